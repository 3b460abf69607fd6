"""What is said before a merge: numbers that can be redone on paper, and words that follow from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evertune.cli import app
from evertune.merge.inspect import Curve, chance_of_conflict, inspect_models, recommend
from evertune.merge.plan import plan_merge
from evertune.merge.starts import Likeness
from tests.merge.folders import configure, random_tensors, write_family, write_model

FIT = [Likeness("a", "b", 0.999)]


def _inspect(folder: Path, models: dict[str, Any], **settings: Any) -> Any:
    return inspect_models(plan_merge(configure("task_arithmetic", models, base="base", **settings), folder=folder))


def test_lengths_angles_and_conflicts_are_those_of_the_whole_models(tmp_path: Path) -> None:
    base = random_tensors(0, dtype=torch.float32)
    shift = random_tensors(5, dtype=torch.float32, std=0.002)
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "up", {name: base[name] + shift[name] for name in base})
    write_model(tmp_path / "down", {name: base[name] - 0.5 * shift[name] for name in base})
    found = _inspect(tmp_path, {"up": {}, "down": {}})
    moved = torch.cat([one.flatten() for one in shift.values()]).norm()
    size = torch.cat([one.flatten() for one in base.values()]).norm()
    assert found.of_reference["up"] == pytest.approx(float(moved / size), rel=1e-3)
    assert found.of_reference["down"] == pytest.approx(float(moved / size) / 2, rel=1e-3)
    assert found.cosines == {"up - down": pytest.approx(-1.0, abs=1e-3)}
    assert found.sign_conflict > 0.99
    assert "opposite directions" in " ".join(found.recommendation)
    assert [one.layer for one in found.layers] == [-1, 0, 1]


def test_independent_small_changes_are_fit_to_merge(tmp_path: Path) -> None:
    write_family(tmp_path, experts=2, dtype=torch.float32, delta=5e-4)
    found = _inspect(tmp_path, {"e0": {}, "e1": {}})
    assert abs(found.cosines["e0 - e1"]) < 0.06
    assert found.sign_conflict == pytest.approx(0.5, abs=0.05)  # as two coins: no reason against an average
    assert found.recommendation[0].startswith("Fit to merge")
    assert "(unrelated changes: up to 50%)" in "\n".join(found.lines())


def test_three_independent_changes_differ_somewhere_in_three_quarters(tmp_path: Path) -> None:
    write_family(tmp_path, experts=3, dtype=torch.float32, delta=5e-4)
    found = _inspect(tmp_path, {"e0": {}, "e1": {}, "e2": {}})
    assert found.sign_conflict == pytest.approx(0.75, abs=0.05)
    assert chance_of_conflict(3) == 0.75
    assert found.recommendation[0].startswith("Fit to merge")
    words = recommend(FIT, {"a": 0.01, "b": 0.01}, {"a - b": 0.0}, 0.61, [])
    assert "61% of the shared changes differ in sign, 50% would by chance: try ties" in words[0]


def test_one_model_without_a_base_has_no_line_to_walk(tmp_path: Path) -> None:
    write_family(tmp_path, experts=1)
    plan = plan_merge(configure("linear", {"e0": {}}), folder=tmp_path)
    assert inspect_models(plan, loss=lambda one, two, shares: [0.0] * len(shares)).curves == ()


def test_strangers_are_told_not_to_merge(tmp_path: Path) -> None:
    write_family(tmp_path, experts=1)
    write_model(tmp_path / "other", random_tensors(9))
    found = _inspect(tmp_path, {"e0": {}, "other": {}})
    assert found.recommendation[0].startswith("Do not merge")


def test_words_follow_from_the_numbers() -> None:
    ridge = Curve("a", "b", (0.0, 0.5, 1.0), (1.0, 1.5, 1.2), 0.4)
    flat = Curve("a", "b", (0.0, 0.5, 1.0), (1.0, 1.05, 1.2), -0.05)
    assert "the loss rises by 0.4000" in recommend(FIT, {"a": 0.01}, {"a - b": 0.0}, 0.1, [ridge])[0]
    assert recommend(FIT, {"a": 0.01}, {"a - b": 0.0}, 0.1, [flat])[0].startswith("Fit to merge")
    assert "moved far" in recommend(FIT, {"a": 0.5}, {}, 0.0, [])[0]
    assert "learnt much the same" in recommend(FIT, {"a": 0.01}, {"a - b": 0.9}, 0.0, [])[0]


def test_a_barrier_is_the_rise_above_the_straight_line(tmp_path: Path) -> None:
    write_family(tmp_path, experts=2)
    plan = plan_merge(configure("linear", {"e0": {}, "e1": {}}), folder=tmp_path)
    # Losses 2, 4, 3 at 0, 1/2, 1: the line has 2.5 in the middle.
    found = inspect_models(plan, loss=lambda one, two, shares: [2.0, 4.0, 3.0], unit="nats", points=3)
    assert found.curves[0].barrier == pytest.approx(1.5)
    assert found.relative_to == "mean"


def test_without_a_base_nothing_is_said_of_directions(tmp_path: Path) -> None:
    # Two differences from their mean have the cosine -1 whatever was learnt: that is no conflict.
    write_family(tmp_path, experts=2)
    plan = plan_merge(configure("linear", {"e0": {}, "e1": {}}), folder=tmp_path)
    found = inspect_models(plan)
    assert found.cosines == {}
    assert found.sign_conflict is None
    assert {(one.cosine, one.sign_conflict) for one in found.layers} == {(None, None)}
    assert not any("opposite" in one or "differ in sign" in one for one in found.recommendation)
    assert "base:" in found.recommendation[-1]
    assert "cosine between differences" not in "\n".join(found.lines())


def test_the_command_measures_a_curve_on_a_text(tmp_path: Path, tiny_model: Path) -> None:
    from tests.model.folders import change_tensors, copy

    for k in range(2):
        place = copy(tiny_model, tmp_path / f"e{k}")
        change_tensors(place / "model.safetensors", lambda tensors: [one.mul_(1.001) for one in tensors.values()])
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"a line {i}"}) + "\n" for i in range(4)))
    (tmp_path / "m.yaml").write_text("method: linear\nmodels: {a: {path: e0}, b: {path: e1}}\n")
    arguments = ["merge", "inspect", str(tmp_path / "m.yaml"), "--text", str(tmp_path / "text.jsonl"), "--points", "3"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    losses = body["curves"][0]["losses"]
    assert losses[0] == losses[1] == losses[2]  # the same model twice
    assert body["starts"][0]["cosine"] == pytest.approx(1.0, abs=1e-6)
