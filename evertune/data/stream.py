"""Which row comes when: a pure function of (seed, position). Nothing is stored, so a resumed run sees the same rows.

    position  0    1    2    3    4    5    6    7    8    9   ...
    row       new  new  new  new  OLD  new  new  new  new  OLD        share 0.2: one in five, evenly spread

An epoch shows every new row once (or, with weights, as many rows in the given shares) and exactly
round(new * share / (1 - share)) old ones. Each pass over a source has its own order, from a keyed permutation that
needs no memory.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evertune.errors import DataError

COUNTED_ROWS = 1 << 16
FEISTEL_ROUNDS = 8  # fewer leave small permutations visibly uneven
_BITS_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Pick:
    """One row: the source's name, the index within it, and whether it is replay."""

    source: str
    index: int
    is_replay: bool


@dataclass(frozen=True, eq=False)
class Picks:
    """Many rows.

    Attributes:
        names: the new sources, then those of the pool.
        source: place of each row's source in `names`.
        index: each row within its source.
        is_replay: True for those of the pool.
    """

    names: list[str]
    source: NDArray[np.int64]
    index: NDArray[np.int64]
    is_replay: NDArray[np.bool_]


class Stream:
    """The order of rows.

    Args:
        new: rows per new-data source.
        weights: shares of the new rows per source, of any positive sum; each row once an epoch when None.
        replay: rows per replay source; they form one pool, shuffled anew each time it is used up.
        share: share of the final stream that is replay, in [0, 1).
        seed: the same seed gives the same stream.
        quotas: rows of each source in an epoch, in place of weights; `quotas.py` works them out.

    Attributes:
        rows_per_epoch, new_per_epoch, replay_per_epoch: exact counts of every epoch, in rows.

    Raises:
        DataError: a source of new rows is empty, a share outside [0, 1), a share above 0 with an empty pool, or
            weights that are not positive or do not name the sources.
    """

    def __init__(
        self,
        new: Mapping[str, int],
        weights: Mapping[str, float] | None,
        replay: Mapping[str, int],
        share: float,
        seed: int,
        quotas: Mapping[str, int] | None = None,
    ) -> None:
        _check(new, weights, replay, share)
        self._new = dict(new)
        self._quotas = dict(quotas or (quotas_by_weight(weights, sum(new.values())) if weights else new))
        if set(self._quotas) != set(new) or min(self._quotas.values()) < 0 or not any(self._quotas.values()):
            raise DataError(f"stream: found the quotas {self._quotas}, expected a number of rows for {sorted(new)}.")
        self._pool = {name: count for name, count in replay.items() if count}
        self._seed = seed
        self.new_per_epoch = sum(self._quotas.values())
        self.replay_per_epoch = round(self.new_per_epoch * share / (1 - share))
        self.rows_per_epoch = self.new_per_epoch + self.replay_per_epoch

    def pick(self, position: int) -> Pick:
        """The row at a position, counted from 0 over all epochs.

        Any w positions in a row hold w * replay_per_epoch / rows_per_epoch replay rows, give or take less than one
        (Bresenham's line), over the end of an epoch too.
        """
        epoch, place = divmod(position, self.rows_per_epoch)
        before = place * self.replay_per_epoch // self.rows_per_epoch
        is_replay = (place + 1) * self.replay_per_epoch // self.rows_per_epoch > before
        if is_replay:
            return self.replay_row(epoch * self.replay_per_epoch + before)
        return self._pick_new(epoch, place - before)

    def new_row(self, number: int) -> Pick:
        """The new row of this number, counted from 0 over all epochs, however many old ones stand between."""
        return self._pick_new(*divmod(number, self.new_per_epoch))

    def picks(self, positions: NDArray[np.int64]) -> "Picks":
        """The rows at many positions at once: the same as `pick`, thirty times faster."""
        epoch, place = np.divmod(positions, self.rows_per_epoch)
        before = place * self.replay_per_epoch // self.rows_per_epoch
        is_replay = (place + 1) * self.replay_per_epoch // self.rows_per_epoch > before
        source, index = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        if is_replay.any():
            drawn = (epoch * self.replay_per_epoch + before)[is_replay]
            total = sum(self._pool.values())
            turn, among = np.divmod(drawn, total)
            shuffled = _permuted(among, total, f"{self._seed}/replay/", turn)
            source[is_replay], index[is_replay] = _found(self._pool, shuffled)
        if not is_replay.all():
            new = ~is_replay
            source[new], index[new] = self._picks_new(epoch[new], (place - before)[new])
        names = [*self._new, *self._pool]
        source[is_replay] += len(self._new)
        return Picks(names, source, index, is_replay)

    def _picks_new(
        self, epoch: NDArray[np.int64], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shuffled = _permuted(place, self.new_per_epoch, f"{self._seed}/epoch/", epoch)
        source, drawn = _found(self._quotas, shuffled)
        index = np.empty(len(place), np.int64)
        for i, name in enumerate(self._quotas):
            own = source == i
            turn, among = np.divmod(epoch[own] * self._quotas[name] + drawn[own], self._new[name])
            index[own] = _permuted(among, self._new[name], f"{self._seed}/new/{name}/", turn)
        return source, index

    def batch(
        self,
        step: int,
        micro_step: int,
        rank: int,
        *,
        batch_rows: int,
        micro_batch_rows: int,
        world_size: int = 1,
        lengths: Mapping[tuple[str, int], int] | None = None,
    ) -> list[Pick]:
        """The rows of one micro-step of one process; empty when the step has no rows left for it.

        A step shows positions `step * batch_rows` to `(step + 1) * batch_rows`, however it is divided. With `lengths`,
        by (source, index), the rows of a step are dealt longest first, so that a micro-batch has little padding and
        what does not fit into memory is met at once.
        """
        rows = [self.pick(step * batch_rows + i) for i in range(batch_rows)]
        return deal(rows, micro_step * world_size + rank, micro_batch_rows=micro_batch_rows, lengths=lengths)

    def micro_steps(self, *, batch_rows: int, micro_batch_rows: int, world_size: int = 1) -> int:
        """Micro-steps that a step needs, the same for every process."""
        return -(-batch_rows // (micro_batch_rows * world_size))

    def describe(self, rows: int) -> dict[str, Any]:
        """What the first `rows` positions show, counted.

        Returns:
            `rows` and `passes` per source (`replay:<name>` for the pool's): below 1 pass some rows are not seen, above
            1 rows repeat; and `share_done`, the share that is replay.
        """
        sizes = {**self._new, **{f"replay:{name}": count for name, count in self._pool.items()}}
        counts = np.zeros(len(sizes), np.int64)
        for first in range(0, rows, COUNTED_ROWS):
            picks = self.picks(np.arange(first, min(first + COUNTED_ROWS, rows)))
            counts += np.bincount(picks.source, minlength=len(sizes))
        seen = dict(zip(sizes, counts.tolist(), strict=True))
        return {
            "rows": seen,
            "passes": {name: seen[name] / size for name, size in sizes.items()},
            "share_done": int(counts[len(self._new) :].sum()) / rows if rows else 0.0,
        }

    def replay_row(self, drawn: int) -> Pick:
        """The pool's row for the `drawn`-th replay position of all epochs."""
        total = sum(self._pool.values())
        turn, place = divmod(drawn, total)
        name, index = _find(self._pool, permute(place, total, f"{self._seed}/replay/{turn}"))
        return Pick(name, index, is_replay=True)

    def _pick_new(self, epoch: int, place: int) -> Pick:
        """The new row at a place of an epoch: a shuffle mixes the sources, each source's own passes order its rows."""
        shuffled = permute(place, self.new_per_epoch, f"{self._seed}/epoch/{epoch}")
        name, drawn = _find(self._quotas, shuffled)
        turn, index = divmod(epoch * self._quotas[name] + drawn, self._new[name])
        return Pick(name, permute(index, self._new[name], f"{self._seed}/new/{name}/{turn}"), is_replay=False)


class Stretches:
    """A stream whose share of replay is one number for each stretch of positions.

    In each stretch the share is exact, to a row, and old rows are evenly spread. New and old rows go on where the
    stretch before left off, so that a share which never changes shows each new row once an epoch, too.

    Args:
        stream: gives the rows, by their numbers.
        rows: positions in a stretch.
        share: of the first stretch, and of all that follow until more are set.
    """

    def __init__(self, stream: Stream, rows: int, share: float) -> None:
        self._stream = stream
        self._rows = rows
        self.set_shares([share])

    def set_shares(self, shares: Sequence[float]) -> None:
        """Shares of the stretches from the first on; the last one goes on."""
        replayed = [round(share * self._rows) for share in shares]
        self._shown = list(accumulate(replayed, initial=0))
        self._replayed = replayed

    def pick(self, position: int) -> Pick:
        """The row at a position; see `Stream.pick`."""
        stretch, place = divmod(position, self._rows)
        known = min(stretch, len(self._replayed) - 1)
        replayed = self._replayed[known]
        shown = self._shown[known] + (stretch - known) * replayed
        before = place * replayed // self._rows
        if (place + 1) * replayed // self._rows > before:
            return self._stream.replay_row(shown + before)
        return self._stream.new_row(stretch * self._rows - shown + place - before)

    def batch(
        self,
        step: int,
        micro_step: int,
        rank: int,
        *,
        batch_rows: int,
        micro_batch_rows: int,
        world_size: int = 1,
        lengths: Mapping[tuple[str, int], int] | None = None,
    ) -> list[Pick]:
        """The rows of one micro-step of one process; see `Stream.batch`."""
        rows = [self.pick(step * batch_rows + i) for i in range(batch_rows)]
        return deal(rows, micro_step * world_size + rank, micro_batch_rows=micro_batch_rows, lengths=lengths)

    def micro_steps(self, *, batch_rows: int, micro_batch_rows: int, world_size: int = 1) -> int:
        """Micro-steps that a step needs, the same for every process."""
        return self._stream.micro_steps(batch_rows=batch_rows, micro_batch_rows=micro_batch_rows, world_size=world_size)


def deal(
    rows: list[Pick], hand: int, *, micro_batch_rows: int, lengths: Mapping[tuple[str, int], int] | None
) -> list[Pick]:
    """The rows of a step that one micro-step of one process gets: longest first where lengths are known."""
    if lengths is not None:
        rows = sorted(rows, key=lambda one: -lengths[one.source, one.index])
    return rows[hand * micro_batch_rows : (hand + 1) * micro_batch_rows]


def quotas_by_weight(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` rows in the shares of the weights, by largest remainder; of equal remainders the first name."""
    whole = sum(Fraction(one) for one in weights.values())
    exact = {name: Fraction(one) * total / whole for name, one in weights.items()}
    quotas = {name: math.floor(one) for name, one in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def permute(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) sends an index, in constant memory.

    A Feistel network permutes the smallest range(4**k) that holds `size`; a result outside is sent through again until
    it lands inside (cycle walking, Black and Rogaway 2002). Both are one to one. Good enough to shuffle, not a cipher.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & mask
        for one in keys:
            left, right = right, left ^ (_mix(right ^ one) & mask)
        index = (left << half) | right
        if index < size:
            return index


def lengths_of(sources: Mapping[str, Sequence[Any]]) -> dict[tuple[str, int], int]:
    """Lengths by (source, index) of encoded rows, for `Stream.batch`; of a pair, that of its longer conversation."""
    return {
        (name, i): max(len(row.ids) for row in item.rows)
        for name, items in sources.items()
        for i, item in enumerate(items)
    }


def _check(
    new: Mapping[str, int], weights: Mapping[str, float] | None, replay: Mapping[str, int], share: float
) -> None:
    if not new or min(new.values()) < 1:
        raise DataError(f"stream: found new rows {dict(new)}, expected one or more of every source.")
    if not 0.0 <= share < 1.0:
        raise DataError(f"stream: found the replay share {share}, expected 0 to below 1.")
    if share > 0 and not any(replay.values()):
        raise DataError(
            f"stream: found no row to replay, expected some for a share of {share}.",
            remedy="Name a source with rows, or set the share to 0.",
        )
    if weights is None:
        return
    if set(weights) != set(new):
        raise DataError(f"stream: found weights for {sorted(weights)}, expected them for {sorted(new)}.")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"stream: found the weight {weight} for '{name}', expected a finite number above 0.")


def _find(counts: Mapping[str, int], index: int) -> tuple[str, int]:
    """Name and index within it, where the named ranges lie end to end."""
    for name, count in counts.items():
        if index < count:
            return name, index
        index -= count
    raise AssertionError("an index lies past the last source")


def _found(counts: Mapping[str, int], indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place of the name and index within it, as `_find`, for many."""
    ends = np.cumsum(list(counts.values()))
    source = np.searchsorted(ends, indices, side="right")
    return source, indices - (ends - np.array(list(counts.values())))[source]


def _permuted(indices: NDArray[np.int64], size: int, key: str, turns: NDArray[np.int64]) -> NDArray[np.int64]:
    """`permute` for many indices; the key of each ends with its turn."""
    result = np.empty(len(indices), np.int64)
    for turn in np.unique(turns).tolist():
        own = turns == turn
        result[own] = _permute_many(indices[own], size, _round_keys(f"{key}{turn}"))
    return result


def _permute_many(indices: NDArray[np.int64], size: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    values = indices.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> shift, values[walking] & mask
        for one in keys:
            left, right = right, left ^ (_mix_many(right ^ np.uint64(one)) & mask)
        values[walking] = (left << shift) | right
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.sha512(key.encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(FEISTEL_ROUNDS))


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a fast 64-bit mix."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _BITS_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _BITS_64
    return value ^ (value >> 31)


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
