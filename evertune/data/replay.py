"""Replay: the small mixing function, duplicates between old and new rows, and samples of past rounds."""

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from evertune.data.compared import compared_text
from evertune.data.rows import Row
from evertune.errors import DataError

T = TypeVar("T")


class Deduplicated(NamedTuple):
    """Rows that stay and rows that were left out, both in their order."""

    kept: list[Row]
    removed: list[Row]


def make_replay_stream(
    new_data: Iterable[T], old_data: Sequence[T], replay_ratio: float = 0.3, seed: int = 0
) -> list[tuple[str, T]]:
    """New data in order, with old data mixed in by chance.

    After each new item one number in [0, 1) is drawn from a CPU `torch.Generator` seeded with `seed`; below
    `replay_ratio`, the next old item follows, cycling. So the ratio is of old to *new*: 0.3 gives an expected share of
    0.3 / 1.3 = 23 % of the stream. Recipes use `share`, the share of the final stream, which `Stream` keeps exactly.

    Returns:
        `("new", item)` and `("old", item)` pairs.

    Raises:
        DataError: the ratio lies outside [0, 1] or is not finite, or it is above 0 and there is no old data.
    """
    import torch

    if not math.isfinite(replay_ratio) or not 0.0 <= replay_ratio <= 1.0:
        raise DataError(f"replay_ratio: found {replay_ratio}, expected 0 to 1.")
    if replay_ratio > 0 and len(old_data) == 0:
        raise DataError(
            f"old_data: found nothing, expected items for a replay_ratio of {replay_ratio}.",
            remedy="Use 0 for no replay.",
        )
    generator = torch.Generator().manual_seed(seed)
    stream: list[tuple[str, T]] = []
    taken = 0
    for item in new_data:
        stream.append(("new", item))
        # One draw a time: a vector of draws is another sequence of numbers.
        if torch.rand(1, generator=generator).item() < replay_ratio:
            stream.append(("old", old_data[taken % len(old_data)]))
            taken += 1
    return stream


def drop_duplicates(
    replay: Sequence[Row],
    new: Sequence[Row],
    *,
    near: bool = False,
    key: Callable[[Row], Hashable] = compared_text,
) -> Deduplicated:
    """Replay rows that are neither a new row nor an earlier replay row.

    Compared are whole conversations, system turns included, and whole texts, normalised. A replay row with the same
    question and another answer stays.

    Args:
        near: leave out near-duplicates too, as `evertune data dedup` finds them; of two alike the longer stays.
        key: what is the same for rows of the same text, such as the digest of `compared_text` that a caller keeps.
    """
    if near:
        return _drop_near(replay, new)
    seen = {key(row) for row in new}
    found = Deduplicated([], [])
    for row in replay:
        own = key(row)
        (found.removed if own in seen else found.kept).append(row)
        seen.add(own)
    return found


def _drop_near(replay: Sequence[Row], new: Sequence[Row]) -> Deduplicated:
    from evertune.data.dedup import THRESHOLD, Memory, find_templates, resolve
    from evertune.data.fingerprint import fingerprint, join

    names = {name: i for i, name in enumerate(dict.fromkeys(row.source for row in [*new, *replay]))}
    old, own = fingerprint(new), fingerprint(replay)
    sources = [np.array([names[row.source] for row in rows], dtype=np.int64) for rows in (new, replay)]
    templates = find_templates(join([old, own]), np.concatenate(sources))
    found = resolve(own, sources=sources[1], earlier=Memory(old, templates, THRESHOLD), templates=templates)
    stays = found.stays.tolist()
    return Deduplicated(
        [row for row, kept in zip(replay, stays, strict=True) if kept],
        [row for row, kept in zip(replay, stays, strict=True) if not kept],
    )


def reservoir(rows: Iterable[T], size: int, seed: int) -> list[T]:
    """A uniform sample without replacement of at most `size` rows, in their order (algorithm R, Vitter 1985)."""
    # Only `random()` keeps its sequence between versions of Python.
    rng = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for i, row in enumerate(rows):
        if i < size:
            kept.append((i, row))
            continue
        place = int(rng.random() * (i + 1))
        if place < size:
            kept[place] = (i, row)
    return [row for _, row in sorted(kept, key=lambda one: one[0])]
