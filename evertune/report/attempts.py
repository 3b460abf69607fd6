"""What each rung of a round's rescue gained and lost, beside the candidate that it was to mend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evertune.ledger import Event
from evertune.report.rounds import Body, RoundStory, bodies


@dataclass(frozen=True)
class Attempt:
    """One candidate of a round: its own, or a rescue's.

    Attributes:
        rung: `candidate` for the round's own.
        told: what was tried, in words; "" for the round's own.
        pooled: all guards together, against the champion; None where none is scored in [0, 1].
        worst: the guard that lost most, in the margins that it may lose; targets: every target.
        steps: optimizer steps that were trained for it.
    """

    rung: str
    told: str
    label: str
    decision: str
    pooled: Body | None
    worst: Body | None
    targets: tuple[Body, ...]
    steps: int


@dataclass(frozen=True)
class Ladder:
    """A round that was not promoted by itself, with its candidate and every rung that was climbed."""

    round: str
    attempts: tuple[Attempt, ...]
    promoted: str | None


def climbed(events: Sequence[Event], rounds: Sequence[RoundStory]) -> tuple[Ladder, ...]:
    """A ladder for each round with rescues, in order."""
    trained = _steps(events)
    found = []
    for story in rounds:
        if story.verdict is None or not story.rescues:
            continue
        own = _attempt(story.verdict, "candidate", "", trained)
        rungs = [_attempt(one, one["rung"], _told(one), trained) for one in story.rescues]
        label = story.promotion["label"] if story.promotion else None
        found.append(Ladder(story.name, (own, *rungs), label))
    return tuple(found)


def _attempt(verdict: Body, rung: str, told: str, trained: Mapping[str, int]) -> Attempt:
    mine = [one for one in verdict["probes"] if one["reference"] == "champion"]
    guards = [one for one in mine if one["role"] == "guard" and one["margin"]]
    worst = min(guards, key=lambda one: (one["difference"] / one["margin"], one["probe"]), default=None)
    pooled = verdict["pooled"]
    return Attempt(
        rung=rung,
        told=told,
        label=verdict["label"],
        decision=verdict["decision"],
        pooled=pooled,
        worst=worst,
        targets=tuple(one for one in mine if one["role"] == "target"),
        steps=trained.get(verdict["label"], 0),
    )


def _told(rescue: Body) -> str:
    if rescue["alpha"] is None:
        return str(rescue["why"])
    blocks = rescue.get("blocks")
    share = ", ".join(f"{one:g}" for one in blocks) + " of the blocks" if blocks else f"{rescue['alpha']:g}"
    return f"keeps {share} of the update, of {len(rescue['scan'])} points tried"


def _steps(events: Sequence[Event]) -> dict[str, int]:
    """Steps that were trained for each judged label: of its own stages, not of those found done."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    for one in bodies(events, "checkpoint"):
        attempt = one["label"].rpartition("/")[0]
        if one["digest"] not in seen:
            found[attempt] = found.get(attempt, 0) + int(one["steps"])
        seen.add(one["digest"])
    return {one["label"]: found.get(one["label"].rpartition("/")[0], 0) for one in bodies(events, "checkpoint")}
