"""How two models' outputs differ: pure functions of arrays and tensors."""

# N positions, V vocabulary, H hidden, M and K sides of a matrix

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

BINS = 10
POWER_STEPS = 12


def kl_sum(logp_NV: Tensor, logq_NV: Tensor) -> float:
    """Sum over positions of KL(p || q) in nats, over the full vocabulary, added up in float64."""
    return float((logp_NV.double().exp() * (logp_NV.double() - logq_NV.double())).sum())


def linear_cka(X_NH: Tensor, Y_NH: Tensor) -> float:
    """Linear centred kernel alignment of two sets of hidden states at the same positions, in [0, 1]: 1 where one is a
    rotation and a scale of the other (Kornblith et al. 2019, arXiv:1905.00414). 0 where either does not vary."""
    X, Y = (one.double() - one.double().mean(dim=0) for one in (X_NH, Y_NH))
    cross = (X.T @ Y).square().sum()
    own = (X.T @ X).square().sum().sqrt() * (Y.T @ Y).square().sum().sqrt()
    return float(cross / own) if own > 0 else 0.0


def spectral_norm(matrix_MK: Tensor, *, steps: int = POWER_STEPS) -> float:
    """Largest singular value, by power iteration from its longest row: never above it, and within a few per cent where
    the next one is not close."""
    A = matrix_MK.float()
    # The longest row is never orthogonal to all that the matrix does.
    v = A[int(A.square().sum(dim=1).argmax())]
    v = v / v.norm().clamp_min(1e-30)
    norm = A.new_zeros(())
    for _ in range(steps):
        u = A @ v
        norm = u.norm()
        if norm == 0:
            return 0.0
        v = A.T @ (u / norm)
        v = v / v.norm().clamp_min(1e-30)
    return float((A @ v).norm())


def calibration_error(confidences: ArrayLike, is_right: ArrayLike, *, bins: int = BINS) -> float:
    """Expected calibration error in [0, 1]: mean over equally wide bins of confidence, weighted by items, of
    |share right - mean confidence| (Guo et al. 2017, arXiv:1706.04599)."""
    p, right = np.asarray(confidences, dtype=float), np.asarray(is_right, dtype=float)
    bin_of = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(right[bin_of == k].sum() - p[bin_of == k].sum()) for k in range(bins)]
    return float(sum(gaps) / len(p))
