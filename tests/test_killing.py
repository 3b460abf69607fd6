"""kill -9 at random instants and at every failpoint: the run that is started again ends with the same bits.

The reference is one undisturbed run of `recipes/debug.yaml`. Runs are forked from a server that has imported torch
once, so that imports are paid once.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from evertune.failpoint import FAILPOINTS
from evertune.ledger import Ledger, verify_workspace
from evertune.workspace import Workspace

RECIPE = Path(__file__).parent.parent / "recipes" / "debug.yaml"
RANDOM_KILLS = 20
SEED = 2026


def _run(workspace: str, failpoint: str | None) -> None:
    """A run of the debug recipe, in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if failpoint:
        os.environ["EVERTUNE_FAILPOINT"] = failpoint
    from evertune.recipe.load import load_recipe
    from evertune.run import run_recipe

    try:
        run_recipe(load_recipe(RECIPE, overrides=[f"workspace={workspace}"]), start_method="fork")
    except Exception:
        if not failpoint:
            raise
        os._exit(9)


def _start(workspace: Path, failpoint: str | None = None) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evertune.preload", "evertune.run", "evertune.train.sft", "evertune.probe.job"])
    process = context.Process(target=_run, args=(str(workspace), failpoint))
    process.start()
    return process


def _finish(workspace: Path) -> None:
    process = _start(workspace)
    process.join(180)
    assert process.exitcode == 0


def _facts(folder: Path) -> dict[str, Any]:
    """What must be equal: ledger tree, digests of every checkpoint, decisions; and that nothing is left behind."""
    workspace = Workspace.open(folder, create=False)
    ledger = Ledger.open(folder / "ledger.sqlite", create=False)
    assert verify_workspace(workspace, ledger) == []
    assert list(workspace.tmp.iterdir()) == []
    assert list(workspace.quarantine.iterdir()) == []
    return {
        "tree": ledger.tree(),
        "checkpoints": {one.body["label"]: one.body["digest"] for one in ledger.events("checkpoint")},
        "decisions": {one.body["label"]: one.body["decision"] for one in ledger.events("verdict")},
        "objects": {one.key: one.tree for one in workspace.manifests() if one.kind in ("checkpoint", "history")},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """Facts of a run nobody killed, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    _finish(folder.with_name("warm"))  # pays for the server's imports, so that the next run's time is a run's time
    began = time.monotonic()
    _finish(folder)
    seconds = time.monotonic() - began
    facts = _facts(folder)
    assert facts == _facts(folder.with_name("warm"))
    return facts, seconds


@pytest.mark.path
@pytest.mark.parametrize("kill", range(RANDOM_KILLS))
def test_a_run_killed_at_a_random_instant_ends_with_the_same_bits(
    kill: int, undisturbed: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    facts, seconds = undisturbed
    process = _start(tmp_path / "run")
    process.join(random.Random(f"{SEED}-{kill}").uniform(0, seconds))
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
    _finish(tmp_path / "run")
    assert _facts(tmp_path / "run") == facts


@pytest.mark.path
@pytest.mark.parametrize("action", ["kill", "enospc", "eio"])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_run_stopped_at_a_failpoint_ends_with_the_same_bits(
    name: str, action: str, undisturbed: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    facts, _ = undisturbed
    passage = random.Random(f"{SEED}-{name}-{action}").randint(1, 3) if not name.startswith("current") else 1
    process = _start(tmp_path / "run", f"{name}:{passage}:{action}")
    process.join(180)
    assert process.exitcode != 0, f"failpoint {name} was never reached {passage} times"
    _finish(tmp_path / "run")
    assert _facts(tmp_path / "run") == facts
