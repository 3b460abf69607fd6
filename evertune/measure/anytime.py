"""Bounds and tests that hold at every number of items, so that looking after each batch and stopping is allowed.

A bet against a hypothesis: with x in [-1, 1] and mean at most D, the capital prod(1 + f (x - D) / (1 + D)) is, for each
fixed fraction f in (0, 1), a nonnegative supermartingale that begins at 1. So is the mean over a grid of fractions, and
by Ville's inequality it ever reaches 1 / alpha with probability at most alpha. What capital refutes at some time is
refuted: Waudby-Smith & Ramdas 2023 (arXiv:2010.09686), with a mixture of fixed fractions in place of predicted ones, so
that the capital depends on which values were seen and not on their order.
"""

# I items, F fractions, U different values

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Fractions of the capital that are bet. The best one is (mean - D) / variance: 0.1 to show with 10 % flips that nothing
# was lost at a margin of 1 point, above 0.5 to show a large loss. A denser grid splits the capital and is later.
FRACTIONS: Floats = np.array([0.06, 0.13, 0.28, 0.6])


class Counted(NamedTuple):
    """Values in [-1, 1] and how often each was seen."""

    values_U: Floats
    counts_U: Floats


def count(values: ArrayLike) -> Counted:
    """The different values and their counts: items flip in few ways, so this is short."""
    x = np.asarray(values, dtype=np.float64)
    if x.size and (x.min() < -1 - 1e-12 or x.max() > 1 + 1e-12):
        raise ValueError(f"values from {x.min():g} to {x.max():g}, expected them in [-1, 1]")
    found, counts = np.unique(np.clip(x, -1, 1), return_counts=True)
    return Counted(found, counts.astype(np.float64))


def log_capital(seen: Counted, D: float) -> float:
    """Log of the capital won by betting that the mean is above D, in (-1, 1]; 0 before anything was seen."""
    gains_FU = np.log1p(FRACTIONS[:, None] * ((seen.values_U - D) / (1 + D))[None, :])
    logs_F = gains_FU @ seen.counts_U
    top = float(logs_F.max())
    return top + math.log(float(np.mean(np.exp(logs_F - top))))


def lower_bound(seen: Counted, alpha: float) -> float:
    """A bound below the mean that is true at every number of items at once with probability 1 - alpha; -1 at first."""
    wanted = -math.log(alpha)
    lowest = -1 + 1e-6
    if not len(seen.counts_U) or log_capital(seen, lowest) <= wanted:
        return -1.0
    mean = float(np.average(seen.values_U, weights=seen.counts_U))
    # The capital falls in D, and betting on a mean above the one seen wins nothing.
    from scipy import optimize

    return float(optimize.brentq(lambda D: log_capital(seen, D) - wanted, lowest, mean, xtol=1e-9))


def p_harm(seen: Counted) -> float:
    """An anytime-valid p-value against "the mean is not below 0": one over the capital won by betting on a loss."""
    if not len(seen.counts_U):
        return 1.0
    return math.exp(-max(0.0, log_capital(Counted(-seen.values_U, seen.counts_U), 0.0)))
