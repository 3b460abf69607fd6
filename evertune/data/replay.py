"""Replay: the pinned small function, duplicates between old and new, and the pool of past rounds."""

import math
import random
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from evertune.data.rows import Row, messages_of
from evertune.errors import DataError

T = TypeVar("T")


def make_replay_stream(
    new_data: Iterable[T], old_data: Sequence[T], replay_ratio: float = 0.3, seed: int = 0
) -> list[tuple[str, T]]:
    """New data in order, with old data mixed in by chance.

    After each new item one number is drawn from a CPU `torch.Generator` seeded with `seed`; below `replay_ratio`, the
    next old item follows, cycling. So the ratio is of old to *new*: 0.3 gives an expected share of 0.3 / 1.3 = 23 % of
    the stream. Recipes use `share`, the share of the final stream, which `data.stream.Stream` keeps exactly.

    Returns:
        `("new", item)` and `("old", item)` pairs.

    Raises:
        DataError: the ratio lies outside [0, 1] or is not finite, or it is above 0 and there is no old data.
    """
    import torch

    if not math.isfinite(replay_ratio) or not 0.0 <= replay_ratio <= 1.0:
        raise DataError(f"replay_ratio is {replay_ratio}, expected 0 to 1.")
    if replay_ratio > 0 and len(old_data) == 0:
        raise DataError(f"replay_ratio is {replay_ratio}, but old_data is empty.", remedy="Use 0 for no replay.")
    generator = torch.Generator().manual_seed(seed)
    stream: list[tuple[str, T]] = []
    taken = 0
    for item in new_data:
        stream.append(("new", item))
        if torch.rand(1, generator=generator).item() < replay_ratio:
            stream.append(("old", old_data[taken % len(old_data)]))
            taken += 1
    return stream


def normalise_text(text: str) -> str:
    """Text for comparison: compatibility forms unified (NFKC), case folded, punctuation and space runs to one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def row_text(row: Row) -> str:
    """What duplicates are compared on: all turns but system turns, normalised; or the plain text."""
    if "text" in row.value and "messages" not in row.value:
        return normalise_text(row.value["text"])
    turns = messages_of(row.value)
    return "\n".join(f"{one['role']}: {normalise_text(one['content'])}" for one in turns if one["role"] != "system")


def drop_duplicates(replay: Sequence[Row], new: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Replay rows that are neither a new row nor an earlier replay row, and those that are; both in order."""
    seen = {row_text(row) for row in new}
    kept, removed = [], []
    for row in replay:
        text = row_text(row)
        (removed if text in seen else kept).append(row)
        seen.add(text)
    return kept, removed


def reservoir(rows: Sequence[Any], size: int, seed: int) -> list[Any]:
    """A uniform sample without replacement, in the rows' order (algorithm R, Vitter 1985)."""
    rng = random.Random(seed)
    chosen = list(range(min(size, len(rows))))
    for i in range(size, len(rows)):
        place = rng.randrange(i + 1)
        if place < size:
            chosen[place] = i
    return [rows[i] for i in sorted(chosen)]
