"""How far weights have moved: relative L2 distance per layer and in total, one tensor at a time."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from evertune.measure.products import squared_norm

_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class WeightUpdate:
    """One tensor of the model before, and what was added to it; None when nothing was."""

    name: str
    before: Tensor
    change: Tensor | None


@dataclass(frozen=True)
class Drift:
    """|after - before| / |before| with L2 norms: over all weights together, and per layer.

    `layers` maps a layer (`model.layers.3`) or, outside the layers, a tensor's name to its own ratio; 0 means
    untouched. A layer that was all zeros before is measured against the norm of the whole model.
    """

    total: float
    layers: dict[str, float]


def measure_drift(updates: Iterable[WeightUpdate]) -> Drift:
    """Relative L2 drift of a set of weights. Untouched tensors count in the denominators.

    Args:
        updates: every tensor of the model once; consumed one by one, so that only one needs to be in memory. Norms
            are summed in float64.

    Raises:
        ValueError: all weights were zero before.
    """
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    for one in updates:
        layer = layer_of(one.name)
        size[layer] = size.get(layer, 0.0) + float(squared_norm(one.before))
        moved[layer] = moved.get(layer, 0.0) + (0.0 if one.change is None else float(squared_norm(one.change)))
    whole = sum(size.values())
    if whole == 0.0:
        raise ValueError("all weights were zero before: there is nothing to measure a drift against")
    layers = {layer: math.sqrt(moved[layer] / (size[layer] or whole)) for layer in size}
    return Drift(total=math.sqrt(sum(moved.values()) / whole), layers=layers)


def between(before: Mapping[str, Tensor], after: Iterable[tuple[str, Tensor]]) -> Iterator[WeightUpdate]:
    """The updates from one set of weights to another with the same names and shapes, subtracted in float32.

    Raises:
        ValueError: a name is in one of them only, or a shape differs.
    """
    missing = set(before)
    for name, new in after:
        if name not in before:
            raise ValueError(f"{name} is only in the model after")
        old = before[name]
        if old.shape != new.shape:
            raise ValueError(f"{name} is {tuple(old.shape)} before and {tuple(new.shape)} after")
        missing.remove(name)
        yield WeightUpdate(name, old, new.float() - old.float())
    if missing:
        raise ValueError(f"{min(missing)} is only in the model before")


def layer_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.3`; a tensor outside the layers is its own, without
    `.weight`."""
    found = _LAYER.match(name)
    return found.group(1) if found else name.removesuffix(".weight")
