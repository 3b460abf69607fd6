"""The line between a reference and a candidate: walked in memory, and one point of it written.

A candidate that stands on its reference through adapters is moved by scaling those adapters, which is the exact line in
weights. Any other pair is opened as dense models, and each tensor is interpolated from the two ends, never from the
last point.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from evertune.errors import MergeError
from evertune.merge.arithmetic import interpolate
from evertune.model.adapter import concatenate, read_factors, scale_adapters, write_adapter
from evertune.model.checkpoint import Checkpoint
from evertune.model.export import save_dense
from evertune.model.open import OpenModel, open_model

T = TypeVar("T")


def scan(
    candidate: Checkpoint,
    reference: Checkpoint,
    alphas: Sequence[float],
    *,
    dtype: str,
    device: str,
    visit: Callable[[float, OpenModel], T],
) -> list[T]:
    """Call `visit(alpha, model)` with (1 - alpha) reference + alpha candidate for each alpha, in order.

    The model handed over is valid during the call only. With adapters no weight is copied; for dense models a second
    copy of the weights is in memory.

    Raises:
        MergeError: the two are not one architecture, or stand on different vocabularies.
    """
    if above(candidate, reference) is not None:
        return [visit(alpha, opened) for alpha, opened in _scaled(candidate, reference, alphas, dtype, device)]
    return [visit(alpha, opened) for alpha, opened in _dense(candidate, reference, alphas, dtype, device)]


def write_winner(candidate: Checkpoint, reference: Checkpoint, alpha: float, folder: Path, *, dtype: str) -> None:
    """Write one point of the line: an adapter on the reference where `scan` scaled adapters, else a dense model."""
    adapters = above(candidate, reference)
    if adapters is not None:
        factors = concatenate([read_factors(one.path) for one in adapters], [alpha] * len(adapters))
        write_adapter(factors, folder, reference)
        return
    ((_, opened),) = _dense(candidate, reference, [alpha], dtype, "cpu")
    save_dense(opened.model, folder, like=candidate)


def above(candidate: Checkpoint, reference: Checkpoint) -> tuple[Checkpoint, ...] | None:
    """The adapters of the candidate's stack that stand above the reference; None when it does not stand on it."""
    digests = [one.digest for one in candidate.stack]
    if reference.digest not in digests[:-1]:
        return None
    return candidate.stack[digests.index(reference.digest) + 1 :]


def _scaled(
    candidate: Checkpoint, reference: Checkpoint, alphas: Sequence[float], dtype: str, device: str
) -> Iterator[tuple[float, OpenModel]]:
    opened = open_model(candidate, dtype=dtype, device=device)
    below = len(reference.stack) - 1
    names = [f"s{i}" for i in range(below, len(candidate.stack) - 1)]
    for alpha in alphas:
        scale_adapters(opened, names, alpha)
        yield alpha, opened


def _dense(
    candidate: Checkpoint, reference: Checkpoint, alphas: Sequence[float], dtype: str, device: str
) -> Iterator[tuple[float, OpenModel]]:
    opened = open_model(candidate, dtype=dtype, device=device, fold=True)
    other = open_model(reference, dtype=dtype, device=device, fold=True)
    if opened.codec.digest != other.codec.digest:
        raise MergeError(
            f"{candidate.path} and {reference.path} differ in tokenizer or chat template.",
            remedy="Interpolation needs two models with one start.",
        )
    ends1, ends0 = dict(opened.model.named_parameters()), dict(other.model.named_parameters())
    for name in ends0.keys() | ends1.keys():
        shapes = [tuple(ends[name].shape) if name in ends else None for ends in (ends0, ends1)]
        if shapes[0] != shapes[1]:
            raise MergeError(
                f"{name} is {shapes[0]} in {reference.path} and {shapes[1]} in {candidate.path}.",
                remedy="Interpolation needs one architecture.",
            )
    kept = {name: tensor.detach().clone() for name, tensor in ends1.items()}
    for alpha in alphas:
        with torch.no_grad():
            for name, tensor in ends1.items():
                tensor.copy_(interpolate(ends0[name], kept[name], alpha))
        yield alpha, opened
