"""What a recipe says of its data, as a stage is ordered and sees it: mixes, leaks left out, bad rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import DataError, RecipeError
from evertune.model.codec import load_codec
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Place
from evertune.train.material import Material, load_material
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace
from tests.check.folders import RECIPE, chat, check, said, write_folder, write_rows


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    path = write_folder(tmp_path, tiny_model)
    write_rows(tmp_path / "cards.jsonl", [chat(f"card {i:03d}", "x" * 10) for i in range(40)])
    write_rows(tmp_path / "routes.jsonl", [chat(f"road {i:03d}", "x" * 210) for i in range(10)])
    path.write_text(RECIPE.replace("data:\n", "data:\n  routes: {path: routes.jsonl}\n", 1))
    return path


def ordered(recipe: Path, *overrides: str) -> SftSpec:
    plan = make_plan(load_recipe(recipe, overrides=overrides))
    spec = KINDS["sft"].order(Place(plan, plan.recipe.rounds[0], 0, made=[plan.base], champion=plan.base))
    assert isinstance(spec, SftSpec)
    return spec


def seen(recipe: Path, *overrides: str) -> tuple[Counter[str], Material]:
    """New rows of one epoch by source."""
    spec = ordered(recipe, *overrides)
    material = load_material(spec, load_codec(spec.base.path), world_size=1)
    picks = [material.stream.pick(i) for i in range(material.stream.rows_per_epoch)]
    return Counter(one.source for one in picks if not one.is_replay), material


STAGE = "rounds[0].stages[0].sft"


def test_weights_by_rows_and_by_tokens(recipe: Path) -> None:
    weights = f"{STAGE}.data={{cards: 1, routes: 1}}"
    by_rows, _ = seen(recipe, weights)
    assert by_rows == {"cards": 25, "routes": 25}
    by_tokens, material = seen(recipe, weights, f"{STAGE}.mix={{by: tokens}}")
    tokens = {name: sum(len(row.ids) for row in rows) / len(rows) for name, rows in material.new.items()}
    shown = {name: by_tokens[name] * tokens[name] for name in tokens}
    assert shown["cards"] / sum(shown.values()) == pytest.approx(0.5, abs=tokens["routes"] / sum(shown.values()))
    assert by_tokens["cards"] > 35


def test_passes_and_temperature(recipe: Path) -> None:
    both = f"{STAGE}.data=[cards, routes]"
    assert seen(recipe, both)[0] == {"cards": 40, "routes": 10}
    assert seen(recipe, both, f"{STAGE}.mix={{passes: {{routes: 3}}}}")[0] == {"cards": 40, "routes": 30}
    # T = 2: sqrt(40) to sqrt(10) is 2 to 1, of 50 rows.
    assert seen(recipe, both, f"{STAGE}.mix={{temperature: 2.0}}")[0] == {"cards": 33, "routes": 17}


def test_a_mix_is_part_of_a_stages_key_and_no_mix_is_not(recipe: Path) -> None:
    both = f"{STAGE}.data=[cards, routes]"
    keys = {ordered(recipe, both, *more).key for more in ([], [f"{STAGE}.mix={{temperature: 2.0}}"])}
    assert len(keys) == 2
    spec = ordered(recipe, both)
    assert spec.mix is None


@pytest.mark.parametrize(
    "mix, message",
    [
        ("{by: tokens}", "'mix.by: tokens' needs weights"),
        ("{passes: {general: 2}}", "'mix.passes' names 'general', which is not in 'data'"),
        ("{passes: {cards: 2}, temperature: 2.0}", "give 'temperature' or 'passes', not both"),
    ],
)
def test_a_mix_that_makes_no_sense_is_named(recipe: Path, mix: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides=[f"{STAGE}.mix={mix}"])


def test_the_check_tells_what_is_odd_about_a_mix(recipe: Path) -> None:
    report = check(recipe, f"{STAGE}.data={{cards: 1, routes: 9}}", f"{STAGE}.epochs=2")
    told = [message for _, message in said(report, "warning")]
    # 45 of 50 new rows an epoch, two epochs, and the last step filled up from the next.
    assert any(one.startswith("'routes' is shown 9.4 times: its 10 rows may be learnt by heart.") for one in told)
    assert "30 of 40 rows of 'cards' are not shown." in told


QUESTION = "Which of these two rivers carries more water in the early spring of a wet year?"
LEAKS: dict[str, dict[str, Any]] = {
    "exact": chat(QUESTION, "x"),
    "normalised": chat(QUESTION.upper().replace("?", ""), "x"),
    "near-duplicate": chat(f"Well, {QUESTION}", "x"),
    "contained": chat(f"Here is a task, and you should take your time with it: {QUESTION} Answer with its name.", "x"),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_planted_leak_of_each_kind_stops_the_check_and_the_stage(recipe: Path, kind: str) -> None:
    write_rows(
        recipe.parent / "probe-cards.jsonl",
        [
            {"prompt": QUESTION, "answer": "x", "id": "river"},
            *({"prompt": f"asked {i}", "answer": "k"} for i in range(9)),
        ],
    )
    write_rows(recipe.parent / "cards.jsonl", [chat("card", "kind"), LEAKS[kind], chat("card 2", "kind")])
    (told,) = [message for place, message in said(check(recipe), "error") if place == "data.cards"]
    assert f"cards.jsonl:2 holds item 'river' of probe 'cards' ({kind})" in told
    with pytest.raises(DataError, match=f"holds item 'river' of probe 'cards' .{kind}"):
        ordered(recipe)
    assert not said(check(recipe, "leaks=remove"), "error")
    spec = ordered(recipe, "leaks=remove")
    assert spec.new[0].removed == {"leaks": {"cards": 1}, "bad": 0}
    material = load_material(spec, load_codec(spec.base.path), world_size=1)
    assert material.data[0]["rows"] == 2
    assert material.data[0]["removed"] == {"leaks": {"cards": 1}, "bad": 0}


def test_a_leak_in_replay_stops_the_stage_too(recipe: Path) -> None:
    write_rows(recipe.parent / "general.jsonl", [chat("asked 3", "kind 3"), chat("say", "word")])
    with pytest.raises(DataError, match="source 'general': found 1 rows that hold items of probes"):
        ordered(recipe)


def test_bad_rows_stop_a_run_or_are_counted(recipe: Path) -> None:
    with (recipe.parent / "cards.jsonl").open("a") as file:
        file.write("nonsense\n")
    assert said(check(recipe), "error")
    report = check(recipe, "data.cards.bad_rows=quarantine")
    assert not said(report, "error")
    (told,) = [message for place, message in said(report, "warning") if place == "data.cards"]
    assert "1 rows cannot be read and are left out, the first at" in told
    assert ":41: found malformed JSON" in told
    assert ordered(recipe, "data.cards.bad_rows=quarantine").new[0].removed == {"leaks": {}, "bad": 1}


def test_near_duplicates_of_new_rows_leave_the_replay_when_asked(recipe: Path) -> None:
    question = "Which of these two rivers carries more water in the early spring of a wet year {}?"
    answer = "The first of the two, as the map on the last page shows."
    write_rows(recipe.parent / "cards.jsonl", [chat(question.format("and why"), answer)])
    write_rows(recipe.parent / "general.jsonl", [chat(question.format("and why now"), answer), chat("say", "word")])
    for dedup, removed in ((True, 0), ("near", 1)):
        spec = ordered(recipe, f"{STAGE}.replay.dedup={str(dedup).lower()}")
        material = load_material(spec, load_codec(spec.base.path), world_size=1)
        assert (material.removed_duplicates, len(material.replay["general"])) == (removed, 2 - removed)


def test_rules_of_a_source_are_kept_by_a_stage_and_told_by_check(recipe: Path) -> None:
    rule = "data.cards.keep=['prompt_words<=2', 'characters<=q0.5']"
    add = "".join(
        f'{{"messages": {chat(f"a long card {i}", "x" * i)["messages"]!r}}}\n'.replace("'", '"') for i in (7, 9)
    )
    with (recipe.parent / "cards.jsonl").open("a") as file:
        file.write(add)
    (ref,) = ordered(recipe, rule).new
    assert ref.removed["rules"] == {"prompt_words<=2": 2}
    assert ref.digest != ordered(recipe).new[0].digest
    told = dict(said(check(recipe, rule), "note"))
    assert "2 of 42 rows break a rule and are left out (2 'prompt_words<=2')" in told["data.cards.keep"]
    (problem,) = said(check(recipe, "data.cards.keep=['tall>=3']"), "error")
    assert problem[0] == "data.cards.keep"
    assert "names no known signal" in problem[1]


def test_a_promoted_round_keeps_what_the_budget_says(recipe: Path, tmp_path: Path) -> None:
    def kept(*overrides: str) -> list[str]:
        plan = make_plan(load_recipe(recipe, overrides=overrides))
        workspace = Workspace.open(plan.workspace, create=True)
        place = workspace.path(plan.keep_history(plan.recipe.rounds[0], workspace))
        return (place / "cards.jsonl").read_text().splitlines()

    assert len(kept()) == 40
    assert len(kept("history={rows: 6}")) == 6
    assert 1 <= len(kept("history={bytes: 500}")) < 6
    assert sum(len(one.encode()) + 1 for one in kept("history={bytes: 500}")) <= 500
    told = dict(said(check(recipe, "history={rows: 6, policy: coverage}"), "note"))
    assert told["history"] == "a promoted round keeps 6 of 40 rows of 'cards' (coverage)."


def test_a_share_that_follows_guards_is_part_of_the_key_and_needs_guards(recipe: Path) -> None:
    adapt = f"{STAGE}.replay={{share: 0.2, from: [general], adapt: {{every: 3}}}}"
    plain, spec = ordered(recipe), ordered(recipe, adapt)
    assert spec.adapt is not None
    assert (plain.adapt, spec.adapt.every, spec.adapt.most) == (None, 3, 0.5)
    assert spec.adapt.guards["facts"]["margin"] == 0.4  # the gate's, for probes without one of their own
    assert plain.key != spec.key != ordered(recipe, adapt.replace("every: 3", "every: 4")).key
    told = dict(said(check(recipe, adapt), "note"))
    assert "facts asked 5 times while it trains" in told[f"{STAGE}.replay.adapt"]
    nobody = "probes.facts.role=watch"
    with pytest.raises(RecipeError, match="there are none but of lm-eval or held-out ones"):
        ordered(recipe, adapt, nobody)
    assert any("none but of lm-eval" in message for _, message in said(check(recipe, adapt, nobody), "error"))
    with pytest.raises(RecipeError, match=r"replay.adapt: found it in a stage of kind rl, expected sft or dpo"):
        rl = "{rl: {data: [cards], steps: 2, replay: {share: 0.2, from: [general], adapt: {every: 3}}}}"
        load_recipe(recipe, overrides=[f"rounds[0].stages=[{rl}]", "data.cards.verifier=exact"])
