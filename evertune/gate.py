"""The gate: promote, hold, or say that the evidence is too thin. Formulas and reasons: docs/gate.md.

PROMOTE needs proof that nothing was lost (non-inferiority: a lower bound above -margin), HOLD needs proof that
something was (a significant harm test after Holm's correction, or a broken hard rule). What is neither is
INCONCLUSIVE, with the number of items that would decide. "No significant drop" never promotes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
# `whole`: all items, looked at once. `early`: some of them, with more to come. `last`: all, after early looks.
Look = Literal["whole", "early", "last"]
Unit = Literal["points", "percent", "score"]
Scores = Mapping[str, ItemScores]

# A model whose answers mostly ended (or had the form asked for) and now hardly ever do is broken: no statistics needed.
HAD, LOST = 0.5, 0.1
# Part of alpha that early looks may spend, all of them together; the last look has the rest.
EARLY_SHARE = 0.2
FORMS = (
    ("format", "valid", "the answer format has collapsed", "have the form that was asked for"),
    ("stop", "stopped", "the stop token is lost", "end by themselves"),
)


@dataclass(frozen=True)
class GateSettings:
    """The recipe's `gate` as plain numbers.

    Attributes:
        alpha: one-sided error of each test.
        pooled, probe, safety, format, ratchet: margins in score units, 0.03 is 3 points: of all guards together, of
            each, of each safety guard, of format and stop rate, and against the best promoted score.
        loss: margin of a lower-is-better guard, relative.
        min_gain: the mean gain a target must reach.
        min_items, min_clusters: with fewer, a probe cannot promote.
    """

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

    def at_verdict(self, number: int) -> "GateSettings":
        """For the k-th verdict of a run that spends its alpha: 6 alpha / (pi k)^2, which sums to alpha over all k."""
        return replace(self, alpha=self.alpha * 6 / (math.pi * number) ** 2)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GateSettings":
        """From the recipe's `gate` as a mapping."""
        names = ("alpha", "min_gain", "min_items", "min_clusters")
        return cls(**body["margin"], **{name: body[name] for name in names})


@dataclass(frozen=True)
class ProbeFacts:
    """What the gate must know of a probe: its role in this round, `guard`, `target` or `watch`, and its own margin."""

    role: str
    safety: bool
    margin: float | None


@dataclass(frozen=True)
class Evidence:
    """One comparison: a probe, its answers' form, or all guards pooled, against one reference.

    Attributes:
        probe, kind, safety: of the probe; kind is `pooled` where several are taken together.
        role: `guard`, `target`, `watch`, or `form` for format and stop rate.
        reference: the champion, or the best promoted scores.
        n, clusters: items, and groups of items that are not independent.
        samples, noise_share: answers sampled for each item, and the share of the variance of their mean change that
            more of them would remove.
        before, after: mean scores of reference and candidate.
        difference: better is positive; in score units, or relative to the reference's loss.
        unit: what 0.01 of it is: a `points`, a `percent` of the loss, or 0.01 of a `score` outside [0, 1].
        lower_bound, level: one-sided, at the level that promotion uses here; `ci90` is two-sided.
        bootstrap_bound: at the same level, the check of a t bound that would do; else None, and where clusters are few.
        flip_share: share of items whose score changed.
        smallest_visible_drop: true drop that the harm test finds with power 80 %, before Holm.
        margin: drop that must be ruled out; None for a target or watched probe.
        p_harm, p_holm: one-sided p-value of harm, divided by the part of alpha that this look has, plain and adjusted
            over the verdict; None where it is not tested.
        outcome: `watch` where nothing waits for it and no harm is shown.
        items_needed: items that would decide with power 80 % if the truth is what was seen; None when decided, or
            when no number would.
        reason: one sentence with the numbers.
    """

    probe: str
    role: str
    safety: bool
    kind: str
    reference: Reference
    n: int
    clusters: int
    samples: int
    noise_share: float
    before: float
    after: float
    difference: float
    unit: Unit
    ci90: tuple[float, float]
    lower_bound: float
    level: float
    bootstrap_bound: float | None
    flip_share: float
    smallest_visible_drop: float
    margin: float | None
    p_harm: float
    p_holm: float | None
    outcome: Outcome
    items_needed: int | None
    reason: str

    @property
    def is_awaited(self) -> bool:
        """A promotion needs this comparison to pass."""
        return self.role in ("guard", "target") or self.kind == "pooled"

    @property
    def is_within_margin(self) -> bool:
        """A drop as large as the margin is ruled out, by both bounds where there are two."""
        return self.margin is not None and self.least_bound > -self.margin

    @property
    def least_bound(self) -> float:
        """The lower of the bound and its check."""
        return self.lower_bound if self.bootstrap_bound is None else min(self.lower_bound, self.bootstrap_bound)


@dataclass(frozen=True)
class Verdict:
    """The decision with everything it rests on.

    `pooled` is all guards together; `probes` every other comparison, format and stop rate included.
    """

    decision: Decision
    reasons: tuple[str, ...]
    pooled: Evidence | None
    probes: tuple[Evidence, ...]

    @property
    def failing(self) -> tuple[Evidence, ...]:
        """What stands between the candidate and a promotion."""
        return _failing([*([self.pooled] if self.pooled else []), *self.probes])

    def to_json(self) -> dict[str, Any]:
        """Plain values: decision, reasons, pooled, probes."""
        return {
            "decision": self.decision,
            "reasons": list(self.reasons),
            "pooled": _plain(self.pooled) if self.pooled else None,
            "probes": [_plain(one) for one in self.probes],
        }


def judge(
    candidate: Scores,
    champion: Scores,
    best: Scores,
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    *,
    tried: int = 1,
    hard: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    look: Look = "whole",
) -> Verdict:
    """Judge a candidate by its item scores.

    Args:
        candidate: scores by probe.
        champion: scores of the last promoted model, on the same items.
        best: scores of the best promoted model so far, by probe: small losses cannot add up against it.
        probes: the probes that count, with their roles.
        settings: levels, margins and least numbers.
        tried: candidates among which this one was picked by its scores (a rescue scan). Each bound is then taken at
            level alpha / tried, so that the chance of promoting any bad one of them stays alpha (Bonferroni).
        hard: broken hard rules found elsewhere, as sentences: each holds the candidate by itself.
        shares: by probe, the share of alpha that is left for the bound against the best (`ratchet.py`); 1 when absent.
        look: whether more items follow, or early looks went before. Early looks use bounds that hold at every number of
            items, and have a fifth of alpha together; the last look has the rest. Losses are measured whole, once.

    Raises:
        ProbeError: a probe is missing on one side, or the sides differ in items or template. Scores that are not
            finite cannot get here: `ItemScores` refuses them.
    """
    _check_sides(candidate, champion, best, probes)
    left = {name: (shares or {}).get(name, 1.0) for name in probes}
    asked = list(_ask_pooled(candidate, champion, best, probes, settings, left))
    for name, facts in probes.items():
        asked += _ask(candidate[name], champion[name], best[name], facts, settings, left[name])
    level = settings.alpha / tried
    evidence = _adjust([_answer(one, settings, level, look) for one in asked], settings)
    broken = [*hard, *_collapses(candidate, champion, probes)]
    decision = _decide(evidence, broken)
    reasons = _reasons(decision, evidence, broken, level, tried)
    pooled = next((one for one in evidence if one.kind == "pooled" and one.role == "guard"), None)
    return Verdict(decision, tuple(reasons), pooled, tuple(one for one in evidence if one is not pooled))


def compare_scores(after: ItemScores, before: ItemScores, *, level: float) -> tuple[stats.Comparison, Unit]:
    """One table of scores against another, item by item, in the unit the gate compares them in.

    Raises:
        ProbeError: the tables are not of the same items, asked alike.
    """
    check_paired(after, before)
    pair = _pair(after, before)
    return stats.compare_paired(pair.d, pair.clusters, level=level, bounded=pair.unit == "points"), pair.unit


def shown_gain(after: ItemScores, before: ItemScores, level: float) -> float:
    """Lower bound of the gain of one table of scores over another; raises as `compare_scores`."""
    return compare_scores(after, before, level=level)[0].lower_bound


@dataclass(frozen=True)
class _Pair:
    """Two models on the same items; d is the change of each item, better is positive.

    Where items were sampled several times, d is the mean change over an item's samples, and `noise_share` the part of
    the variance of d that is left from sampling: sigma^2 / K of omega^2 + sigma^2 / K.
    """

    probe: str
    kind: str
    unit: Unit
    before: float
    after: float
    d: NDArray[np.float64]
    clusters: tuple[str, ...]
    samples: int = 1
    noise_share: float = 0.0


@dataclass(frozen=True)
class _Question:
    """A comparison to be made: what is compared, in which role, the drop to rule out, at which share of the level."""

    pair: _Pair
    role: str
    margin: float | None
    reference: Reference = "champion"
    safety: bool = False
    share: float = 1.0


def _check_sides(candidate: Scores, champion: Scores, best: Scores, probes: Mapping[str, ProbeFacts]) -> None:
    for name in probes:
        for side, scores in (("candidate", candidate), ("champion", champion), ("best", best)):
            if name not in scores:
                raise ProbeError(f"probe '{name}' has no scores for the {side}.", remedy="Score it on that checkpoint.")
            check_paired(candidate[name], scores[name])


def _ask(
    after: ItemScores,
    before: ItemScores,
    best: ItemScores,
    facts: ProbeFacts,
    settings: GateSettings,
    share: float,
) -> Iterator[_Question]:
    """A probe against the champion, a guard also against the best where that is another; and its answers' form."""
    if facts.role != "guard":
        yield _Question(_pair(after, before), facts.role, None)
    else:
        own = own_margin(after.direction, facts, settings)
        yield _Question(_pair(after, before), "guard", own, safety=facts.safety)
        if not np.array_equal(best.score, before.score):
            # The ratchet is in points; for a relative loss the probe's own margin is the cumulative one too.
            cumulative = max(own, settings.ratchet) if after.direction == "higher" else own
            yield _Question(_pair(after, best), "guard", cumulative, "best", facts.safety, share)
    if facts.role == "watch":
        return
    for label, column, _, _ in FORMS:
        form = _form_pair(after, before, label, column)
        if form is None:
            continue
        yield _Question(form, "form", settings.format)
        against_best = _form_pair(after, best, label, column)
        if against_best is not None and not np.array_equal(getattr(best, column), getattr(before, column)):
            yield _Question(against_best, "form", max(settings.format, settings.ratchet), "best")


def _ask_pooled(
    candidate: Scores,
    champion: Scores,
    best: Scores,
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    shares: Mapping[str, float],
) -> Iterator[_Question]:
    """All guards scored in [0, 1] as one, every item with equal weight: the tight margins. And all answers' form."""
    names = [name for name, facts in probes.items() if facts.role == "guard"]
    pairs = {name: _pair(candidate[name], champion[name]) for name in names}
    names = [name for name in names if pairs[name].unit == "points"]
    if names:
        yield _Question(_pool("all guards", [pairs[name] for name in names]), "guard", settings.pooled)
        if any(not np.array_equal(best[name].score, champion[name].score) for name in names):
            against_best = _pool("all guards", [_pair(candidate[name], best[name]) for name in names])
            cumulative, share = max(settings.pooled, settings.ratchet), min(shares[name] for name in names)
            yield _Question(against_best, "guard", cumulative, "best", share=share)
    counted = [name for name, facts in probes.items() if facts.role != "watch"]
    for label, column, _, _ in FORMS:
        forms = [_form_pair(candidate[name], champion[name], label, column) for name in counted]
        if found := [one for one in forms if one is not None]:
            yield _Question(_pool(f"all answers ({label})", found), "form", settings.format)


def _pair(after: ItemScores, before: ItemScores) -> _Pair:
    """Differences per item; for a loss, relative to the reference's loss of the item."""
    d = after.score - before.score
    unit: Unit = "points"
    if after.direction == "lower":
        if np.any(before.score <= 0):
            raise ProbeError(
                f"probe '{after.probe}': the reference's loss on item {before.ids[int(np.argmin(before.score))]!r} is "
                f"{before.score.min():g}, which has no relative change.",
                remedy="Use a score where higher is better, or leave the item out.",
            )
        d, unit = -d / before.score, "percent"
    elif any(one.score.min() < 0 or one.score.max() > 1 for one in (after, before)):
        unit = "score"
    d_I, noise = _by_item(d, after.samples)
    clusters = after.cluster[:: after.samples]
    return _Pair(after.probe, after.kind, unit, before.value, after.value, d_I, clusters, after.samples, noise)


def _by_item(d: NDArray[np.float64], samples: int) -> tuple[NDArray[np.float64], float]:
    """Mean change of each item over its samples, and the share of their variance that is noise of sampling."""
    if samples == 1:
        return d, 0.0
    d_IK = d.reshape(-1, samples)
    d_I = d_IK.mean(axis=1)
    total = float(d_I.var(ddof=1)) if len(d_I) > 1 else 0.0
    within = float(d_IK.var(axis=1, ddof=1).mean()) / samples
    return d_I, min(1.0, within / total) if total > 0 else 0.0


def _form_pair(after: ItemScores, before: ItemScores, label: str, column: str) -> _Pair | None:
    """Whether each answer had the form, or ended, as a score of 0 or 1; None where nothing is generated."""
    now, then = getattr(after, column), getattr(before, column)
    if now is None or then is None:
        return None
    d_I, noise = _by_item(now.astype(np.float64) - then.astype(np.float64), after.samples)
    return _Pair(
        probe=f"{after.probe} ({label})",
        kind=after.kind,
        unit="points",
        before=float(then.mean()),
        after=float(now.mean()),
        d=d_I,
        clusters=after.cluster[:: after.samples],
        samples=after.samples,
        noise_share=noise,
    )


def _pool(name: str, pairs: Sequence[_Pair]) -> _Pair:
    sizes = [len(one.d) for one in pairs]
    return _Pair(
        probe=name,
        kind="pooled",
        unit="points",
        before=float(np.average([one.before for one in pairs], weights=sizes)),
        after=float(np.average([one.after for one in pairs], weights=sizes)),
        d=np.concatenate([one.d for one in pairs]),
        clusters=tuple(f"{one.probe}/{cluster}" for one in pairs for cluster in one.clusters),
        samples=max(one.samples for one in pairs),
    )


def own_margin(direction: Literal["higher", "lower"], facts: ProbeFacts, settings: GateSettings) -> float:
    """How far a guard may fall: in points, or relative where lower is better."""
    if facts.margin is not None:
        return facts.margin
    if facts.safety:
        return settings.safety
    return settings.probe if direction == "higher" else settings.loss


def _answer(asked: _Question, settings: GateSettings, level: float, look: Look) -> Evidence:
    """Compare, before any correction: `harm` is decided over all comparisons together, in `_adjust`."""
    pair, n = asked.pair, len(asked.pair.d)
    level *= asked.share
    bounded, spent = pair.unit == "points", 1.0
    if look == "early" and bounded:
        spent = EARLY_SHARE
        found = stats.compare_anytime(pair.d, pair.clusters, level=level * spent)
    else:
        spent = 1.0 if look == "whole" else 1 - EARLY_SHARE
        found = stats.compare_paired(pair.d, pair.clusters, level=level * spent, bounded=bounded)
    level *= spent
    clusters = len(set(pair.clusters))
    evidence = Evidence(
        probe=pair.probe,
        role=asked.role,
        safety=asked.safety,
        kind=pair.kind,
        reference=asked.reference,
        n=n,
        clusters=clusters,
        samples=pair.samples,
        noise_share=pair.noise_share,
        before=pair.before,
        after=pair.after,
        difference=found.difference,
        unit=pair.unit,
        ci90=found.ci90,
        lower_bound=found.lower_bound,
        level=level,
        bootstrap_bound=None,
        flip_share=float(np.mean(pair.d != 0)),
        smallest_visible_drop=stats.smallest_visible_drop(found.variance, n, settings.alpha),
        margin=asked.margin,
        p_harm=min(1.0, found.p_harm / spent),
        p_holm=None,
        outcome="watch",
        items_needed=None,
        reason="",
    )
    if found.is_normal and asked.role != "watch" and found.lower_bound > -(asked.margin or 0.0):
        check = stats.bca_lower_bound(pair.d, pair.clusters, level)
        evidence = replace(evidence, bootstrap_bound=check)
    if not evidence.is_awaited:
        return replace(evidence, outcome="pass" if evidence.is_within_margin else "watch")
    passed = evidence.is_within_margin
    if evidence.role == "target":
        passed = evidence.least_bound > 0 and evidence.difference >= settings.min_gain
    few = n < settings.min_items or clusters < settings.min_clusters
    if passed and not few:
        return replace(evidence, outcome="pass")
    needed = _items_needed(evidence, found.variance, few, settings, level)
    return replace(evidence, outcome="too_few" if few else "undecided", items_needed=needed)


def _items_needed(one: Evidence, variance: float, few: bool, settings: GateSettings, level: float) -> int | None:
    """Items for an 80 % chance to pass if the true difference is the one seen, and the least numbers are met."""
    if one.role == "target" and one.difference < settings.min_gain:
        return None
    needed = stats.items_needed(variance, one.difference + (one.margin or 0.0), level)
    if needed is None:
        return None
    per_cluster = one.n / one.clusters
    least: list[float] = [settings.min_items, settings.min_clusters * per_cluster] if few else [one.n + 1]
    if one.margin is not None and one.unit == "points":
        least.append(stats.minimum_items(one.margin, level) * per_cluster)
    return math.ceil(max(needed, *least))


def _adjust(evidence: Sequence[Evidence], settings: GateSettings) -> list[Evidence]:
    """Holm over the harm tests of the verdict; marks what is harmed, and writes the reasons.

    A comparison in which no item changed cannot raise an alarm, whatever is true, so it does not count as a test. A
    significant drop that is shown to be smaller than the margin is what the margin allows, not harm.
    """
    tested = [i for i, one in enumerate(evidence) if one.role != "watch" and one.flip_share > 0]
    adjusted = dict(zip(tested, stats.holm([evidence[i].p_harm for i in tested]), strict=True))
    found = []
    for i, one in enumerate(evidence):
        p = adjusted.get(i, None if one.role == "watch" else 1.0)
        if p is not None and p <= settings.alpha and not one.is_within_margin:
            one = replace(one, outcome="harm", items_needed=None)
        one = replace(one, p_holm=p)
        found.append(replace(one, reason=_describe(one, settings)))
    return found


def _collapses(candidate: Scores, champion: Scores, probes: Mapping[str, ProbeFacts]) -> list[str]:
    broken = []
    for name in (name for name, facts in probes.items() if facts.role != "watch"):
        for label, column, what, meaning in FORMS:
            form = _form_pair(candidate[name], champion[name], label, column)
            if form is not None and form.before >= HAD and form.after <= LOST:
                broken.append(
                    f"{name}: {what}: {form.after:.0%} of the answers {meaning}, {form.before:.0%} did before."
                )
    return broken


def _failing(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    return tuple(one for one in evidence if one.outcome == "harm" or (one.is_awaited and one.outcome != "pass"))


def _decide(evidence: Sequence[Evidence], broken: Sequence[str]) -> Decision:
    if broken or any(one.outcome == "harm" for one in evidence):
        return "HOLD"
    has_guard = any(one.role == "guard" for one in evidence)
    return "PROMOTE" if has_guard and not _failing(evidence) else "INCONCLUSIVE"


def _reasons(
    decision: Decision, evidence: Sequence[Evidence], broken: Sequence[str], level: float, tried: int
) -> list[str]:
    """Plain sentences, the ones that decided first."""
    reasons = [*broken]
    if decision == "HOLD":
        harmed = [one for one in evidence if one.outcome == "harm"]
        harmed.sort(key=lambda one: (one.kind == "pooled", one.p_holm, one.difference))
        reasons += [one.reason for one in harmed]
    elif decision == "INCONCLUSIVE":
        reasons += [f"{one.reason}{_needed(one)}" for one in _failing(evidence)]
    else:
        reasons += [one.reason for one in evidence if one.role == "target"]
        guards = {one.probe for one in evidence if one.role == "guard" and one.kind != "pooled"}
        reasons.append(f"{len(guards)} of {len(guards)} guards kept within their margins.")
        tolerated = [one for one in evidence if one.p_holm is not None and one.p_holm <= level * tried]
        reasons += [one.reason for one in evidence if one.kind == "pooled" and one.role == "guard"]
        reasons += [one.reason for one in tolerated if one.kind != "pooled"]
    if not any(one.role == "guard" for one in evidence):
        reasons.append("No probe is a guard in this round: nothing can show that anything was kept.")
    if not any(one.role == "target" for one in evidence):
        reasons.append("No probe is a target in this round: only that nothing was lost is shown.")
    if tried > 1:
        reasons.append(f"Picked among {tried} tried: each bound is taken at level {level:.3g}.")
    return reasons


def _describe(one: Evidence, settings: GateSettings) -> str:
    """One sentence with the numbers."""
    sign, scale = {"points": (" points", 100.0), "percent": ("%", 100.0), "score": ("", 1.0)}[one.unit]
    low, high = one.ci90
    against = "" if one.reference == "champion" else " against the best promoted score"
    p = "" if one.p_holm is None else f", Holm p {one.p_holm:.3f}" if one.p_holm >= 0.001 else ", Holm p < 0.001"
    more = ""
    if one.outcome == "undecided" and one.lower_bound > -(one.margin or 0.0) >= one.least_bound:
        t_bound, check = (f"{bound * scale:+.2f}{sign}" for bound in (one.lower_bound, one.least_bound))
        more = f"; the t bound of {t_bound} would do, the bootstrap's of {check} does not"
    elif one.outcome == "too_few":
        more = "; too few to promote on" + (f" in {one.clusters} clusters" if one.clusters < one.n else "")
    elif one.outcome == "undecided" and one.margin is not None:
        more = f"; a drop of {one.margin * scale:.1f}{sign} is not ruled out"
        if one.level < settings.alpha:  # the interval shown is another one
            more += f": at level {one.level:.2g} the bound is {one.least_bound * scale:+.1f}{sign}"
    elif one.outcome == "undecided":
        short = one.difference < settings.min_gain
        more = f"; the gain asked for is {settings.min_gain * scale:.1f}{sign}" if short else "; a gain is not shown"
    elif one.outcome == "pass" and one.p_holm is not None and one.p_holm <= settings.alpha and one.margin is not None:
        more = f"; it is shown to be less than the {one.margin * scale:.1f}{sign} that are allowed"
    items = f"{one.n} items" if one.samples == 1 else f"{one.n} items sampled {one.samples} times"
    return (
        f"{one.probe} {one.difference * scale:+.1f}{sign}{against} (90% interval {low * scale:+.1f} to "
        f"{high * scale:+.1f}, {items}{p}){more}."
    )


def _needed(one: Evidence) -> str:
    if one.outcome == "harm":
        return ""
    if one.items_needed is None:
        return " More items would not change this."
    return f" About {one.items_needed:,} items would decide."


def _plain(one: Evidence) -> dict[str, Any]:
    return {**asdict(one), "ci90": list(one.ci90)}
