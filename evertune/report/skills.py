"""What was kept: backward transfer and retention along the line of champions, each capability by itself.

A skill is learnt where the first champion was promoted that had its probe as a target; a guard that no round taught is
the base's own. The summaries are over taught skills, as in the literature; the worst is looked for among all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evertune.measure import backward_transfer_interval, chance_corrected, retention_per_task
from evertune.measure.matrix import Interval
from evertune.report.scores import Cell, Column, Matrix

Z95 = 1.6448536269514722


@dataclass(frozen=True)
class Skill:
    """One capability: what it was where it was learnt and what it is in the champion.

    `retention` is now / then, and `corrected` the same of scores with chance taken off; None where then is not above 0
    (or chance), and for losses, which have a relative change instead.
    """

    probe: str
    taught: bool
    learnt_at: str
    lower_is_better: bool
    then: float
    now: float
    change: float
    retention: float | None
    corrected: float | None
    trend: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """The champion line up to one model: transfer and retention over skills taught before it, worst of all skills."""

    label: str
    taught: int
    transfer: Interval | None
    retention: Interval | None
    worst: Skill | None


def summarise(matrix: Matrix, line: Sequence[str], verdicts: Mapping[str, Mapping[str, Any]]) -> tuple[Summary, ...]:
    """One summary per promoted model, in order.

    Args:
        matrix: all scores.
        line: labels from the base to the champion.
        verdicts: the verdict of each judged label: its targets are what that model was taught.
    """
    found = []
    for end in range(2, len(line) + 1):
        skills = list_skills(matrix, line[:end], verdicts)
        tasks = [one for one in skills if one.taught and one.learnt_at != line[end - 1] and not one.lower_is_better]
        transfer, kept = _over_tasks(matrix, line[end - 1], tasks) if tasks else (None, None)
        rated = [one for one in skills if one.retention is not None and one.learnt_at != line[end - 1]]
        worst = min(rated, key=lambda one: (one.retention, one.probe), default=None)
        found.append(Summary(line[end - 1], len(tasks), transfer, kept, worst))
    return tuple(found)


def list_skills(matrix: Matrix, line: Sequence[str], verdicts: Mapping[str, Mapping[str, Any]]) -> tuple[Skill, ...]:
    """Every capability of the last model of the line, in the matrix's order of columns."""
    learnt: dict[str, str] = {}
    for label in line[1:]:
        for one in verdicts[label]["probes"] if label in verdicts else ():
            if one["role"] == "target":
                learnt.setdefault(one["probe"], label)
    skills = []
    for column in matrix.columns:
        if column.name not in learnt and column.role != "guard":
            continue
        skill = _skill(matrix, column, line, learnt.get(column.name))
        if skill is not None:
            skills.append(skill)
    return tuple(skills)


def ratio_interval(now: Cell, then: Cell) -> Interval:
    """now / then with a 90 % interval by the delta method, the two taken as independent.

    Two checkpoints answer the same items, so their errors correlate and the true interval is narrower.
    """
    ratio = now.value / then.value
    half = Z95 * math.hypot(_error(now) / then.value, ratio * _error(then) / then.value)
    return Interval(ratio, ratio - half, ratio + half)


def _skill(matrix: Matrix, column: Column, line: Sequence[str], taught_at: str | None) -> Skill | None:
    learnt_at = taught_at or line[0]
    then, now = matrix.cell(learnt_at, column.name), matrix.cell(line[-1], column.name)
    if then is None or now is None:
        return None
    lower = column.direction == "lower"
    corrected = None
    if column.chance is not None and then.value > column.chance:
        above = chance_corrected([then.value, now.value], [column.chance, column.chance])
        corrected = float(above[1] / above[0])
    cells = [matrix.cell(label, column.name) for label in line[line.index(learnt_at) :]]
    return Skill(
        probe=column.name,
        taught=taught_at is not None,
        learnt_at=learnt_at,
        lower_is_better=lower,
        then=then.value,
        now=now.value,
        change=now.value - then.value,
        retention=None if lower or then.value <= 0 else now.value / then.value,
        corrected=corrected,
        trend=tuple(cell.value for cell in cells if cell is not None),
    )


def _over_tasks(matrix: Matrix, label: str, tasks: Sequence[Skill]) -> tuple[Interval | None, Interval | None]:
    """Backward transfer and mean retention at a champion, over skills learnt before it.

    R is square with a row where each skill was learnt and a last one for the champion; the champion's own task is the
    last column, which neither measure reads.
    """
    rows, names = [*(one.learnt_at for one in tasks), label], [one.probe for one in tasks]
    cells = [[matrix.cell(row, name) for name in names] for row in rows]
    K = len(rows)
    R, errors = np.zeros((K, K)), np.zeros((K, K))
    for i, j in zip(*np.tril_indices(K), strict=True):
        if j < K - 1:
            cell = cells[i][j]
            if cell is None:
                return None, None
            R[i, j], errors[i, j] = cell.value, _error(cell)
    return backward_transfer_interval(R, errors), _mean_retention(R, cells)


def _mean_retention(R: NDArray[np.float64], cells: Sequence[Sequence[Cell | None]]) -> Interval | None:
    kept = retention_per_task(R)
    halves = []
    for j, value in enumerate(kept):
        now, then = cells[-1][j], cells[j][j]
        if math.isnan(value) or now is None or then is None:
            return None
        halves.append((ratio_interval(now, then).high - value) ** 2)
    mean, half = float(np.mean(kept)), math.sqrt(sum(halves)) / len(kept)
    return Interval(mean, mean - half, mean + half)


def _error(cell: Cell) -> float:
    """Standard error of a score, from its 90 % interval."""
    return (cell.high - cell.low) / (2 * Z95)
