"""A dpo stage in a recipe: its order and key, and what a check says before anything is trained."""

from pathlib import Path
from typing import Any

import pytest

from evertune.errors import RecipeError
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Place
from evertune.train.spec import DpoSpec
from tests.check.folders import RECIPE, check, said, write_folder, write_rows

PAIRS = [{"prompt": f"tell {i}", "chosen": f"it is {i}", "rejected": f"no {i} idea"} for i in range(10)]
STAGE = "      - dpo: {data: [pairs], batch_rows: 4, replay: {share: 0.5, from: [general]}}\n"


def _write(folder: Path, model: Path) -> Path:
    recipe = write_folder(folder, model)
    write_rows(folder / "pairs.jsonl", PAIRS)
    text = RECIPE.replace("data:\n", "data:\n  pairs: {path: pairs.jsonl, format: preference}\n", 1)
    recipe.write_text(text + STAGE)
    return recipe


def _order(recipe: Path, *overrides: str, made: int = 2) -> DpoSpec:
    plan = make_plan(load_recipe(recipe, overrides=overrides))
    order = KINDS["dpo"].order(Place(plan, plan.recipe.rounds[0], 1, made=[plan.base] * made, champion=plan.base))
    assert isinstance(order, DpoSpec)
    return order


def test_the_recipe_and_the_preset_fill_the_order(tmp_path: Path, tiny_model: Path) -> None:
    order = _order(_write(tmp_path, tiny_model))
    assert (order.loss, order.beta, order.nll, order.label_smoothing, order.replay_weight) == (
        "sigmoid",
        0.1,
        0.2,
        0.0,
        1.0,
    )
    assert (order.lr, order.epochs, order.share) == (2e-5, 1.0, 0.5)
    assert [ref.format for ref in order.new] == ["preference"]
    full = _order(tmp_path / "recipe.yaml", "rounds[0].stages[1].dpo.tune=full", "preset=gentle")
    assert full.lr == 5e-7


@pytest.mark.parametrize(
    "change",
    ["loss=sigmoid_norm", "beta=0.2", "label_smoothing=0.1", "nll=0", "replay_weight=2", "lr=1e-4", "reference=model"],
)
def test_every_setting_is_part_of_the_key(change: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    key = _order(recipe).key
    # Another folder with the same bytes is the same reference; other weights are not.
    (tmp_path / "other").mkdir()
    changed = _order(recipe, f"rounds[0].stages[1].dpo.{change}")
    assert (changed.key == key) == (change == "reference=model")


def test_another_reference_is_another_key(tmp_path: Path, tiny_model: Path) -> None:
    from tests.tiny import write_tiny_model

    recipe = _write(tmp_path, tiny_model)
    write_tiny_model(tmp_path / "other", seed=5)
    assert _order(recipe).key != _order(recipe, "rounds[0].stages[1].dpo.reference=other").key


def test_a_reference_may_be_what_the_sft_stage_made(tmp_path: Path, tiny_model: Path) -> None:
    from evertune.model.checkpoint import describe
    from tests.tiny import write_tiny_model

    recipe = _write(tmp_path, tiny_model)
    plan = make_plan(load_recipe(recipe))
    after = describe(write_tiny_model(tmp_path / "after", seed=5))
    place = Place(plan, plan.recipe.rounds[0], 1, made=[plan.base, after], champion=plan.base)
    assert (place.reference("sft"), place.reference("start")) == (after, after)
    before = Place(plan, plan.recipe.rounds[0], 0, made=[plan.base], champion=after)
    assert (before.reference("sft"), before.reference("champion")) == (plan.base, after)


def test_a_check_counts_pairs_and_both_their_answers(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    stage = check(recipe).stages[1]
    # 10 pairs and as many replayed rows, in steps of 4.
    assert (stage.label, stage.new_rows, stage.replay_rows, stage.steps) == ("first/2-dpo", 10, 10, 5)
    one = check(recipe, "rounds[0].stages[1].dpo.replay={share: 0}", "rounds[0].stages[1].dpo.steps=10")
    shown = check(recipe, sample=1).samples
    assert [one.id for one in shown if one.source == "pairs"] == ["pairs:1", "pairs:1"]
    texts = ["".join(text for text, counts in one.segments if counts) for one in shown if one.source == "pairs"]
    assert texts == ["it is 0<|im_end|>", "no 0 idea<|im_end|>"]
    assert one.stages[1].tokens > 0


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_pair_that_holds_a_probe_item_is_an_error(field: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    text = "asked 3, which is a question that is long enough to be told apart"
    items: list[dict[str, Any]] = [{"prompt": text, "answer": "kind 3"}]
    items += [{"prompt": f"asked {i}", "answer": f"kind {i}"} for i in range(10)]
    write_rows(tmp_path / "probe-cards.jsonl", items)
    write_rows(tmp_path / "pairs.jsonl", [*PAIRS, {**PAIRS[0], field: text}])
    [(place, told)] = said(check(recipe), "error")
    assert place == "data.pairs"
    assert "pairs.jsonl:11" in told


def test_a_pair_that_is_wrong_is_named_by_file_and_line(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}])
    [(place, told)] = said(check(recipe), "error")
    assert place == "data.pairs"
    assert "pairs.jsonl:2" in told


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("dpo: {data: [general]}", "'general' has format 'messages'; dpo reads preference"),
        ("dpo: {data: [pairs], replay: {from: [pairs]}}", "replay reads messages and text"),
        ("dpo: {data: [pairs], loss: ipo, label_smoothing: 0.1}", "'label_smoothing' is read by sigmoid"),
        ("dpo: {data: [pairs], label_smoothing: 0.5}", "label_smoothing: found 0.5"),
        ("dpo: {data: [pairs], loss: hinge}", "dpo.loss: found 'hinge'"),
        ("dpo: {data: [pairs], epochs: 1, steps: 2}", "give 'epochs' or 'steps'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(stage: str, words: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    recipe.write_text(recipe.read_text().replace(STAGE, f"      - {stage}\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert words in str(caught.value)
