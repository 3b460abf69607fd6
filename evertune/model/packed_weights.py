"""Weights in the order in which the processor reads them, while answers are generated token by token.

A product with few rows takes as long as it takes to read the weights, and oneDNN otherwise puts them in that order anew
for every product. `benchmarks/decoding.py` has what it saves.
"""

# I inputs, O outputs

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

# The two operations that torch's own compiler lays weights out with; private, so their absence is no error.
_reorder: Callable[[Tensor], Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
LEAST_TOKENS = 8
"""Laying out the weights takes about as long as so many tokens save."""


@contextlib.contextmanager
def packed_weights(model: nn.Module, *, tokens: int) -> Iterator[None]:
    """Inside, linear layers in bfloat16 on a CPU multiply with a copy of their weights laid out for it.

    The copy is as large as the weights, which must not change inside; without gradients only. Other dtypes and devices
    stay as they are.

    Args:
        tokens: how many will be generated one after the other; with few nothing is laid out.
    """
    is_worth_it = tokens >= LEAST_TOKENS and not torch.is_grad_enabled()
    layers = [one for one in model.modules() if _can_pack(one)] if is_worth_it else []
    try:
        for one in layers:
            one.forward = _packed(one)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for one in layers:
            vars(one).pop("forward", None)


def _can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and _reorder is not None
        and _product is not None
        and type(module.weight) is nn.Parameter  # not in shards
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and "forward" not in vars(module)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    assert _reorder is not None
    weight, bias_O = _reorder(layer.weight.detach()), layer.bias

    def forward(x: Tensor) -> Tensor:
        found: Tensor = _product(x, weight, bias_O, "none", [], "")
        return found

    return forward
