"""Statistics on paired item scores: bounds, harm tests, corrections, sample sizes. Arrays in, numbers out.

Throughout, d = score(candidate) - score(reference) on the same item, better is positive. Binary items: b that the
reference had right and the candidate has wrong, c the other way, psi = (b + c) / n the share that flipped. All bounds
and tests are one-sided at level alpha; an interval is two bounds, so alpha 0.05 gives 90 %.
"""

# I items, G clusters

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evertune.measure import anytime

Floats = NDArray[np.float64]

POWER = 0.8
# Below this many flips the exact test is used: mid-p may exceed its level there.
EXACT_BELOW = 10
# Below this many clusters a t quantile leans on a normality nobody can see; signs of clusters are flipped instead.
PERMUTE_BELOW = 30
ENUMERATE_CLUSTERS = 14
PERMUTATIONS = 20_000
# Resamples of the bootstrap, and the clusters they draw in all: a few thousand clusters need fewer.
RESAMPLES, RESAMPLED_CLUSTERS = 10_000, 10_000_000


class _Special:
    """scipy.special, imported at its first use: a report shows what was computed before, and need not wait for it."""

    def __getattr__(self, name: str) -> Any:
        from scipy import special

        return getattr(special, name)


special = _Special()


class Estimate(NamedTuple):
    """A mean with its standard error and degrees of freedom."""

    mean: float
    standard_error: float
    degrees: float

    def lower_bound(self, alpha: float) -> float:
        """One-sided lower bound at level alpha."""
        return self.mean - float(special.stdtrit(self.degrees, 1 - alpha)) * self.standard_error

    def interval(self, alpha: float) -> tuple[float, float]:
        """Two-sided interval whose ends are one-sided bounds at level alpha each."""
        low = self.lower_bound(alpha)
        return low, 2 * self.mean - low

    def p_harm(self) -> float:
        """One-sided p-value against "the mean is not below 0"."""
        if self.standard_error == 0:
            return 0.0 if self.mean < 0 else 1.0
        return float(special.stdtr(self.degrees, self.mean / self.standard_error))


class Comparison(NamedTuple):
    """A candidate against a reference on one set of items.

    difference: mean of d.
    lower_bound: one-sided, at the level asked for.
    ci90: two-sided.
    p_harm: one-sided p-value against "no harm".
    variance: of d per item, such that variance / n is the variance of the mean; clusters and rare flips included.
    is_normal: the bound is a t bound, which leans on a mean that is near normal; `bca_lower_bound` checks it.
    """

    difference: float
    lower_bound: float
    ci90: tuple[float, float]
    p_harm: float
    variance: float
    is_normal: bool = False


def compare_paired(d: ArrayLike, clusters: Sequence[str], *, level: float, bounded: bool) -> Comparison:
    """Bound, interval and harm test of the mean of d.

    Independent items with d in {-1, 0, 1}: Tango's bound and McNemar's test. Anything else: cluster-robust t.

    Args:
        d: (I,) better is positive.
        clusters: (I,) names; items of one cluster count as one draw.
        level: of the one-sided lower bound.
        bounded: scores lie in [0, 1]. Then a t bound is never nearer to the mean than Tango's bound is to 0 when
            nothing flips, with clusters for items: few clusters cannot rule out a rare loss, however still they are.
    """
    x = np.asarray(d, dtype=np.float64)
    n = len(x)
    if bounded and bool(np.all(np.isin(x, (-1, 0, 1)))) and len(set(clusters)) == n:
        b, c = int(np.sum(x < 0)), int(np.sum(x > 0))
        # One flip more than was seen, so that few items never claim a variance of 0.
        variance = (b + c + 1) / (n + 2) - ((c - b) / n) ** 2 * n / (n + 2)
        bound, ci90 = tango_lower_bound(b, c, n, level), tango_interval(b, c, n, 0.05)
        return Comparison((c - b) / n, bound, ci90, mcnemar(b, c), variance)
    estimate = cluster_mean(x, clusters)
    groups = int(estimate.degrees) + 1
    if groups < 2:
        # One draw shows nothing; -1 is all of a score lost, or a loss doubled, which no margin allows.
        return Comparison(estimate.mean, -1.0, (-1.0, 1.0), 1.0, float(n))
    low, high = estimate.interval(0.05)
    bound = estimate.lower_bound(level)
    variance = estimate.standard_error**2 * n
    if bounded:
        low = min(low, estimate.mean - _least_width(groups, 0.05))
        high = max(high, estimate.mean + _least_width(groups, 0.05))
        bound = min(bound, estimate.mean - _least_width(groups, level))
        variance = max(variance, n / groups / (groups + 2))
    p = estimate.p_harm() if groups >= PERMUTE_BELOW else sign_flip(_cluster_sums(x, clusters))
    return Comparison(estimate.mean, bound, (low, high), p, variance, is_normal=True)


def compare_anytime(d: ArrayLike, clusters: Sequence[str], *, level: float) -> Comparison:
    """The same for scores in [0, 1] whose items arrive in random order, clusters whole: true at every look.

    A cluster is one draw: its sum over the size of the largest, so that the mean over clusters has the sign of the mean
    over items; bounds are turned back into the scale of items.

    Args:
        d: (I,) in [-1, 1], better is positive.
        clusters: (I,) names.
        level: of the one-sided lower bound; the interval's ends are bounds at 0.05 each.
    """
    x = np.asarray(d, dtype=np.float64)
    sums_G = _cluster_sums(x, clusters)
    sizes_G = _cluster_sums(np.ones_like(x), clusters)
    largest, scale = float(sizes_G.max()), float(sizes_G.max() / sizes_G.mean())
    seen = anytime.count(sums_G / largest)
    mirrored = anytime.Counted(-seen.values_U, seen.counts_U)
    bound, low, high = (
        max(-1.0, scale * anytime.lower_bound(side, alpha))
        for side, alpha in ((seen, level), (seen, 0.05), (mirrored, 0.05))
    )
    variance = float(np.var(sums_G / largest)) * scale**2 * len(x) / len(sums_G)
    return Comparison(float(x.mean()), bound, (low, -high), anytime.p_harm(seen), max(variance, 1 / len(x)))


def bca_lower_bound(values: ArrayLike, clusters: Sequence[str], alpha: float) -> float | None:
    """One-sided lower bound of a mean by the BCa bootstrap over clusters (Efron 1987), which follows skewness.

    Bias from the share of 10,000 seeded resamples below the mean, acceleration from the jackknife over clusters. None
    below 30 clusters, where resampling shows too little of what clusters can be, where no value differs, and for an
    alpha so small that the resamples do not reach it.
    """
    x = np.asarray(values, dtype=np.float64)
    sums_G, sizes_G = _cluster_sums(x, clusters), _cluster_sums(np.ones_like(x), clusters)
    groups = len(sums_G)
    resamples = min(RESAMPLES, RESAMPLED_CLUSTERS // groups)
    if groups < PERMUTE_BELOW or np.ptp(x) == 0 or alpha * resamples < 20:
        return None
    rng = np.random.default_rng(0)
    means: Floats = np.empty(resamples)
    for start in range(0, resamples, 500):
        drawn = rng.integers(0, groups, size=(min(500, resamples - start), groups), dtype=np.int32)
        means[start : start + 500] = sums_G[drawn].sum(axis=1) / sizes_G[drawn].sum(axis=1)
    mean = float(sums_G.sum() / sizes_G.sum())
    below = float(np.mean(means < mean) + np.mean(means == mean) / 2)
    bias = float(special.ndtri(min(max(below, 0.5 / resamples), 1 - 0.5 / resamples)))
    left_out_G = (sums_G.sum() - sums_G) / (sizes_G.sum() - sizes_G)
    pulls_G = left_out_G.mean() - left_out_G
    spread = float(np.sum(pulls_G**2))
    acceleration = float(np.sum(pulls_G**3)) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + float(special.ndtri(alpha))
    return float(np.quantile(means, float(special.ndtr(bias + z / (1 - acceleration * z)))))


@functools.lru_cache(maxsize=1 << 16)
def tango_lower_bound(b: int, c: int, n: int, alpha: float) -> float:
    """One-sided lower bound of the difference (c - b) / n of paired proportions.

    The score interval of Tango 1998 (Statistics in Medicine 17:891): the smallest difference that the score test does
    not reject. Its level holds with few or no flips too: with b = c = 0 the bound is -z^2 / (n + z^2).
    """
    z = float(special.ndtri(1 - alpha))
    difference = (c - b) / n

    def excess(D: float) -> float:
        return _tango_score(b, c, n, D) - z

    # The score falls in D: it is 0 at the estimate, and grows without bound towards -1.
    lowest = -1.0 + 1e-12
    if difference <= lowest or excess(lowest) <= 0:
        return -1.0
    from scipy import optimize  # slow to import, and few judgements come here

    return float(optimize.brentq(excess, lowest, difference, xtol=1e-12))


def tango_interval(b: int, c: int, n: int, alpha: float) -> tuple[float, float]:
    """Two-sided interval whose ends are Tango bounds at level alpha each."""
    return tango_lower_bound(b, c, n, alpha), -tango_lower_bound(c, b, n, alpha)


@functools.lru_cache(maxsize=1 << 16)
def mcnemar(b: int, c: int) -> float:
    """One-sided p-value of harm: mid-p, or exact below 10 flips. 1 when nothing flipped."""
    return mcnemar_exact(b, c) if b + c < EXACT_BELOW else mcnemar_midp(b, c)


def mcnemar_exact(b: int, c: int) -> float:
    """P(Bin(b + c, 1/2) >= b): b or more of the flips go the wrong way by chance (McNemar 1947)."""
    return float(special.bdtrc(b - 1, b + c, 0.5)) if b else 1.0


def mcnemar_midp(b: int, c: int) -> float:
    """The exact p-value less half the probability of what was seen (Lancaster 1961; Fagerland et al. 2013)."""
    return mcnemar_exact(b, c) - math.comb(b + c, b) / 2 ** (b + c + 1)


def cluster_mean(values: ArrayLike, clusters: Sequence[str], weights: ArrayLike | None = None) -> Estimate:
    """Weighted mean with a cluster-robust standard error and G - 1 degrees of freedom.

    Var = G / (G - 1) sum_g (sum_{i in g} w_i (x_i - mean))^2 / (sum w)^2. Where each item is its own cluster and
    weights are equal this is the usual standard error of a mean. With one cluster the error is infinite.

    Args:
        values: (I,).
        clusters: (I,) names.
        weights: (I,) positive; equal when not given.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(np.average(x, weights=w))
    sums_G = _cluster_sums(w * (x - mean), clusters)
    groups = len(sums_G)
    if groups < 2:
        return Estimate(mean, math.inf, 0.0)
    variance = float(np.sum(sums_G**2)) * groups / (groups - 1) / float(w.sum()) ** 2
    return Estimate(mean, math.sqrt(variance), groups - 1)


def sign_flip(sums_G: ArrayLike) -> float:
    """One-sided p-value of harm when each cluster's sum could as well have had the other sign (Fisher 1935).

    All 2^G signs up to 14 clusters, beyond that 20,000 draws from a fixed seed, the observed signs among them.

    Args:
        sums_G: (G,) sum of d in each cluster.
    """
    x = np.asarray(sums_G, dtype=np.float64)
    groups = len(x)
    if groups <= ENUMERATE_CLUSTERS:
        signs = 1 - 2 * ((np.arange(2**groups)[:, None] >> np.arange(groups)) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(PERMUTATIONS, groups))
        signs[0] = np.sign(x) + (x == 0)
    # Equal sums differ in their last digits with the order of terms.
    return float(np.mean(signs @ np.abs(x) <= x.sum() + 1e-9 * np.abs(x).sum()))


def mean_interval(values: ArrayLike, clusters: Sequence[str], weights: ArrayLike | None = None) -> tuple[float, float]:
    """Two-sided 90 % interval of one checkpoint's mean score.

    Binary items: Wilson's interval on the items, or on as many draws as there are clusters where clusters agree in
    full; otherwise the cluster-robust t, kept inside [0, 1] for binary items. One cluster says nothing: the range.
    """
    x = np.asarray(values, dtype=np.float64)
    estimate = cluster_mean(x, clusters, weights)
    groups = int(estimate.degrees) + 1
    binary = is_binary(x)
    if groups < 2:
        return (0.0, 1.0) if binary else (float(x.min()), float(x.max()))
    if binary and ((groups == len(x) and _equal(weights)) or estimate.standard_error == 0):
        return _wilson(estimate.mean, groups)
    low, high = estimate.interval(0.05)
    return (max(0.0, low), min(1.0, high)) if binary else (low, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): rejecting those <= alpha keeps the chance of any false alarm <= alpha."""
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
        distance: from the true mean to the bound that must be passed; when it is not positive no number of items
            is enough, and None is returned.
    """
    if distance <= 0:
        return None
    return max(1, math.ceil(_z_sum(alpha) ** 2 * variance / distance**2))


def minimum_items(margin: float, alpha: float) -> int:
    """Items in [0, 1] below which no drop of `margin` can be ruled out, even when none flips: z^2 (1 - m) / m, and up.

    From Tango's bound at b = c = 0, which must be *above* -margin.
    """
    z = float(special.ndtri(1 - alpha))
    return math.floor(z * z * (1 - margin) / margin) + 1


def is_binary(values: Floats) -> bool:
    """Every value is 0 or 1."""
    return bool(np.all((values == 0) | (values == 1)))


def _equal(weights: ArrayLike | None) -> bool:
    return weights is None or bool(np.ptp(np.asarray(weights, dtype=np.float64)) == 0)


def _cluster_sums(values: Floats, clusters: Sequence[str]) -> Floats:
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(index, weights=values).astype(np.float64)


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson 1927, 90 %."""
    z = float(special.ndtri(0.95))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _least_width(groups: int, alpha: float) -> float:
    """How far Tango's bound is from 0 when none of so many items flips."""
    z = float(special.ndtri(1 - alpha))
    return z * z / (groups + z * z)


def _z_sum(alpha: float) -> float:
    return float(special.ndtri(1 - alpha) + special.ndtri(POWER))


def _tango_score(b: int, c: int, n: int, D: float) -> float:
    """(c - b - n D) / sqrt(n (2 q + D (1 - D))), q the likeliest share of b when the difference is D."""
    B = -b - c + (2 * n - c + b) * D
    C = -b * D * (1 - D)
    q = (math.sqrt(max(0.0, B * B - 8 * n * C)) - B) / (4 * n)
    variance = n * (2 * q + D * (1 - D))
    distance = c - b - n * D
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)
