"""Weights in the order in which the processor reads them: of a whole model while answers are generated, of
a frozen head while something is trained below it.

A product with few rows takes as long as it takes to read the weights, and oneDNN otherwise puts them in that order anew
for every product. `benchmarks/decoding.py` has what it saves there, and `benchmarks/head.py` for a head.
"""

# N rows, I inputs, O outputs

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

# The two operations that torch's own compiler lays weights out with; private, so their absence is no error.
_reorder: Callable[[Tensor], Tensor] | None = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
LEAST_TOKENS = 8
"""Laying out the weights takes about as long as so many tokens save."""
# Names of layers in one module that read the same tensor: one product for them reads it, and is called, once.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Models whose weights do not change for a while, with the forwards that have been made for them.
_constant: dict[nn.Module, "_Forwards | None"] = {}
_Forwards = dict[nn.Linear, Callable[[Tensor], Tensor]]
# Copies of frozen weights, with the version of the weight that each is of.
_frozen: Any = WeakTensorKeyDictionary()


@contextlib.contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the weights do not change, so that all `packed_weights` share the copy that the first one makes."""
    _constant[model] = None
    try:
        yield
    finally:
        del _constant[model]


@contextlib.contextmanager
def packed_weights(model: nn.Module, *, tokens: int) -> Iterator[None]:
    """Inside, linear layers in bfloat16 on a CPU multiply with a copy of their weights laid out for it.

    The copy is as large as the weights, which must not change inside; without gradients only. Other dtypes and devices
    stay as they are.

    Args:
        tokens: how many will be generated one after the other; with few nothing is laid out.
    """
    is_worth_it = tokens >= LEAST_TOKENS and not torch.is_grad_enabled()
    forwards = _constant.get(model) if is_worth_it else {}
    if forwards is None:
        forwards = {one: made for group in _groups(model) for one, made in zip(group, _packed(group), strict=True)}
        if model in _constant:
            _constant[model] = forwards
    try:
        for layer, forward in forwards.items():
            layer.forward = forward  # type: ignore[method-assign, assignment]
        yield
    finally:
        for layer in forwards:
            vars(layer).pop("forward", None)


def frozen_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear` with a weight that is not trained: in bfloat16 on a CPU by a copy laid out for it, made once and kept
    as long as the weight lives and is not written to. Where a gradient is asked for it is plain `F.linear`."""
    wants_gradient = weight_OI.requires_grad or (torch.is_grad_enabled() and x_NI.requires_grad)
    if wants_gradient or x_NI.dtype != weight_OI.dtype or not _can_lay_out(weight_OI):
        return F.linear(x_NI, weight_OI, bias_O)
    assert _reorder is not None
    version, laid_out = _frozen.get(weight_OI, (None, None))
    if version != weight_OI._version:
        laid_out = _reorder(weight_OI.detach())
        _frozen[weight_OI] = (weight_OI._version, laid_out)
    found: Tensor = _product(x_NI, laid_out, bias_O, "none", [], "")
    return found


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """Layers that can be packed, with their siblings where those read the same tensor."""
    found: list[list[nn.Linear]] = []
    for parent in model.modules():
        layers = {name: one for name, one in parent.named_children() if _can_pack(one)}
        for names in _SIBLINGS:
            group = [layers[name] for name in names if name in layers]
            if len({one.in_features for one in group}) == 1 and len({one.bias is None for one in group}) == 1:
                found.append(group)
                layers = {name: one for name, one in layers.items() if name not in names}
        found += [[one] for one in layers.values()]
    return found


def _can_pack(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and "forward" not in vars(module) and _can_lay_out(module.weight)


def _can_lay_out(weight: Tensor) -> bool:
    return (
        _reorder is not None
        and _product is not None
        and type(weight) in (nn.Parameter, Tensor)  # not in shards
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _packed(group: Sequence[nn.Linear]) -> list[Callable[[Tensor], Tensor]]:
    """A forward for each layer; the first that is asked about a tensor makes the product for all of them."""
    assert _reorder is not None
    weight = _reorder(torch.cat([one.weight.detach() for one in group]))
    bias_O = None if group[0].bias is None else torch.cat([one.bias.detach() for one in group])
    sizes = [one.out_features for one in group]
    made: dict[int, Tensor] = {}
    read: list[tuple[Tensor, int]] = []

    def forward(x: Tensor, which: int) -> Tensor:
        if which not in made or read[0][0] is not x or read[0][1] != x._version:
            read[:] = [(x, x._version)]
            made.update(enumerate(_product(x, weight, bias_O, "none", [], "").split(sizes, dim=-1)))
        found = made.pop(which)
        if not made:
            read.clear()
        return found

    return [partial(forward, which=i) for i in range(len(group))]
