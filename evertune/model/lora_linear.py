"""A linear layer with low-rank updates in one autograd step: each update is added into the product it changes.

Written out as separate operations an update costs two more passes over the layer's outputs forward and three backward;
here these are the second half of a matrix product (`addmm`), which also rounds once instead of twice.
"""

# M tokens, I inputs, O outputs, R rank

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Update:
    """scale * B @ A, added to a layer's weight: a_RI, b_OR."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


def lora_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """x @ (weight + sum of the updates)^T + bias, the updates added one after the other in their order.

    Differentiable in all tensors; weight and bias, which training freezes below adapters, are asked by `blame` alone.

    Args:
        x: (..., I), in the dtype of all the others.
    """
    factors = [one for update in updates for one in (update.a_RI, update.b_OR)]
    found: Tensor = _LoraLinear.apply(x, weight_OI, bias_O, [one.scale for one in updates], *factors)
    return found


@torch.no_grad()
def add_updates(y_MO: Tensor, x: Tensor, updates: Sequence[Update]) -> Tensor:
    """(..., O): what `lora_linear` computes, from the layer's own outputs y (taken over); without gradients."""
    x_MI = x.reshape(-1, x.shape[-1])
    for one in updates:
        y_MO.addmm_(F.linear(x_MI, one.a_RI), one.b_OR.t(), alpha=one.scale)
    return y_MO.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, scales: Sequence[float], *factors: Tensor
    ) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        y_MO = F.linear(x_MI, weight_OI, bias_O)
        narrow = []
        for scale, a_RI, b_OR in zip(scales, factors[::2], factors[1::2], strict=True):
            narrow.append(F.linear(x_MI, a_RI))
            y_MO.addmm_(narrow[-1], b_OR.t(), alpha=scale)
        ctx.scales, ctx.shape = scales, x.shape
        ctx.save_for_backward(x_MI, weight_OI, *factors, *narrow)
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_MI, weight_OI, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        factors, narrow = rest[: 2 * count], rest[2 * count :]
        grad_MO = upstream[0].reshape(-1, weight_OI.shape[0])
        needs_x = ctx.needs_input_grad[0]
        of_x_MI = grad_MO @ weight_OI if needs_x else None
        of_factors: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            a_RI, b_OR = factors[2 * i : 2 * i + 2]
            needs_a, needs_b = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            # Scaled while it is narrow.
            grad_MR = (grad_MO @ b_OR).mul_(scale) if needs_x or needs_a else None
            if of_x_MI is not None and grad_MR is not None:
                of_x_MI.addmm_(grad_MR, a_RI)
            of_factors.append(grad_MR.t() @ x_MI if needs_a and grad_MR is not None else None)
            of_factors.append((grad_MO.t() @ narrow[i]).mul_(scale) if needs_b else None)
        of_weight_OI = grad_MO.t() @ x_MI if ctx.needs_input_grad[1] else None
        of_bias_O = grad_MO.sum(dim=0) if ctx.needs_input_grad[2] else None
        of_x = None if of_x_MI is None else of_x_MI.view(ctx.shape)
        return of_x, of_weight_OI, of_bias_O, None, *of_factors
