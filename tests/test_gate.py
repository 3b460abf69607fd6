"""The gate's three verdicts, what each waits for, and how often it errs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evertune.errors import ProbeError
from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.hashing import canonical_json
from evertune.measure import stats
from evertune.probe.scores import ItemScores
from evertune.recipe.schema import Gate

SETTINGS = GateSettings.from_json(Gate().model_dump())
WIDE = replace(SETTINGS, pooled=0.05, probe=0.05, format=0.05, ratchet=0.05)
GUARD, TARGET, WATCH = (ProbeFacts(role=role, safety=False, margin=None) for role in ("guard", "target", "watch"))


def scores(name: str, right: Any, **more: Any) -> ItemScores:
    """Item scores of a choice probe; every item is its own cluster unless said otherwise."""
    right = np.asarray(right, dtype=np.float64)
    ids = tuple(f"i{k}" for k in range(len(right)))
    facts = {"kind": "choice", "direction": "higher", "cluster": ids, "items_digest": "i", "template_digest": "t"}
    return ItemScores(probe=name, ids=ids, score=right, **{**facts, **more})


def generated(name: str, right: Any, *, valid: Any = None, stopped: Any = None) -> ItemScores:
    n = len(right)
    forms = {"valid": np.ones(n) if valid is None else valid, "stopped": np.ones(n) if stopped is None else stopped}
    return scores(name, right, kind="generate", **forms)


def prose(values: Any) -> ItemScores:
    return scores("prose", values, kind="bits_per_byte", direction="lower", weight=np.full(len(values), 100.0))


def ones(n: int, right: int) -> np.ndarray:
    return np.arange(n) < right


def flipped(right: np.ndarray, b: int, c: int = 0) -> np.ndarray:
    """The first b right items turned wrong, the last c wrong ones turned right."""
    after = right.copy()
    after[np.flatnonzero(right)[:b]] = False
    after[np.flatnonzero(~right)[len(np.flatnonzero(~right)) - c :]] = True
    return after


def ask(
    after: dict[str, ItemScores],
    before: dict[str, ItemScores],
    roles: dict[str, ProbeFacts] | None = None,
    settings: GateSettings = WIDE,
    best: dict[str, ItemScores] | None = None,
    **more: Any,
) -> Verdict:
    roles = roles or {name: TARGET if name == "skill" else GUARD for name in after}
    return judge(after, before, best or before, roles, settings, **more)


FACTS = ones(300, 200)
BEFORE = {"facts": scores("facts", FACTS), "skill": scores("skill", ones(300, 10))}
LEARNT = scores("skill", ones(300, 200))


def row(verdict: Verdict, probe: str, reference: str = "champion") -> Any:
    return next(one for one in verdict.probes if (one.probe, one.reference) == (probe, reference))


def test_a_skill_gained_and_nothing_lost_is_promoted() -> None:
    verdict = ask({"facts": scores("facts", flipped(FACTS, 2, 2)), "skill": LEARNT}, BEFORE)
    assert verdict.decision == "PROMOTE"
    assert verdict.failing == ()
    assert verdict.reasons[0].startswith("skill +63.3 points (90% interval +58.7 to +67.8, 300 items, Holm p 1.000)")
    assert verdict.reasons[1] == "1 of 1 guards kept within their margins."
    assert verdict.reasons[2].startswith("all guards +0.0 points")


def test_a_clear_loss_is_held_with_its_numbers() -> None:
    verdict = ask({"facts": scores("facts", flipped(FACTS, 24, 6)), "skill": LEARNT}, BEFORE)
    assert verdict.decision == "HOLD"
    # b = 24, c = 6: mid-p is P(Bin(30, 1/2) > 24) + P(= 24) / 2 = 0.00044; Holm over all guards, facts and skill.
    assert verdict.reasons[0] == "facts -6.0 points (90% interval -9.2 to -3.2, 300 items, Holm p 0.001)."
    assert row(verdict, "facts").p_holm == pytest.approx(3 * 0.00044, rel=0.02)
    assert row(verdict, "facts").outcome == "harm"


def test_no_significant_drop_is_not_enough_to_promote() -> None:
    # 60 items, 3 lost, 1 gained: no test would call it harm, and a loss of 5 points is far from ruled out.
    facts = ones(60, 40)
    before = {"facts": scores("facts", facts), "skill": BEFORE["skill"]}
    after = {"facts": scores("facts", flipped(facts, 3, 1)), "skill": LEARNT}
    verdict = ask(after, before, settings=replace(WIDE, min_items=40))
    assert row(verdict, "facts").p_harm > 0.2
    assert verdict.decision == "INCONCLUSIVE"
    needed = row(verdict, "facts").items_needed
    assert f"a drop of 5.0 points is not ruled out. About {needed:,} items would decide." in " ".join(verdict.reasons)


def test_a_stricter_level_is_said_with_its_bound() -> None:
    # No flip in 60 items: Tango's bound is -z^2 / (60 + z^2), -4.3 points at 5 % and -11.6 at a twentieth of that.
    still = {"facts": scores("facts", ones(60, 40))}
    lenient = replace(WIDE, min_items=40, probe=0.1, pooled=0.2)
    assert row(ask(still, still, settings=lenient), "facts").outcome == "pass"
    verdict = ask(still, still, settings=lenient, tried=20)
    assert "a drop of 10.0 points is not ruled out: at level 0.0025 the bound is -11.6 points." in verdict.reasons[0]


def test_the_items_asked_for_would_decide_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    facts = ones(80, 60)
    before = {"facts": scores("facts", facts)}
    verdict = ask({"facts": scores("facts", flipped(facts, 4, 4))}, before, settings=replace(WIDE, min_items=40))
    n = row(verdict, "facts").items_needed
    assert n is not None
    passed = 0
    for _ in range(400):
        d = rng.choice([-1, 1, 0], size=n, p=[0.05, 0.05, 0.90])
        after, base = scores("facts", d > 0), scores("facts", d < 0)
        passed += row(ask({"facts": after}, {"facts": base}), "facts").outcome == "pass"
    assert 0.75 < passed / 400 < 0.92


def test_too_few_items_cannot_promote_but_can_hold() -> None:
    small = ones(60, 50)
    before = {"facts": scores("facts", small)}
    verdict = ask({"facts": scores("facts", small)}, before, settings=replace(WIDE, probe=0.3, pooled=0.3))
    assert (verdict.decision, row(verdict, "facts").outcome) == ("INCONCLUSIVE", "too_few")
    assert row(verdict, "facts").items_needed == 200
    assert ask({"facts": scores("facts", flipped(small, 30))}, before).decision == "HOLD"


def test_too_few_clusters_cannot_promote() -> None:
    cluster = tuple(f"g{k // 20}" for k in range(300))
    same = {"facts": scores("facts", FACTS, cluster=cluster)}
    verdict = ask(same, same, settings=replace(WIDE, probe=0.9, pooled=0.9))
    assert (verdict.decision, row(verdict, "facts").clusters) == ("INCONCLUSIVE", 15)
    assert "too few to promote on in 15 clusters" in verdict.reasons[0]
    assert row(verdict, "facts").items_needed == 30 * 20


def test_losses_that_come_in_clusters_are_weaker_evidence() -> None:
    # 16 lost items, each alone: significant. The same 16 as two passages of eight: not.
    after = flipped(FACTS, 16)
    assert ask({"facts": scores("facts", after)}, {"facts": scores("facts", FACTS)}).decision == "HOLD"
    cluster = tuple(f"g{k // 8}" for k in range(300))
    grouped = [{"facts": scores("facts", one, cluster=cluster)} for one in (after, FACTS)]
    verdict = ask(*grouped)
    assert verdict.decision == "INCONCLUSIVE"
    assert row(verdict, "facts").p_harm > 0.05


def test_a_safety_guard_has_the_tight_margin_and_a_probes_own_margin_wins() -> None:
    same = {"facts": scores("facts", FACTS)}
    safety, own = ProbeFacts("guard", True, None), ProbeFacts("guard", True, 0.2)
    settings = replace(WIDE, pooled=0.5, safety=0.001)
    assert ask(same, same, {"facts": GUARD}, settings).decision == "PROMOTE"
    assert ask(same, same, {"facts": safety}, settings).decision == "INCONCLUSIVE"
    assert ask(same, same, {"facts": own}, settings).decision == "PROMOTE"


def test_losses_each_too_small_to_see_are_seen_together() -> None:
    names = [f"g{k}" for k in range(6)]
    before = {name: scores(name, FACTS) for name in names}
    after = {name: scores(name, flipped(FACTS, 7, 2)) for name in names}
    verdict = ask(after, before, settings=replace(WIDE, probe=0.10, pooled=0.01))
    assert all(one.outcome == "pass" for one in verdict.probes)
    assert verdict.pooled is not None
    assert verdict.pooled.outcome == "harm"
    assert verdict.pooled.difference == pytest.approx(-5 / 300)
    assert verdict.decision == "HOLD"


def test_the_tight_pooled_margin_alone_withholds_a_promotion() -> None:
    after = {"facts": scores("facts", flipped(FACTS, 1, 1)), "skill": LEARNT}
    verdict = ask(after, BEFORE, settings=replace(WIDE, pooled=0.005))
    assert verdict.decision == "INCONCLUSIVE"
    assert [one.probe for one in verdict.failing] == ["all guards"]


def test_a_loss_is_judged_relative_and_stays_out_of_the_pool() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(1.6, 2.4, 300)
    before = {"prose": prose(base), "facts": scores("facts", FACTS)}

    def with_rise(rise: float) -> Verdict:
        return ask({**before, "prose": prose(base * (1 + rise + rng.normal(0, 0.004, 300)))}, before)

    risen = with_rise(0.02)
    assert risen.decision == "HOLD"
    assert row(risen, "prose").difference == pytest.approx(-0.02, abs=0.001)
    assert risen.reasons[0].startswith("prose -2.0%")
    assert risen.pooled is not None
    assert risen.pooled.n == 300
    # 0.2 % is a significant rise, and proven to be less than the 0.5 % allowed: tolerated, and said.
    tolerated = with_rise(0.002)
    assert row(tolerated, "prose").p_holm < 0.001
    assert tolerated.decision == "PROMOTE"
    assert any("it is shown to be less than the 0.5% that are allowed" in one for one in tolerated.reasons)


def test_a_loss_that_did_not_move_passes_and_a_loss_of_zero_is_refused() -> None:
    before = {"prose": prose(np.full(300, 1.1)), "facts": scores("facts", FACTS)}
    assert ask(before, before).decision == "PROMOTE"
    with pytest.raises(ProbeError, match="loss on item 'i7' is 0, which has no relative change"):
        zero = prose(np.where(np.arange(300) == 7, 0.0, 1.1))
        ask({**before, "prose": zero}, {**before, "prose": zero})


def test_creep_is_stopped_by_the_best_promoted_score() -> None:
    # Every round loses 2 points, within the margin of 5 against the champion; against the best they add up.
    right = [ones(2000, 1600), ones(2000, 1560), ones(2000, 1520), ones(2000, 1480)]
    states = [{"facts": scores("facts", one)} for one in right]
    settings = replace(WIDE, probe=0.05, ratchet=0.05, pooled=0.05)
    assert ask(states[1], states[0], settings=settings).decision == "PROMOTE"
    assert ask(states[3], states[2], settings=settings).decision == "PROMOTE"
    verdict = ask(states[3], states[2], settings=settings, best=states[0])
    assert verdict.decision == "HOLD"
    assert row(verdict, "facts", "best").outcome == "harm"
    assert "against the best promoted score" in verdict.reasons[0]


def test_the_ratchets_margin_is_the_larger_of_its_own_and_the_probes() -> None:
    # 3 points below the best, where the probe allows 5 against the champion and the ratchet asks 2 or the probe's own.
    best, champion = {"facts": scores("facts", ones(2000, 1600))}, {"facts": scores("facts", ones(2000, 1540))}
    for ratchet, margin in ((0.02, 0.05), (0.08, 0.08)):
        verdict = ask(champion, champion, settings=replace(WIDE, ratchet=ratchet), best=best)
        assert row(verdict, "facts", "best").margin == margin
        assert verdict.decision == "PROMOTE"


def test_every_target_must_rise_and_by_the_gain_asked_for() -> None:
    before = {**BEFORE, "other": scores("other", ones(300, 10))}
    roles = {"facts": GUARD, "skill": TARGET, "other": TARGET}
    kept = {"facts": BEFORE["facts"], "skill": LEARNT}
    assert ask({**kept, "other": scores("other", ones(300, 40))}, before, roles).decision == "PROMOTE"
    unmoved = ask({**kept, "other": before["other"]}, before, roles)
    assert unmoved.decision == "INCONCLUSIVE"
    assert "a gain is not shown. More items would not change this." in unmoved.reasons[0]
    small = ask({**kept, "other": scores("other", ones(300, 22))}, before, roles, replace(WIDE, min_gain=0.05))
    assert small.decision == "INCONCLUSIVE"
    assert "the gain asked for is 5.0 points" in small.reasons[0]
    assert ask({**kept, "other": scores("other", ones(300, 0))}, before, roles).decision == "HOLD"


def test_without_a_target_only_keeping_is_shown_and_without_a_guard_nothing_is() -> None:
    same = {"facts": scores("facts", FACTS)}
    verdict = ask(same, same)
    assert verdict.decision == "PROMOTE"
    assert verdict.reasons[-1].startswith("No probe is a target in this round")
    alone = ask({"skill": LEARNT}, {"skill": BEFORE["skill"]})
    assert alone.decision == "INCONCLUSIVE"
    assert alone.reasons[-1].startswith("No probe is a guard in this round")
    watched = ask(same, same, {"facts": WATCH})
    assert watched.decision == "INCONCLUSIVE"


def test_a_watched_probe_decides_nothing() -> None:
    before = {**BEFORE, "seen": generated("seen", FACTS)}
    after = {"facts": BEFORE["facts"], "skill": LEARNT, "seen": generated("seen", ~FACTS, stopped=np.zeros(300))}
    verdict = ask(after, before, {"facts": GUARD, "skill": TARGET, "seen": WATCH})
    assert verdict.decision == "PROMOTE"
    assert (row(verdict, "seen").outcome, row(verdict, "seen").p_holm) == ("watch", None)


@pytest.mark.parametrize(("column", "label"), [("valid", "format"), ("stopped", "stop")])
def test_lost_form_holds_although_the_score_is_kept(column: str, label: str) -> None:
    before = {"sums": generated("sums", FACTS)}
    worse = ask({"sums": generated("sums", FACTS, **{column: ones(300, 270)})}, before)
    assert worse.decision == "HOLD"
    assert row(worse, f"sums ({label})").outcome == "harm"
    assert not any("collapsed" in one or "lost:" in one for one in worse.reasons)
    gone = ask({"sums": generated("sums", FACTS, **{column: ones(300, 20)})}, before)
    assert gone.decision == "HOLD"
    assert gone.reasons[0].startswith("sums: the ")
    assert "7% of the answers" in gone.reasons[0]
    assert "100% did before" in gone.reasons[0]


def test_a_collapse_on_a_handful_of_items_holds_without_statistics() -> None:
    before = {"sums": generated("sums", ones(3, 3))}
    verdict = ask({"sums": generated("sums", ones(3, 3), stopped=np.zeros(3))}, before)
    assert (verdict.decision, row(verdict, "sums (stop)").outcome) == ("HOLD", "watch")


def test_form_lost_since_the_best_holds_although_the_champion_had_lost_it_already() -> None:
    best = {"sums": generated("sums", ones(300, 220))}
    champion = {"sums": generated("sums", ones(300, 219), valid=ones(300, 240))}
    verdict = ask(champion, champion, best=best)
    assert verdict.decision == "HOLD"
    assert row(verdict, "sums (format)", "best").outcome == "harm"


def test_promotion_waits_for_the_form_of_all_answers_together_not_of_each_probe() -> None:
    names = ("sums", "names")
    before = {name: generated(name, FACTS) for name in names}
    after = {name: generated(name, FACTS, valid=ones(300, 298)) for name in names}
    margins = replace(WIDE, probe=0.05, pooled=0.05)
    assert ask(after, before, settings=replace(margins, format=0.02)).decision == "PROMOTE"
    verdict = ask(after, before, settings=replace(margins, format=0.01))
    assert verdict.decision == "INCONCLUSIVE"
    assert [one.probe for one in verdict.failing] == ["all answers (format)"]


def test_hard_rules_from_elsewhere_hold_and_scores_that_are_not_finite_cannot_get_here() -> None:
    verdict = ask({"facts": BEFORE["facts"], "skill": LEARNT}, BEFORE, hard=["the chat template has changed."])
    assert verdict.decision == "HOLD"
    assert verdict.reasons[0] == "the chat template has changed."
    with pytest.raises(ProbeError, match="NaN or Inf"):
        scores("facts", [1.0, np.nan])


def test_holm_counts_every_comparison_that_could_raise_an_alarm() -> None:
    # b = 9, c = 2 has a mid-p of 0.019: harm when it is the only guard (and the pool), chance among ten.
    small = flipped(FACTS, 9, 2)
    settings = replace(WIDE, probe=0.02, pooled=0.001)
    alone = ask({"g0": scores("g0", small)}, {"g0": scores("g0", FACTS)}, settings=settings)
    assert row(alone, "g0").p_holm == pytest.approx(2 * row(alone, "g0").p_harm)
    assert alone.decision == "HOLD"
    names = [f"g{k}" for k in range(10)]
    before = {name: scores(name, FACTS) for name in names}
    noisy = {name: scores(name, small if name == "g0" else flipped(FACTS, 2, 2)) for name in names}
    among = ask(noisy, before, settings=settings)
    assert row(among, "g0").p_holm == pytest.approx(11 * row(among, "g0").p_harm)
    assert among.decision == "INCONCLUSIVE"
    # Nine guards in which nothing changed could not have raised an alarm.
    still = ask({**before, "g0": scores("g0", small)}, before, settings=settings)
    assert row(still, "g0").p_holm == pytest.approx(2 * row(still, "g0").p_harm)
    assert row(still, "g1").p_holm == 1.0


def test_a_winner_picked_among_many_needs_stronger_proof() -> None:
    after = {"facts": scores("facts", flipped(FACTS, 8, 3)), "skill": LEARNT}
    once = ask(after, BEFORE)
    picked = ask(after, BEFORE, tried=20)
    assert once.decision == "PROMOTE"
    assert picked.decision == "INCONCLUSIVE"
    assert row(picked, "facts").lower_bound < row(once, "facts").lower_bound
    assert row(picked, "facts").ci90 == row(once, "facts").ci90
    assert picked.reasons[-1] == "Picked among 20 tried: each bound is taken at level 0.0025."


def test_sides_that_were_not_measured_alike_are_refused() -> None:
    after = {"facts": scores("facts", FACTS), "skill": LEARNT}
    roles = {"facts": GUARD, "skill": TARGET}
    with pytest.raises(ProbeError, match="probe 'skill' has no scores for the champion"):
        judge(after, {"facts": BEFORE["facts"]}, BEFORE, roles, WIDE)
    with pytest.raises(ProbeError, match="template"):
        ask({**after, "facts": scores("facts", FACTS, template_digest="other")}, BEFORE)
    with pytest.raises(ProbeError, match="items"):
        ask(after, BEFORE, best={**BEFORE, "facts": scores("facts", FACTS, items_digest="other")})


def test_a_score_outside_zero_and_one_keeps_its_own_unit() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(20, 3, 300)
    before = {"bleu": scores("bleu", base), "facts": scores("facts", FACTS)}
    after = {**before, "bleu": scores("bleu", base - 1 + rng.normal(0, 1, 300))}
    verdict = ask(after, before, {"bleu": ProbeFacts("guard", False, 0.5), "facts": GUARD})
    assert verdict.reasons[0].startswith("bleu -1.")
    assert " points" not in verdict.reasons[0]
    assert verdict.pooled is not None
    assert verdict.pooled.n == 300


def test_a_verdict_is_plain_json_with_every_field() -> None:
    before = {**BEFORE, "sums": generated("sums", FACTS), "prose": prose(np.full(300, 1.1))}
    body = ask({**before, "facts": scores("facts", flipped(FACTS, 20))}, before).to_json()
    canonical_json(body)
    assert set(body) == {"decision", "reasons", "pooled", "probes"}
    wanted = {"probe", "role", "safety", "kind", "reference", "n", "clusters", "samples", "noise_share", "before"}
    wanted |= {"after", "difference", "ci90", "lower_bound", "level", "bootstrap_bound", "flip_share", "unit"}
    wanted |= {"smallest_visible_drop", "margin", "p_harm", "p_holm", "outcome"}
    assert all(set(one) == wanted | {"items_needed", "reason"} for one in (body["pooled"], *body["probes"]))


def test_one_cluster_is_plain_json_too() -> None:
    whole = {"prose": replace(prose(np.full(3, 1.1)), cluster=("a", "a", "a"))}
    body = ask(whole, whole).to_json()
    canonical_json(body)
    assert body["decision"] == "INCONCLUSIVE"


def test_a_small_probe_can_promote_at_wide_margins() -> None:
    # What a demonstration on a CPU can afford: nothing flips, 60 items and a margin of 5 points, or 25 and 10.
    for n, margin, passes in ((60, 0.05, True), (51, 0.05, False), (25, 0.10, True), (24, 0.10, False)):
        same = {"facts": scores("facts", ones(n, n // 2))}
        settings = replace(WIDE, probe=margin, pooled=margin, min_items=20, min_clusters=20)
        assert (ask(same, same, settings=settings).decision == "PROMOTE") is passes


def _draw(rng: np.random.Generator, n: int, psi: float, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Before and after of n items of which psi flip, with a true drop of `loss`."""
    d = rng.choice([-1, 1, 0], size=n, p=[(psi + loss) / 2, (psi - loss) / 2, 1 - psi])
    kept = rng.uniform(size=n) < 0.6
    return np.where(d == 0, kept, d < 0), np.where(d == 0, kept, d > 0)


def _verdicts(losses: list[float], runs: int, settings: GateSettings) -> list[Verdict]:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(runs):
        drawn = {f"g{k}": _draw(rng, 300, 0.1, loss) for k, loss in enumerate(losses)}
        before = {name: scores(name, one[0]) for name, one in drawn.items()}
        found.append(ask({name: scores(name, one[1]) for name, one in drawn.items()}, before, settings=settings))
    return found


def test_five_unharmed_guards_are_held_at_most_once_in_twenty() -> None:
    held = np.mean([one.decision == "HOLD" for one in _verdicts([0.0] * 5, 400, WIDE)])
    assert held < 0.07


def test_a_guard_that_lost_its_whole_margin_is_promoted_at_most_once_in_twenty() -> None:
    promoted = np.mean([one.decision == "PROMOTE" for one in _verdicts([0.05], 400, replace(WIDE, pooled=0.2))])
    assert promoted < 0.07


def test_a_pass_needs_the_bootstrap_where_a_t_bound_is_all_there_is() -> None:
    # A loss probe 0.2 % better but for three documents of 300 that are 40 % worse: the t bound rules out 0.5 %.
    base = np.ones(300)
    worse = base - np.full(300, 0.0043) + np.random.default_rng(3).normal(scale=0.001, size=300)
    worse[[10, 100, 200]] = 1.4
    verdict = ask({"prose": prose(worse)}, {"prose": prose(base)})
    one = row(verdict, "prose")
    assert one.bootstrap_bound is not None
    assert one.lower_bound > -0.005 >= one.bootstrap_bound
    assert one.outcome == "undecided"
    assert "the t bound of -0.36%" in one.reason
    assert "the bootstrap's of -0.52%" in one.reason


def test_early_looks_spend_a_fifth_of_alpha_and_the_last_look_the_rest() -> None:
    after, before = {"facts": scores("facts", flipped(FACTS, 3))}, {"facts": scores("facts", FACTS)}
    early, last = (row(ask(after, before, look=look), "facts") for look in ("early", "last"))
    assert (early.level, last.level) == (pytest.approx(0.01), pytest.approx(0.04))
    assert last.lower_bound == pytest.approx(stats.tango_lower_bound(3, 0, 300, 0.04))
    assert early.lower_bound < last.lower_bound
    assert last.p_harm == pytest.approx(stats.mcnemar(3, 0) / 0.8)


def test_a_large_loss_is_held_early_and_a_small_one_is_not() -> None:
    before = {"facts": scores("facts", FACTS[:150])}
    assert ask({"facts": scores("facts", flipped(FACTS[:150], 30))}, before, look="early").decision == "HOLD"
    assert ask({"facts": scores("facts", flipped(FACTS[:150], 6))}, before, look="early").decision == "INCONCLUSIVE"
