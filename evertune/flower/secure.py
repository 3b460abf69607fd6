"""Secure sums through Flower: its SecAgg+ protocol, the mod on the client's side and the workflow on the server's.

    server -> clients   setup; all public keys; shares of secrets, and with them the order; who has dropped out
    clients -> server   public keys; encrypted shares; the masked update; shares that lift the masks of the sum

The protocol is Flower's, as it is; here is what goes into it and what comes out. Against a server that follows the
protocol it hides every single update; one that invents clients of its own is not what it is made for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server import LegacyContext
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import Strategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from numpy.typing import NDArray

from evertune.errors import TrainingError

Arrays = list[NDArray[np.float64]]
# Share of the clients that must stay to the end for the sum to be known.
THRESHOLD = 0.67


def is_secure(message: Message) -> bool:
    """A message of the protocol."""
    return RECORD_KEY_CONFIGS in message.content.config_records


def secure_when_asked(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Flower's mod on messages of the protocol; others pass.

    Raises:
        TrainingError: a message of the protocol under another type, which the mod would let through unmasked.
    """
    if not is_secure(message):
        return call_next(message, context)
    if message.metadata.message_type != MessageType.TRAIN:
        raise TrainingError(f"a secure sum was asked for by a message of type {message.metadata.message_type!r}.")
    return secaggplus_mod(message, context, call_next)


def masked(arrays: Arrays, told: Mapping[str, Any]) -> RecordDict:
    """A client's part, for the mod to mask; `told` goes openly."""
    answer = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 1, dict(told))
    return fitres_to_recorddict(answer, keep_input=True)


class _Sum(Strategy):  # type: ignore[misc]  # Flower's class has no types here
    """What the workflow asks a strategy: whom to ask, and where the mean goes."""

    def __init__(self, grid: Grid, nodes: Sequence[int], run_id: int) -> None:
        self._clients = [GridClientProxy(node_id=one, grid=grid, run_id=run_id) for one in nodes]
        self.mean: Arrays | None = None
        self.told: dict[int, Mapping[str, Any]] = {}
        self.failures: list[str] = []

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        return [(one, FitIns(Parameters([], ""), {})) for one in self._clients]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        self.told = {client.node_id: answer.metrics for client, answer in results}
        self.failures = [str(one) for one in failures]
        self.mean = parameters_to_ndarrays(results[0][1].parameters) if results else None
        return None, {}

    def initialize_parameters(self, client_manager: Any) -> None:
        return None

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        return []

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> tuple[None, dict[str, Any]]:
        return None, {}

    def evaluate(self, server_round: int, parameters: Parameters) -> None:
        return None


class _Workflow(SecAggPlusWorkflow):  # type: ignore[misc]
    """Flower's workflow with our own order in the message that asks for the update."""

    def __init__(self, content: Callable[[int], RecordDict], entries: float, seconds: float) -> None:
        super().__init__(
            num_shares=1.0,
            reconstruction_threshold=THRESHOLD,
            max_weight=1.0,
            clipping_range=float(entries),
            timeout=seconds,
        )
        self._content = content

    def setup_stage(self, grid: Grid, context: Any, state: Any) -> bool:
        going = super().setup_stage(grid, context, state)
        state.nid_to_fitins = {node: self._content(node) for node in state.nid_to_fitins}
        return bool(going)


def secure_mean(
    grid: Grid,
    context: Context,
    nodes: Sequence[int],
    content: Callable[[int], RecordDict],
    *,
    exchange: int,
    entries: float,
    seconds: float,
) -> tuple[Arrays, dict[int, Mapping[str, Any]]]:
    """The mean of what these nodes send, and what each has told openly.

    Args:
        content: what a node is asked, in the message that asks for its update.
        seconds: the longest wait in each of the four steps.

    Raises:
        TrainingError: too few have stayed to the end.
    """
    strategy = _Sum(grid, nodes, context.run_id)
    legacy = LegacyContext(context=context, strategy=strategy)
    legacy.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: exchange + 1})
    legacy.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    _Workflow(content, entries, seconds)(grid, legacy)
    if strategy.mean is None:
        raise TrainingError(
            f"exchange {exchange + 1}: the secure sum did not come about: too few of {len(nodes)} clients stayed.",
            remedy="See the clients' logs; at least two thirds must stay.",
        )
    return strategy.mean, strategy.told
