"""Update or retrain, on a run of the debug recipe; likeness of texts on its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from evertune.lineage import current_events, open_workspace
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.report import build_report
from evertune.retraining import advise_update, likeness, measure_baseline, state_likeness
from tests.command import RECIPE, DebugRun, evertune
from tests.tiny import write_tiny_model


@pytest.fixture
def done(debug_run: DebugRun, tmp_path: Path) -> LoadedRecipe:
    shutil.copytree(debug_run.workspace, tmp_path / "run")
    return load_recipe(RECIPE, overrides=[f"workspace={tmp_path / 'run'}"])


def test_more_of_the_same_is_like_it_and_another_domain_is_not() -> None:
    tickets = [f"My order number {n} has not arrived, where is my parcel now?" for n in range(60)]
    code = [f"def f{n}(x): return x + {n}  # a function of one number" for n in range(30)]
    assert likeness(tickets[:40], tickets[40:]) > 0.8
    assert likeness(tickets[:40], code) < 0.05
    assert likeness(["one"], ["two"]) == 0.0


def test_vectors_of_one_cloud_are_alike_and_of_another_not() -> None:
    rng = np.random.default_rng(0)
    here, there = np.zeros(16), np.zeros(16)
    here[0], there[1] = 5.0, 5.0
    old, same = (here + rng.normal(size=(n, 16)) for n in (40, 20))
    other = there + rng.normal(size=(20, 16))
    assert state_likeness(old, same) > 0.9
    assert state_likeness(old, other) < 0.25
    same[3] = np.nan  # a row that could not be read
    assert state_likeness(old, same) > 0.9


@pytest.mark.path
def test_criteria_have_numbers_and_any_that_speaks_for_a_retrain_decides(done: LoadedRecipe) -> None:
    found = advise_update(done)
    values = {one.name: one for one in found.criteria}
    # 24 rows of routes, which no promoted round has seen, beside the 24 cards of the first round... or none.
    assert "new rows beside" in values["share of new data"].value
    assert values["tolerance for loss"].says == "either"
    assert found.retrain_tokens > 0
    assert found.retrain_round["start"] == "base"
    strict = advise_update(done, is_zero_tolerance=True, with_model=True)
    assert any(one.name == "likeness under the base" for one in strict.criteria)
    assert strict.choice == "retrain"
    assert "tolerance for loss" in strict.reason


@pytest.mark.path
def test_a_retrain_is_made_or_taken_and_the_monitor_compares_with_it(done: LoadedRecipe, tmp_path: Path) -> None:
    made = measure_baseline(done)
    assert made["steps"] > 0 and "cards" in made["data"]
    taken = measure_baseline(done, model=str(write_tiny_model(tmp_path / "other")))
    assert (taken["source"], taken["steps"]) == (str(tmp_path / "other"), 0)
    assert taken["scores"].keys() == made["scores"].keys()
    events = current_events(open_workspace(tmp_path / "run").ledger)
    assert [one.kind for one in events].count("baseline") >= 1
    names = [one.name for one in build_report(events).monitor]
    assert names == ["Forgetting", "New skills against a retrain", "Safety", "Cost", "Drift"]


@pytest.mark.path
def test_the_commands_print_a_choice_and_write_a_recipe_that_checks(debug_run: DebugRun, tmp_path: Path) -> None:
    shutil.copytree(debug_run.workspace, tmp_path / "run")
    text = RECIPE.read_text().replace("../runs/debug", str(tmp_path / "run"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("path: demo/", f"path: {RECIPE.parent}/demo/"))
    printed = evertune("advise", "update", recipe, "--write")
    assert "# retrain" in printed and "share of new data" in printed
    assert "fine" in evertune("check", tmp_path / "recipe-retrain.yaml")
    assert "is there already" in evertune("advise", "update", recipe, "--write", code=3)
    assert "acts when" in evertune("monitor", tmp_path / "run")
