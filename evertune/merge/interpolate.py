"""The line between a reference and a candidate: walked in memory, and one point of it written.

A candidate that stands on its reference through adapters is moved by scaling those adapters, which is the exact line in
weights. For any other pair each point is a merge by the engine, from the numbers stored at the two ends, never from the
last point; what is written is float32, so that a later merge does not start from rounded numbers. A point may also have
a share of its own for each block of layers, as RLHF is tempered layer by layer (Lin et al. 2024, arXiv:2309.06256).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from evertune.errors import MergeError
from evertune.merge.config import MergeConfig
from evertune.merge.engine import merge_into
from evertune.merge.in_memory import apply_into
from evertune.merge.plan import MergePlan, plan_checkpoints
from evertune.model.adapter import concatenate, read_factors, scale_adapters, scaled, write_adapter
from evertune.model.checkpoint import Checkpoint, weight_files
from evertune.model.codec import load_codec
from evertune.model.header import read_header
from evertune.model.open import OpenModel, open_model

T = TypeVar("T")
# Of the candidate: one number, or one for each block of layers, from the embedding to the head.
Share = float | tuple[float, ...]
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


def scan(
    candidate: Checkpoint,
    reference: Checkpoint,
    alphas: Sequence[Share],
    *,
    dtype: str,
    device: str,
    visit: Callable[[Share, OpenModel], T],
) -> list[T]:
    """Call `visit(alpha, model)` with (1 - alpha) reference + alpha candidate for each alpha, in order.

    The model handed over is valid during the call only. One copy of the weights is in memory: adapters are scaled, and
    a dense point is read into the model tensor by tensor.

    Args:
        candidate, reference: two checkpoints of one architecture and tokenizer.
        alphas: 0 is the reference, 1 the candidate, both bit for bit in `dtype`. Several numbers are the shares of as
            many blocks of layers; the embedding goes with the first, the last norm and the head with the last.
        dtype: `bfloat16` or `float32`, of the model; the line is computed in float64.
        device: `cpu`, `cuda` or `auto`.

    Raises:
        MergeError: the two differ in architecture, tokenizer or chat template.
    """
    line = _dense if above(candidate, reference) is None else _scaled
    return [visit(alpha, opened) for alpha, opened in line(candidate, reference, alphas, dtype, device)]


def write_winner(candidate: Checkpoint, reference: Checkpoint, alpha: Share, folder: Path) -> None:
    """Write one point of the line: an adapter on the reference where `scan` scaled adapters, else a model in float32.

    One adapter keeps its factors and gets a scale; several become one with concatenated factors, the same function up
    to the order of rounding.

    Args:
        folder: exists and is empty.

    Raises:
        MergeError: as `scan`.
    """
    adapters = above(candidate, reference)
    if adapters is None:
        merge_into(_point(candidate, reference, alpha), folder)
        return
    read = [read_factors(one.path) for one in adapters]
    layers = _count_layers(candidate)
    parts = [scaled(one, _share_of(alpha, layers)) for one in read]
    write_adapter(parts[0] if len(parts) == 1 else concatenate(parts), folder, reference)


def is_exact(candidate: Checkpoint, reference: Checkpoint) -> bool:
    """Whether what `write_winner` writes has, opened in the dtype of a scan, the scanned weights bit for bit: all but
    several adapters that become one."""
    adapters = above(candidate, reference)
    return adapters is None or len(adapters) == 1


def above(candidate: Checkpoint, reference: Checkpoint) -> tuple[Checkpoint, ...] | None:
    """The adapters of the candidate's stack that stand above the reference; None when it does not stand on it."""
    digests = [one.digest for one in candidate.stack]
    if reference.digest not in digests[:-1]:
        return None
    return candidate.stack[digests.index(reference.digest) + 1 :]


def _share_of(share: Share, layers: int) -> Callable[[str], float]:
    """The share of a weight or layer by its name."""

    def share_of(name: str) -> float:
        if not isinstance(share, tuple):
            return share
        found = _LAYER.search(name)
        if found is None:
            return share[0] if "embed" in name or "wte" in name else share[-1]
        return share[min(int(found[1]) * len(share) // layers, len(share) - 1)]

    return share_of


def _count_layers(candidate: Checkpoint) -> int:
    """Layers of the model at the bottom of the stack, from its weights' names: an adapter may skip the last ones."""
    files = weight_files(candidate.base.path)
    numbers = [int(found[1]) for file in files for name in read_header(file) if (found := _LAYER.search(name))]
    return 1 + max(numbers, default=0)


def _scaled(
    candidate: Checkpoint, reference: Checkpoint, alphas: Sequence[Share], dtype: str, device: str
) -> Iterator[tuple[Share, OpenModel]]:
    opened = open_model(candidate, dtype=dtype, device=device)
    # stack[0] is the base, so adapter s0 is stack[1].
    names = [f"s{i}" for i in range(len(reference.stack) - 1, len(candidate.stack) - 1)]
    layers = opened.model.config.get_text_config().num_hidden_layers
    for alpha in alphas:
        scale_adapters(opened, names, _share_of(alpha, layers))
        yield alpha, opened


def _dense(
    candidate: Checkpoint, reference: Checkpoint, alphas: Sequence[Share], dtype: str, device: str
) -> Iterator[tuple[Share, OpenModel]]:
    points = [(alpha, _point(candidate, reference, alpha)) for alpha in alphas]
    opened = open_model(candidate, dtype=dtype, device=device, fold=True)
    for alpha, plan in points:
        apply_into(plan, opened.model)
        yield alpha, opened


def _point(candidate: Checkpoint, reference: Checkpoint, share: Share) -> MergePlan:
    """A point of the line as a merge. Whether it makes sense is for the probes to say, not for the weights' cosine."""
    if load_codec(candidate.base.path).digest != load_codec(reference.base.path).digest:
        raise MergeError(
            f"{candidate.path} and {reference.path} differ in tokenizer or chat template.",
            remedy="Interpolation needs two models with one start.",
        )
    config = MergeConfig.model_validate({
        "method": "interpolate", "base": str(reference.path), "models": {"candidate": {"path": str(candidate.path)}},
        "t": {"blocks": list(share)} if isinstance(share, tuple) else share, "config_from": "candidate",
        "dtype": "float32", "different_starts": "allow", "output": "model",
    })  # fmt: skip
    return plan_checkpoints(config, {"candidate": candidate}, reference)
