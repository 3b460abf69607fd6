"""A row's way into models, and its removal, on a run of the debug recipe through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evertune.data.index import DEFAULT, open_index
from tests.command import RECIPE, RECIPES, DebugRun, evertune

pytestmark = pytest.mark.path

FOURTH = """

  - name: four
    stages:
      - sft:
          data: [cards]
          steps: 2
          batch_rows: 8
          micro_batch_rows: 4
          tune: full
          replay: {share: 0.25, from: [history], dedup: false}
"""


def card(line: int) -> dict[str, Any]:
    return dict(json.loads((RECIPES / "demo/cards.jsonl").read_text().splitlines()[line - 1]))


@pytest.fixture
def workspace(debug_run: DebugRun, tmp_path: Path) -> Path:
    shutil.copytree(debug_run.workspace, tmp_path / "run")
    return tmp_path / "run"


def test_a_row_is_traced_by_its_question_and_as_a_whole(debug_run: DebugRun) -> None:
    row = card(3)
    for text in (row["messages"][1]["content"], json.dumps(row)):
        found = json.loads(evertune("data", "trace", debug_run.workspace, text, "--json"))
        new = {one["label"]: one for one in found["sightings"] if one["role"] == "new"}
        assert set(new) == {"one/1-sft", "two/1-sft"}
        assert 3 in new["one/1-sft"]["lines"]
        replayed = {(one["label"], one["source"]) for one in found["sightings"] if one["role"] == "replay"}
        # In round two it is new, so its copy in the history is not replayed there.
        assert replayed == {("three/1-sft", "history/one/cards")}
        assert set(found["standing"]) >= {"one/1-sft", "two/1-sft", "three/1-sft"}
        assert any("/objects/" in one for one in found["files"])
    assert "one/1-sft: new, 'cards' line" in evertune(
        "data", "trace", debug_run.workspace, card(3)["messages"][1]["content"]
    )


def test_a_text_that_nothing_was_given_is_told_so(debug_run: DebugRun) -> None:
    assert "No stage of this workspace was given it" in evertune("data", "trace", debug_run.workspace, "never seen")


def test_an_empty_text_removes_nothing(debug_run: DebugRun) -> None:
    for text in ("", " "):
        assert "found no text to remove" in evertune("data", "remove", debug_run.workspace, "--text", text, code=3)


def test_promoted_rows_are_in_the_index(debug_run: DebugRun, tmp_path: Path) -> None:
    index = open_index(debug_run.workspace / "dedup", DEFAULT, create=False)
    labels = [label for one in index.segments for label in one.labels]
    assert any(label.startswith("one: cards/") for label in labels)
    assert not any(label.startswith("two: ") for label in labels)  # it was not promoted
    repeat = tmp_path / "repeat.jsonl"
    repeat.write_text(json.dumps(card(3)) + "\n")
    printed = evertune("data", "dedup", repeat, "--index", debug_run.workspace / "dedup")
    assert "exact duplicate of an earlier round" in printed


def test_a_removed_row_is_left_out_of_the_next_round_and_earlier_rounds_stand(workspace: Path, tmp_path: Path) -> None:
    printed = evertune("data", "remove", workspace, "--text", json.dumps(card(3)), "--reason", "asked by its author")
    assert "trained on them, or standing on what was: one/1-sft" in printed
    assert "still holds them:" in printed
    text = RECIPE.read_text().replace("demo/", f"{RECIPES}/demo/")
    text = text.replace("workspace: ../runs/debug", f"workspace: {workspace}")
    (tmp_path / "recipe.yaml").write_text(text.rstrip() + FOURTH)
    # The other rounds' stages are found, not made: their rows are those they were given then.
    command = [sys.executable, "-m", "evertune", "run", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 2, 4), done.stderr  # whatever the verdict on two steps is
    printed = done.stdout
    assert "1 stages trained" in printed
    log = json.loads(evertune("log", workspace, "--json"))
    made = [
        one["body"] for one in log["events"] if one["kind"] == "checkpoint" and one["body"]["label"] == "four/1-sft"
    ]
    assert made[0]["data"][0]["removed"] == {"leaks": {}, "bad": 0, "asked": 1}
    assert made[0]["data"][0]["rows"] == 23
    found = json.loads(evertune("data", "trace", workspace, json.dumps(card(3)), "--json"))
    assert "four/1-sft" not in {one["label"] for one in found["sightings"]}
    assert "cards" in found["kept_out"]
    assert "removal" in evertune("log", workspace)
    assert "all clean" in evertune("verify", workspace)
