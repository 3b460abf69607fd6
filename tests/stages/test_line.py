"""All kinds of trained stages in one round, through the command line: each is probed, and the record tells of each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.check.folders import write_folder, write_rows
from tests.stages.trainer import __file__ as TRAINER

pytestmark = pytest.mark.path

RECIPE = """\
evertune: 1
name: later
base: model
workspace: run
seed: 2
data:
  cards: {path: cards.jsonl, verifier: {regex: "(?s)[ -~].*"}}
  pairs: {path: pairs.jsonl, format: preference}
  general: {path: general.jsonl}
probes:
  cards: {path: probe-cards.jsonl, kind: generate, verifier: exact, max_new_tokens: 8, role: target}
  facts: {path: probe-facts.jsonl, kind: choice}
defaults:
  replay: {from: [general]}
gate: {min_items: 8, min_clusters: 8, margin: {pooled: 0.4, probe: 0.4, format: 0.4}}
rescue: [discard]
numerics: {dtype: float32, device: cpu}
rounds:
  - name: first
    stages:
      - sft: {data: [cards], steps: 3, batch_rows: 4}
      - dpo: {data: [pairs], steps: 3, batch_rows: 4, replay: {from: [general, cards]}, anchor: {to: sft}}
      - rl: {data: [cards], steps: 3, batch_rows: 4, group: 3, max_new_tokens: 4}
      - external: {command: "PYTHON trainer.py adapter {model} {data} {output} {seed}", data: [cards]}
"""


def _evertune(*arguments: str | Path, code: int) -> str:
    command = [sys.executable, "-m", "evertune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "CI": "1"})
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("line")
    recipe = write_folder(folder, tiny_model)
    pairs = [{"prompt": f"tell {i}", "chosen": f"it is {i}", "rejected": f"no {i} idea"} for i in range(10)]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "trainer.py").write_text(Path(TRAINER).read_text())
    recipe.write_text(RECIPE.replace("PYTHON", sys.executable))
    # Nothing is learnt in three steps, so the gate is undecided: exit code 4.
    return recipe, _evertune("run", recipe, code=4)


def _events(recipe: Path, kind: str) -> dict[str, Any]:
    body = json.loads(_evertune("log", recipe.parent / "run", "--json", code=0))
    return {one["body"]["label"]: one["body"] for one in body["events"] if one["kind"] == kind}


def test_every_stage_is_made_recorded_and_probed(finished: tuple[Path, str]) -> None:
    recipe, printed = finished
    made = _events(recipe, "checkpoint")
    labels = ["first/1-sft", "first/2-dpo", "first/3-rl", "first/4-external"]
    assert [label for label in made if label.startswith("first/")] == labels
    for label in labels:
        assert label in printed
        assert made[label]["form"] == "adapter"
    assert made["first/2-dpo"]["start"] == made["first/1-sft"]["digest"]
    assert made["first/3-rl"]["stands_on"] == made["first/2-dpo"]["digest"]
    assert made["first/2-dpo"]["anchor"]["to"] == "start"
    assert {"margin", "nll"} <= made["first/2-dpo"]["final"].keys()
    assert {"reward", "policy_kl"} <= made["first/3-rl"]["final"].keys()
    assert _events(recipe, "probe").keys() >= set(labels)


def test_an_unchanged_rerun_does_nothing_and_the_workspace_is_clean(finished: tuple[Path, str]) -> None:
    recipe, _ = finished
    assert "0 stages trained, 0 probes scored" in _evertune("run", recipe, code=4)
    assert json.loads(_evertune("verify", recipe.parent / "run", "--json", code=0))["clean"] is True


def test_a_changed_later_stage_leaves_the_earlier_ones(finished: tuple[Path, str]) -> None:
    recipe, _ = finished
    assert "2 stages trained" in _evertune("run", recipe, "--set", "rounds[0].stages[2].rl.kl=0.02", code=4)


def test_the_report_and_show_tell_of_each(finished: tuple[Path, str]) -> None:
    recipe, _ = finished
    page = (recipe.parent / "run" / "report.html").read_text()
    for label in ("first/2-dpo", "first/3-rl", "first/4-external"):
        assert label in page
    assert "final: " in _evertune("show", recipe.parent / "run", "first/3-rl", code=0)
    assert "deploy" in _evertune("show", recipe.parent / "run", "first/4-external", code=0)
