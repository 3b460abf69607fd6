"""What a stage would do: steps, tokens, time and disk, from the rows it would see and the shapes of the weights."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evertune.check.findings import StageEstimate
from evertune.check.lengths import Length
from evertune.data.quotas import Mixing, quotas_of, warnings_of
from evertune.data.stream import Stream
from evertune.model.checkpoint import Checkpoint, weight_files
from evertune.model.header import read_header
from evertune.recipe.presets import ResolvedDpo, ResolvedRl, ResolvedTraining
from evertune.recipe.schema import Numerics

# FLOP per second and core that training reaches on two AVX-512 cores with bfloat16 products: about half of what the
# matrix products alone reach.
CORE_FLOPS = {"bfloat16": 9e10, "float32": 4e10}
BYTES = {"bfloat16": 2, "float32": 4}
# A float32 master and AdamW's two moments of each trained weight; two resume points are kept while a third is written.
RESUME_BYTES = 3 * 12

Rows = Mapping[str, Sequence[Length]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, from the headers of its files.

    Attributes:
        weights: numbers in all tensors.
        body: numbers in what runs at every token: all but the embeddings and the head.
        head: numbers in the output matrix, which runs at the counted positions only.
        sides: rows plus columns of all matrices but the embeddings: what one rank of an adapter holds.
    """

    weights: int
    body: int
    head: int
    sides: int


def shapes_of(base: Checkpoint, vocab_size: int) -> Shapes:
    """Sizes of a model. Matrices with a row per token of the vocabulary, and maybe more, are the embeddings, the head,
    or both."""
    tensors = [one.shape for file in weight_files(base.path) for one in read_header(file).values()]
    outer = [shape for shape in tensors if len(shape) == 2 and shape[0] >= vocab_size]
    inner = [shape for shape in tensors if len(shape) == 2 and shape[0] < vocab_size]
    weights, edges = sum(map(math.prod, tensors)), [math.prod(shape) for shape in outer]
    return Shapes(
        weights=weights,
        body=weights - sum(edges),
        head=max(edges, default=0),
        sides=sum(map(sum, inner)),
    )


class Amounts(NamedTuple):
    """Rows and tokens seen in all steps of a stage, and what is odd about how its sources are mixed."""

    steps: int
    new_rows: int
    replay_rows: int
    new_tokens: float
    new_counted: float
    replay_tokens: float
    replay_counted: float
    odd: list[str]


def amounts(new: Rows, replay: Rows, mixing: Mixing, settings: ResolvedTraining) -> Amounts:
    """Exact rows and steps of a stage; tokens as the mean of a source's rows, which is exact over whole epochs.

    Args:
        new, replay: lengths of rows by source, replay without those that are also new.
        mixing: how the new sources are mixed.
    """
    pool = {name: len(rows) for name, rows in replay.items()}
    share = settings.replay.share if any(pool.values()) else 0.0
    sizes = {name: len(rows) for name, rows in new.items()}
    quotas = quotas_of(mixing, sizes, {name: sum(one.tokens for one in rows) for name, rows in new.items()})
    stream = Stream(new=sizes, weights=None, replay=pool, share=share, seed=0, quotas=quotas)
    passes = settings.iterations if isinstance(settings, ResolvedRl) else 1
    epochs = settings.epochs or 0
    steps = settings.steps or passes * max(1, math.ceil(epochs * stream.rows_per_epoch / settings.batch_rows))
    seen = math.ceil(steps / passes) * settings.batch_rows
    replay_rows = seen * stream.replay_per_epoch // stream.rows_per_epoch
    new_rows = seen - replay_rows
    of_new, of_replay = _means(new, quotas), _means(replay, pool)
    return Amounts(
        steps,
        new_rows,
        replay_rows,
        new_rows * of_new[0],
        new_rows * of_new[1],
        replay_rows * of_replay[0],
        replay_rows * of_replay[1],
        odd=warnings_of(quotas, sizes, new_rows / stream.new_per_epoch) if quotas != sizes else [],
    )


def estimate(
    label: str, seen: Amounts, settings: ResolvedTraining, shapes: Shapes, numerics: Numerics, *, done: bool
) -> StageEstimate:
    """The amounts with time and disk."""
    cores = numerics.threads or os.cpu_count() or 1
    seconds = _flops(seen, settings, shapes) / (CORE_FLOPS[numerics.dtype] * cores)
    return StageEstimate(
        label=label,
        new_rows=seen.new_rows,
        replay_rows=seen.replay_rows,
        steps=seen.steps,
        tokens=round(seen.new_tokens + seen.replay_tokens),
        counted_tokens=round(seen.new_counted + seen.replay_counted),
        seconds=math.ceil(seconds),
        disk_bytes=kept_weights(settings, shapes) * BYTES[numerics.dtype],
        done=done,
        summary=(
            f"{seen.new_rows:,} new + {seen.replay_rows:,} replayed rows in {seen.steps:,} steps, "
            f"{round(seen.new_tokens + seen.replay_tokens):,} tokens"
        ),
    )


def forward_seconds(tokens: float, counted: float, shapes: Shapes, numerics: Numerics) -> float:
    """Time of forward passes over so many tokens, with the head on the counted ones."""
    cores = numerics.threads or os.cpu_count() or 1
    return 2 * (shapes.body * tokens + shapes.head * counted) / (CORE_FLOPS[numerics.dtype] * cores)


def resume_bytes(settings: ResolvedTraining, shapes: Shapes) -> int:
    """Disk that a stage takes beside its checkpoint while it runs."""
    return kept_weights(settings, shapes) * RESUME_BYTES


def nearest_folder(path: Path) -> Path:
    """The path, or the first folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _flops(seen: Amounts, settings: ResolvedTraining, shapes: Shapes) -> float:
    """2 per weight and token and pass: forward, gradient of the input, and of the weights where they are trained."""
    tokens, counted = seen.new_tokens + seen.replay_tokens, seen.new_counted + seen.replay_counted
    passes = 2 if settings.tune.lora else 3
    flops: float = 2 * (passes * shapes.body * tokens + passes * shapes.head * counted)
    anchor = settings.anchor
    if anchor.kl and anchor.cache == "off":
        # The reference runs forward beside the policy.
        new, replay = anchor.on in ("new", "both"), anchor.on in ("replay", "both")
        flops += 2 * shapes.body * (new * seen.new_tokens + replay * seen.replay_tokens)
        flops += 2 * shapes.head * (new * seen.new_counted + replay * seen.replay_counted)
    if isinstance(settings, ResolvedDpo):
        # The reference runs over each pair once, however often the pair is seen.
        rounds_over = max(1.0, settings.epochs or 1.0)
        flops += 2 * (shapes.body * seen.new_tokens + shapes.head * seen.new_counted) / rounds_over
    if isinstance(settings, ResolvedRl):
        # Every answer is taken to be as long as it may be: written token by token, then read to be trained on.
        answers = seen.new_rows * settings.group
        written, read = answers * settings.max_new_tokens, answers * seen.new_tokens / max(1, seen.new_rows)
        readings = passes * settings.iterations + bool(settings.kl) + (settings.rollout_steps * settings.iterations > 1)
        flops += 2 * (shapes.body + shapes.head) * written * (1 + readings) + 2 * shapes.body * read * readings
    return flops


def kept_weights(settings: ResolvedTraining, shapes: Shapes) -> int:
    """Numbers in what a stage trains and leaves; an adapter on named layers counts as one on all."""
    lora = settings.tune.lora
    return lora.rank * shapes.sides if lora else shapes.weights


def _means(rows: Rows, shares: Mapping[str, float]) -> tuple[float, float]:
    """Mean tokens and counted tokens of a row, where sources are drawn in these shares."""
    total = sum(shares.values())
    if not total:
        return 0.0, 0.0
    means = {
        name: (sum(one.tokens for one in each) / len(each), sum(one.counted for one in each) / len(each))
        for name, each in rows.items()
        if each
    }
    tokens, counted = (sum(shares[name] * mean[i] for name, mean in means.items()) / total for i in (0, 1))
    return tokens, counted
