"""Flower's SecAgg+ through `evertune.flower.secure`, server and clients in one process. Needs a python with Flower.

Says, as JSON, how far the mean is from the true one with all clients and with one that drops out, what is told when two
of three do, and how much of an update can be seen in what its client sent.
"""

import copy
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.supercore.task_identity import TaskIdentity

from evertune.errors import TrainingError
from evertune.flower.secure import masked, secure_mean, secure_when_asked

NODES = (11, 12, 13)


class Grid:
    """Carries messages to clients in this process and loses the updates of those that drop out."""

    def __init__(self, arrays: dict[int, Any], dropping: Sequence[int] = ()) -> None:
        self.arrays, self.dropping = arrays, dropping
        self.contexts = {node: context(node) for node in arrays}
        self.sent: dict[int, Any] = {}

    def send_and_receive(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in map(copy.deepcopy, messages):
            node = message.metadata.dst_node_id
            is_order = "order" in message.content
            reply = secure_when_asked(message, self.contexts[node], self._learn)
            if is_order:
                (record,) = (one for one in reply.content.config_records.values() if "masked_params" in one)
                self.sent[node] = [bytes_to_ndarray(one) for one in record["masked_params"]]
            if not (is_order and node in self.dropping):
                replies.append(reply)
        return replies

    def _learn(self, message: Message, own: Context) -> Message:
        assert message.content["order"]["node"] == own.node_id
        return Message(masked(self.arrays[own.node_id], {"loss": 1.0}), reply_to=message)


def context(node: int) -> Context:
    return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})


def summed(grid: Grid, exchange: int) -> tuple[list[Any], list[int]]:
    def content(node: int) -> RecordDict:
        return RecordDict({"order": ConfigRecord({"node": node})})

    mean, told = secure_mean(grid, context(0), NODES, content, exchange=exchange, entries=1.0, seconds=5.0)
    return mean, sorted(told)


def main() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = 1
    TaskIdentity.node_id = 0
    draw = np.random.default_rng(0)
    arrays = {node: [draw.uniform(-0.5, 0.5, (60, 8)), draw.uniform(-0.5, 0.5, (40, 8))] for node in NODES}
    found: dict[str, Any] = {}
    for name, dropping in (("all", ()), ("one out", (12,))):
        grid = Grid(arrays, dropping)
        mean, staying = summed(grid, 0)
        true = [np.mean([arrays[node][i] for node in staying], axis=0) for i in range(2)]
        error = max(float(np.abs(one - other).max()) for one, other in zip(mean, true, strict=True))
        found[name] = {"error": error, "clients": staying}
    # The first array of what is sent is the weight; then come the update's own.
    sent = np.concatenate([one.ravel() for one in grid.sent[11][1:]]).astype(float)
    own = np.concatenate([one.ravel() for one in arrays[11]])
    found["seen"] = abs(float(np.corrcoef(sent, own)[0, 1]))
    try:
        summed(Grid(arrays, (12, 13)), 1)
    except TrainingError as error:
        found["two out"] = error.message
    asked = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({}), "order": ConfigRecord({"node": 11})})
    try:
        secure_when_asked(Message(asked, dst_node_id=11, message_type="train.default"), context(11), grid._learn)
    except TrainingError as error:
        found["other type"] = error.message
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
