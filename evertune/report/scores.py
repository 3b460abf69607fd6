"""The matrix R as the report shows it: a row per checkpoint, a column per probe, a meaning per cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evertune.ledger import Event
from evertune.report.rounds import Body, RoundStory, bodies, champion_before, champion_line, judged_labels

GROUPS = {"guard": "Guards: must not drop", "target": "Targets: must rise in their round", "watch": "Watched"}


@dataclass(frozen=True)
class Column:
    """A probe. `group` is target when any round taught it, else `role`, its own; `taught_in` names those rounds."""

    name: str
    role: str
    group: str
    kind: str
    direction: str
    chance: float | None
    safety: bool
    taught_in: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A score, its 90 % interval and number of items; `change` against the champion of that time, in score units.

    `outcome` is the gate's word and `role` the probe's role where the checkpoint was judged, else None.
    """

    value: float
    low: float
    high: float
    n: int
    change: float | None
    better: bool | None
    outcome: str | None
    role: str | None


@dataclass(frozen=True)
class Row:
    """One checkpoint. `state`: base, champion, promoted, rolled back, held, or step (made on the way, not judged)."""

    label: str
    digest: str
    state: str
    before: str | None
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Matrix:
    """All scores, columns grouped guard, target, watch; rows in the order they were made."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def cell(self, label: str, probe: str) -> Cell | None:
        """The score of a checkpoint on a probe, or None when it was not scored."""
        names = [one.name for one in self.columns]
        for row in self.rows:
            if row.label == label:
                return row.cells[names.index(probe)]
        return None

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Title and width of each group of columns."""
        widths = [(title, sum(one.group == group for one in self.columns)) for group, title in GROUPS.items()]
        return tuple((title, width) for title, width in widths if width)


def build_matrix(events: Sequence[Event], rounds: Sequence[RoundStory]) -> Matrix:
    """The matrix of all checkpoints that were scored on at least one probe."""
    columns = _columns(bodies(events, "probe"), rounds)
    scores = {(one["label"], one["probe"]): one for one in bodies(events, "probe")}
    judged = judged_labels(rounds)
    states = checkpoint_states(events, rounds)
    rows = []
    for checkpoint in bodies(events, "checkpoint"):
        label = checkpoint["label"]
        if not any((label, column.name) in scores for column in columns):
            continue
        before = champion_before(events, label)
        cells = tuple(
            _cell(scores.get((label, one.name)), scores.get((before, one.name)), judged.get(label)) for one in columns
        )
        rows.append(Row(label, checkpoint["digest"], states[label], before, cells))
    return Matrix(columns, tuple(rows))


def checkpoint_states(events: Sequence[Event], rounds: Sequence[RoundStory]) -> dict[str, str]:
    """State of every checkpoint by label; see `Row`."""
    line = champion_line(events)
    promoted = {one["label"] for one in bodies(events, "promotion")}
    judged = judged_labels(rounds)

    def state(label: str) -> str:
        if label == line[-1]:
            return "champion"
        if label == "base":
            return "base"
        if label in promoted:
            return "promoted" if label in line else "rolled back"
        return "held" if label in judged else "step"

    return {one["label"]: state(one["label"]) for one in bodies(events, "checkpoint")}


def _columns(probes: Sequence[Mapping[str, Any]], rounds: Sequence[RoundStory]) -> tuple[Column, ...]:
    known: dict[str, Column] = {}
    for one in probes:
        taught = tuple(
            story.name
            for story in rounds
            if any(each["probe"] == one["probe"] and each["role"] == "target" for each in _evidence(story))
        )
        group = "target" if taught or one["role"] == "target" else one["role"]
        facts = (one["kind"], one["direction"], one["chance"], one["safety"], taught)
        known[one["probe"]] = Column(one["probe"], one["role"], group if group in GROUPS else "watch", *facts)
    order = list(GROUPS)
    return tuple(sorted(known.values(), key=lambda one: order.index(one.group)))


def _evidence(story: RoundStory) -> Sequence[Body]:
    return story.verdict["probes"] if story.verdict else ()


def _cell(score: Body | None, before: Body | None, verdict: Body | None) -> Cell | None:
    if score is None:
        return None
    change = None if before is None else score["value"] - before["value"]
    better = None if not change else (change > 0) == (score["direction"] == "higher")
    mine = [one for one in (verdict["probes"] if verdict else ()) if one["probe"] == score["probe"]]
    # Judged against two references, the worse outcome is the cell's.
    outcomes = {one["outcome"] for one in mine}
    outcome = next((word for word in ("harm", "too_few", "undecided", "watch", "pass") if word in outcomes), None)
    low, high = score["ci90"]
    return Cell(score["value"], low, high, score["n"], change, better, outcome, mine[0]["role"] if mine else None)
