"""How the checkpoints were made: trained stages, what a round cost beside a retrain, methods, what came from what."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evertune.ledger import Event
from evertune.methods import STANDINGS, methods
from evertune.report.rounds import Body, RoundStory, bodies
from evertune.report.scores import checkpoint_states


@dataclass(frozen=True)
class Stage:
    """A trained stage: the checkpoint's ledger body, its volatile facts, and its state among the checkpoints."""

    body: Body
    volatile: Mapping[str, Any]
    state: str

    @property
    def layers(self) -> tuple[tuple[str, float], ...]:
        """Drift of each layer against the start, in the order of the model."""
        drift = self.body["drift"]
        return tuple(sorted(drift["layers"].items(), key=lambda one: _natural(one[0]))) if drift else ()


@dataclass(frozen=True)
class Cost:
    """Tokens of one round beside an estimate of a retrain.

    The increment is what was recorded: D_new x T of new data (`new_tokens` a pass, `passes` passes), the rest of
    `increment` being replayed rows, alpha x D_old. The retrain is D_total x T: every training row of the champion's
    rounds (`seen_tokens`) and of this one, as often as this round saw its new rows. What the base itself was trained on
    is in neither.
    """

    round: str
    seconds: float | None
    increment: int
    new_tokens: int
    passes: float
    total_tokens: int
    seen_tokens: int

    @property
    def retrain(self) -> float:
        return self.total_tokens * self.passes

    @property
    def replayed(self) -> float:
        return max(0.0, self.increment - self.new_tokens * self.passes)

    @property
    def new_share(self) -> float:
        """Share of all data that no earlier round of the champion had seen."""
        return 1 - self.seen_tokens / self.total_tokens


@dataclass(frozen=True)
class Origin:
    """A checkpoint in the lineage: the label it was made from, if the ledger knows it."""

    label: str
    parent: str | None
    state: str
    made_by: str


@dataclass(frozen=True)
class Used:
    """A method that went into checkpoints, by its id ("" when only a standing was recorded), name and standing."""

    id: str
    name: str
    standing: str
    labels: tuple[str, ...]

    @property
    def is_academic(self) -> bool:
        return _rank(self.standing) > STANDINGS.index("research")


def trained_stages(events: Sequence[Event], rounds: Sequence[RoundStory]) -> tuple[Stage, ...]:
    """The checkpoints that training made, in order."""
    states = checkpoint_states(events, rounds)
    return tuple(
        Stage(one.body, one.volatile, states[one.body["label"]])
        for one in events
        if one.kind == "checkpoint" and one.body["steps"]
    )


def round_costs(events: Sequence[Event], stages: Sequence[Stage], line: Sequence[str]) -> tuple[Cost, ...]:
    """The cost of each round whose stages recorded tokens; `line` holds the labels from the base to the champion."""
    kept = {one["round"] for one in bodies(events, "checkpoint") if one["label"] in line}
    found = []
    for name in dict.fromkeys(one.body["round"] for one in stages):
        mine = [one for one in stages if one.body["round"] == name]
        first = stages.index(mine[0])
        earlier = [one for one in stages[:first] if one.body["round"] in kept]
        rows = sum(source["rows"] for one in mine for source in one.body["data"])
        seconds = [one.volatile["seconds"] for one in mine if one.volatile.get("seconds") is not None]
        if rows and _distinct_tokens(mine):
            found.append(
                Cost(
                    round=name,
                    seconds=sum(seconds) if len(seconds) == len(mine) else None,
                    increment=sum(one.body["tokens"] for one in mine),
                    new_tokens=_distinct_tokens(mine),
                    passes=sum(one.body["new_rows"] for one in mine) / rows,
                    total_tokens=_distinct_tokens([*earlier, *mine]),
                    seen_tokens=_distinct_tokens(earlier),
                )
            )
    return tuple(found)


def origins(events: Sequence[Event], rounds: Sequence[RoundStory]) -> tuple[Origin, ...]:
    """Where each checkpoint came from, in the order they were made.

    A rescue lies between two models; it is drawn from the candidate that it mends.
    """
    checkpoints = bodies(events, "checkpoint")
    states = checkpoint_states(events, rounds)
    mends = {one["label"]: story.verdict["label"] for story in rounds if story.verdict for one in story.rescues}
    labels: dict[str, str] = {}
    found = []
    for one in checkpoints:
        label = one["label"]
        parent = mends.get(label) or labels.get(one["start"])
        labels[one["digest"]] = label
        found.append(Origin(label, parent, states[label], one["stage"]))
    return tuple(found)


def methods_used(events: Sequence[Event]) -> tuple[Used, ...]:
    """Each method with its standing and the labels of the checkpoints that it went into.

    A checkpoint whose recorded standing is weaker than that of every method it names is a line of its own: it was made
    with something that this version's table does not know.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in bodies(events, "checkpoint"):
        made_with = [(method, *_known(method, one["standing"])) for method in one["methods"]]
        if _rank(one["standing"]) > max((_rank(standing) for _, _, standing in made_with), default=0):
            made_with.append(("", one["label"], one["standing"]))
        for key in made_with:
            found.setdefault(key, []).append(one["label"])
    return tuple(Used(*key, tuple(labels)) for key, labels in found.items())


def _known(method: str, recorded: str) -> tuple[str, str]:
    """Name and standing of a method by the table; what the ledger recorded where the table does not know it."""
    row = methods().get(method)
    return (row.name, row.standing) if row is not None else (method, recorded)


def _rank(standing: str) -> int:
    """0 for production; the weaker, the higher. A word that nobody knows is as weak as any."""
    known: tuple[str, ...] = STANDINGS
    return known.index(standing) if standing in known else len(known) - 1


def _distinct_tokens(stages: Sequence[Stage]) -> int:
    """Tokens of one pass over all the stages' data; a source used twice counts once."""
    sources = {(source["source"], source["sha256"]): source["tokens"] for one in stages for source in one.body["data"]}
    return sum(sources.values())


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layers.2` before `layers.10`, embeddings first and the last norm and head last."""
    place = 0 if "embed" in name else 1 if re.search(r"\d", name) else 2
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(place, 0, ""), *((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)]
