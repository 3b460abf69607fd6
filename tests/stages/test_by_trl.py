"""The example in `recipes/trl.yaml`: a stage that TRL trains on the bundled model, with our probes in its loop."""

import os
import sys
from pathlib import Path

import pytest

from evertune.lineage import open_workspace
from tests.command import evertune

RECIPE = Path(__file__).parents[2] / "recipes" / "trl.yaml"


@pytest.mark.slow
def test_a_stage_that_trl_trains_is_probed_judged_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    said = evertune("run", RECIPE, "--set", f"workspace={tmp_path / 'run'}", "--set", "probes.cards.limit=4")
    opened = open_workspace(tmp_path / "run")
    [made] = [one.body for one in opened.ledger.events("checkpoint") if one.body["label"] == "by-trl/1-external"]
    assert made["form"] == "model"
    assert 0.0 < made["drift"]["to_start"] < 0.1
    log = (opened.workspace.path(made["object"]) / "external.log").read_text()
    # TRL's own losses, and the callback's verdict at both probings.
    losses = [float(line.split("'loss': '")[1].split("'")[0]) for line in log.splitlines() if "'loss': '" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert "probes at step 6: " in log
    assert "probes at step 12: " in log
    assert "PROMOTE" in said
    evertune("verify", tmp_path / "run")
