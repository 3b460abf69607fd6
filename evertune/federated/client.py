"""One client: it trains on its own rows and sends the factors of its update, nothing else.

The local transport runs each client in a process of its own, with a workspace of its own, on this machine.
"""

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from evertune.errors import EvertuneError
from evertune.train.plugins import Bench, Parts
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace

PRELOAD = "evertune.preload"
Transport = Callable[[SftSpec, Path], "Answer"]
Answer = dict[str, Any]
"""`{"folder", "rows", "loss"}` of a client that has trained, or `{"error"}` of one that has not."""


class FrozenA:
    """FFA-LoRA on a client: A stays as the server sent it; only B is trained."""

    name = "frozen_a"

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        for name in [one for one in gradients if one.endswith(".lora_A")]:
            del gradients[name]
        return {}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def carried(self) -> dict[str, Tensor]:
        return {}


def make_frozen_a(bench: Bench) -> Parts:
    return Parts(rules=[FrozenA()])


def train_here(order: SftSpec, folder: Path) -> Answer:
    """Train a client in this process; an error of its data or model is its answer."""
    from evertune.train.sft import run_sft

    workspace = Workspace.open(folder, create=True)
    try:
        facts = run_sft(order, workspace)["checkpoint"]
    except EvertuneError as error:
        return {"error": str(error)}
    rows = sum(one["rows"] for one in facts["data"])
    return {"folder": str(workspace.path(order.key)), "rows": rows, "loss": facts["final"]["loss"]}


def train_in_process(order: SftSpec, folder: Path) -> Answer:
    """Train a client in a process of its own; one that dies has not returned, and the others go on."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(order.to_json(), str(folder), theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        answer: Answer = ours.recv()
    except EOFError:
        answer = {"error": "its process died"}
    except BaseException:
        child.terminate()
        raise
    child.join()
    return answer


def _child(order: dict[str, Any], folder: str, pipe: Connection) -> None:
    pipe.send(train_here(SftSpec.from_json(order), Path(folder)))
