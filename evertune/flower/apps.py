"""The two apps that Flower runs: what the server sends to a client, and what comes back.

    server  -> client   the federation's settings, the exchange, and the factors of every exchange so far
    client  -> server   the factors of its update, its number of rows and its loss; or why it has none

A client opens its own copy of the base and its own rows; of what the server says it takes the settings of training and
nothing else: no path, no code. The server checks what comes as it checks everything (federated/validation.py).
"""

import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from evertune.errors import EvertuneError
from evertune.federated.client import Answer, train_here
from evertune.federated.server import run_federated
from evertune.federated.spec import client_order
from evertune.flower.files import ClientFile, ServerFile, client_spec, federated_spec
from evertune.model.adapter import Factor, Factors, read_factors, write_adapter
from evertune.model.checkpoint import Checkpoint, describe
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace

client = ClientApp()
server = ServerApp()


def to_arrays(stack: Sequence[Factors]) -> ArrayRecord:
    """Factors of adapters, from the bottom up, in float32; scales are multiplied into B."""
    arrays = {}
    for i, factors in enumerate(stack):
        for name, one in factors.items():
            arrays[f"{i}/{name}/A"] = Array(one.a_RI.float().numpy())
            arrays[f"{i}/{name}/B"] = Array((one.b_OR.float() * one.scale).numpy())
    return ArrayRecord(arrays)


def from_arrays(record: Mapping[str, Array]) -> list[dict[str, Factor]]:
    """The inverse; what is no pair of factors is left for the check of updates to refuse.

    Raises:
        ValueError: a name that is none, or an A without its B.
    """
    found: dict[int, dict[str, Factor]] = {}
    for key in record:
        place, name, side = key.split("/")
        if side == "A":
            a_RI, b_OR = (torch.from_numpy(np.array(record[f"{place}/{name}/{one}"].numpy())) for one in "AB")
            found.setdefault(int(place), {})[name] = Factor(a_RI, b_OR, 1.0, False)
    return [found[i] for i in sorted(found)]


@client.query()
def who(message: Message, context: Context) -> Message:
    """The client's name, and the digest of its base."""
    own = ClientFile.read(Path(str(context.node_config["client"])))
    told = ConfigRecord({"name": own.name, "base": own.checkpoint().digest})
    return Message(RecordDict({"who": told}), reply_to=message)


@client.train()
def learn(message: Message, context: Context) -> Message:
    """Train on the client's own rows, over its own base and what the server sent."""
    own = ClientFile.read(Path(str(context.node_config["client"])))
    order, model = message.content["order"], message.content["model"]
    with tempfile.TemporaryDirectory() as name:
        try:
            answer = _learn(own, json.loads(order["settings"]), int(order["exchange"]), from_arrays(model), Path(name))
        except (EvertuneError, ValueError, KeyError, TypeError) as error:
            answer = {"error": str(error)}
        told = {key: answer[key] for key in ("rows", "loss", "error") if key in answer}
        content = RecordDict({"told": ConfigRecord(told)})
        if "folder" in answer:
            content["update"] = to_arrays([read_factors(Path(answer["folder"]))])
        return Message(content, reply_to=message)


def _learn(own: ClientFile, settings: dict[str, Any], exchange: int, stack: Sequence[Factors], folder: Path) -> Answer:
    base = own.checkpoint()
    start = base
    for i, factors in enumerate(stack):
        place = folder / f"global-{i + 1}"
        place.mkdir()
        write_adapter(factors, place, start)
        start = describe(place)
    order = client_order(client_spec(settings, own, base), own.name, exchange, start)
    return train_here(order, folder / "workspace")


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Perform the federation that the run was started for; its result is published in the server's workspace."""
    own = ServerFile.read(Path(str(context.run_config["server"])))
    base = own.checkpoint()
    spec = federated_spec(own, base)
    nodes = _meet(grid, own, base)

    exchanges = itertools.count()

    def ask(orders: Mapping[str, SftSpec], folder: Path) -> dict[str, Answer]:
        told = {"settings": json.dumps(spec.settings()), "exchange": next(exchanges)}
        messages = []
        for name, order in orders.items():
            stack = [read_factors(one.path) for one in order.start.stack if one.form == "adapter"]
            content = RecordDict({"order": ConfigRecord(told), "model": to_arrays(stack)})
            messages.append(Message(content, dst_node_id=nodes[name], message_type="train"))
        back = {one.metadata.src_node_id: one for one in grid.send_and_receive(messages, timeout=own.wait_seconds)}
        return {name: _answer(back.get(nodes[name]), order, folder / name) for name, order in orders.items()}

    run_federated(spec, Workspace.open(own.workspace(), create=True), ask=ask)


def _meet(grid: Grid, own: ServerFile, base: Checkpoint) -> dict[str, int]:
    """The node of each client; waits until all have come."""
    found: dict[str, int] = {}
    until = time.monotonic() + own.wait_seconds
    while set(found) < set(own.clients):
        asked = [Message(RecordDict(), dst_node_id=one, message_type="query") for one in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked, timeout=own.wait_seconds) if asked else []:
            if reply.has_error():
                continue
            told = reply.content["who"]
            name, digest = str(told["name"]), str(told["base"])
            if name in own.clients and digest != base.digest:
                raise EvertuneError(
                    f"the client '{name}' has another base: {digest[:12]}, expected {base.digest[:12]}."
                )
            if name in own.clients:
                found[name] = reply.metadata.src_node_id
        if time.monotonic() > until:
            missing = ", ".join(sorted(set(own.clients) - set(found)))
            raise EvertuneError(f"no client {missing} has come within {own.wait_seconds:g} s.")
        time.sleep(1.0)
    return found


def _answer(reply: Message | None, order: SftSpec, folder: Path) -> Answer:
    if reply is None:
        return {"error": "no answer came in time"}
    if reply.has_error():
        return {"error": str(reply.error.reason)}
    told = reply.content["told"]
    if "error" in told or "update" not in reply.content:
        return {"error": str(told.get("error", "sent no update"))}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (factors,) = from_arrays(reply.content["update"])
        write_adapter(factors, folder, order.start)
    except (ValueError, KeyError, EvertuneError) as error:
        return {"error": f"sent what is no update: {error}"}
    return {"folder": str(folder), "rows": int(told["rows"]), "loss": float(told["loss"])}
