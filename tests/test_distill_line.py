"""Distillation through the command line: teachers are asked once, and what is wrong with them is one error."""

import json
from pathlib import Path

import pytest

from evertune.lineage import open_workspace
from tests.command import evertune
from tests.model.folders import change_json, change_tensors
from tests.tiny import write_tiny_model

RECIPE = """
evertune: 1
name: taught
base: model
workspace: run
data:
  sums: {path: sums.jsonl}
  plain: {path: plain.jsonl}
probes:
  sums: {path: probe.jsonl, kind: choice}
defaults: {tune: {lora: {rank: 2}}, replay: {share: 0.0}, anchor: {kl: 0.0}}
numerics: {dtype: float32, device: cpu}
rescue: [discard]
rounds:
  - name: one
    stages:
      - sft: {data: [sums], steps: 1}
      - distill: {data: [sums, plain], teachers: teacher, steps: 2, batch_rows: 4, lr: 0.001}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    write_tiny_model(tmp_path / "teacher", seed=3)
    for name, word in (("sums", "plus"), ("plain", "and then")):
        said = [(f"Say {i} {word} one.", f"It is {word} {i}.") for i in range(4)]
        rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "probe.jsonl").write_text(
        json.dumps({"prompt": "Ready?", "choices": ["yes", "no"], "answer": 0}) + "\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.mark.path
def test_a_second_run_with_another_learning_rate_asks_no_teacher(recipe: Path) -> None:
    first = evertune("run", recipe, code=4)
    assert "teachers one/2-distill: 8 forward passes" in first
    again = evertune("run", recipe, "--set", "rounds[0].stages[1].distill.lr=0.002", code=4)
    assert "1 stages trained" in again
    assert "teachers one/2-distill: 0 forward passes, every answer was in the cache" in again
    events = open_workspace(recipe.parent / "run").ledger.events("checkpoint")
    asked = [one.volatile["teacher_forwards"] for one in events if one.body["stage"] == "distill"]
    assert asked == [8, 0]


@pytest.mark.path
def test_what_is_distilled_back_is_compared_with_every_stage(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text().replace("teachers: teacher,", "teachers: run, route: best, skills: {plain: sums},")
    )
    printed = evertune("run", recipe, code=4)
    events = open_workspace(recipe.parent / "run").ledger.events()
    (compared,) = [one.body for one in events if one.kind == "erosion" and one.body["label"] == "one/2-distill"]
    values = {one.body["label"]: one.body["value"] for one in events if one.kind == "probe"}
    assert [each["since"] for each in compared["against"]] == ["base", "one/1-sft"]
    for each in compared["against"]:
        sums = next(one for one in each["changes"] if one["probe"] == "sums")
        assert sums["difference"] == pytest.approx(values["one/2-distill"] - values[each["since"]])
        assert sums["ci90"][0] <= sums["difference"] <= sums["ci90"][1]
    assert "since    one/1-sft: " in printed
    assert "What each stage did" in (recipe.parent / "run" / "report.html").read_text()


def _nan(teacher: Path) -> None:
    change_tensors(teacher / "model.safetensors", lambda all: all["model.norm.weight"][:1].fill_(float("nan")))


def _cut(teacher: Path) -> None:
    file = teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _wide(teacher: Path) -> None:
    change_json(teacher / "config.json", vocab_size=300)


@pytest.mark.path
@pytest.mark.parametrize(
    ("harm", "change", "code", "told"),
    [
        (_nan, [], 5, "teacher 'teacher': "),
        (_cut, [], 3, "broken safetensors file"),
        (_wide, [], 3, "teacher 'teacher' has a vocabulary of 300 words, expected the student's 261"),
        (None, ["teachers=stage:one/1-dpo"], 3, "found 'stage:one/1-dpo', expected one of: stage:sft, stage:one/1-sft"),
        (None, ["teachers=[{checkpoint: teacher, sources: sums}]"], 3, "no teacher teaches the rows of 'plain'"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_error(recipe: Path, harm, change, code, told) -> None:
    if harm is not None:
        harm(recipe.parent / "teacher")
    overrides = [each for one in change for each in ("--set", f"rounds[0].stages[1].distill.{one}")]
    printed = evertune("run", recipe, *overrides, code=code)
    assert told in " ".join(printed.split())
    assert printed.count("Error: ") == 1
    if harm is _nan:
        assert "are NaN or Inf" in " ".join(printed.split())
