"""Texts as sets of shingles: hashes of every run of a few words, so that two texts can be compared without the texts.

A word is what stands between spaces; where a script writes none (Han, kana, Thai, Lao, Khmer) each character is one. A
text shorter than a run is one shingle. Hashes have 52 bits: two sets of 1,000 shingles agree by accident in one of them
with a probability of 1 in 4 billion, so a Jaccard similarity of such sets is exact for every practical purpose.
"""

# R rows, S shingles of all rows, N bytes, W words

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WIDTH = 3
HASH_BITS = 52
CHUNK_ROWS = 1 << (64 - HASH_BITS)
CHUNK_BYTES = 1 << 20

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

_UNSPACED = re.compile("([\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff])")
_ODD = 0x9E3779B97F4A7C15
_SPACE, _NEWLINE = 32, 10
_BUCKETS = 1 << 20


@dataclass(frozen=True, eq=False)
class Shingles:
    """Sets of shingles of many rows.

    Attributes:
        starts: (R + 1,) where each row's set begins in `hashes`.
        hashes: (S,) 52-bit hashes, ascending and distinct within a row.
    """

    starts: Indices
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Indices:
        """(R,) shingles of each row."""
        return np.diff(self.starts)

    def take(self, rows: Indices) -> "Shingles":
        """The sets of some rows, in the order asked for."""
        sizes = self.sizes[rows]
        return Shingles(_starts(sizes), self.hashes[spans(self.starts[:-1][rows], sizes)])

    def without(self, common: Hashes) -> "Shingles":
        """The same sets less some hashes, given ascending."""
        if len(common) == 0:
            return self
        place = np.minimum(np.searchsorted(common, self.hashes), len(common) - 1)
        stays_S = common[place] != self.hashes
        kept = np.concatenate([[0], np.cumsum(stays_S)])[self.starts]
        return Shingles(kept.astype(np.int64), self.hashes[stays_S])


def shingle(texts: Sequence[str], width: int = WIDTH) -> Shingles:
    """The shingles of texts whose words are divided by single spaces or line ends, as `compared_text` writes them."""
    return concatenate([_shingle_chunk(chunk, width) for chunk in _chunks(texts)])


def concatenate(parts: Sequence[Shingles]) -> Shingles:
    """The rows of all parts, in their order."""
    sizes = [np.zeros(0, np.int64), *(one.sizes for one in parts)]
    hashes = [np.zeros(0, np.uint64), *(one.hashes for one in parts)]
    return Shingles(_starts(np.concatenate(sizes)), np.concatenate(hashes))


def spans(starts: Indices, sizes: Indices) -> Indices:
    """Every index of the ranges that begin at `starts`, end to end."""
    ends = np.cumsum(sizes)
    shift = np.repeat(starts - (ends - sizes), sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64) + shift


def distinct(values: Hashes) -> Hashes:
    """The values, ascending, each once. numpy's own `unique` is several times slower on millions of integers."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def common_hashes(shingles: Shingles, share: float) -> Hashes:
    """Hashes in more than this share of the rows: a template, which says nothing about what differs. Ascending."""
    if len(shingles.hashes) == 0:
        return shingles.hashes
    # A crowded hash makes its bucket crowded: only what lies in such buckets is sorted.
    buckets = (shingles.hashes & np.uint64(_BUCKETS - 1)).astype(np.int64)
    is_crowded = np.bincount(buckets, minlength=_BUCKETS) > share * len(shingles)
    ordered = np.sort(shingles.hashes[is_crowded[buckets]])
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    return ordered[first[:-1][np.diff(first) > share * len(shingles)]]


def runs(texts: Sequence[str], width: int = WIDTH) -> Shingles:
    """As `shingle`, but every run of words in its place, repeats included: not ascending, not distinct."""
    return concatenate([_runs_of_chunk(chunk, width) for chunk in _chunks(texts)])


def _shingle_chunk(texts: Sequence[bytes], width: int) -> Shingles:
    found = _runs_of_chunk(texts, width)
    row = np.repeat(np.arange(len(texts), dtype=np.uint64), found.sizes)
    keys = distinct((row << np.uint64(HASH_BITS)) | found.hashes)
    sizes = np.bincount((keys >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(texts))
    return Shingles(_starts(sizes), keys & np.uint64((1 << HASH_BITS) - 1))


def _runs_of_chunk(texts: Sequence[bytes], width: int) -> Shingles:
    lengths = np.array([len(one) + 1 for one in texts], dtype=np.int64)
    bytes_N = np.frombuffer(b" ".join(texts) + b" ", dtype=np.uint8)
    is_word_N = (bytes_N != _SPACE) & (bytes_N != _NEWLINE)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_word_N, [False]]).astype(np.int8)))
    first_W, end_W = edges[::2], edges[1::2]
    row_W = np.searchsorted(np.cumsum(lengths), first_W, side="right")
    hashes, row = _runs(_word_hashes(bytes_N, first_W, end_W), row_W, width)
    return Shingles(_starts(np.bincount(row, minlength=len(texts))), hashes >> np.uint64(64 - HASH_BITS))


def _word_hashes(bytes_N: NDArray[np.uint8], first_W: Indices, end_W: Indices) -> Hashes:
    """A polynomial hash of each word, from one running sum over all bytes."""
    powers, inverses = _powers(1 << (len(bytes_N) - 1).bit_length())
    terms_N = _byte_values()[bytes_N] * powers[: len(bytes_N)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms_N, dtype=np.uint64)])
    return _mix((sums[end_W] - sums[first_W]) * inverses[first_W])


def _runs(words_W: Hashes, row_W: Indices, width: int) -> tuple[Hashes, Indices]:
    """Hash and row of every run of `width` words within a row; of a shorter row, of all its words."""
    count = len(words_W)
    total = np.zeros(count, np.uint64)
    is_whole = np.ones(count, np.bool_)
    for k in range(width):
        rest = max(count - k, 0)
        inside = np.zeros(count, np.bool_)
        inside[:rest] = row_W[count - rest :] == row_W[:rest]
        shifted = np.zeros(count, np.uint64)
        shifted[:rest] = words_W[count - rest :]
        total += np.where(inside, shifted * np.uint64(_ODD * (2 * k + 1) % 2**64), np.uint64(0))
        is_whole &= inside
    is_first = np.concatenate([[True], row_W[1:] != row_W[:-1]]) if len(row_W) else is_whole
    kept = is_whole | is_first
    return _mix(total[kept]), row_W[kept]


def _chunks(texts: Sequence[str]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        if not text.isascii():
            text = " ".join(_UNSPACED.sub(r" \1 ", text).split(" "))
        chunk.append(text.encode())
        size += len(chunk[-1])
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _byte_values() -> Hashes:
    """A random-looking odd number for each byte, the same in every process."""
    return _mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(_ODD)) | np.uint64(1)


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Powers of an odd number modulo 2**64, and their inverses."""
    base = 0xD6E8FEB86659FD93
    both = []
    for one in (base, pow(base, -1, 1 << 64)):
        factors = np.full(count, one, dtype=np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both[0], both[1]


def _starts(sizes: Indices) -> Indices:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
