"""What to try after a candidate was not promoted: proposals only; the loop performs them like any stage.

interpolate      shares of the update, in memory            choose
the other rungs  the round again, with amended stages       propose
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.probe.scores import ItemScores
from evertune.recipe.fields import REPLAYABLE
from evertune.recipe.presets import ResolvedTraining, resolve_stage
from evertune.recipe.schema import Anchor, Distill, Recipe, Replay, Round, Rung, Stage, Teacher, Training, kept_sources

Scores = Mapping[str, ItemScores]
# A share of the update, or one for each block of layers.
Share = float | tuple[float, ...]
# Where an anchor was off, what is multiplied: the weight of the balanced preset.
ANCHOR_KL = 0.05
# Where nothing was replayed, likewise: the share of the balanced preset.
REPLAY_SHARE = 0.2
# Of a stage that teaches back what fell: the share of the round's new rows in its stream.
KEPT_SHARE = 0.3
# Chance that a rung mends a held round: judgement, not measured.
EXPECTED_GAIN = {
    "drop_stage": 0.4,
    "distil_back": 0.4,
    "more_replay": 0.5,
    "stronger_anchor": 0.4,
    "lower_lr": 0.4,
    "fewer_epochs": 0.3,
}


@dataclass(frozen=True)
class Chosen:
    """The share of the update to keep, and what every tried share scored.

    `passes` says whether the share would be promoted, corrected for the number tried.
    """

    share: Share
    values: Mapping[Share, Mapping[str, float]]
    passes: Mapping[Share, bool]

    @property
    def alpha(self) -> float:
        """The share that is kept; of blocks, their mean."""
        return kept(self.share)

    def scan_body(self) -> list[dict[str, Any]]:
        """The scan as the ledger keeps it, largest share first."""
        return [
            {
                "alpha": kept(share),
                "blocks": list(share) if isinstance(share, tuple) else None,
                "values": dict(values),
                "passes": self.passes[share],
            }
            for share, values in sorted(self.values.items(), key=lambda one: _by_size(one[0]))
        ]


@dataclass(frozen=True)
class Proposal:
    """The round with amended stages.

    Attributes:
        rung: name of the rung.
        why: what is changed, in words.
        stages: all of the round's stages; those before the first amended one have been performed already.
    """

    rung: str
    why: str
    stages: tuple[Stage, ...]


def shares_of(alphas: Sequence[float], blocks: int) -> list[Share]:
    """The points to try: the shares, or each of them on one block of layers while the others stay whole."""
    if blocks == 1:
        return list(alphas)
    return [tuple(alpha if k == b else 1.0 for k in range(blocks)) for b in range(blocks) for alpha in alphas]


def kept(share: Share) -> float:
    """How much of the update a point keeps, in [0, 1]."""
    return sum(share) / len(share) if isinstance(share, tuple) else share


def choose(
    scan: Mapping[Share, Scores],
    champion: Scores,
    best: Scores,
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    *,
    tried: int,
    shares: Mapping[str, float] | None = None,
) -> Chosen:
    """The largest share of the update that passes the gate; if none does, the one that comes nearest.

    Nearest: not held rather than held, then the fewest comparisons that fail, then the larger share. It is written and
    judged all the same, so that the ledger shows by how much the rescue missed.

    Args:
        scan: item scores by probe for each share tried, in (0, 1).
        tried: what the ladder tries in all, the shares of this scan among it.
        shares: of alpha that is left, by probe: see `gate.judge`.
    """
    verdicts = {
        share: judge(scores, champion, best, probes, settings, tried=tried, shares=shares)
        for share, scores in scan.items()
    }
    chosen = min(verdicts, key=lambda one: (rank(verdicts[one]), _by_size(one)))
    return Chosen(
        share=chosen,
        values={one: {name: scores.value for name, scores in scan[one].items()} for one in scan},
        passes={one: verdict.decision == "PROMOTE" for one, verdict in verdicts.items()},
    )


def count_tries(rungs: Sequence[Rung]) -> int:
    """Candidates that a ladder may judge in all: every bound is taken at alpha divided by it."""
    scans = [one.interpolate for one in rungs if one.interpolate is not None]
    shares = sum(len(one.alphas) * one.blocks for one in scans)
    return shares + sum(one.interpolate is None and one.discard is None for one in rungs)


def in_order(rungs: Sequence[Rung], order: str, steps: Sequence[int]) -> list[Rung]:
    """The rungs as they are to be tried.

    Args:
        order: `written`, or `gain_for_cost`: expected gain over cost, most first; what only scores costs nothing, and
            what only discards comes last.
        steps: that each of the round's stages has trained.
    """
    if order == "written":
        return list(rungs)
    return sorted(rungs, key=lambda one: -_gain_for_cost(one, steps))


def _gain_for_cost(rung: Rung, steps: Sequence[int]) -> float:
    """Expected gain of a rung over the share of the round that it trains anew."""
    if rung.discard is not None:
        return 0.0
    if rung.interpolate is not None:
        return float("inf")
    total = max(sum(steps), 1)
    # Stages before the first that changes are found done. Which one is dropped is not known here: the first, at worst.
    cost = {
        "drop_stage": sum(steps[1:]) / total,
        "distil_back": 0.3,
        "fewer_epochs": rung.fewer_epochs.factor if rung.fewer_epochs else 1.0,
    }.get(rung.kind, 1.0)
    return EXPECTED_GAIN[rung.kind] / max(cost, 0.05)


def propose(rung: Rung, recipe: Recipe, one: Round, made: Sequence[Scores], verdict: Verdict) -> Proposal | None:
    """The amended round of a rung that trains; None where it would change nothing.

    Args:
        made: item scores of what the round started from, then after each of its stages.
        verdict: the candidate's own.
    """
    if rung.drop_stage is not None:
        return _drop_stage(one, made, verdict)
    if rung.distil_back is not None:
        return _distil_back(rung, recipe, one, verdict)
    amend, why = _amendment(rung, verdict)
    stages = tuple(_amended(recipe, stage, amend) for stage in one.stages)
    return None if stages == tuple(one.stages) else Proposal(rung.kind, why, stages)


Amend = Callable[[Training, ResolvedTraining], Mapping[str, Any]]


def _amendment(rung: Rung, verdict: Verdict) -> tuple[Amend, str]:
    """How each training stage changes, from its own and its resolved settings."""
    if rung.lower_lr is not None:
        factor = rung.lower_lr.factor
        return lambda own, now: {"lr": now.lr * factor}, f"learning rates times {factor:g}"
    if rung.fewer_epochs is not None:
        factor = rung.fewer_epochs.factor
        return lambda own, now: _shorter(now, factor), f"epochs times {factor:g}"
    if rung.stronger_anchor is not None:
        factor = rung.stronger_anchor.factor
        return lambda own, now: {"anchor": _anchor(now, factor)}, f"anchors times {factor:g}"
    assert rung.more_replay is not None, rung.kind
    more = rung.more_replay
    wanted = list(dict.fromkeys(name for probe in _fallen(verdict) for name in more.by_probe.get(probe, ())))

    def replay(own: Training, now: ResolvedTraining) -> Mapping[str, Any]:
        sources = list(dict.fromkeys([*now.replay.sources, *wanted]))
        share = max(now.replay.share, min(more.most, (now.replay.share or REPLAY_SHARE) * more.factor))
        return {"replay": Replay(share=share, sources=sources, dedup=now.replay.dedup)}

    return replay, f"replay times {more.factor:g}" + (f", {', '.join(wanted)} among it" if wanted else "")


def _amended(recipe: Recipe, stage: Stage, amend: Amend) -> Stage:
    """The stage with its changes; itself where it does not train here, or nothing changes."""
    own = stage.settings
    if not isinstance(own, Training):
        return stage
    now = resolve_stage(recipe, own)
    assert isinstance(now, ResolvedTraining)
    changes = {name: value for name, value in amend(own, now).items() if value != getattr(now, name)}
    return stage.model_copy(update={stage.kind: own.model_copy(update=changes)}) if changes else stage


def _shorter(now: ResolvedTraining, factor: float) -> dict[str, Any]:
    if now.steps is not None:
        return {"steps": max(1, round(now.steps * factor))}
    return {"epochs": (now.epochs or 1.0) * factor}


def _anchor(now: ResolvedTraining, factor: float) -> Anchor:
    return now.anchor.model_copy(update={"kl": (now.anchor.kl or ANCHOR_KL) * factor})


def _drop_stage(one: Round, made: Sequence[Scores], verdict: Verdict) -> Proposal | None:
    """Leave out the stage after which the guards that failed fell most."""
    # Held-out probes are not asked after each stage: which of them cost a skill is not known.
    fallen = [name for name in _fallen(verdict) if all(name in scores for scores in made)]
    if len(one.stages) < 2 or not fallen:
        return None
    falls = [sum(_fall(made[i][name], made[i + 1][name]) for name in fallen) for i in range(len(one.stages))]
    worst = max(range(len(falls)), key=lambda i: falls[i])
    if falls[worst] <= 0:
        return None
    stages = tuple(stage for i, stage in enumerate(one.stages) if i != worst)
    why = f"without stage {worst + 1} ({one.stages[worst].kind}), after which {', '.join(fallen)} fell most"
    return Proposal("drop_stage", why, stages)


def _distil_back(rung: Rung, recipe: Recipe, one: Round, verdict: Verdict) -> Proposal | None:
    """One more stage: the start teaches the skill that fell; the round's new rows are replayed under an anchor to the
    candidate, so that what was learnt stays. None where no rows of the skill are known."""
    settings, fallen = rung.distil_back, _fallen(verdict)
    assert settings is not None, rung.kind
    replayed = [name for stage in one.stages for name in _replays(recipe, stage)]
    wanted = [name for probe in fallen for name in settings.by_probe.get(probe, replayed)]
    rows = [name for name in dict.fromkeys(wanted) if name != "history"]
    if not fallen or not rows:
        return None
    teacher = one.start if one.start in ("champion", "base") else str(one.start)
    learnt = [name for name in kept_sources(one) if recipe.data[name].format in REPLAYABLE and name not in rows]
    stage = Distill(
        data=rows,
        teachers=[Teacher(checkpoint=teacher)],
        weight=1.0,
        epochs=settings.epochs,
        lr=settings.lr,
        replay=Replay(share=KEPT_SHARE, sources=learnt) if learnt else Replay(share=0.0),
        anchor=Anchor(kl=ANCHOR_KL, to="start", on="replay") if learnt else Anchor(kl=0.0),
    )
    why = f"one more stage: {one.start} teaches {', '.join(fallen)} back on the rows of {', '.join(rows)}"
    return Proposal("distil_back", why, (*one.stages, Stage(distill=stage)))


def _replays(recipe: Recipe, stage: Stage) -> list[str]:
    """Sources that a stage replays; none where it does not train here."""
    if not isinstance(stage.settings, Training):
        return []
    now = resolve_stage(recipe, stage.settings)
    assert isinstance(now, ResolvedTraining)
    return list(now.replay.sources) if now.replay.share > 0 else []


def _fall(before: ItemScores, after: ItemScores) -> float:
    """How far a score fell, better is positive; of a loss, relative."""
    if after.direction == "higher":
        return before.value - after.value
    return (after.value - before.value) / before.value


def _fallen(verdict: Verdict) -> list[str]:
    """Guards that stand in the way, each once."""
    return list(dict.fromkeys(one.probe for one in verdict.failing if one.role == "guard" and one.kind != "pooled"))


def _by_size(share: Share) -> tuple[float, tuple[float, ...]]:
    """Sorts larger shares first."""
    return -kept(share), tuple(-one for one in share) if isinstance(share, tuple) else ()


def rank(verdict: Verdict) -> tuple[int, int]:
    """Sorts a verdict before those that are further from a promotion."""
    order = {"PROMOTE": 0, "INCONCLUSIVE": 1, "HOLD": 2}
    return order[verdict.decision], len(verdict.failing)
