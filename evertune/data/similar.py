"""All pairs of sets that are similar, found exactly: no pair at or above the threshold is missed, none below is named.

Two sets with a Jaccard similarity of t or more share one of their rarest elements: of the n elements of each, ordered
from rare to common by one order for both, the first n - ceil(t n) + 1 must meet (prefix filter: Chaudhuri, Ganti,
Kaushik 2006; Bayardo, Ma, Srikant 2007). So only rows that share a rare shingle are looked at, and of those only pairs
whose sizes allow the similarity; each is then compared in full. Unlike MinHash bands, which find a pair by chance and
stumble over every row of a common template, this misses nothing and passes templates by.

The order needs only to be one order: shingles are counted in a small table of buckets, so a crowded bucket costs time
and never a pair.
"""

# R rows, S shingles of all rows, P postings, K candidate pairs

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evertune.data.shingles import HASH_BITS, Hashes, Indices, Shingles, distinct, spans

RARITY_BITS = 6
TOKEN_BITS = 40
ROW_BITS = 64 - TOKEN_BITS
MAX_ROWS = 1 << ROW_BITS
BATCH_PAIRS = 1 << 21
BATCH_SHINGLES = 1 << 22
_LOW = np.uint64((1 << HASH_BITS) - 1)
# Within a chunk of 2**9 rows, row, rarity and 49 bits of the hash are one sortable number.
_CHUNK_ROW_BITS = 9
_KEY_BITS = 64 - _CHUNK_ROW_BITS - RARITY_BITS


class Pairs(NamedTuple):
    """Similar rows: `left` and `right` are row numbers, `jaccard` their similarity."""

    left: Indices
    right: Indices
    jaccard: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rarity:
    """The order of shingles: a small number for each bucket of hashes, 0 for the rarest."""

    levels: NDArray[np.uint8]

    @classmethod
    def of(cls, shingles: Shingles) -> "Rarity":
        """Counted in these rows; about one bucket for each shingle, at most 2**22."""
        bits = min(22, max(10, int(len(shingles.hashes)).bit_length()))
        counts = np.bincount(_buckets(shingles.hashes, 1 << bits), minlength=1 << bits)
        return cls(np.minimum(4 * np.log2(np.maximum(counts, 1)), (1 << RARITY_BITS) - 1).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class Postings:
    """For each row, its rarest shingles: (P,) ascending numbers of 40 bits of shingle and 24 bits of row."""

    packed: Hashes


def postings_of(shingles: Shingles, rarity: Rarity, threshold: float, *, first_row: int = 0) -> Postings:
    """The prefix of every row. Rows are numbered from `first_row`; there may be 2**24 of them.

    Rows must be in ascending order of size for `pairs_within`.
    """
    packed = [
        _prefixes(shingles, rarity, threshold, start, first_row)
        for start in range(0, len(shingles), 1 << _CHUNK_ROW_BITS)
    ]
    together = np.concatenate([np.zeros(0, np.uint64), *packed])
    together.sort()
    return Postings(together)


def pairs_within(shingles: Shingles, threshold: float, *, most_candidates: int | None = None) -> Pairs | None:
    """Every pair of rows with a Jaccard similarity of `threshold` or more; `left` < `right`, ascending.

    Rows without shingles have no pair. Returns None, before any comparison, where there are more than `most_candidates`
    pairs to look at.
    """
    by_size = np.argsort(shingles.sizes, kind="stable")
    ordered = shingles.take(by_size)
    postings = postings_of(ordered, Rarity.of(ordered), threshold)
    if most_candidates is not None and _count_candidates(postings) > most_candidates:
        return None
    found = _verified(ordered, ordered, _meeting(postings, ordered.sizes, threshold), threshold)
    left, right = by_size[found.left], by_size[found.right]
    return _sorted(Pairs(np.minimum(left, right), np.maximum(left, right), found.jaccard))


def pairs_between(new: Shingles, old: Shingles, postings: Postings, rarity: Rarity, threshold: float) -> Pairs:
    """Every similar pair of a new row (`left`) and an old one (`right`), whose postings and order are given."""
    looked = postings_of(new, rarity, threshold)
    found = _verified(new, old, _crossing(looked, postings, new.sizes, old.sizes, threshold), threshold)
    return _sorted(found)


def jaccard(one: Shingles, other: Shingles, left_K: Indices, right_K: Indices) -> NDArray[np.float64]:
    """Jaccard similarity of rows `left_K` of one and `right_K` of the other; 0 where either is empty."""
    result = np.zeros(len(left_K))
    sizes = one.sizes[left_K] + other.sizes[right_K]
    for first, last in _batches(sizes):
        part = slice(first, last)
        common = _common(one, other, left_K[part], right_K[part])
        result[part] = common / np.maximum(sizes[part] - common, 1)
    return result


def _count_candidates(postings: Postings) -> int:
    """Pairs of rows that share a posting, repeats counted: what a join would have to look at, at most."""
    token = postings.packed >> np.uint64(ROW_BITS)
    first = np.flatnonzero(np.concatenate([[True], token[1:] != token[:-1], [True]])) if len(token) else np.zeros(1)
    counts = np.diff(first).astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _common(one: Shingles, other: Shingles, left_K: Indices, right_K: Indices) -> Indices:
    """Shingles that each pair has in common: sorted together, a common one stands twice."""
    tagged = []
    for shingles, rows_K in ((one, left_K), (other, right_K)):
        sizes = shingles.sizes[rows_K]
        hashes = shingles.hashes[spans(shingles.starts[:-1][rows_K], sizes)]
        pair = np.repeat(np.arange(len(rows_K), dtype=np.uint64), sizes)
        tagged.append(pair << np.uint64(HASH_BITS) | hashes)
    together = np.concatenate(tagged)
    together.sort(kind="stable")  # two ascending runs: this kind merges them, the default sorts anew, 20 times slower
    twice = together[1:][together[1:] == together[:-1]] >> np.uint64(HASH_BITS)
    return np.bincount(twice.astype(np.int64), minlength=len(left_K)).astype(np.int64)


def _batches(sizes: Indices) -> Iterator[tuple[int, int]]:
    """Ranges of at most 2**12 pairs, and of few shingles unless one pair has many."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, before + BATCH_SHINGLES, side="right"))
        last = min(max(last, first + 1), first + (1 << (64 - HASH_BITS)), len(sizes))
        yield first, last
        first = last


def _prefixes(shingles: Shingles, rarity: Rarity, threshold: float, start: int, first_row: int) -> Hashes:
    stop = min(start + (1 << _CHUNK_ROW_BITS), len(shingles))
    hashes = shingles.hashes[shingles.starts[start] : shingles.starts[stop]]
    sizes = shingles.sizes[start:stop]
    row = np.repeat(np.arange(stop - start, dtype=np.uint64), sizes)
    level = rarity.levels[_buckets(hashes, len(rarity.levels))].astype(np.uint64)
    keys = (row << np.uint64(64 - _CHUNK_ROW_BITS)) | (level << np.uint64(_KEY_BITS))
    keys |= hashes >> np.uint64(HASH_BITS - _KEY_BITS)
    keys.sort()
    prefix = sizes - _least_common(sizes, threshold) + 1
    taken = spans(shingles.starts[start:stop] - shingles.starts[start], np.where(sizes > 0, prefix, 0))
    token = (keys[taken] & np.uint64((1 << _KEY_BITS) - 1)) >> np.uint64(_KEY_BITS - TOKEN_BITS)
    rows = np.repeat(np.arange(start, stop, dtype=np.uint64), np.where(sizes > 0, prefix, 0)) + np.uint64(first_row)
    return (token << np.uint64(ROW_BITS)) | rows


def _meeting(postings: Postings, sizes: Indices, threshold: float) -> Iterator[Hashes]:
    """Candidates within one set of rows, as packed pairs: postings that stand d places apart, for every d."""
    token, row = _unpacked(postings)
    active = np.arange(len(token), dtype=np.int64)
    distance = 0
    while len(active):
        distance += 1
        active = active[active + distance < len(token)]
        other = active + distance
        # Rows ascend in size under one token: once too large, all that follow are.
        fits = (token[active] == token[other]) & (sizes[row[active]] >= threshold * sizes[row[other]])
        active, other = active[fits], other[fits]
        yield (row[active].astype(np.uint64) << np.uint64(32)) | row[other].astype(np.uint64)


def _crossing(
    new: Postings, old: Postings, new_sizes: Indices, old_sizes: Indices, threshold: float
) -> Iterator[Hashes]:
    """Candidates between two sets of rows, as packed pairs."""
    token, row = _unpacked(new)
    shifted = token.astype(np.uint64) << np.uint64(ROW_BITS)
    first = np.searchsorted(old.packed, shifted, side="left")
    last = np.searchsorted(old.packed, shifted | np.uint64(MAX_ROWS - 1), side="right")
    met = np.flatnonzero(last > first)
    first, counts, row = first[met], (last - first)[met], row[met]
    for start, stop in _ranges_of(counts):
        left = np.repeat(row[start:stop], counts[start:stop])
        places = spans(first[start:stop], counts[start:stop])
        right = (old.packed[places] & np.uint64(MAX_ROWS - 1)).astype(np.int64)
        small, large = np.minimum(new_sizes[left], old_sizes[right]), np.maximum(new_sizes[left], old_sizes[right])
        fits = small >= threshold * large
        yield (left[fits].astype(np.uint64) << np.uint64(32)) | right[fits].astype(np.uint64)


def _ranges_of(counts: Indices) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BATCH_PAIRS, side="right")))
        yield first, last
        first = last


def _verified(one: Shingles, other: Shingles, candidates: Iterator[Hashes], threshold: float) -> Pairs:
    """Of packed candidates those that are similar, each once."""
    kept: list[Hashes] = []
    values: list[NDArray[np.float64]] = []
    for packed in _gathered(candidates):
        left, right = (packed >> np.uint64(32)).astype(np.int64), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
        similarity = jaccard(one, other, left, right)
        is_similar = similarity >= threshold
        kept.append(packed[is_similar])
        values.append(similarity[is_similar])
    packed = np.concatenate([np.zeros(0, np.uint64), *kept])
    packed, place = np.unique(packed, return_index=True)
    left, right = (packed >> np.uint64(32)).astype(np.int64), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return Pairs(left, right, np.concatenate([np.zeros(0), *values])[place])


def _gathered(candidates: Iterator[Hashes]) -> Iterator[Hashes]:
    """Candidates in distinct batches of some millions: a pair that meets at several shingles is compared once."""
    held: list[Hashes] = []
    count = 0
    for packed in candidates:
        held.append(packed)
        count += len(packed)
        if count >= BATCH_PAIRS:
            yield distinct(np.concatenate(held))
            held, count = [], 0
    if count:
        yield distinct(np.concatenate(held))


def _least_common(sizes: Indices, threshold: float) -> Indices:
    """Shingles that a set of this size shares with any set similar to it, at least: ceil(t n), with a hair's care for
    products that floating point puts just above a whole number."""
    return np.ceil(threshold * sizes - 1e-9).astype(np.int64)


def _buckets(hashes: Hashes, count: int) -> Indices:
    return (hashes & np.uint64(count - 1)).astype(np.int64)


def _unpacked(postings: Postings) -> tuple[Indices, Indices]:
    return (postings.packed >> np.uint64(ROW_BITS)).astype(np.int64), (
        postings.packed & np.uint64(MAX_ROWS - 1)
    ).astype(np.int64)


def _sorted(pairs: Pairs) -> Pairs:
    order = np.lexsort((pairs.right, pairs.left))
    return Pairs(pairs.left[order], pairs.right[order], pairs.jaccard[order])
