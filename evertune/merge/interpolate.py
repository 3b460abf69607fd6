"""The line between a reference and a candidate: walked in memory, and one point of it written.

A candidate that stands on its reference through adapters is moved by scaling those adapters, which is the exact line in
weights. Any other pair is opened as dense models, and each point is computed from the two ends, never from the last
point.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from evertune.errors import MergeError
from evertune.merge.arithmetic import interpolate
from evertune.model.adapter import concatenate, read_factors, scale_adapters, scaled, write_adapter
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

    The model handed over is valid during the call only. With adapters no weight is copied; for dense models the two
    ends and the point between them are in memory: three copies of the weights.

    Args:
        candidate, reference: two checkpoints of one architecture and tokenizer.
        alphas: 0 is the reference, 1 the candidate, both bit for bit in `dtype`.
        dtype: `bfloat16` or `float32`, of the ends and of the point; the line is computed in float64.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        MergeError: the two differ in architecture, tokenizer or chat template.
    """
    line = _dense if above(candidate, reference) is None else _scaled
    return [visit(alpha, opened) for alpha, opened in line(candidate, reference, alphas, dtype, device)]


def write_winner(candidate: Checkpoint, reference: Checkpoint, alpha: float, folder: Path, *, dtype: str) -> None:
    """Write one point of the line: an adapter on the reference where `scan` scaled adapters, else a dense model.

    One adapter keeps its factors and gets a scale; several become one with concatenated factors, the same function up
    to the order of rounding.

    Args:
        folder: exists and is empty.
        dtype: of a dense model, as in `scan`; an adapter keeps its own.

    Raises:
        MergeError: as `scan`.
    """
    adapters = above(candidate, reference)
    if adapters is None:
        ((_, opened),) = _dense(candidate, reference, [alpha], dtype, "cpu")
        save_dense(opened.model, folder, like=candidate)
        return
    parts = [scaled(read_factors(one.path), alpha) for one in adapters]
    write_adapter(parts[0] if len(parts) == 1 else concatenate(parts), folder, reference)


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
    # stack[0] is the base, so adapter s0 is stack[1].
    names = [f"s{i}" for i in range(len(reference.stack) - 1, len(candidate.stack) - 1)]
    for alpha in alphas:
        scale_adapters(opened, names, alpha)
        yield alpha, opened


def _dense(
    candidate: Checkpoint, reference: Checkpoint, alphas: Sequence[float], dtype: str, device: str
) -> Iterator[tuple[float, OpenModel]]:
    opened = open_model(candidate, dtype=dtype, device=device, fold=True)
    other = open_model(reference, dtype=dtype, device=device, fold=True)
    _check_one_line(candidate, reference, opened, other)
    moved, start = dict(opened.model.named_parameters()), dict(other.model.named_parameters())
    end = {name: tensor.detach().clone() for name, tensor in moved.items()}
    for alpha in alphas:
        with torch.no_grad():
            for name, tensor in moved.items():
                tensor.copy_(interpolate(start[name], end[name], alpha))
        yield alpha, opened


def _check_one_line(candidate: Checkpoint, reference: Checkpoint, opened: OpenModel, other: OpenModel) -> None:
    if opened.codec.digest != other.codec.digest:
        raise MergeError(
            f"{candidate.path} and {reference.path} differ in tokenizer or chat template.",
            remedy="Interpolation needs two models with one start.",
        )
    ends: list[dict[str, Tensor]] = [dict(one.model.named_parameters()) for one in (other, opened)]
    for name in sorted(ends[0].keys() | ends[1].keys()):
        shapes = [tuple(end[name].shape) if name in end else "missing" for end in ends]
        if shapes[0] != shapes[1]:
            raise MergeError(
                f"{name} is {shapes[0]} in {reference.path} and {shapes[1]} in {candidate.path}.",
                remedy="Interpolation needs one architecture.",
            )
    saved = opened.model.state_dict().keys()
    buffers = dict(other.model.named_buffers())
    for name, buffer in opened.model.named_buffers():
        if name in saved and not torch.equal(buffer, buffers[name]):
            raise MergeError(
                f"the buffer {name} differs between {reference.path} and {candidate.path}, and has no value between.",
                remedy="Interpolation needs two models with one start.",
            )
