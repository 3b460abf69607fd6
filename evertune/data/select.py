"""Which of many old rows to keep for replay, when not all can be.

    reservoir        each row equally likely          the default: no assumption, and unbiased estimates of the past
    class_balanced   classes alike, rows within       labels or tags of very different size, where rare ones matter
                     a class equally likely
    coverage         rows that add new word runs      few rows for much variety; favours long and unusual rows
    highest_score    the rows that score highest      what a candidate is about to forget (score: its loss); needs a
                     (maximally interfered)           model, and picks up mislabelled rows first: filter before

Experience replay with reservoirs: Rolnick et al. 2019 (arXiv:1811.11682), Chaudhry et al. 2019 (arXiv:1902.10486).
Highest loss: after Aljundi et al. 2019 (arXiv:1908.04742), who score by the rise of the loss through a trial update;
here it is the loss under a model that is given. Every result is in the rows' order and the same for the same seed.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from evertune.data.quality import asked_and_said
from evertune.data.replay import reservoir
from evertune.data.rows import Row
from evertune.data.shingles import Shingles
from evertune.errors import DataError

T = TypeVar("T")


def class_of(row: Row, field: str) -> str:
    """The class of a row: a field of its own, or what is said where the field is `answer`.

    Raises:
        DataError: the row lacks the field.
    """
    if field in row.value:
        return str(row.value[field])
    if field == "answer":
        return asked_and_said(row)[1]
    raise DataError(f"{row.place}: found no field '{field}', expected the row's class.", remedy="Name another field.")


def class_balanced(rows: Iterable[T], size: int, *, class_of: Callable[[T], str], seed: int) -> list[T]:
    """At most `size` rows, as nearly as possible the same number of each class; a small class gives all it has."""
    by_class: dict[str, list[tuple[int, T]]] = {}
    for i, row in enumerate(rows):
        by_class.setdefault(class_of(row), []).append((i, row))
    room = _even({name: len(each) for name, each in by_class.items()}, size)
    kept = [one for name, each in by_class.items() for one in reservoir(each, room[name], seed)]
    return [row for _, row in sorted(kept, key=lambda one: one[0])]


def _even(counts: dict[str, int], size: int) -> dict[str, int]:
    """Places for each class: filled up from the smallest, what it does not need going to the others."""
    room = {}
    left = size
    ordered = sorted(counts, key=lambda name: (counts[name], name))
    for i, name in enumerate(ordered):
        room[name] = min(counts[name], left // (len(ordered) - i))
        left -= room[name]
    return room


def coverage(shingles: Shingles, size: int) -> list[int]:
    """Rows, one after the other, that each add the most shingles not yet seen; of equals the first. Ascending.

    Greedy maximum coverage: at least 1 - 1/e = 63 % of the shingles that the best choice covers (Nemhauser, Wolsey,
    Fisher 1978). A row's gain can only fall, so a row is looked at again only when it comes up (Minoux 1978).
    """
    seen: set[int] = set()
    heap = [(-int(gain), row) for row, gain in enumerate(shingles.sizes)]
    heapq.heapify(heap)
    kept: list[int] = []
    while heap and len(kept) < size:
        _, row = heapq.heappop(heap)
        own = shingles.hashes[shingles.starts[row] : shingles.starts[row + 1]].tolist()
        gain = sum(one not in seen for one in own)
        if heap and (-gain, row) > heap[0]:
            heapq.heappush(heap, (-gain, row))
            continue
        kept.append(row)
        seen.update(own)
    return sorted(kept)


def highest_score(scores: Sequence[float], size: int) -> list[int]:
    """The rows of the highest finite scores; of equals the first. Ascending."""
    values = np.asarray(scores, dtype=np.float64)
    order = np.lexsort((np.arange(len(values)), np.where(np.isfinite(values), -values, np.inf)))
    return sorted(order[: min(size, int(np.isfinite(values).sum()))].tolist())
