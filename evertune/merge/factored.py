"""Linear merges of adapters over one base, done on the factors: exact, and no weight of the base is read.

sum_k w_k (base + s_k B_k A_k) with weights that add up to 1 is base + [w_1 s_1 B_1, ...] [A_1; ...]: one adapter whose
rank is the sum of the ranks. Averaging A and B by themselves, as is often done, is something else: (sum of square roots
of weights) squared times too much for equal adapters, and cross terms for different ones.
"""

# I inputs, O outputs, R rank

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evertune.merge.kernels import Array
from evertune.merge.methods import Settings, check_weight_sum
from evertune.merge.plan import MergePlan, TensorPlan
from evertune.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from evertune.model.adapter import Factor


@dataclass(frozen=True)
class Residual:
    """What a recompression lost: the root of the lost share of the squared update, over all modules and at worst."""

    overall: float
    worst: float
    worst_module: str


def common_base(plan: MergePlan) -> Checkpoint | None:
    """The base whose adapter the result can be, exactly; None where a model must be written."""
    experts = [one for one in plan.sources if one is not plan.base]
    base = experts[0].checkpoint.base
    same = all(one.checkpoint.base.digest == base.digest for one in plan.sources)
    if not (plan.method.linear and same and any(one.updates for one in experts) and plan.config.output != "model"):
        return None
    if plan.base is not None and plan.base.updates:
        return None
    changed = {name for one in experts for name in one.updates}
    weighed = [one for one in plan.tensors if one.settings is not None and one.name in changed]
    # Where no adapter counts, the result is the base, and an adapter without factors could not be written.
    counts = any(share != 0.0 for one in weighed for share in coefficients(plan, one).values())
    return base if counts and all(_keeps_base(plan, one) for one in weighed) else None


def merged_factors(plan: MergePlan) -> "dict[str, Factor]":
    """The merged adapter's factors by module; scale 1."""
    from evertune.model.adapter import Factors, concatenate, read_factors, scaled

    shares: dict[str, Mapping[int, float]] = {
        one.name: coefficients(plan, one) for one in plan.tensors if one.settings is not None
    }
    parts: list[Factors] = []
    for i, source in enumerate(plan.sources):
        tensors = {update.module: name for name, updates in source.updates.items() for update in updates}
        for adapter in source.checkpoint.stack[1:]:
            factors = {
                module: replace(factor, scale=factor.scale * shares[tensors[module]].get(i, 0.0))
                for module, factor in read_factors(adapter.path).items()
            }
            parts.append({module: one for module, one in scaled(factors, 1.0).items() if one.scale != 0.0})
    return concatenate(parts)


def coefficients(plan: MergePlan, tensor: TensorPlan) -> dict[int, float]:
    """How much each source's difference from the base counts in a linear merge of one tensor."""
    settings = tensor.settings
    assert settings is not None, tensor.name
    if plan.config.method == "ema":
        decay, last = settings.t, settings.experts - 1
        shares = [decay**last, *((1.0 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    elif plan.config.method == "interpolate":
        shares = [settings.t]
    else:
        weights = settings.weights
        if settings.normalize:
            check_weight_sum(weights)
            weights = weights / math.fsum(weights)
        scale = settings.scale if plan.config.method == "task_arithmetic" else 1.0
        shares = [scale * float(one) for one in weights]
    found: dict[int, float] = {}
    for i, share in zip(tensor.experts, shares, strict=True):
        found[i] = found.get(i, 0.0) + share
    return found


def recompress(factors: "Mapping[str, Factor]", rank: int) -> "tuple[dict[str, Factor], Residual]":
    """The best adapter of a smaller rank: QR of both sides, then the SVD of their small core.

    The same as the SVD of B @ A cut to `rank` (Eckart and Young 1936), without ever making that product.
    """
    import torch

    from evertune.model.adapter import Factor

    found, lost, whole = {}, 0.0, 0.0
    worst, worst_module = 0.0, ""
    for module, one in factors.items():
        a_RI, b_OR = one.a_RI.double().numpy(), one.b_OR.double().numpy() * one.scale
        q_OR, left = np.linalg.qr(b_OR)
        q_IR, right = np.linalg.qr(a_RI.T)
        u, sizes, v = np.linalg.svd(left @ right.T)
        kept = min(rank, len(sizes))
        roots = np.sqrt(sizes[:kept])
        small_b, small_a = (q_OR @ u[:, :kept]) * roots, (roots[:, None] * v[:kept]) @ q_IR.T
        found[module] = Factor(_single(torch, small_a), _single(torch, small_b), 1.0, one.transposed)
        tail, total = float(np.square(sizes[kept:]).sum()), float(np.square(sizes).sum())
        lost, whole = lost + tail, whole + total
        share = math.sqrt(tail / total) if total > 0.0 else 0.0
        if share >= worst:
            worst, worst_module = share, module
    return found, Residual(math.sqrt(lost / whole) if whole > 0.0 else 0.0, worst, worst_module)


def write_factored(plan: MergePlan, base: Checkpoint, folder: Path) -> Residual | None:
    """Write the merged adapter; returns what a smaller `rank` lost, or None when nothing was cut."""
    from evertune.model.adapter import write_adapter

    factors = merged_factors(plan)
    residual = None
    if plan.config.rank is not None and any(one.rank > plan.config.rank for one in factors.values()):
        factors, residual = recompress(factors, plan.config.rank)
    write_adapter(factors, folder, base)
    return residual


def _keeps_base(plan: MergePlan, tensor: TensorPlan) -> bool:
    """The base counts exactly once: a sum without normalisation may scale it."""
    settings: Settings | None = tensor.settings
    if plan.config.method != "linear" or settings is None or settings.normalize:
        return True
    return abs(math.fsum(settings.weights) - 1.0) < 1e-12


def _single(torch: Any, values: Array) -> Any:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
