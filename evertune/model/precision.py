"""A bfloat16 model computing in float32 for a while, one layer's weights at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes in float32 with the weights it has; afterwards it is what it was, bit for bit.

    Each layer's weights are widened when it is called and put back when it is done, so that the memory of a second,
    wider model is never needed; of an embedding only the rows that are looked up. Without gradients only.
    """
    units: list[nn.Module] = []
    rest: list[Tensor] = []
    _divide(model, units, rest)
    handles = []
    held: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def widen(unit: nn.Module, *_: Any) -> None:
        held[unit] = _widened([*unit.parameters(), *unit.buffers()])

    def put_back(unit: nn.Module, *_: Any) -> None:
        _put_back(held.pop(unit))

    kept = _widened(rest)
    try:
        for unit in units:
            if type(unit) is nn.Embedding:
                handles.append(unit.register_forward_hook(_widen_rows))
                continue
            handles += [unit.register_forward_pre_hook(widen), unit.register_forward_hook(put_back, always_call=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for narrow in held.values():
            _put_back(narrow)
        _put_back(kept)


def _widen_rows(embedding: nn.Module, given: Any, rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in _NARROW else rows


def _divide(module: nn.Module, units: list[nn.Module], rest: list[Tensor]) -> None:
    """Into modules that are called whole, such as layers and the head, and tensors that belong to none of them."""
    if not any(isinstance(one, nn.ModuleList) for one in module.modules()):
        units.append(module)
        return
    rest += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    for child in module.children():
        _divide(child, units, rest)


def _widened(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give narrow tensors float32 values in place; returns each with its own narrow values."""
    narrow = [(one, one.data) for one in tensors if one.dtype in _NARROW]
    for one, values in narrow:
        one.data = values.float()
    return narrow


def _put_back(narrow: list[tuple[Tensor, Tensor]]) -> None:
    for one, values in narrow:
        one.data = values
