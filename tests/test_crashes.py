"""The workspace and the ledger alone, stopped before and after every step: the next run ends as if nothing happened.

`test_killing.py` does the same with whole runs. A killed process keeps the page cache, so these tests show order and
atomicity; that bytes are synced before names is shown in `test_workspace.py`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evertune.failpoint import FAILPOINTS
from tests import pipeline

ROOT = Path(__file__).parent.parent
REPEATED = [name for name in FAILPOINTS if not name.startswith("current")]


def _run(folder: Path, failpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EVERTUNE_FAILPOINT": failpoint}
    command = [sys.executable, "-m", "tests.pipeline", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    pipeline.run(folder)
    pipeline.run(folder)
    return pipeline.facts(folder)


@pytest.mark.parametrize(("name", "passage"), [*((one, 1) for one in FAILPOINTS), *((one, 2) for one in REPEATED)])
def test_a_run_killed_at_a_failpoint_ends_the_same(
    name: str, passage: int, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    done = _run(tmp_path / "run", f"{name}:{passage}")
    assert done.returncode == -9, done.stderr
    pipeline.run(tmp_path / "run")
    assert pipeline.facts(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("action", "words"), [("enospc", "No space left on device"), ("eio", "Input/output error")])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_disk_that_fails_at_a_failpoint_is_one_clear_error_and_costs_nothing(
    name: str, action: str, words: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    done = _run(tmp_path / "run", f"{name}:{action}")
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("WorkspaceError:")
    assert words in done.stderr
    assert "same command again" in done.stderr
    assert list((tmp_path / "run" / "tmp").iterdir()) == []
    pipeline.run(tmp_path / "run")
    assert pipeline.facts(tmp_path / "run") == undisturbed
