"""How far a stage has moved the model: from its start and from the base, adapters included."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from evertune.errors import EvertuneError
from evertune.measure.drift import WeightUpdate, between, measure_drift
from evertune.model.adapter import Factors, read_factors
from evertune.model.checkpoint import Checkpoint
from evertune.model.open import OpenModel, open_model

JsonDrift = dict[str, float | dict[str, float] | None]


@torch.no_grad()
def stage_drift(opened: OpenModel, *, start: Checkpoint, base: Checkpoint, new: Factors | None) -> JsonDrift:
    """Relative L2 drift of the trained model: `to_start`, `to_base`, and `layers` (to the start).

    Args:
        opened: the trained model, in memory.
        new: the trained adapter; None when the weights themselves were trained.

    Returns:
        `to_base` is None when the base has other tensors than the model, so that no distance is defined.
    """
    lower = [] if new is None else [read_factors(one.path) for one in start.stack[1:]]
    if new is None:
        to_start = measure_drift(between(_dense(start, opened), plain_weights(opened.model)))
    else:
        to_start = measure_drift(low_rank_updates(opened.model, lower, [new]))
    if new is not None and base.digest == start.base.digest:
        to_base: float | None = measure_drift(low_rank_updates(opened.model, [], [*lower, new])).total
    elif base.digest == start.digest:
        to_base = to_start.total
    else:
        stack = [*lower, new] if new is not None else []
        to_base = _drift_or_none(_dense(base, opened), effective_weights(opened.model, stack))
    return {"to_start": to_start.total, "to_base": to_base, "layers": to_start.layers}


def drift_or_none(opened: OpenModel, *, start: Checkpoint, base: Checkpoint) -> JsonDrift | None:
    """`stage_drift` of a checkpoint that another program made: None where it has other tensors than its start."""
    new = read_factors(opened.checkpoint.path) if opened.checkpoint.form == "adapter" else None
    try:
        return stage_drift(opened, start=start, base=base, new=new)
    except EvertuneError:  # a ValueError too, and never what is meant here
        raise
    except ValueError:
        return None


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's own weights under their plain names, without adapters; tied weights once."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter.detach()


def effective_weights(model: nn.Module, stack: Sequence[Factors]) -> Iterator[tuple[str, Tensor]]:
    """The weights with a stack of adapters added in float32, one tensor at a time."""
    for name, weight in plain_weights(model):
        change = _sum_of(stack, name)
        yield name, weight if change is None else weight.float() + change.to(weight.device)


def low_rank_updates(model: nn.Module, lower: Sequence[Factors], new: Sequence[Factors]) -> Iterator[WeightUpdate]:
    """What adapters `new` change on a model with adapters `lower`, one tensor at a time, from their factors."""
    for name, before in effective_weights(model, lower):
        yield WeightUpdate(name, before, _sum_of(new, name))


def _sum_of(stack: Sequence[Factors], name: str) -> Tensor | None:
    module = name.removesuffix(".weight")
    deltas = [factors[module].delta() for factors in stack if module in factors and name != module]
    return sum(deltas[1:], deltas[0]) if deltas else None


def _dense(checkpoint: Checkpoint, like: OpenModel) -> Mapping[str, Tensor]:
    dtype = str(like.dtype).removeprefix("torch.")
    dense = open_model(checkpoint, dtype=dtype, device=str(like.device), fold=True)
    return dict(plain_weights(dense.model))


def _drift_or_none(before: Mapping[str, Tensor], after: Iterator[tuple[str, Tensor]]) -> float | None:
    try:
        return measure_drift(between(before, after)).total
    except ValueError:
        return None
