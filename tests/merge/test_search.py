"""Searches on functions whose best is known, and the merge in memory that is the merge on disk."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evertune.cli import app
from evertune.errors import MergeError
from evertune.merge.in_memory import apply_into
from evertune.merge.plan import plan_merge
from evertune.merge.run import merge_planned
from evertune.merge.search import Search, Weights, cma, coordinate, greedy_soup, grid, leave_one_out
from evertune.merge_search import search_weights
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.recipe.load import load_recipe
from tests.check.folders import write_folder
from tests.merge.folders import configure, tensors_of
from tests.model.folders import change_tensors, copy

NAMES = ["a", "b", "c"]
EQUAL = dict.fromkeys(NAMES, 1 / 3)


def _bowl(weights: Weights) -> dict[str, float]:
    """Best at a = 0.5, b = 0.25, c = 0.25."""
    goal = {"a": 0.5, "b": 0.25, "c": 0.25}
    return {"one": -sum((weights[name] - goal[name]) ** 2 for name in NAMES), "two": 0.0}


def test_a_grid_tries_every_division_once() -> None:
    search = Search(_bowl)
    # Ways of dividing 4 parts among 3 models: C(6, 2) = 15.
    assert grid(search, NAMES, 4).weights == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert len(search.trials) == 15


def test_coordinates_climb_and_halve_their_step() -> None:
    search = Search(_bowl)
    best = coordinate(search, NAMES, start={"a": 0.5, "b": 0.5, "c": 0.5}, step=0.5, rounds=4)
    assert best.weights == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert all(sum(one.weights.values()) > 0 for one in search.trials)


def _valley(weights: Weights) -> dict[str, float]:
    """A narrow valley at an angle to the axes: best at a = 0.7, b = 0.2, where climbing along one axis gets stuck."""
    along, across = weights["a"] + weights["b"] - 0.9, weights["a"] - weights["b"] - 0.5
    return {"probe": -(along**2 + 100 * across**2) - (weights["c"] - 0.4) ** 2}


def test_cma_finds_the_end_of_a_valley_that_no_axis_follows() -> None:
    search = Search(_valley)
    best = cma(search, NAMES, start=EQUAL, step=0.3, evaluations=300, seed=0)
    assert best.weights == pytest.approx({"a": 0.7, "b": 0.2, "c": 0.4}, abs=0.02)
    assert best is search.best
    assert search.trials[0].weights == {name: round(1 / 3, 4) for name in NAMES}
    assert all(0.0 <= one <= 2.0 for trial in search.trials for one in trial.weights.values())
    by_axes = Search(_valley)
    coordinate(by_axes, NAMES, start=EQUAL, step=0.3, rounds=300 // 6)
    assert best.objective > by_axes.best.objective


def test_cma_keeps_to_its_budget_and_to_its_seed() -> None:
    runs = []
    for seed in (0, 0, 1):
        search = Search(_bowl)
        cma(search, NAMES, start=EQUAL, step=0.3, evaluations=30, seed=seed)
        runs.append([one.weights for one in search.trials])
    assert runs[0] == runs[1] != runs[2]
    # The start, and generations of 7 until 30 were asked for.
    assert len(runs[0]) <= 1 + 35


def test_cma_goes_on_where_no_model_is_left_and_refuses_one_model() -> None:
    # The best is at the corner where all weights are 0, which is not a merge and is never scored.
    def score(weights: Weights) -> dict[str, float]:
        assert any(weights.values())
        return {"probe": -sum(weights.values())}

    search = Search(score)
    assert sum(cma(search, NAMES, start=EQUAL, step=0.5, evaluations=200, seed=3).weights.values()) < 0.05
    with pytest.raises(MergeError, match="CMA-ES needs two models or more"):
        cma(search, ["a"], start={"a": 1.0}, step=0.5, evaluations=10, seed=0)


def test_without_its_package_cma_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MergeError, match="needs the package 'cma'") as caught:
        cma(Search(_bowl), NAMES, start=EQUAL, step=0.3, evaluations=60, seed=0)
    assert "evertune[search]" in str(caught.value)


def test_a_greedy_soup_leaves_the_spoiler_out() -> None:
    # Each model alone: a 0.6, b 0.5, c 0.4. With a: b helps, c spoils.
    def score(weights: Weights) -> dict[str, float]:
        members = "".join(name for name in NAMES if weights[name] > 0)
        return {"probe": {"a": 0.6, "b": 0.5, "c": 0.4, "ab": 0.7, "abc": 0.65}[members]}

    search = Search(score)
    assert greedy_soup(search, NAMES).weights == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert len(search.trials) == 5


def test_leaving_one_out_names_the_model_that_collides() -> None:
    def score(weights: Weights) -> dict[str, float]:
        return {"probe": weights["a"] + weights["b"] - 3 * weights["c"], "other": 0.0}

    search = Search(score)
    table = leave_one_out(search, search.attempt({"a": 0.4, "b": 0.4, "c": 0.2}))
    assert table[0].name == "c"
    # Without c: 0.5 + 0.5 - 0 = 1 against 0.2.
    assert table[0].change == pytest.approx({"probe": 0.8, "other": 0.0})
    assert table[0].mean == pytest.approx(0.4)


def _shake(generator: torch.Generator, tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=generator)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_folder(folder, tiny_model)
    for k in range(2):
        generator = torch.Generator().manual_seed(k)
        place = copy(tiny_model, folder / f"e{k}")
        change_tensors(place / "model.safetensors", partial(_shake, generator))
    return folder


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_the_merge_in_memory_is_the_one_on_disk(family: Path, method: str) -> None:
    settings: dict[str, Any] = {} if method == "linear" else {"base": "model"}
    plan = plan_merge(configure(method, {"e0": {}, "e1": {}}, **settings), folder=family)
    opened = open_model(describe(family / "model"), dtype="float32")
    apply_into(plan, opened.model)
    written = tensors_of(merge_planned(plan, family / f"out-{method}").checkpoint.path)
    found = dict(opened.model.named_parameters())
    assert written.keys() == found.keys()
    assert all(torch.equal(found[name], written[name]) for name in written)


def test_a_search_reports_what_it_never_saw_and_writes_only_the_winner(family: Path) -> None:
    recipe = load_recipe(family / "recipe.yaml")
    config = configure("linear", {"e0": {}, "e1": {}})
    found = search_weights(config, family, recipe, how="grid", steps=2, out=family / "winner")
    assert len(found.trials) >= 3
    assert set(found.held_out) == set(found.best.values) == set(recipe.recipe.probes)
    assert json.loads(json.dumps(found.body()))["weights"] == found.best.weights
    expected = plan_merge(
        configure("linear", {name: {"weight": one} for name, one in found.best.weights.items()}), folder=family
    )
    written = tensors_of(family / "winner")
    again = tensors_of(merge_planned(expected, family / "again").checkpoint.path)
    assert all(torch.equal(written[name], again[name]) for name in written)
    with pytest.raises(MergeError, match="winner exists and is not an empty folder"):
        search_weights(configure("linear", {"none": {}, "e1": {}}), family, recipe, how="grid", out=family / "winner")
    with pytest.raises(MergeError, match="'slerp' has no weights"):
        search_weights(configure("slerp", {"e0": {}, "e1": {}}), family, recipe, how="grid")


def test_the_command_searches_by_cma_on_a_recipes_probes(family: Path) -> None:
    (family / "m.yaml").write_text("method: task_arithmetic\nbase: model\nmodels: {a: {path: e0}, b: {path: e1}}\n")
    arguments = ["merge", "search", str(family / "m.yaml"), "--probes", str(family / "recipe.yaml"), "--how", "cma"]
    done = CliRunner().invoke(app, [*arguments, "--rounds", "1", "--out", str(family / "by-cma"), "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert len(body["trials"]) > 5
    assert body["trials"][0]["weights"] == {"a": 0.5, "b": 0.5}
    best = max(body["trials"], key=lambda one: one["objective"])
    assert body["weights"] == best["weights"]
    said = json.loads((family / "by-cma" / "merge.json").read_text())["config"]["models"]
    assert {name: one["weight"] for name, one in said.items()} == body["weights"]
    alone = CliRunner().invoke(app, [*arguments, "--rounds", "0"])
    assert alone.exit_code == 2  # a usage error: the range is said
