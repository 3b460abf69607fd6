"""What may be averaged at all: an update is data from outside, and one bad client spoils a mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from evertune.federated.aggregation import squared_norm
from evertune.model.adapter import Factor, Factors

Shapes = Mapping[str, tuple[int, int]]
"""Module -> (outputs, inputs)."""


@dataclass(frozen=True)
class Checked:
    """An update that may be used, or why it may not.

    Attributes:
        factors: the update, clipped where asked; None where it is refused.
        norm: Frobenius norm of all its products together, before clipping; NaN where it could not be formed.
        reason: why it is refused, or that it was clipped; "" where it is as it came.
    """

    factors: Factors | None
    norm: float
    reason: str = ""


def shapes_of(factors: Factors) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each module of an update."""
    return {name: (one.b_OR.shape[0], one.a_RI.shape[1]) for name, one in factors.items()}


def norm_of(factors: Factors) -> float:
    """Frobenius norm of all s B A together, in float64."""
    return math.sqrt(sum(squared_norm(one) for one in factors.values()))


def check_update(
    factors: Factors, *, shapes: Shapes, max_rank: int, norm_bound: float | None, clip: bool = False
) -> Checked:
    """Check an update's modules, shapes, ranks, values and size, in this order.

    Args:
        shapes: of every module that may be updated; all of them must be.
        max_rank: the largest rank a client may send.
        norm_bound: the largest norm; None for any.
        clip: scale an update that is too large down to the bound instead of refusing it.
    """
    reason = _odd_modules(factors, shapes) or _odd_shapes(factors, shapes, max_rank) or _not_finite(factors)
    if reason:
        return Checked(None, math.nan, reason)
    norm = norm_of(factors)
    if norm_bound is None or norm <= norm_bound:
        return Checked(factors, norm)
    told = f"norm {norm:.4g} is above the bound {norm_bound:g}"
    if not clip:
        return Checked(None, norm, told)
    scaled = {name: replace(one, scale=one.scale * norm_bound / norm) for name, one in factors.items()}
    return Checked(scaled, norm, f"{told}: clipped")


def _odd_modules(factors: Factors, shapes: Shapes) -> str:
    odd = sorted(set(factors) ^ set(shapes))
    if not odd:
        return ""
    return f"module {odd[0]} is {'not to be updated' if odd[0] in factors else 'missing'}"


def _odd_shapes(factors: Factors, shapes: Shapes, max_rank: int) -> str:
    for name, one in factors.items():
        a, b = tuple(one.a_RI.shape), tuple(one.b_OR.shape)
        outputs, inputs = shapes[name]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or b[0] != outputs or a[1] != inputs:
            return f"{name}: factors {b} and {a} do not make a ({outputs}, {inputs}) update"
        if a[0] > max_rank:
            return f"{name}: rank {a[0]} is above {max_rank}"
    return ""


def _not_finite(factors: Factors) -> str:
    for name, one in factors.items():
        if not _is_finite(one):
            return f"{name}: not finite"
    return ""


def _is_finite(one: Factor) -> bool:
    return bool(torch.isfinite(one.a_RI).all() and torch.isfinite(one.b_OR).all()) and math.isfinite(one.scale)
