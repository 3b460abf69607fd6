"""Which rows stay: exact duplicates by a digest of their text, near-duplicates by the Jaccard similarity of shingles.

Rows are taken in an order that depends on what they are, not on where they stand: rows of a lower rank first, then the
longer text, then the digest. A row stays unless one that stays already is similar to it. So every removed row has a
survivor that it was compared with and is similar to; chains (a like b, b like c) remove b, not c; and the same rows
stay for any order of files and any number of workers.

Shingles in more than half of the rows that are compared are a template ("Answer with one option.") and are left out of
the comparison: otherwise all short questions of one task are near-duplicates of each other.
"""

# R rows

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evertune.data.fingerprint import Fingerprints
from evertune.data.shingles import Hashes, Indices, Shingles, common_hashes, distinct
from evertune.data.similar import Pairs, Rarity, pairs_between, pairs_within, postings_of

THRESHOLD = 0.8
TEMPLATE_SHARE = 0.5
# Fewer rows say little about what they have in common.
TEMPLATE_ROWS = 50
MAX_CANDIDATES = 1 << 25
_SMALL = 1024


class Earlier(Protocol):
    """Rows of before that new ones are compared with."""

    @property
    def templates(self) -> Hashes:
        """Shingles that were left out of these rows."""

    def same_text(self, texts: NDArray[np.uint64]) -> Indices:
        """For each of (R, 2) digests the earlier row with this text, or -1."""

    def similar(self, shingles: Shingles, threshold: float) -> Pairs:
        """Pairs of a new row and an earlier one."""


@dataclass(frozen=True, eq=False)
class Resolution:
    """What became of R rows.

    Attributes:
        cause: (R,) the row that a removed row repeats; -1 where it stays or where an earlier row is the cause.
        earlier: (R,) the earlier row that a removed row repeats, else -1.
        jaccard: (R,) similarity to the cause, 0 where the row stays.
        is_exact: (R,) removed for an equal text; where that row was removed too, its cause is the cause.
        templates: shingles that were left out of the comparison, ascending.
    """

    cause: Indices
    earlier: Indices
    jaccard: NDArray[np.float64]
    is_exact: NDArray[np.bool_]
    templates: Hashes

    @property
    def stays(self) -> NDArray[np.bool_]:
        """(R,) True where the row survives. Made anew each time: hold it while asking for single rows."""
        return (self.cause < 0) & (self.earlier < 0)


def resolve(
    prints: Fingerprints,
    *,
    sources: Sequence[int] | Indices | None = None,
    rank: Sequence[int] | Indices | None = None,
    earlier: Earlier | None = None,
    threshold: float = THRESHOLD,
    template_share: float = TEMPLATE_SHARE,
    templates: Hashes | None = None,
) -> Resolution:
    """Decide for every row whether it stays.

    Args:
        sources: (R,) which source a row is of, for what counts as a template; all of one when not given.
        rank: (R,) rows of a lower rank win over rows of a higher one; all alike when not given.
        earlier: rows that win over all of these.
        threshold: Jaccard similarity from which on two rows are near-duplicates; 1 finds exact ones only.
        template_share: see above; 1 compares everything.
        templates: shingles to leave out beside those of `earlier`, instead of those that these rows share.
    """
    count = len(prints)
    ranks = np.zeros(count, np.int64) if rank is None else np.asarray(rank, np.int64)
    of_source = np.zeros(count, np.int64) if sources is None else np.asarray(sources, np.int64)
    found = Resolution(
        cause=np.full(count, -1),
        earlier=np.full(count, -1),
        jaccard=np.zeros(count),
        is_exact=np.zeros(count, np.bool_),
        templates=np.zeros(0, np.uint64),
    )
    order = _order(prints, ranks)
    _drop_equal(found, prints, order, earlier)
    if threshold >= 1.0:
        return found
    waiting = order[found.stays[order]]
    known = earlier.templates if earlier is not None else found.templates
    if templates is None:
        templates = _templates(prints.shingles, waiting, of_source, template_share)
    templates = distinct(np.concatenate([known, templates]))
    shingles = prints.shingles.without(templates)
    if earlier is not None:
        pairs = earlier.similar(shingles.take(waiting), threshold)
        for place, other, value in zip(*pairs, strict=True):
            row = waiting[place]
            if found.earlier[row] < 0 or value > found.jaccard[row]:
                found.earlier[row], found.jaccard[row] = other, value
        waiting = order[found.stays[order]]
    _drop_similar(found, shingles, waiting, threshold)
    _name_survivors(found)
    return Resolution(found.cause, found.earlier, found.jaccard, found.is_exact, templates)


class Memory:
    """Earlier rows held in memory."""

    def __init__(self, prints: Fingerprints, templates: Hashes, threshold: float) -> None:
        self.templates = templates
        self._prints = prints
        self._shingles = prints.shingles.without(templates)
        self._rarity = Rarity.of(self._shingles)
        self._postings = postings_of(self._shingles, self._rarity, threshold)

    def same_text(self, texts: NDArray[np.uint64]) -> Indices:
        order = by_text(self._prints.texts)
        found = find_texts(self._prints.texts[order], texts)
        found[found >= 0] = order[found[found >= 0]]
        return found

    def similar(self, shingles: Shingles, threshold: float) -> Pairs:
        return pairs_between(shingles, self._shingles, self._postings, self._rarity, threshold)


class Several:
    """Earlier rows of several places, numbered one after the other."""

    def __init__(self, parts: Sequence[tuple[Earlier, int]]) -> None:
        self._parts = parts
        self._before = np.cumsum([0, *(count for _, count in parts)]).tolist()

    @property
    def templates(self) -> Hashes:
        return distinct(np.concatenate([np.zeros(0, np.uint64), *(one.templates for one, _ in self._parts)]))

    def same_text(self, texts: NDArray[np.uint64]) -> Indices:
        found = np.full(len(texts), -1)
        for (one, _), before in zip(self._parts, self._before, strict=False):
            place = one.same_text(texts)
            found = np.where((found < 0) & (place >= 0), place + before, found)
        return found

    def similar(self, shingles: Shingles, threshold: float) -> Pairs:
        found = [
            (one.similar(shingles, threshold), before)
            for (one, _), before in zip(self._parts, self._before, strict=False)
        ]
        return Pairs(
            np.concatenate([np.zeros(0, np.int64), *(one.left for one, _ in found)]),
            np.concatenate([np.zeros(0, np.int64), *(one.right + before for one, before in found)]),
            np.concatenate([np.zeros(0), *(one.jaccard for one, _ in found)]),
        )


def find_texts(known: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> Indices:
    """For each wanted (R, 2) digest a row of `known`, which ascends, with this text, or -1."""
    if len(known) == 0:
        return np.full(len(wanted), -1)
    place = np.minimum(np.searchsorted(known[:, 0], wanted[:, 0]), len(known) - 1)
    # 64 bits that agree while the other 64 do not are not met in practice: such a row is only not found.
    return np.where((known[place] == wanted).all(axis=1), place, -1)


def by_text(texts: NDArray[np.uint64]) -> Indices:
    """The order in which (R, 2) digests ascend."""
    return np.lexsort((np.arange(len(texts)), texts[:, 1], texts[:, 0]))


def _order(prints: Fingerprints, ranks: Indices) -> Indices:
    """Rows in the order in which they are taken."""
    return np.lexsort((prints.rows, prints.texts[:, 1], prints.texts[:, 0], -prints.shingles.sizes, ranks))


def _drop_equal(found: Resolution, prints: Fingerprints, order: Indices, earlier: Earlier | None) -> None:
    """Of rows with one text the first in the order stays; none where an earlier row has it."""
    if earlier is not None:
        found.earlier[:] = earlier.same_text(prints.texts)
    grouped = order[by_text(prints.texts[order])]
    texts = prints.texts[grouped]
    is_first = np.ones(len(grouped), np.bool_)
    is_first[1:] = (texts[1:] != texts[:-1]).any(axis=1)
    first = grouped[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]] if len(grouped) else grouped
    repeats = ~is_first & (found.earlier[grouped] < 0)
    found.cause[grouped[repeats]] = first[repeats]
    is_removed = ~found.stays
    found.jaccard[is_removed] = 1.0
    found.is_exact[is_removed] = True


def _name_survivors(found: Resolution) -> None:
    """Copies of a row that turned out to be like another are like that one, too: a cause is a row that stays."""
    copies = np.flatnonzero(found.cause >= 0)
    copies = copies[~found.stays[found.cause[copies]]]
    first = found.cause[copies]
    found.cause[copies], found.earlier[copies] = found.cause[first], found.earlier[first]
    found.jaccard[copies] = found.jaccard[first]


def find_templates(prints: Fingerprints, sources: Indices, share: float = TEMPLATE_SHARE) -> Hashes:
    """Shingles that most distinct rows of a source share, of all sources, ascending."""
    order = by_text(prints.texts)
    texts = prints.texts[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (texts[1:] != texts[:-1]).any(axis=1)
    return _templates(prints.shingles, order[is_first], sources, share)


def _templates(shingles: Shingles, rows: Indices, of_source: Indices, share: float) -> Hashes:
    found = [np.zeros(0, np.uint64)]
    for source in np.unique(of_source[rows]):
        own = rows[of_source[rows] == source]
        if len(own) >= TEMPLATE_ROWS and share < 1.0:
            found.append(common_hashes(shingles.take(own), share))
    return distinct(np.concatenate(found))


class _Removed(NamedTuple):
    """Places in the order that were removed, the places that caused it, and their similarity."""

    place: Indices
    cause: Indices
    jaccard: NDArray[np.float64]


def _drop_similar(found: Resolution, shingles: Shingles, order: Indices, threshold: float) -> None:
    """Remove, of rows in their order, each that is similar to one before it that stays."""
    for removed in _removals(shingles.take(order), np.arange(len(order)), threshold):
        found.cause[order[removed.place]] = order[removed.cause]
        found.jaccard[order[removed.place]] = removed.jaccard


def _removals(shingles: Shingles, places: Indices, threshold: float) -> list[_Removed]:
    """Where very many rows look alike, the first half is settled before the second is compared with what is left of it:
    the result is the same, and a crowd of near-copies costs its survivors, not its square."""
    pairs = pairs_within(shingles, threshold, most_candidates=MAX_CANDIDATES if len(places) > _SMALL else None)
    if pairs is not None:
        return [_greedy(pairs, places)]
    middle = len(places) // 2
    removed = _removals(shingles.take(np.arange(middle)), places[:middle], threshold)
    kept = np.flatnonzero(~np.isin(places[:middle], np.concatenate([one.place for one in removed])))
    head, tail = shingles.take(kept), shingles.take(np.arange(middle, len(places)))
    rarity = Rarity.of(head)
    across = pairs_between(tail, head, postings_of(head, rarity, threshold), rarity, threshold)
    first = np.unique(across.left, return_index=True)[1]
    crossed = _Removed(places[middle + across.left[first]], places[kept[across.right[first]]], across.jaccard[first])
    rest = np.setdiff1d(np.arange(middle, len(places)), middle + across.left)
    return [*removed, crossed, *_removals(shingles.take(rest), places[rest], threshold)]


def _greedy(pairs: Pairs, places: Indices) -> _Removed:
    """Each row that stays removes those after it that are similar to it; the first to do so is the cause."""
    cause: dict[int, tuple[int, float]] = {}
    for left, right, value in zip(pairs.left.tolist(), pairs.right.tolist(), pairs.jaccard.tolist(), strict=True):
        if left not in cause and right not in cause:
            cause[right] = (left, value)
    removed = np.fromiter(cause, np.int64, len(cause))
    by = np.fromiter((one for one, _ in cause.values()), np.int64, len(cause))
    values = np.fromiter((one for _, one in cause.values()), np.float64, len(cause))
    return _Removed(places[removed], places[by], values)
