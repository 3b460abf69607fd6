"""A round consolidated in several ways: which is kept, what the choice costs, and what the recipe may say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evertune.consolidation import choose_way, gain
from evertune.errors import RecipeError
from evertune.gate import judge
from evertune.ledger import Event
from evertune.lineage import current_events, open_workspace
from evertune.recipe.load import load_recipe
from evertune.report import write_report
from evertune.run import Outcome, run_recipe
from tests.check.folders import check, said
from tests.test_gate import BEFORE, FACTS, GUARD, TARGET, WIDE, flipped, ones, scores
from tests.test_rounds import DEMO

ROLES = {"facts": GUARD, "skill": TARGET}


def _made(lost: int, learnt: int) -> dict[str, Any]:
    return {"facts": scores("facts", flipped(FACTS, lost)), "skill": scores("skill", ones(300, learnt))}


def test_of_the_ways_that_pass_the_one_with_the_largest_gain_is_kept():
    ways = {"merge": _made(0, 120), "distill": _made(1, 180), "retrain": _made(40, 290)}
    best = choose_way(ways, BEFORE, BEFORE, ROLES, WIDE)
    assert best.name == "distill"
    assert {name: one.decision for name, one in best.verdicts.items()} == {
        "merge": "PROMOTE",
        "distill": "PROMOTE",
        "retrain": "HOLD",
    }
    before = BEFORE["skill"].value
    assert gain(best.verdicts["distill"]) == pytest.approx(180 / 300 - before)


def test_of_equals_the_first_that_was_named_is_kept_and_without_a_pass_the_nearest():
    same = {"merge": _made(0, 120), "distill": _made(0, 120)}
    assert choose_way(same, BEFORE, BEFORE, ROLES, WIDE).name == "merge"
    # Harm is proven for one; the other has lost nothing and shows no gain.
    none = {"merge": _made(60, 200), "distill": _made(0, 10)}
    best = choose_way(none, BEFORE, BEFORE, ROLES, WIDE)
    assert best.name == "distill"
    assert best.verdicts["distill"].decision == "INCONCLUSIVE"


def test_the_number_of_ways_enters_every_bound():
    # Six lost items pass where there is one candidate, and no longer where the luckiest of twenty is taken.
    settings = replace(WIDE, probe=0.045, pooled=0.045)
    assert judge(_made(6, 200), BEFORE, BEFORE, ROLES, settings).decision == "PROMOTE"
    ways = {str(k): _made(6, 200) for k in range(20)}
    best = choose_way(ways, BEFORE, BEFORE, ROLES, settings)
    assert "PROMOTE" not in {one.decision for one in best.verdicts.values()}
    levels = {one.level for verdict in best.verdicts.values() for one in verdict.probes if one.role == "guard"}
    assert levels == {settings.alpha / 20}


# --- the recipe

RECIPE = """
evertune: 1
name: ways
base: tiny-random
workspace: run
seed: 3
data:
  routes: {{path: {demo}/cards.jsonl, limit: 8}}
  general: {{path: {demo}/general.jsonl, limit: 8}}
  pairs: {{path: pairs.jsonl, format: preference}}
probes:
  routes: {{path: {demo}/probe-routes.jsonl, kind: generate, verifier: exact, max_new_tokens: 3, limit: 4, margin: 0.9}}
  prose: {{path: {demo}/probe-prose.jsonl, kind: bits_per_byte, limit: 6, role: {role}}}
defaults: {{tune: {{lora: {{rank: 2}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
gate: {{margin: {{pooled: 0.9, probe: 0.9, format: 0.9, ratchet: 0.9, loss: 0.9}}, min_items: 2, min_clusters: 2}}
numerics: {{dtype: float32, device: cpu}}
rescue: {rescue}
rounds:
{before}  - name: one
    stages: [sft: {{data: [routes], steps: 2, lr: 0.05, batch_rows: 2, micro_batch_rows: 2}}]
    consolidate: {consolidate}
"""
BEFORE_IT = "  - name: zero\n    stages: [sft: {data: [general], steps: 1}]\n"
WAYS = "{best_of: [merge, {distill: {steps: 2}}, {retrain: {steps: 3, batch_rows: 2, micro_batch_rows: 2}}]}"


def _recipe(
    folder: Path, consolidate: str = WAYS, *, role: str = "guard", rescue: str = "[discard]", before: str = BEFORE_IT
) -> Path:
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Hello?", "chosen": "Hello!", "rejected": "Bye."}) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(demo=DEMO, consolidate=consolidate, role=role, rescue=rescue, before=before))
    return path


def test_what_a_way_leaves_open_is_filled_in_and_told(tmp_path):
    loaded = load_recipe(_recipe(tmp_path, "{best_of: [merge, distill, retrain]}"))
    one = loaded.recipe.rounds[1]
    whole = one.written_out()
    assert list(whole) == ["merge", "distill", "retrain"]
    assert [[stage.kind for stage in each.stages] for each in whole.values()] == [
        ["sft", "merge"],
        ["sft", "distill"],
        ["sft"],
    ]
    distill, retrain = whole["distill"].stages[-1].distill, whole["retrain"].stages[0].sft
    assert (distill.data, distill.route, distill.teachers[0].checkpoint) == (["routes"], "best", "run")
    assert (retrain.data, whole["retrain"].start) == (["general", "routes"], "base")
    resolved = loaded.resolved["rounds"][1]["consolidate"]["best_of"]
    assert resolved[0]["merge"]["weights"] == {"candidate": 0.5, "champion": 0.5}
    assert resolved[1]["distill"]["skills"] == {"routes": "routes"}
    assert resolved[2]["retrain"]["lr"] == loaded.resolved["rounds"][0]["stages"][0]["sft"]["lr"]
    # A resolved recipe is itself a recipe, and resolves to itself.
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(loaded.resolved))
    assert load_recipe(again).resolved == loaded.resolved


@pytest.mark.parametrize(
    ("consolidate", "told"),
    [
        ("{best_of: [merge]}", "rounds[1].consolidate.best_of: found 1 of them, expected 2 entries or more."),
        ("{best_of: [merge, distil]}", "rounds[1].consolidate.best_of[1]: found 'distil'"),
        (
            "{best_of: [merge, {distill: {data: [pairs], teachers: base}}]}",
            "best_of[1].distill.data: 'pairs' has format 'preference'",
        ),
        ("{best_of: [merge, {distill: {data: [general]}}]}", "best_of[1].distill.skills: no probe 'general' measures"),
        ("{best_of: [merge, {distill: {teachers: 'stage:two'}}]}", "best_of[1].distill.teachers[0].checkpoint: found"),
        ("{best_of: [merge, {retrain: {data: [ghosts]}}]}", "best_of[1].retrain.data: no data source 'ghosts'"),
        (
            "{best_of: [merge, {retrain: {epoch: 1}}]}",
            "best_of[1].retrain: unknown key 'epoch'. Did you mean 'epochs'?",
        ),
        ("{merge: {}, best_of: [merge, retrain]}", "rounds[1].consolidate: consolidate has exactly one key of"),
    ],
)
def test_a_way_that_cannot_be_taken_is_one_clear_problem(tmp_path, consolidate, told):
    with pytest.raises(RecipeError) as caught:
        load_recipe(_recipe(tmp_path, consolidate))
    assert told in str(caught.value)
    assert str(caught.value).count("rounds[1]") == 1


def test_a_round_without_rows_to_learn_again_says_so(tmp_path):
    path = _recipe(tmp_path, "{best_of: [merge, distill]}")
    path.write_text(path.read_text().replace("sft: {data: [routes], steps: 2, lr: 0.05,", "dpo: {data: [pairs],"))
    with pytest.raises(
        RecipeError, match=r"best_of\[1\].distill.data: no stage before it learns from messages or text"
    ):
        load_recipe(path)


def test_a_check_estimates_every_way_and_finds_what_is_missing(tmp_path):
    found = check(_recipe(tmp_path))
    labels = ["zero/1-sft", "one/1-sft", "one/merge/2-merge", "one/distill/2-distill", "one/retrain/1-sft"]
    assert [one.label for one in found.stages] == labels
    bad = check(_recipe(tmp_path, "{best_of: [merge, {retrain: {start: nowhere}}]}"))
    assert [place for place, _ in said(bad, "error")] == ["rounds[1].consolidate.best_of[1].retrain.start"]
    bad = check(_recipe(tmp_path, "{best_of: [merge, {distill: {teachers: nowhere}}]}"))
    assert [place for place, _ in said(bad, "error")] == ["rounds[1].consolidate.best_of[1].distill.teachers[0]"]


# --- the run


def _run(recipe: Path) -> tuple[Outcome, list[Event]]:
    outcome = run_recipe(load_recipe(recipe))
    events = current_events(open_workspace(recipe.parent / "run").ledger)
    write_report(events, recipe.parent / "report.html")
    return outcome, events


def _bodies(events: list[Event], kind: str) -> list[dict[str, Any]]:
    return [one.body for one in events if one.kind == kind]


@pytest.mark.path
def test_every_way_is_made_judged_and_paid_for_and_the_best_is_the_candidate(tmp_path):
    outcome, events = _run(_recipe(tmp_path, role="target", before=""))
    (told,) = [one for one in events if one.kind == "consolidation"]
    ways = {one["way"]: one for one in told.body["ways"]}
    assert list(ways) == ["merge", "distill", "retrain"]
    made = {one["label"]: one for one in _bodies(events, "checkpoint")}
    for one in ways.values():
        assert one["digest"] == made[one["label"]]["digest"]
        assert set(one["values"]) == {"routes", "prose"}
    assert (ways["merge"]["steps"], ways["distill"]["steps"], ways["retrain"]["steps"]) == (0, 2, 3)
    assert ways["retrain"]["tokens"] > 0
    assert told.volatile["costs"]["distill"]["teacher_forwards"] == 8
    assert all(one["seconds"] > 0 for one in told.volatile["costs"].values())
    # A retrain starts from the base and knows nothing of the stages; the others stand on the candidate.
    assert made["one/retrain/1-sft"]["start"] == made["base"]["digest"]
    assert made["one/distill/2-distill"]["start"] == made["one/1-sft"]["digest"]
    compared = {one["label"]: [each["since"] for each in one["against"]] for one in _bodies(events, "erosion")}
    assert compared["one/distill/2-distill"] == ["base", "one/1-sft"]
    verdict = [one for one in _bodies(events, "verdict") if one["round"] == "one"][-1]
    chosen = ways[told.body["chosen"]]
    assert (verdict["label"], verdict["tried"]) == (chosen["label"], 3)
    rank = {"PROMOTE": 0, "INCONCLUSIVE": 1, "HOLD": 2}
    assert rank[chosen["decision"]] == min(rank[one["decision"]] for one in ways.values())
    assert "Consolidation: the ways that were tried" in (tmp_path / "report.html").read_text()
    # The same again does nothing.
    again, _ = _run(tmp_path / "recipe.yaml")
    assert (again.stages_run, again.probes_run, again.last) == (0, 0, outcome.last)


@pytest.mark.path
def test_a_rescue_after_the_best_way_pays_for_the_ways_too_and_keeps_it(tmp_path):
    merges = [f"{{merge: {{weights: {{candidate: 0.9, {one}: 0.1}}}}}}" for one in ("champion", "base")]
    path = _recipe(tmp_path, f"{{best_of: [{', '.join(merges)}]}}", rescue="[lower_lr, discard]", before="")
    path.write_text(path.read_text().replace("min_items: 2,", "min_items: 5,"))  # routes has four: nothing can pass
    _, events = _run(path)
    (told,) = _bodies(events, "consolidation")
    assert [one["way"] for one in told["ways"]] == ["merge", "merge-2"]
    (rescue,) = _bodies(events, "rescue")
    assert rescue["tried"] == 1 * 2
    # The amended round ends in the way that was kept.
    assert rescue["label"] == "one/lower_lr/2-merge"
    made = {one["label"]: one for one in _bodies(events, "checkpoint")}
    assert set(made["one/lower_lr/2-merge"]["settings"]["models"]) == set(made[told["label"]]["settings"]["models"])
