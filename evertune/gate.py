"""The gate: promote, hold, or say that the evidence is too thin. Formulas and reasons: docs/gate.md.

PROMOTE needs proof that nothing was lost (non-inferiority: a lower bound above -margin), HOLD needs proof that
something was (a significant harm test after Holm's correction, or a broken hard rule). What is neither is
INCONCLUSIVE, with the number of items that would decide. "No significant drop" never promotes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evertune.errors import ProbeError
from evertune.measure import stats
from evertune.probe.scores import ItemScores, check_paired

Decision = Literal["PROMOTE", "HOLD", "INCONCLUSIVE"]
Outcome = Literal["pass", "harm", "too_few", "undecided", "watch"]
Reference = Literal["champion", "best"]
# A model that ended most of its answers and now ends almost none has lost its stop token: no statistics are needed.
STOP_RATE_HAD, STOP_RATE_LOST = 0.5, 0.1


@dataclass(frozen=True)
class GateSettings:
    """The recipe's `gate` as plain numbers; margins in score units, `loss` relative."""

    alpha: float
    pooled: float
    probe: float
    safety: float
    loss: float
    format: float
    ratchet: float
    min_gain: float
    min_items: int
    min_clusters: int

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GateSettings":
        """From the recipe's `gate` as a mapping."""
        names = ("alpha", "min_gain", "min_items", "min_clusters")
        return cls(**body["margin"], **{name: body[name] for name in names})


@dataclass(frozen=True)
class ProbeFacts:
    """What the gate must know of a probe."""

    role: str
    safety: bool
    margin: float | None


@dataclass(frozen=True)
class Evidence:
    """One comparison: a probe (or its format, its stop rate, or all guards pooled) against one reference.

    Differences are in score units, better is positive; for bits per byte they are relative to the reference.
    `lower_bound` is one-sided at the level promotion uses, `ci90` two-sided.
    """

    probe: str
    role: str
    safety: bool
    kind: str
    reference: Reference
    n: int
    clusters: int
    before: float
    after: float
    difference: float
    ci90: tuple[float, float]
    lower_bound: float
    flip_share: float
    smallest_visible_drop: float
    margin: float | None
    p_harm: float
    p_holm: float | None
    outcome: Outcome
    items_needed: int | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The decision with everything it rests on."""

    decision: Decision
    reasons: tuple[str, ...]
    pooled: Evidence | None
    probes: tuple[Evidence, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: decision, reasons, pooled, probes."""
        return {
            "decision": self.decision,
            "reasons": list(self.reasons),
            "pooled": _plain(self.pooled) if self.pooled else None,
            "probes": [_plain(one) for one in self.probes],
        }


def judge(
    candidate: Mapping[str, ItemScores],
    champion: Mapping[str, ItemScores],
    best: Mapping[str, ItemScores],
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    *,
    tried: int = 1,
    hard: Sequence[str] = (),
) -> Verdict:
    """Judge a candidate by its item scores.

    Args:
        candidate: scores by probe.
        champion: scores of the last promoted model, on the same items.
        best: scores of the best promoted model so far, by probe: small losses cannot add up against it.
        probes: the probes that count, with their roles.
        settings: levels, margins and least numbers.
        tried: candidates among which this one was picked (a rescue scan); promotion then needs level alpha / tried.
        hard: broken hard rules found elsewhere, as sentences: each holds the candidate by itself.

    Raises:
        ProbeError: a probe is missing on one side, or the sides differ in items or template.
    """
    level = settings.alpha / tried
    for name in probes:
        for side, scores in (("candidate", candidate), ("champion", champion), ("best", best)):
            if name not in scores:
                raise ProbeError(f"probe '{name}' has no scores for the {side}.")
    evidence = [
        one
        for name, facts in probes.items()
        for one in _compare(candidate, champion, best, name, facts, settings, level)
    ]
    evidence = _with_holm(evidence, settings)
    pooled = _pool(candidate, champion, probes, settings, level)
    broken = [*hard, *_lost_stop_tokens(candidate, champion, probes)]
    decision = _decide(evidence, pooled, broken)
    return Verdict(
        decision, tuple(_reasons(decision, evidence, pooled, broken, settings, tried)), pooled, tuple(evidence)
    )


def _compare(
    candidate: Mapping[str, ItemScores],
    champion: Mapping[str, ItemScores],
    best: Mapping[str, ItemScores],
    name: str,
    facts: ProbeFacts,
    settings: GateSettings,
    level: float,
) -> list[Evidence]:
    """A probe against the champion, against the best where that is another, and its form and stop rate."""
    after, before, top = candidate[name], champion[name], best[name]
    check_paired(after, before)
    check_paired(after, top)
    own = _own_margin(after, facts, settings)
    found = [_evidence(after, before, facts, settings, level, margin=own, reference="champion")]
    if facts.role == "guard" and not np.array_equal(top.score, before.score):
        ratchet = max(own, settings.ratchet) if after.direction == "higher" else max(own, settings.loss)
        found.append(_evidence(after, top, facts, settings, level, margin=ratchet, reference="best"))
    if facts.role in ("guard", "target") and after.valid is not None and before.valid is not None:
        found += _form_evidence(after, before, facts, settings, level)
    return found


def _form_evidence(
    after: ItemScores, before: ItemScores, facts: ProbeFacts, settings: GateSettings, level: float
) -> list[Evidence]:
    """Form and stop rate: they can hold a candidate, but a promotion does not wait for them."""
    found = []
    for label, column in (("format", "valid"), ("stop", "stopped")):
        sides = [
            replace(one, score=getattr(one, column), weight=np.ones(len(one.ids)), valid=None, stopped=None)
            for one in (after, before)
        ]
        watched = replace(facts, role="form")
        found.append(
            _evidence(
                replace(sides[0], probe=f"{after.probe} ({label})"),
                sides[1],
                watched,
                settings,
                level,
                margin=settings.format,
                reference="champion",
            )
        )
    return found


def _evidence(
    after: ItemScores,
    before: ItemScores,
    facts: ProbeFacts,
    settings: GateSettings,
    level: float,
    *,
    margin: float | None,
    reference: Reference,
) -> Evidence:
    d = _differences(after, before)
    found = _compare_items(d, after.cluster, level, settings.alpha)
    clusters = len(set(after.cluster))
    few = len(d) < settings.min_items or clusters < settings.min_clusters
    evidence = Evidence(
        probe=after.probe,
        role=facts.role,
        safety=facts.safety,
        kind=after.kind,
        reference=reference,
        n=len(d),
        clusters=clusters,
        before=before.value,
        after=after.value,
        difference=found.difference,
        ci90=found.ci90,
        lower_bound=found.lower_bound,
        flip_share=float(np.mean(d != 0)),
        smallest_visible_drop=stats.smallest_visible_drop(found.variance, len(d), settings.alpha),
        margin=margin,
        p_harm=found.p_harm,
        p_holm=None,
        outcome="watch",
        items_needed=None,
        reason="",
    )
    outcome = _outcome(evidence, few, settings)
    needed = (
        _items_needed(evidence, found.variance, few, settings, level) if outcome in ("too_few", "undecided") else None
    )
    return replace(evidence, outcome=outcome, items_needed=needed)


@dataclass(frozen=True)
class _Comparison:
    difference: float
    ci90: tuple[float, float]
    lower_bound: float
    p_harm: float
    variance: float


def _compare_items(d: NDArray[np.float64], clusters: Sequence[str], level: float, alpha: float) -> _Comparison:
    """Tango's bound and McNemar's test for independent binary items, a cluster-robust t otherwise."""
    n = len(d)
    if np.all(np.isin(d, (-1, 0, 1))) and len(set(clusters)) == n:
        b, c = int(np.sum(d < 0)), int(np.sum(d > 0))
        # At least one flip more than was seen, so that a variance of zero is never claimed from few items.
        variance = max((b + c + 1) / (n + 2) - ((c - b) / n) ** 2, 1 / (n + 2))
        interval = stats.tango_interval(b, c, n, 0.05)
        return _Comparison((c - b) / n, interval, stats.tango_bound(b, c, n, level), stats.mcnemar_p(b, c), variance)
    estimate = stats.cluster_mean(d, clusters)
    if estimate.standard_error == 0:
        # Nothing moved at all: as careful as with binary items that did not flip.
        bound = stats.tango_bound(0, 0, n, level) if estimate.mean == 0 else estimate.mean
        return _Comparison(estimate.mean, (bound, estimate.mean), bound, estimate.p_below_zero(), 1 / (n + 2))
    # Of the mean, times n: with clusters it is what one more item is worth.
    variance = estimate.standard_error**2 * n
    if not np.isfinite(variance):
        return _Comparison(estimate.mean, (-1.0, 1.0), -1.0, 1.0, 1.0)
    return _Comparison(estimate.mean, estimate.interval(0.05), estimate.bound(level), estimate.p_below_zero(), variance)


def _differences(after: ItemScores, before: ItemScores) -> NDArray[np.float64]:
    """Per item, better is positive; for a loss, relative to the reference's loss of the item."""
    if after.direction == "higher":
        return after.score - before.score
    if np.any(before.score <= 0):
        raise ProbeError(
            f"probe '{after.probe}': the reference has an item with a loss of 0, which has no relative change."
        )
    return (before.score - after.score) / before.score


def _own_margin(scores: ItemScores, facts: ProbeFacts, settings: GateSettings) -> float:
    if facts.margin is not None:
        return facts.margin
    if facts.safety:
        return settings.safety
    return settings.probe if scores.direction == "higher" else settings.loss


def _outcome(one: Evidence, few: bool, settings: GateSettings) -> Outcome:
    """Before Holm's correction: can this comparison pass? Harm is decided over all of them together."""
    if one.role == "watch":
        return "watch"
    if one.role == "target":
        passed = one.lower_bound > 0 and one.difference >= settings.min_gain
    else:
        passed = one.margin is not None and one.lower_bound > -one.margin
    if one.role == "form":
        return "pass" if passed else "undecided"
    if few:
        return "too_few"
    return "pass" if passed else "undecided"


def _items_needed(one: Evidence, variance: float, few: bool, settings: GateSettings, level: float) -> int | None:
    target = one.role == "target"
    distance = one.difference if target else one.difference + (one.margin or 0.0)
    needed = stats.items_needed(variance, distance, level)
    if needed is None:
        return None
    return max(needed, settings.min_items if few else 0, one.n + 1 if not few else 0)


def _with_holm(evidence: Sequence[Evidence], settings: GateSettings) -> list[Evidence]:
    """Adjust the harm tests of all that count together, and mark what is harmed.

    A significant drop that is proven to be smaller than the margin is what the margin allows, not harm.
    """
    tested = [i for i, one in enumerate(evidence) if one.role != "watch"]
    adjusted = dict(zip(tested, stats.holm([evidence[i].p_harm for i in tested]), strict=True))
    found = []
    for i, one in enumerate(evidence):
        if i not in adjusted:
            found.append(replace(one, reason=_describe(one)))
            continue
        tolerated = one.role != "target" and one.margin is not None and one.lower_bound > -one.margin
        harmed = adjusted[i] <= settings.alpha and not tolerated
        outcome: Outcome = "harm" if harmed else one.outcome
        changed = replace(one, p_holm=adjusted[i], outcome=outcome, items_needed=None if harmed else one.items_needed)
        found.append(replace(changed, reason=_describe(changed)))
    return found


def _pool(
    candidate: Mapping[str, ItemScores],
    champion: Mapping[str, ItemScores],
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    level: float,
) -> Evidence | None:
    """All guards scored in [0, 1] as one, every item with equal weight: the tight margin."""
    names = [name for name, facts in probes.items() if facts.role == "guard" and candidate[name].direction == "higher"]
    if not names:
        return None
    sides = [_pooled_scores([side[name] for name in names]) for side in (candidate, champion)]
    facts = ProbeFacts(role="guard", safety=False, margin=settings.pooled)
    one = _evidence(sides[0], sides[1], facts, settings, level, margin=settings.pooled, reference="champion")
    return replace(one, reason=_describe(one))


def _pooled_scores(parts: Sequence[ItemScores]) -> ItemScores:
    return replace(
        parts[0],
        probe="all guards",
        kind="pooled",
        ids=tuple(f"{one.probe}/{item}" for one in parts for item in one.ids),
        score=np.concatenate([one.score for one in parts]),
        cluster=tuple(f"{one.probe}/{cluster}" for one in parts for cluster in one.cluster),
        prediction=(),
        expected=(),
        weight=np.concatenate([np.ones(len(one.ids)) for one in parts]),
        valid=None,
        stopped=None,
        gap=None,
    )


def _lost_stop_tokens(
    candidate: Mapping[str, ItemScores], champion: Mapping[str, ItemScores], probes: Mapping[str, ProbeFacts]
) -> list[str]:
    broken = []
    for name, facts in probes.items():
        after, before = candidate[name].stopped, champion[name].stopped
        if facts.role == "watch" or after is None or before is None:
            continue
        if np.mean(before) >= STOP_RATE_HAD and np.mean(after) <= STOP_RATE_LOST:
            broken.append(
                f"{name}: the stop token is lost: {np.mean(after):.0%} of the answers end by themselves, "
                f"{np.mean(before):.0%} did before."
            )
    return broken


def _decide(evidence: Sequence[Evidence], pooled: Evidence | None, broken: Sequence[str]) -> Decision:
    if broken or any(one.outcome == "harm" for one in evidence):
        return "HOLD"
    counted = [one for one in evidence if one.role in ("guard", "target")] + ([pooled] if pooled else [])
    return "PROMOTE" if all(one.outcome == "pass" for one in counted) else "INCONCLUSIVE"


def _reasons(
    decision: Decision,
    evidence: Sequence[Evidence],
    pooled: Evidence | None,
    broken: Sequence[str],
    settings: GateSettings,
    tried: int,
) -> list[str]:
    """Plain sentences, the ones that decided first."""
    reasons = [*broken]
    counted = [one for one in evidence if one.role in ("guard", "target")] + ([pooled] if pooled else [])
    if decision == "HOLD":
        reasons += [one.reason for one in evidence if one.outcome == "harm"]
    elif decision == "INCONCLUSIVE":
        reasons += [f"{one.reason}{_needed(one)}" for one in counted if one.outcome in ("too_few", "undecided")]
    else:
        guards = [
            one for one in counted if one.role == "guard" and one.kind != "pooled" and one.reference == "champion"
        ]
        reasons += [one.reason for one in counted if one.role == "target"]
        reasons.append(f"{len(guards)} of {len(guards)} guards kept within their margins.")
        if pooled is not None:
            reasons.append(pooled.reason)
    if not any(one.role == "target" for one in counted):
        reasons.append("No probe is a target in this round: only that nothing was lost is shown.")
    if tried > 1:
        reasons.append(f"Picked among {tried} tried: promotion needed level {settings.alpha / tried:.3g}.")
    return reasons


def _describe(one: Evidence) -> str:
    """One sentence with the numbers, in points or in per cent of the reference's loss."""
    unit, scale = ("%", 100.0) if one.kind == "bits_per_byte" else (" points", 100.0)
    low, high = one.ci90
    against = "" if one.reference == "champion" else " against the best promoted score"
    p = "" if one.p_holm is None else f", Holm p {one.p_holm:.3f}" if one.p_holm >= 0.001 else ", Holm p < 0.001"
    margin = ""
    if one.role == "guard" and one.margin is not None and one.outcome in ("undecided", "too_few"):
        margin = f"; a drop of {one.margin * scale:.1f}{unit} is not ruled out"
    if one.outcome == "too_few":
        margin = "; too few items to promote on"
    return (
        f"{one.probe} {one.difference * scale:+.1f}{unit}{against} (90% interval {low * scale:+.1f} to "
        f"{high * scale:+.1f}, {one.n} items{p}){margin}."
    )


def _needed(one: Evidence) -> str:
    if one.items_needed is None:
        return " More items would not change this."
    return f" About {one.items_needed:,} items would decide."


def _plain(one: Evidence) -> dict[str, Any]:
    return {**asdict(one), "ci90": list(one.ci90)}
