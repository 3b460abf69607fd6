"""The matrix R and what it says. R[i, j] is the score on task j after learning task i, tasks in order.

Only the lower triangle is needed, and for forward transfer the entries just above the diagonal; others may be NaN.
"""

# K tasks

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from evertune.errors import ProbeError

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate with its two-sided 90 % interval."""

    value: float
    low: float
    high: float


class Worst(NamedTuple):
    """The task that lost most: its index, and what is left of it."""

    task: int
    retention: float


def backward_transfer(R: ArrayLike) -> float:
    """Mean change on earlier tasks since each was learnt: mean over j < K of R[K, j] - R[j, j].

    Negative means forgetting. Lopez-Paz & Ranzato 2017 (arXiv:1706.08840). In the units of R; needs two tasks.

    Raises:
        ProbeError: R is not square, has fewer than two tasks, or a needed entry is not finite.
    """
    matrix = _square(R)
    return float(np.mean(matrix[-1, :-1] - np.diag(matrix)[:-1]))


def backward_transfer_interval(R: ArrayLike, standard_errors: ArrayLike) -> Interval:
    """Backward transfer with a 90 % interval by the delta method.

    Args:
        R: (K, K) scores.
        standard_errors: (K, K), of each score. Scores of different rows are taken as independent: two checkpoints
            answer the same items, so their errors correlate and the true interval is narrower.
    """
    matrix, errors = _square(R), np.asarray(standard_errors, dtype=np.float64)
    variances = errors[-1, :-1] ** 2 + np.diag(errors)[:-1] ** 2
    half = float(stats.norm.ppf(0.95) * np.sqrt(variances.sum()) / (len(matrix) - 1))
    value = backward_transfer(matrix)
    return Interval(value, value - half, value + half)


def forward_transfer(R: ArrayLike, baseline: ArrayLike | None = None) -> float:
    """How much earlier tasks helped each later one before it was learnt: mean over j > 0 of R[j-1, j] - baseline[j].

    Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).

    Args:
        R: (K, K); the entries just above the diagonal are read.
        baseline: (K,) scores before any learning; zeros when not given, and then the mean score itself is returned.
    """
    matrix = _square(R, superdiagonal=True)
    before = np.zeros(len(matrix)) if baseline is None else np.asarray(baseline, dtype=np.float64)
    if before.shape != (len(matrix),):
        raise ProbeError(f"baseline has shape {before.shape}, expected ({len(matrix)},).")
    return float(np.mean(np.diag(matrix, k=1) - before[1:]))


def forgetting(R: ArrayLike) -> float:
    """Mean over earlier tasks of the fall from the best score ever had: see `forgetting_per_task`."""
    return float(np.mean(forgetting_per_task(R)))


def forgetting_per_task(R: ArrayLike) -> Floats:
    """(K-1,) for each earlier task j: max over j <= i < K of R[i, j], less R[K, j].

    Chaudhry et al. 2018 (arXiv:1801.10112). Negative when a task ended better than it ever was.
    """
    matrix = _square(R)
    best = [np.max(matrix[j:-1, j]) for j in range(len(matrix) - 1)]
    return np.array(best) - matrix[-1, :-1]


def retention(R: ArrayLike) -> float:
    """Mean over earlier tasks of the share that is left: see `retention_per_task`."""
    return float(np.mean(retention_per_task(R)))


def retention_per_task(R: ArrayLike) -> Floats:
    """(K-1,) for each earlier task j: R[K, j] / R[j, j]. NaN where a task was never learnt (R[j, j] is 0)."""
    matrix = _square(R)
    learnt = np.diag(matrix)[:-1]
    return np.divide(matrix[-1, :-1], learnt, out=np.full(len(learnt), np.nan), where=learnt != 0)


def chance_corrected(R: ArrayLike, chance: ArrayLike) -> Floats:
    """(R - chance) / (1 - chance): 0 is guessing, 1 is perfect.

    Near chance a plain ratio says that everything was kept of a skill that was never there; take retention of this.

    Args:
        R: (..., K) scores in [0, 1].
        chance: (K,) scores of a guess, below 1.
    """
    matrix, guess = np.asarray(R, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    if np.any(guess >= 1) or np.any(guess < 0):
        raise ProbeError(f"chance levels are {guess.tolist()}, expected 0 to below 1.")
    return (matrix - guess) / (1 - guess)


def worst_task(R: ArrayLike) -> Worst:
    """The earlier task with the lowest retention: a mean hides one that collapsed."""
    kept = retention_per_task(R)
    if np.all(np.isnan(kept)):
        raise ProbeError("no earlier task was ever learnt: every R[j, j] is 0.")
    task = int(np.nanargmin(kept))
    return Worst(task, float(kept[task]))


def _square(R: ArrayLike, *, superdiagonal: bool = False) -> Floats:
    matrix = np.array(R, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ProbeError(f"R has shape {matrix.shape}, expected one row and one column per task.")
    if len(matrix) < 2:
        raise ProbeError(f"R has {len(matrix)} task, expected two or more: there is no earlier task.")
    needed = np.tril(np.ones_like(matrix, dtype=bool))
    if superdiagonal:
        needed = np.eye(len(matrix), k=1, dtype=bool)
    missing = np.argwhere(needed & ~np.isfinite(matrix))
    if len(missing):
        i, j = missing[0]
        raise ProbeError(f"R[{i}, {j}] is {matrix[i, j]}, expected a finite score.")
    return matrix
