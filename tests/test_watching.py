"""A run from another terminal: what has ended, what is in training, and when the watching ends."""

import json
import os
import time
from pathlib import Path

import pytest

from evertune.watching import snapshots, take_snapshot
from tests.command import DebugRun, evertune


@pytest.mark.path
def test_a_finished_run_is_told_once_and_the_watching_ends(debug_run: DebugRun) -> None:
    found = take_snapshot(debug_run.workspace)
    assert found.is_over
    told = "\n".join(found.lines)
    assert "three" in told and "promoted" in told and "newest scores, three/1-sft" in told
    assert len(list(snapshots(debug_run.workspace, every_seconds=1.0, sleep=lambda _: None))) == 1
    assert "newest scores" in evertune("watch", debug_run.workspace)
    assert "is not a workspace" in evertune("watch", debug_run.workspace.parent, "--once", code=5)


@pytest.mark.path
def test_a_stage_that_writes_metrics_is_in_training_until_it_is_quiet(debug_run: DebugRun, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(debug_run.workspace, tmp_path / "run")
    metrics = tmp_path / "run" / "work" / ("0" * 64) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps({"step": 7, "steps": 47, "loss": 1.25, "seconds": 3.0}) + "\n{half a li")
    found = take_snapshot(tmp_path / "run")
    assert not found.is_over
    (line,) = (line for line in found.lines if "in training" in line)
    assert "in training: step 7/47, loss 1.250" in line
    assert line.endswith("s, about 2 min left")
    old = time.time() - 120
    os.utime(metrics, (old, old))
    assert take_snapshot(tmp_path / "run").is_over
