"""A merge as a stage: what its order names, what a check says, and a round that ends in one."""

import json
from pathlib import Path

import pytest
import torch

from evertune.errors import MergeError
from evertune.ledger import Ledger
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.run import run_recipe
from evertune.stages import KINDS, Past, Place
from evertune.stages.merge import MergeSpec
from evertune.workspace import Workspace
from tests.check.folders import RECIPE, check, said, write_folder
from tests.merge.folders import merge
from tests.model.folders import write_adapter_folder
from tests.tiny import write_tiny_model

STAGE = (
    "      - merge: {method: linear, models: {new: {path: start, weight: 0.75}, old: {path: origin, weight: 0.25}}}\n"
)


def _write(folder: Path, model: Path, stage: str = STAGE) -> Path:
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        write_folder(folder, model)
    recipe.write_text(RECIPE + stage)
    return recipe


def _order(recipe: Path, made: list[Checkpoint], *overrides: str) -> MergeSpec:
    plan = make_plan(load_recipe(recipe, overrides=overrides))
    order = KINDS["merge"].order(Place(plan, plan.recipe.rounds[0], 1, made=made, champion=made[0]))
    assert isinstance(order, MergeSpec)
    return order


def loaded_round(recipe: Path) -> str:
    return load_recipe(recipe).recipe.rounds[0].name


@pytest.fixture
def stack(tmp_path: Path, tiny_model: Path) -> list[Checkpoint]:
    """The base, and an adapter on it that an sft stage might have made."""
    write_folder(tmp_path, tiny_model)
    base = describe(tmp_path / "model")
    return [base, write_adapter_folder(base, tmp_path / "new", seed=1)]


def test_names_are_resolved_and_every_setting_counts(tmp_path: Path, stack: list[Checkpoint]) -> None:
    recipe = _write(tmp_path, tmp_path / "model")
    order = _order(recipe, stack)
    assert {name: one.digest for name, one in order.models.items()} == {"new": stack[1].digest, "old": stack[0].digest}
    assert order.config["dtype"] == "float32"
    assert MergeSpec.from_json(json.loads(json.dumps(order.to_json()))) == order
    place = "rounds[0].stages[1].merge"
    for change in ("models.new.weight=0.5", "dtype=bfloat16", "seed=3", "models.old.path=start", "method=ema"):
        more = ["models.new={path: start}", "models.old={path: origin}"] if change == "method=ema" else []
        assert _order(recipe, stack, *(f"{place}.{one}" for one in (*more, change))).key != order.key, change
    assert _order(recipe, stack, f"{place}.models.old.path=model").key == order.key
    # An earlier stage by its label, of this round or another.
    label = f"{loaded_round(recipe)}/1-sft"
    plan = make_plan(load_recipe(recipe, overrides=[f"{place}.models.old.path={label}"]))
    past = Past(checkpoints={label: stack[1]})
    named = KINDS["merge"].order(Place(plan, plan.recipe.rounds[0], 1, made=stack, champion=stack[0], past=past))
    assert isinstance(named, MergeSpec)
    assert named.models["old"].digest == stack[1].digest
    assert said(check(recipe, f"{place}.models.old.path={label}"), "error") == []


def test_an_adapter_and_its_base_become_a_scaled_adapter(tmp_path: Path, stack: list[Checkpoint]) -> None:
    order = _order(_write(tmp_path, tmp_path / "model"), stack)
    workspace = Workspace.open(tmp_path / "run", create=True)
    facts = KINDS["merge"].perform(order.to_json(), workspace)["checkpoint"]
    assert (facts["form"], facts["methods"], facts["standing"]) == ("adapter", ["expert_merge"], "production")
    assert facts["parents"] == sorted(one.digest for one in stack)
    assert facts["merge"]["numbers"] == {
        "new": {"stored": "float32", "vectors": [stack[1].digest], "rounded_before": False},
        "old": {"stored": "float32", "vectors": [], "rounded_before": False},
    }
    merged, trained = read_factors(workspace.path(order.key)), read_factors(stack[1].path)
    for name in trained:
        assert torch.allclose(merged[name].delta(), 0.75 * trained[name].delta(), atol=1e-7)


def test_whole_models_become_a_float32_master_however_often(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path, tiny_model)
    base = describe(tmp_path / "model")
    other = describe(write_tiny_model(tmp_path / "other", seed=1))
    stage = STAGE.replace("method: linear,", "method: linear, different_starts: allow,")
    order = _order(_write(tmp_path, tmp_path / "model", stage), [base, other])
    workspace = Workspace.open(tmp_path / "run", create=True)
    facts = KINDS["merge"].perform(order.to_json(), workspace)["checkpoint"]
    assert facts["form"] == "model"
    assert facts["settings"]["dtype"] == "float32"
    assert {one["rounded_before"] for one in facts["merge"]["numbers"].values()} == {False}
    found, one, two = (dict(open_model(each, dtype="float32").model.named_parameters()) for each in (
        describe(workspace.path(order.key)), other, base))  # fmt: skip
    for name in found:
        assert torch.equal(found[name], (0.75 * one[name].double() + 0.25 * two[name].double()).float()), name


def test_models_that_do_not_fit_are_refused_under_the_stages_name(tmp_path: Path, tiny_model: Path) -> None:
    write_folder(tmp_path, tiny_model)
    base, other = describe(tmp_path / "model"), describe(write_tiny_model(tmp_path / "other", seed=1))
    order = _order(_write(tmp_path, tmp_path / "model"), [base, other])
    with pytest.raises(MergeError, match=r"/2-merge: 'new' and 'old' do not have the same start"):
        KINDS["merge"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))


def test_a_check_names_what_the_method_lacks_and_folders_that_are_not_there(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    assert "linear of 2 models" in [one.summary for one in check(recipe).stages]
    place = "rounds[0].stages[1].merge"
    found = said(check(recipe, f"{place}.method=ties"), "error")
    assert found == [(place, "base: missing; 'ties' works on differences from a base model.")]
    found = said(check(recipe, f"{place}.models.old.path=nowhere"), "error")
    assert [one for one, _ in found] == [f"{place}.models.old.path"]
    assert "nowhere: no such folder" in found[0][1]


def test_consolidate_is_a_merge_stage_at_the_end(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model, "    consolidate: {merge: {weights: {candidate: 0.9, champion: 0.1}}}\n")
    loaded = load_recipe(recipe)
    last = loaded.recipe.rounds[0].stages[-1].merge
    assert last is not None
    assert {name: (one.path, one.weight) for name, one in last.models.items()} == {
        "candidate": ("start", 0.9),
        "champion": ("champion", 0.1),
    }
    assert loaded.resolved["rounds"][0]["consolidate"] is None
    assert loaded.resolved["rounds"][0]["stages"][-1]["merge"]["dtype"] == "float32"


def test_rounding_a_merge_in_the_line_is_warned_of_and_told_by_the_ledger(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    place = "rounds[0].stages[1].merge"
    assert said(check(recipe), "warning") == []
    found = said(check(recipe, f"{place}.dtype=bfloat16"), "warning")
    assert [one for one, _ in found] == [f"{place}.dtype"]
    assert "a later merge of it starts from rounded numbers" in found[0][1]
    # A model that another merge rounded: the ledger says that its numbers were rounded before.
    base = describe(tmp_path / "model")
    merged = merge(tmp_path, "rounded", "linear", {"model": {}}, dtype="bfloat16").checkpoint
    order = _order(recipe, [base, merged])
    facts = KINDS["merge"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))["checkpoint"]
    assert facts["merge"]["numbers"]["new"] == {"stored": "bfloat16", "vectors": [], "rounded_before": True}
    assert not facts["merge"]["numbers"]["old"]["rounded_before"]


def test_a_model_trained_from_a_master_goes_into_the_next_merge_unrounded(tmp_path: Path, tiny_model: Path) -> None:
    # Two rounds of every weight, computed in bfloat16: train, average, train from the average's master, average again.
    recipe = _write(tmp_path, tiny_model)
    changes = ["defaults.tune={full: {}}", "numerics.dtype=bfloat16", "rounds[0].stages[0].sft.epochs=1"]
    plan = make_plan(load_recipe(recipe, overrides=changes))
    workspace = Workspace.open(tmp_path / "run", create=True)
    champion = describe(tmp_path / "model")
    for _ in range(2):
        made = [champion]
        for number, kind in enumerate(("sft", "merge")):
            order = KINDS[kind].order(Place(plan, plan.recipe.rounds[0], number, made=made, champion=champion))
            facts = KINDS[kind].perform(order.to_json(), workspace)["checkpoint"]
            made.append(describe(workspace.path(order.key)))
        assert facts["merge"]["numbers"] == {
            name: {"stored": "float32", "vectors": [], "rounded_before": False} for name in ("new", "old")
        }
        start, trained, merged = (dict(open_model(one, dtype="float32").model.named_parameters()) for one in made)
        for name in merged:
            exact = 0.75 * trained[name].double() + 0.25 * start[name].double()
            assert torch.equal(merged[name], exact.float()), name
            # And what was trained is no rounded copy.
            assert not torch.equal(trained[name], trained[name].bfloat16().float()), name
        champion = made[-1]


@pytest.mark.path
def test_a_round_that_ends_in_a_merge_is_probed_judged_and_recorded(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    run_recipe(load_recipe(recipe), start_method="fork")
    loaded = load_recipe(recipe)
    events = Ledger.open(loaded.resolve(loaded.recipe.workspace) / "ledger.sqlite", create=False).events()
    made = [event.body for event in events if event.kind == "checkpoint"]
    assert [one["stage"] for one in made][:3] == ["base", "sft", "merge"]
    assert any(event.kind == "probe" and event.body["label"].endswith("2-merge") for event in events)
    verdict = next(event.body for event in events if event.kind == "verdict")
    assert verdict["label"].endswith("2-merge")
