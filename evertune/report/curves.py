"""The rescue curve: what each share of an update scores against the champion, target and worst guard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evertune.ledger import Event
from evertune.report.rounds import Body, RoundStory, bodies
from evertune.report.scores import Matrix


@dataclass(frozen=True)
class Share:
    """One share of the update: scores by probe, changes against the champion (better is positive, losses left out).

    `passes` is the gate's answer at this share, corrected for the number tried; None at the two ends, which were not
    part of the scan. `worst_guard` names the guard that lost most.
    """

    alpha: float
    values: Mapping[str, float]
    changes: Mapping[str, float]
    worst_guard: str | None
    passes: bool | None


@dataclass(frozen=True)
class RescueCurve:
    """All shares of one round's update, from none to all of it; `chosen` is the one that was written and judged."""

    round: str
    champion: str
    chosen: float | None
    targets: tuple[str, ...]
    shares: tuple[Share, ...]

    @property
    def series(self) -> dict[str, list[tuple[float, float]]]:
        """Changes in points against the share: each target, and the worst guard."""
        found = {
            name: [(one.alpha, 100 * one.changes[name]) for one in self.shares if name in one.changes]
            for name in self.targets
        }
        found["worst guard"] = [
            (one.alpha, 100 * one.changes[one.worst_guard]) for one in self.shares if one.worst_guard is not None
        ]
        return {name: points for name, points in found.items() if points}


def rescue_curves(events: Sequence[Event], rounds: Sequence[RoundStory], matrix: Matrix) -> tuple[RescueCurve, ...]:
    """A curve for each round whose rescue scanned shares of the update."""
    found = []
    for story in rounds:
        scans = [one for one in story.rescues if one["scan"]]
        if story.verdict is not None and scans:
            found.append(_curve(events, story.verdict, scans[-1], matrix))
    return tuple(found)


def _curve(events: Sequence[Event], verdict: Body, rescue: Body, matrix: Matrix) -> RescueCurve:
    roles = {one["probe"]: one["role"] for one in verdict["probes"]}
    points: dict[float, tuple[Mapping[str, float], bool | None]] = {}
    for alpha, label in ((0.0, _start_of(events, verdict["round"])), (1.0, verdict["label"])):
        end = _scores(matrix, label)
        if end:
            points[alpha] = (end, None)
    for one in rescue["scan"]:
        points[one["alpha"]] = (one["values"], one["passes"])
    champion = _scores(matrix, verdict["champion_label"])
    shares = []
    for alpha, (values, passes) in sorted(points.items()):
        changes = {
            column.name: values[column.name] - champion[column.name]
            for column in matrix.columns
            if column.direction == "higher" and column.name in values and column.name in champion
        }
        guards = [name for name in changes if roles.get(name) == "guard"]
        worst = min(guards, key=lambda name: (changes[name], name), default=None)
        shares.append(Share(alpha, values, changes, worst, passes))
    targets = tuple(column.name for column in matrix.columns if roles.get(column.name) == "target")
    return RescueCurve(verdict["round"], verdict["champion_label"], rescue["alpha"], targets, tuple(shares))


def _start_of(events: Sequence[Event], round_name: str) -> str | None:
    """Label of the checkpoint that the round's first stage started from."""
    checkpoints = bodies(events, "checkpoint")
    starts = [one["start"] for one in checkpoints if one["round"] == round_name]
    labels = {one["digest"]: one["label"] for one in reversed(checkpoints)}
    return labels.get(starts[0]) if starts else None


def _scores(matrix: Matrix, label: str | None) -> dict[str, float]:
    for row in matrix.rows:
        if row.label == label:
            cells = zip(matrix.columns, row.cells, strict=True)
            return {column.name: cell.value for column, cell in cells if cell is not None}
    return {}
