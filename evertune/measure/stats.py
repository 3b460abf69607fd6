"""Statistics on paired item scores: bounds, harm tests, corrections, sample sizes. Arrays in, numbers out.

Throughout, d = score(candidate) - score(reference) on the same item. Binary: b items the reference had right and the
candidate wrong, c the other way, psi = (b + c) / n the share that flipped.
"""

# I items, G clusters

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

POWER = 0.8
# Below this many discordant items the mid-p test can exceed its level; the exact one is used.
EXACT_BELOW = 10


class Estimate(NamedTuple):
    """A mean with its standard error and degrees of freedom (infinite for a normal quantile)."""

    mean: float
    standard_error: float
    degrees: float

    def bound(self, alpha: float) -> float:
        """One-sided lower bound at level alpha."""
        return self.mean - self._quantile(alpha) * self.standard_error

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided interval whose ends are one-sided bounds at level alpha each."""
        half = self._quantile(alpha) * self.standard_error
        return self.mean - half, self.mean + half

    def p_below_zero(self) -> float:
        """One-sided p-value of "the mean is not below 0"."""
        if self.standard_error == 0:
            return 0.0 if self.mean < 0 else 1.0
        return float(stats.t.cdf(self.mean / self.standard_error, self.degrees))

    def _quantile(self, alpha: float) -> float:
        return float(stats.t.ppf(1 - alpha, self.degrees))


def tango_bound(b: int, c: int, n: int, alpha: float) -> float:
    """One-sided lower bound, at level alpha, of the difference (c - b) / n of paired proportions.

    The score interval of Tango 1998 (Statistics in Medicine 17:891): the smallest difference D that the score test
    does not reject. Its level is right also with few or no flips: with b = c = 0 the bound is -z^2 / (n + z^2).
    """
    return _tango_root(b, c, n, float(stats.norm.ppf(1 - alpha)))


def tango_interval(b: int, c: int, n: int, alpha: float) -> tuple[float, float]:
    """Two-sided interval whose ends are Tango bounds at level alpha each."""
    return tango_bound(b, c, n, alpha), -tango_bound(c, b, n, alpha)


def mcnemar_p(b: int, c: int) -> float:
    """One-sided p-value of harm: b or more of the b + c flips would go the wrong way by chance.

    Mid-p (Lancaster 1961; Fagerland et al. 2013), exact below 10 flips.
    """
    flips = b + c
    if flips == 0:
        return 1.0
    at_least = float(stats.binom.sf(b - 1, flips, 0.5))
    return at_least if flips < EXACT_BELOW else at_least - 0.5 * float(stats.binom.pmf(b, flips, 0.5))


def cluster_mean(values: ArrayLike, clusters: Sequence[str], weights: ArrayLike | None = None) -> Estimate:
    """Weighted mean with a cluster-robust standard error and G - 1 degrees of freedom.

    Items of one cluster (a passage, a paraphrase group) count as one draw. With one cluster the error is infinite.

    Args:
        values: (I,).
        clusters: (I,) names.
        weights: (I,) positive; equal when not given.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(np.average(x, weights=w))
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums_G = np.bincount(index, weights=w * (x - mean))
    groups = len(sums_G)
    if groups < 2:
        return Estimate(mean, math.inf, 1.0)
    variance = float(np.sum(sums_G**2)) * groups / (groups - 1) / float(w.sum()) ** 2
    return Estimate(mean, math.sqrt(variance), groups - 1)


def mean_interval(values: ArrayLike, clusters: Sequence[str], weights: ArrayLike | None = None) -> tuple[float, float]:
    """Two-sided 90 % interval of one checkpoint's mean score: Wilson for independent binary items, else cluster t."""
    x = np.asarray(values, dtype=np.float64)
    if is_binary(x) and weights_equal(weights) and len(set(clusters)) == len(x):
        found = stats.binomtest(int(x.sum()), len(x)).proportion_ci(0.90, method="wilson")
        return float(found.low), float(found.high)
    low, high = cluster_mean(x, clusters, weights).interval(0.05)
    return (low, high) if math.isfinite(low) else (float(x.min()), float(x.max()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): controls the chance of any false alarm among all tests."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def smallest_visible_drop(variance: float, n: int, alpha: float) -> float:
    """The true drop that a test at level alpha finds with power 80 %: (z_alpha + z_power) sqrt(variance / n)."""
    return _z_sum(alpha) * math.sqrt(variance / n)


def items_needed(variance: float, distance: float, alpha: float) -> int | None:
    """Items for an 80 % chance to decide: (z_alpha + z_power)^2 variance / distance^2 (Miller 2024, arXiv:2411.00640).

    Args:
        variance: of d per item; psi - mean^2 for binary items.
        distance: from the true mean to the bound that must be passed; None is returned when it is not positive.
    """
    if distance <= 0:
        return None
    return max(1, math.ceil(_z_sum(alpha) ** 2 * variance / distance**2))


def minimum_items(margin: float, alpha: float) -> int:
    """Binary items below which nothing can rule out a drop of `margin`, even when no item flips: z^2 (1 - m) / m."""
    z = float(stats.norm.ppf(1 - alpha))
    return math.ceil(z * z * (1 - margin) / margin)


def is_binary(values: NDArray[np.float64]) -> bool:
    """Every value is 0 or 1."""
    return bool(np.all((values == 0) | (values == 1)))


def weights_equal(weights: ArrayLike | None) -> bool:
    """All weights are the same, or none are given."""
    return weights is None or bool(np.ptp(np.asarray(weights, dtype=np.float64)) == 0)


def _z_sum(alpha: float) -> float:
    return float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(POWER))


def _tango_root(b: int, c: int, n: int, z: float) -> float:
    difference = (c - b) / n

    def excess(D: float) -> float:
        return _tango_score(b, c, n, D) - z

    # The score falls in D: at the estimate it is 0, and towards -1 it grows without bound.
    low = -1.0 + 1e-12
    if difference <= low or excess(low) <= 0:
        return -1.0
    return float(optimize.brentq(excess, low, difference, xtol=1e-12))


def _tango_score(b: int, c: int, n: int, D: float) -> float:
    """(c - b - n D) / sqrt(n (2 q + D (1 - D))), with q the constrained estimate of the share of b."""
    A = 2.0 * n
    B = -b - c + (2 * n - c + b) * D
    C = -b * D * (1 - D)
    q = (math.sqrt(max(0.0, B * B - 4 * A * C)) - B) / (2 * A)
    variance = n * (2 * q + D * (1 - D))
    distance = c - b - n * D
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)
