"""The matrix R and what it says. R[i, j] is the score on task j after learning task i, tasks in order.

The functions on plain arrays need the lower triangle, forward transfer the entries just above the diagonal; what else
is there may be NaN. Scores are higher-is-better in any unit. `RetentionMatrix` is the same for a run's checkpoints and
probes, where not every probe was taught and some are losses.
"""

# K tasks, C checkpoints, P probes, I items

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evertune.errors import ProbeError
from evertune.measure.stats import Estimate, cluster_mean, special

Floats = NDArray[np.float64]
# The normal distribution's 95 % quantile: two sides of it hold 90 %.
Z90 = 1.6448536269514722


class Interval(NamedTuple):
    """An estimate with its two-sided 90 % interval."""

    value: float
    low: float
    high: float


class Worst(NamedTuple):
    """The task that lost most: its index, and what is left of it."""

    task: int
    retention: float


class ItemSummary(NamedTuple):
    """The four summaries with intervals. `retention` is None when a task was never learnt (its score was 0)."""

    backward_transfer: Interval
    forward_transfer: Interval | None
    forgetting: Interval
    retention: Interval | None


def backward_transfer(R: ArrayLike) -> float:
    """Mean change on earlier tasks since each was learnt: mean over j < K of R[K, j] - R[j, j].

    Negative means forgetting. Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).

    Args:
        R: (K, K), K at least 2, finite on and below the diagonal. The result is in its unit.

    Raises:
        ProbeError: R is not square, has fewer than two tasks, or a needed entry is not finite.
    """
    matrix = _square(R)
    return float(np.mean(matrix[-1, :-1] - np.diag(matrix)[:-1]))


def backward_transfer_interval(R: ArrayLike, standard_errors: ArrayLike) -> Interval:
    """Backward transfer with a 90 % interval from the standard error of each score (delta method).

    Two checkpoints answer the same items, so their errors go together; without the items they are taken as
    independent, and the interval is wider than `summarise_items` gives.

    Args:
        R: as for `backward_transfer`.
        standard_errors: (K, K), of each score.
    """
    matrix, errors = _square(R), _errors(standard_errors, R)
    variances = errors[-1, :-1] ** 2 + np.diag(errors)[:-1] ** 2
    return _around(backward_transfer(matrix), math.sqrt(variances.sum()) / (len(matrix) - 1))


def forward_transfer(R: ArrayLike, baseline: ArrayLike | None = None) -> float:
    """How much earlier tasks helped each later one before it was learnt: mean over j > 0 of R[j-1, j] - baseline[j].

    Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).

    Args:
        R: (K, K); only the entries just above the diagonal are read.
        baseline: (K,) scores before any learning; zeros when not given, and then the mean score itself is returned.
            The first is not read.

    Raises:
        ProbeError: a shape is wrong or a needed entry is not finite.
    """
    matrix = _square(R, superdiagonal=True)
    before = np.zeros(len(matrix)) if baseline is None else np.asarray(baseline, dtype=np.float64)
    if before.shape != (len(matrix),) or not np.all(np.isfinite(before[1:])):
        raise ProbeError(f"baseline is {before.tolist()}, expected {len(matrix)} finite scores.")
    return float(np.mean(np.diag(matrix, k=1) - before[1:]))


def forgetting(R: ArrayLike) -> float:
    """Mean over earlier tasks of the fall from the best score ever had: see `forgetting_per_task`."""
    return float(np.mean(forgetting_per_task(R)))


def forgetting_per_task(R: ArrayLike) -> Floats:
    """(K-1,) for each earlier task j: max over i < K of R[i, j], less R[K, j].

    Chaudhry et al. 2018 (arXiv:1801.10112). Rows before j was learnt count where they are measured; NaN there is
    passed over. Negative when a task ended better than it ever was.
    """
    matrix = _square(R)
    return np.asarray(np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1])


def retention(R: ArrayLike) -> float:
    """Mean over earlier tasks of the share that is left; NaN when a task was never learnt: `retention_per_task`."""
    return float(np.mean(retention_per_task(R)))


def retention_per_task(R: ArrayLike) -> Floats:
    """(K-1,) for each earlier task j: R[K, j] / R[j, j]. NaN where a task was never learnt (R[j, j] not above 0)."""
    matrix = _square(R)
    learnt = np.diag(matrix)[:-1]
    return np.divide(matrix[-1, :-1], learnt, out=np.full(len(learnt), np.nan), where=learnt > 0)


def retention_interval(R: ArrayLike, standard_errors: ArrayLike) -> Interval:
    """Mean retention with a 90 % interval by the delta method; arguments as for `backward_transfer_interval`.

    Raises:
        ProbeError: also when a task was never learnt.
    """
    matrix, errors = _square(R), _errors(standard_errors, R)
    kept, learnt = retention_per_task(matrix), np.diag(matrix)[:-1]
    if np.any(np.isnan(kept)):
        raise ProbeError(f"task {int(np.argmax(np.isnan(kept)))} was never learnt: there is no share to keep.")
    variances = (errors[-1, :-1] ** 2 + (kept * np.diag(errors)[:-1]) ** 2) / learnt**2
    return _around(float(np.mean(kept)), math.sqrt(variances.sum()) / len(kept))


def chance_corrected(R: ArrayLike, chance: ArrayLike) -> Floats:
    """(R - chance) / (1 - chance): 0 is guessing, 1 is perfect.

    Near chance a plain ratio says that everything was kept of a skill that was never there; take retention of this.

    Args:
        R: (..., K) scores in [0, 1].
        chance: (K,) scores of a guess, below 1.
    """
    matrix, guess = np.asarray(R, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    if not np.all((guess >= 0) & (guess < 1)):
        raise ProbeError(f"chance levels are {guess.tolist()}, expected 0 to below 1.")
    return (matrix - guess) / (1 - guess)


def worst_task(R: ArrayLike) -> Worst:
    """The earlier task with the lowest retention: a mean hides one that collapsed.

    Raises:
        ProbeError: as `backward_transfer`, and when no earlier task was ever learnt.
    """
    kept = retention_per_task(R)
    if np.all(np.isnan(kept)):
        raise ProbeError("no earlier task was ever learnt: no R[j, j] is above 0.")
    task = int(np.nanargmin(kept))
    return Worst(task, float(kept[task]))


def summarise_items(
    items: Sequence[Sequence[ArrayLike | None]],
    clusters: Sequence[Sequence[str]] | None = None,
    *,
    baseline: Sequence[ArrayLike | None] | None = None,
    chance: ArrayLike | None = None,
) -> ItemSummary:
    """The four summaries with 90 % intervals from item scores.

    Delta method: each task's summary is linear in its items, or made so, with the same item paired over rows; its
    error is cluster-robust; tasks are independent, and degrees of freedom are Satterthwaite's. For forgetting the best
    row is taken as known, which makes that interval a little too optimistic when rows are close.

    Args:
        items: items[i][j] is (I_j,) scores on task j after task i, or None where not measured.
        clusters: for each task (I_j,) names; every item alone when not given.
        baseline: for each task (I_j,) scores before any learning; without it, or without the rows just before each
            task, there is no forward transfer.
        chance: (K,) for a chance-corrected retention.

    Raises:
        ProbeError: as `backward_transfer`; also when a task's rows differ in number of items.
    """
    R = np.array([[math.nan if one is None else float(np.mean(np.asarray(one))) for one in row] for row in items])
    _square(R)
    tasks = len(R)
    columns = [_column(items, j) for j in range(tasks)]
    names = clusters or [[str(k) for k in range(_length(column))] for column in columns]
    guess = np.zeros(tasks) if chance is None else np.asarray(chance, dtype=np.float64)
    last, earlier = tasks - 1, range(tasks - 1)
    best = [int(np.nanargmax(R[:-1, j])) for j in earlier]
    moved = [cluster_mean(columns[j][last] - columns[j][j], names[j]) for j in earlier]
    fallen = [cluster_mean(columns[j][best[j]] - columns[j][last], names[j]) for j in earlier]
    learnt = all(R[j, j] > guess[j] for j in earlier)
    kept = [_ratio(columns[j][last] - guess[j], columns[j][j] - guess[j], names[j]) for j in earlier] if learnt else []
    ahead = None
    if baseline is not None and all(j - 1 in columns[j] and baseline[j] is not None for j in range(1, tasks)):
        before = [np.asarray(one, dtype=np.float64) for one in baseline]
        gains = [cluster_mean(columns[j][j - 1] - before[j], names[j]) for j in range(1, tasks)]
        ahead = _mean_of(gains)
    return ItemSummary(_mean_of(moved), ahead, _mean_of(fallen), _mean_of(kept) if kept else None)


@dataclass(frozen=True)
class Kept:
    """What is left of one probe at the end of a line of checkpoints.

    Attributes:
        probe, role: as in the matrix.
        start: label of the checkpoint from which it counts: where it was taught, or the first.
        before, after: score there and at the end.
        change: after - before, in points; of a lower-is-better probe relative, (before - after) / before. Better is
            positive.
        retention: after / before, both above chance where chance is known. None for a lower-is-better probe, and
            where there was nothing to keep.
        change_error, retention_error: standard errors, from those of the two scores taken as independent.
    """

    probe: str
    role: str
    start: str
    before: float
    after: float
    change: float
    retention: float | None
    change_error: float
    retention_error: float


@dataclass(frozen=True, eq=False)
class RetentionMatrix:
    """Scores of a line of checkpoints, each trained from the one before, on a run's probes.

    A probe is a task only from the checkpoint that taught it; what the base could do already counts from the first
    row. Lower-is-better probes have no points and no share: they stay out of the means and are shown as a relative
    change. `watch` probes stay out of the means too.

    Attributes:
        rows: (C,) labels, oldest first.
        probes: (P,) names.
        directions: (P,) `higher` or `lower`.
        roles: (P,) `guard`, `target` or `watch`.
        values: (C, P) scores, NaN where not measured.
        errors: (C, P) their standard errors.
        starts: (P,) row from which a probe counts: 0, or where it was taught.
        chance: (P,) score of a guess, or None.

    Raises:
        ProbeError: the shapes do not fit, or a start is no row.
    """

    rows: tuple[str, ...]
    probes: tuple[str, ...]
    directions: tuple[str, ...]
    roles: tuple[str, ...]
    values: Floats
    errors: Floats
    starts: tuple[int, ...]
    chance: tuple[float | None, ...]

    def __post_init__(self) -> None:
        lengths = {len(one) for one in (self.probes, self.directions, self.roles, self.starts, self.chance)}
        shape = (len(self.rows), len(self.probes))
        if len(lengths) > 1 or self.values.shape != shape or self.errors.shape != shape:
            raise ProbeError(
                f"a matrix of {shape[0]} checkpoints and {shape[1]} probes has scores of shape {self.values.shape} and "
                f"columns of lengths {sorted(lengths)}."
            )
        if not self.rows or any(not 0 <= start < len(self.rows) for start in self.starts):
            raise ProbeError(f"starts are {self.starts} in a matrix of {len(self.rows)} rows.")

    @classmethod
    def from_bodies(
        cls, bodies: Sequence[Mapping[str, Any]], rows: Sequence[str], taught: Mapping[str, str]
    ) -> "RetentionMatrix":
        """From the ledger's probe bodies.

        Args:
            bodies: `{label, probe, role, direction, value, ci90, chance, ...}`; labels not in `rows` are passed over.
            rows: labels of the line, oldest first.
            taught: probe -> label of the checkpoint that taught it; probes not named count from the first row.
        """
        places = {label: i for i, label in enumerate(rows)}
        found = [one for one in bodies if one["label"] in places]
        facts = {one["probe"]: one for one in found}
        columns = {name: j for j, name in enumerate(facts)}
        values, errors = (np.full((len(places), len(facts)), np.nan) for _ in range(2))
        for one in found:
            place = places[one["label"]], columns[one["probe"]]
            low, high = one["ci90"]
            values[place], errors[place] = one["value"], (high - low) / (2 * Z90)
        return cls(
            rows=tuple(rows),
            probes=tuple(facts),
            directions=tuple(one["direction"] for one in facts.values()),
            roles=tuple(one["role"] for one in facts.values()),
            values=values,
            errors=errors,
            starts=tuple(places.get(taught.get(name, ""), 0) for name in facts),
            chance=tuple(one["chance"] for one in facts.values()),
        )

    def kept(self) -> tuple[Kept, ...]:
        """Every probe that counts from before the last row and is measured at both ends, in the matrix's order."""
        last = len(self.rows) - 1
        ends = [(j, start) for j, start in enumerate(self.starts) if start < last]
        return tuple(self._kept(j, i) for j, i in ends if np.all(np.isfinite(self.values[[i, last], j])))

    def backward_transfer(self) -> Interval | None:
        """Mean change of guards and targets since each counts, in points; None when there is none."""
        counted = self._counted()
        if not counted:
            return None
        errors = np.array([one.change_error for one in counted])
        value = float(np.mean([one.change for one in counted]))
        return _around(value, float(np.linalg.norm(errors)) / len(counted))

    def retention(self) -> Interval | None:
        """Mean share that is left of guards and targets; None when there is none."""
        counted = [one for one in self._counted() if one.retention is not None]
        if not counted:
            return None
        errors = np.array([one.retention_error for one in counted])
        value = float(np.mean([one.retention for one in counted if one.retention is not None]))
        return _around(value, float(np.linalg.norm(errors)) / len(counted))

    def worst(self) -> Kept | None:
        """The guard or target with the smallest share left; None when none has a share."""
        counted = [(one.retention, one.probe, one) for one in self._counted() if one.retention is not None]
        return min(counted)[2] if counted else None

    def _counted(self) -> list[Kept]:
        higher = {name for name, one in zip(self.probes, self.directions, strict=True) if one == "higher"}
        return [one for one in self.kept() if one.role != "watch" and one.probe in higher]

    def _kept(self, j: int, i: int) -> Kept:
        (before, after), (error_before, error_after) = self.values[[i, -1], j], self.errors[[i, -1], j]
        higher, chance = self.directions[j] == "higher", self.chance[j] or 0.0
        error = float(np.hypot(error_before, error_after))
        above = float(before) - chance
        share = (float(after) - chance) / above if higher and above > 0 else None
        return Kept(
            probe=self.probes[j],
            role=self.roles[j],
            start=self.rows[i],
            before=float(before),
            after=float(after),
            change=float(after - before) if higher else float((before - after) / before),
            retention=share,
            change_error=error if higher else error / float(before),
            retention_error=0.0 if share is None else float(np.hypot(error_after, share * error_before)) / above,
        )


def _column(items: Sequence[Sequence[ArrayLike | None]], j: int) -> dict[int, Floats]:
    """Item scores of task j by row, where measured."""
    found = {i: np.asarray(row[j], dtype=np.float64) for i, row in enumerate(items) if row[j] is not None}
    shapes = {one.shape for one in found.values()}
    if len(shapes) > 1 or any(one.ndim != 1 for one in found.values()):
        raise ProbeError(f"task {j} has item scores of shapes {sorted(shapes)}, expected the same items in each row.")
    return found


def _length(column: Mapping[int, Floats]) -> int:
    return len(next(iter(column.values())))


def _ratio(top: Floats, bottom: Floats, clusters: Sequence[str]) -> Estimate:
    """mean(top) / mean(bottom): the error is that of the mean of (top - ratio bottom) / mean(bottom)."""
    ratio = float(top.mean() / bottom.mean())
    error = cluster_mean((top - ratio * bottom) / bottom.mean(), clusters)
    return Estimate(ratio, error.standard_error, error.degrees)


def _mean_of(estimates: Sequence[Estimate]) -> Interval:
    """Mean of independent estimates; degrees of freedom by Satterthwaite 1946."""
    value = float(np.mean([one.mean for one in estimates]))
    variances = np.array([one.standard_error**2 for one in estimates])
    if variances.sum() in (0.0, math.inf):
        return Interval(value, value - variances.sum(), value + variances.sum())
    shares = variances[variances > 0] ** 2 / np.array([one.degrees for one in estimates])[variances > 0]
    degrees = variances.sum() ** 2 / shares.sum()
    half = float(special.stdtrit(degrees, 0.95)) * math.sqrt(variances.sum()) / len(estimates)
    return Interval(value, value - half, value + half)


def _around(value: float, error: float) -> Interval:
    return Interval(value, value - Z90 * error, value + Z90 * error)


def _errors(standard_errors: ArrayLike, R: ArrayLike) -> Floats:
    errors = np.asarray(standard_errors, dtype=np.float64)
    if errors.shape != np.asarray(R).shape:
        raise ProbeError(f"standard errors have shape {errors.shape}, R has {np.asarray(R).shape}.")
    return errors


def _square(R: ArrayLike, *, superdiagonal: bool = False) -> Floats:
    try:
        matrix = np.array(R, dtype=np.float64)
    except ValueError as error:
        raise ProbeError("R has rows of different lengths, expected one row and one column per task.") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ProbeError(f"R has shape {matrix.shape}, expected one row and one column per task.")
    if len(matrix) < 2:
        raise ProbeError(f"R has {len(matrix)} task(s), expected two or more: there is no earlier task.")
    needed = np.eye(len(matrix), k=1, dtype=bool) if superdiagonal else np.tril(np.ones_like(matrix, dtype=bool))
    missing = np.argwhere(needed & ~np.isfinite(matrix))
    if len(missing):
        i, j = missing[0]
        raise ProbeError(f"R[{i}, {j}] is {matrix[i, j]}, expected a finite score.")
    return matrix
