"""What a rescue proposes: shares of the update to keep, and rounds with amended stages."""

from dataclasses import replace

import numpy as np
import pytest

from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.probe.scores import ItemScores
from evertune.recipe.schema import Recipe, Replay, Round, Rung, Sft, Stage
from evertune.rescue import Proposal, choose, count_tries, in_order, propose, shares_of
from tests.test_gate import BEFORE, FACTS, GUARD, TARGET, WIDE, flipped, ones, scores

ROLES = {"facts": GUARD, "skill": TARGET}


def _share(lost: int, learnt: int) -> dict[str, object]:
    return {"facts": scores("facts", flipped(FACTS, lost)), "skill": scores("skill", ones(300, learnt))}


def test_the_largest_share_that_passes_is_chosen() -> None:
    scan = {0.9: _share(40, 200), 0.7: _share(2, 150), 0.5: _share(0, 80)}
    chosen = choose(scan, BEFORE, BEFORE, ROLES, WIDE, tried=len(scan))
    assert chosen.alpha == 0.7
    assert chosen.passes == {0.9: False, 0.7: True, 0.5: True}
    assert chosen.values[0.9]["facts"] == pytest.approx(160 / 300)
    assert [one["alpha"] for one in chosen.scan_body()] == [0.9, 0.7, 0.5]


def test_when_none_passes_the_nearest_is_chosen_and_said_not_to_pass() -> None:
    # At 0.9 harm is proven; at 0.7 and 0.5 no gain is left, but at 0.5 nothing else fails.
    scan = {0.9: _share(40, 200), 0.7: _share(9, 10), 0.5: _share(0, 10)}
    chosen = choose(scan, BEFORE, BEFORE, ROLES, WIDE, tried=len(scan))
    assert chosen.alpha == 0.5
    assert not any(chosen.passes.values())


def test_the_number_tried_enters_the_correction() -> None:
    scan = {alpha: _share(6, 200) for alpha in np.linspace(0.1, 0.9, 20).round(3)}
    settings = replace(WIDE, probe=0.045, pooled=0.045)
    assert judge(scan[0.9], BEFORE, BEFORE, ROLES, settings).decision == "PROMOTE"
    assert not any(choose(scan, BEFORE, BEFORE, ROLES, settings, tried=len(scan)).passes.values())


def test_a_scan_rarely_finds_a_share_that_lost_its_whole_margin() -> None:
    # Ten bad candidates with independent noise: the worst case for picking the luckiest.
    rng = np.random.default_rng(0)
    settings = GateSettings.from_json(_wide_body())
    found = {"corrected": 0, "not": 0}
    for _ in range(60):
        d = rng.choice([-1, 1, 0], size=(10, 300), p=[0.075, 0.025, 0.90])
        kept = rng.uniform(size=300) < 0.6
        verdicts = []
        for tried in (10, 1):
            passes = []
            for one in d:
                sides = [{"facts": scores("facts", np.where(one == 0, kept, one == s))} for s in (1, -1)]
                facts = {"facts": ProbeFacts("guard", False, 0.05)}
                passes.append(judge(*sides, sides[1], facts, settings, tried=tried).decision == "PROMOTE")
            verdicts.append(any(passes))
        found["corrected"] += verdicts[0]
        found["not"] += verdicts[1]
    assert found["corrected"] / 60 <= 0.12
    assert found["not"] / 60 > 0.2


def _wide_body() -> dict[str, object]:
    margin = {"pooled": 0.5, "probe": 0.5, "safety": 0.5, "loss": 0.5, "format": 0.5, "ratchet": 0.5}
    return {"alpha": 0.05, "margin": margin, "min_gain": 0.0, "min_items": 200, "min_clusters": 30}


# --- amended rounds

RECIPE = Recipe.model_validate(
    {
        "evertune": 1,
        "name": "r",
        "base": "tiny-random",
        "workspace": "run",
        "data": {name: {"path": "rows.jsonl"} for name in ("new", "more", "general", "cards")},
        "probes": {"facts": {"path": "p.jsonl", "kind": "choice"}, "skill": {"path": "q.jsonl", "kind": "choice"}},
        "rounds": [
            {
                "name": "one",
                "stages": [
                    {"sft": {"data": ["new"], "lr": 1e-3, "steps": 10, "replay": {"share": 0.2, "from": ["general"]}}},
                    {"sft": {"data": ["more"], "epochs": 2.0, "anchor": {"kl": 0.0}}},
                    {"external": {"command": "train {model} {data} {output}"}},
                ],
            }
        ],
    }
)
ONE = RECIPE.rounds[0]


def table(right: int) -> dict[str, ItemScores]:
    return {"facts": scores("facts", ones(300, right)), "skill": scores("skill", ones(300, 10))}


def held(lost: int = 60) -> Verdict:
    after = {"facts": scores("facts", flipped(FACTS, lost)), "skill": scores("skill", ones(300, 200))}
    return judge(after, BEFORE, BEFORE, ROLES, WIDE)


def proposed(rung: Rung | str, made: list[dict[str, ItemScores]] | None = None, **more: object) -> Proposal | None:
    wanted = Rung.model_validate(rung)
    return propose(wanted, RECIPE, ONE, made or [table(200)] * 4, held(), **more)  # type: ignore[arg-type]


def test_a_lower_rate_and_fewer_epochs_change_what_trains_and_nothing_else() -> None:
    lower, fewer = proposed("lower_lr"), proposed({"fewer_epochs": {"factor": 0.25}})  # type: ignore[arg-type]
    assert lower is not None and fewer is not None
    first, second, last = lower.stages
    # The second stage's rate is the preset's, for an adapter: 2e-4.
    assert (first.sft.lr, second.sft.lr) == (pytest.approx(3e-4), pytest.approx(6e-5))  # type: ignore[union-attr]
    assert first.sft.steps == 10  # type: ignore[union-attr]
    assert last == ONE.stages[2]
    assert (fewer.stages[0].sft.steps, fewer.stages[1].sft.epochs) == (2, 0.5)  # type: ignore[union-attr]
    assert fewer.stages[0].sft.lr == 1e-3  # type: ignore[union-attr]
    assert (lower.why, fewer.why) == ("learning rates times 0.3", "epochs times 0.25")


def test_a_stronger_anchor_switches_on_one_that_was_off() -> None:
    done = proposed({"stronger_anchor": {"factor": 3.0}})  # type: ignore[arg-type]
    assert done is not None
    weights = [stage.sft.anchor.kl for stage in done.stages[:2]]  # type: ignore[union-attr]
    assert weights == [pytest.approx(0.15), pytest.approx(0.15)]


def test_more_replay_is_capped_and_aimed_at_what_fell() -> None:
    done = proposed({"more_replay": {"factor": 4.0, "by_probe": {"facts": ["cards"], "skill": ["more"]}}})  # type: ignore[arg-type]
    assert done is not None
    replay = done.stages[0].sft.replay  # type: ignore[union-attr]
    # Twice 0.2 would be 0.8, above the largest share; `skill` rose, so its rows are not asked for.
    assert (replay.share, replay.sources) == (0.5, ["general", "cards"])
    assert done.why == "replay times 4, cards among it"


def test_more_replay_switches_on_one_that_was_off() -> None:
    bare = ONE.model_copy(update={"stages": [Stage(sft=Sft(data=["cards"], replay=Replay(share=0.0)))]})
    rung = Rung.model_validate({"more_replay": {"by_probe": {"facts": ["cards"]}}})
    done = propose(rung, RECIPE, bare, [table(200), table(140)], held())
    assert done is not None
    replay = done.stages[0].sft.replay  # type: ignore[union-attr]
    # 0.2 times 2; the sources are those of the recipe's defaults, and what fell.
    assert (replay.share, replay.sources[-1]) == (0.4, "cards")


def test_the_stage_after_which_the_guard_fell_most_is_dropped() -> None:
    made = [table(200), table(195), table(150), table(140)]
    done = proposed("drop_stage", made)
    assert done is not None
    assert done.stages == (ONE.stages[0], ONE.stages[2])
    assert done.why == "without stage 2 (sft), after which facts fell most"


def test_what_would_change_nothing_is_not_proposed() -> None:
    # No stage of this round made the guard fall; and a round of one stage would have none left.
    assert proposed("drop_stage", [table(140), table(150), table(160), table(170)]) is None
    external = ONE.model_copy(update={"stages": [ONE.stages[2]]})
    for name in ("lower_lr", "fewer_epochs", "stronger_anchor", "more_replay", "drop_stage"):
        rung = Rung.model_validate(name)
        assert propose(rung, RECIPE, external, [table(200), table(140)], held()) is None


def test_every_candidate_of_the_ladder_counts_in_the_correction() -> None:
    rungs = [{"interpolate": {"alphas": [0.5, 0.3], "blocks": 3}}, "lower_lr", "drop_stage", "discard"]
    assert count_tries([Rung.model_validate(one) for one in rungs]) == 2 * 3 + 2


def test_blocks_are_tried_one_at_a_time() -> None:
    assert shares_of([0.9, 0.5], 1) == [0.9, 0.5]
    assert shares_of([0.3], 3) == [(0.3, 1.0, 1.0), (1.0, 0.3, 1.0), (1.0, 1.0, 0.3)]
    scan = {(0.3, 1.0): _share(2, 150), (1.0, 0.3): _share(40, 200)}
    chosen = choose(scan, BEFORE, BEFORE, ROLES, WIDE, tried=2)
    assert (chosen.share, chosen.alpha) == ((0.3, 1.0), pytest.approx(0.65))
    assert [one["blocks"] for one in chosen.scan_body()] == [[1.0, 0.3], [0.3, 1.0]]


def test_what_fell_is_taught_back_by_the_start_and_what_was_learnt_is_held() -> None:
    aimed = proposed({"distil_back": {"by_probe": {"facts": ["cards"]}, "epochs": 2.0, "lr": 3e-5}})  # type: ignore[arg-type]
    assert aimed is not None
    assert aimed.stages[:3] == tuple(ONE.stages)
    stage = aimed.stages[3].distill
    assert stage is not None
    assert ([one.checkpoint for one in stage.teachers], stage.data, stage.weight) == (["champion"], ["cards"], 1.0)
    assert (stage.epochs, stage.lr) == (2.0, 3e-5)
    assert stage.replay is not None and stage.anchor is not None
    assert (stage.replay.sources, stage.replay.share) == (["new", "more"], 0.3)
    assert (stage.anchor.to, stage.anchor.on, stage.anchor.kl) == ("start", "replay", 0.05)
    assert aimed.why == "one more stage: champion teaches facts back on the rows of cards"
    # Without rows of its own, the probe is taught back on what the round replays; history is no source to name.
    plain = proposed("distil_back")
    assert plain is not None and plain.stages[3].distill is not None
    assert plain.stages[3].distill.data == ["general"]


def test_nothing_is_taught_back_without_rows_or_a_guard_that_fell() -> None:
    alone = RECIPE.model_copy(update={"rounds": [ONE]})
    bare = Round.model_validate({"name": "one", "stages": [{"sft": {"data": ["new"], "replay": {"share": 0.0}}}]})
    rung = Rung.model_validate("distil_back")
    assert propose(rung, alone, bare, [table(200), table(140)], held()) is None
    assert propose(rung, alone, ONE, [table(200)] * 4, judge(BEFORE, BEFORE, BEFORE, ROLES, WIDE)) is None


def test_rungs_by_gain_for_cost_score_first_and_discard_last() -> None:
    rungs = [
        Rung.model_validate(one)
        for one in ("discard", "lower_lr", "drop_stage", "more_replay", "distil_back", "interpolate", "fewer_epochs")
    ]
    assert in_order(rungs, "written", [10, 10]) == rungs
    kinds = [one.kind for one in in_order(rungs, "gain_for_cost", [10, 30])]
    # 0.4 / 0.3, 0.3 / 0.5, 0.4 / 0.75, 0.5 / 1, 0.4 / 1 of the round.
    assert kinds == [
        "interpolate", "distil_back", "fewer_epochs", "drop_stage", "more_replay", "lower_lr", "discard",
    ]  # fmt: skip
    # A round of one long stage and a short one: dropping costs at most the short one.
    assert [one.kind for one in in_order(rungs, "gain_for_cost", [38, 2])][1] == "drop_stage"
