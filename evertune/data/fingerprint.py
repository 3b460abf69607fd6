"""Rows as what duplicates are found by: a digest of the text, a digest of the row, and the shingles. No row is kept."""

# R rows

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evertune.data.compared import Part, compared_value
from evertune.data.rows import Row
from evertune.data.shingles import WIDTH, Indices, Shingles, concatenate, shingle

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

BATCH_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Of R rows.

    Attributes:
        texts: (R, 2) uint64, a 128-bit digest of what is compared: equal texts are exact duplicates.
        rows: (R,) uint64, a digest of the whole row, to choose among exact duplicates.
        shingles: the sets that near-duplicates are found by.
    """

    texts: NDArray[np.uint64]
    rows: NDArray[np.uint64]
    shingles: Shingles

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Indices) -> "Fingerprints":
        """Those of some rows."""
        return Fingerprints(self.texts[rows], self.rows[rows], self.shingles.take(rows))


def fingerprint(rows: Iterable[Row], *, part: Part = "both", width: int = WIDTH, workers: int = 1) -> Fingerprints:
    """Fingerprints of rows, read once and in their order.

    Args:
        workers: processes that share the work; the result is the same for any number.
    """
    batches = ([(row.value, row.format) for row in batch] for batch in batched(rows))
    if workers == 1:
        return join(_of_batch(batch, part, width) for batch in batches)
    # What reads rows without other processes need not wait for these.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return join(_in_order(pool, batches, part, width, ahead=2 * workers))


def join(parts: Iterable[Fingerprints]) -> Fingerprints:
    """The rows of all parts, in their order."""
    held = list(parts)
    return Fingerprints(
        np.concatenate([np.zeros((0, 2), np.uint64), *(one.texts for one in held)]),
        np.concatenate([np.zeros(0, np.uint64), *(one.rows for one in held)]),
        concatenate([one.shingles for one in held]),
    )


def _in_order(
    pool: "ProcessPoolExecutor", batches: Iterator[list[Any]], part: Part, width: int, *, ahead: int
) -> Iterator[Fingerprints]:
    """Results in the order of the batches, with a bounded number under way: the rows need not fit into memory."""
    waiting = [pool.submit(_of_batch, batch, part, width) for batch in islice(batches, ahead)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(_of_batch, batch, part, width) for batch in islice(batches, 1)]


def _of_batch(batch: list[tuple[dict[str, Any], str]], part: Part, width: int) -> Fingerprints:
    texts = [compared_value(value, format, part) for value, format in batch]
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    wholes = b"".join(hashlib.blake2b(_bytes_of(value), digest_size=8).digest() for value, _ in batch)
    return Fingerprints(
        np.frombuffer(digests, dtype="<u8").reshape(-1, 2),
        np.frombuffer(wholes, dtype="<u8"),
        shingle(texts, width),
    )


# Made once: json.dumps would make one for each row.
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


def _bytes_of(value: dict[str, Any]) -> bytes:
    return _ENCODER.encode(value).encode()


def batched(rows: Iterable[Row], size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """Rows in lists of `size`, the last one shorter."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
