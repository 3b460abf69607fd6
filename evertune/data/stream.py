"""Which row comes when: a pure function of (seed, position). Nothing is stored, so a resumed run sees the same rows.

    position  0    1    2    3    4    5    6    7    8    9   ...
    row       new  new  OLD  new  new  new  new  OLD  new  new        share 0.2: one in five, evenly spread

An epoch shows every new row once (or, with weights, as many rows in the given shares) and exactly
round(new * share / (1 - share)) old ones. Each pass over a source has its own order, from a keyed permutation that
needs no memory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from evertune.errors import DataError

FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Pick:
    """One row: the source's name, the index within it, and whether it is replay."""

    source: str
    index: int
    is_replay: bool


class Stream:
    """The order of rows.

    Args:
        new: rows per new-data source.
        weights: shares of the new rows per source; each source once an epoch when None.
        replay: rows per replay source; they form one pool.
        share: share of the final stream that is replay, in [0, 1).
        seed: the same seed gives the same stream.

    Raises:
        DataError: no new rows, a share outside [0, 1), a share above 0 with an empty pool, or a weight for no source.
    """

    def __init__(
        self,
        new: Mapping[str, int],
        weights: Mapping[str, float] | None,
        replay: Mapping[str, int],
        share: float,
        seed: int,
    ) -> None:
        if not new or min(new.values()) < 1:
            raise DataError(f"every new source needs a row; found {dict(new)}.")
        if not 0.0 <= share < 1.0:
            raise DataError(f"the replay share is {share}, expected 0 to below 1.")
        if weights is not None and set(weights) != set(new):
            raise DataError(f"weights are given for {sorted(weights)}, but the sources are {sorted(new)}.")
        pool = {name: count for name, count in replay.items() if count}
        if share > 0 and not pool:
            raise DataError(f"the replay share is {share}, but there is no row to replay.")
        self._new, self._weights, self._pool, self._seed = dict(new), weights, pool, seed
        self.new_per_epoch = sum(new.values())
        self.replay_per_epoch = round(self.new_per_epoch * share / (1 - share)) if share else 0
        self.rows_per_epoch = self.new_per_epoch + self.replay_per_epoch

    def pick(self, position: int) -> Pick:
        """The row at a position, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.rows_per_epoch)
        before = place * self.replay_per_epoch // self.rows_per_epoch
        is_replay = (place + 1) * self.replay_per_epoch // self.rows_per_epoch > before
        if is_replay:
            return self._pick_replay(epoch * self.replay_per_epoch + before)
        return self._pick_new(epoch, place - before)

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
        by (source, index), the rows of a step are dealt in order of length, so that a micro-batch has little padding.
        """
        rows = [self.pick(step * batch_rows + i) for i in range(batch_rows)]
        if lengths is not None:
            rows.sort(key=lambda one: (lengths[one.source, one.index], one.source, one.index))
        first = (micro_step * world_size + rank) * micro_batch_rows
        return rows[first : first + micro_batch_rows]

    def micro_steps(self, *, batch_rows: int, micro_batch_rows: int, world_size: int = 1) -> int:
        """Micro-steps that a step needs, the same for every process."""
        return -(-batch_rows // (micro_batch_rows * world_size))

    def describe(self, rows: int) -> dict[str, Any]:
        """How many rows of each source the first `rows` positions show, and passes over it: nothing is hidden."""
        counts: dict[str, int] = {}
        replayed = 0
        for position in range(rows):
            one = self.pick(position)
            name = f"replay:{one.source}" if one.is_replay else one.source
            counts[name] = counts.get(name, 0) + 1
            replayed += one.is_replay
        sizes = {**self._new, **{f"replay:{name}": count for name, count in self._pool.items()}}
        passes = {name: counts.get(name, 0) / size for name, size in sizes.items()}
        return {"rows": counts, "passes": passes, "share_done": replayed / rows if rows else 0.0}

    def _pick_replay(self, drawn: int) -> Pick:
        total = sum(self._pool.values())
        turn, place = divmod(drawn, total)
        index = permute(place, total, f"{self._seed}/replay/{turn}")
        for name, count in self._pool.items():
            if index < count:
                return Pick(name, index, is_replay=True)
            index -= count
        raise AssertionError("the pool's counts do not add up")

    def _pick_new(self, epoch: int, place: int) -> Pick:
        shuffled = permute(place, self.new_per_epoch, f"{self._seed}/epoch/{epoch}")
        for name, count in self._quotas.items():
            if shuffled < count:
                turn, index = divmod(epoch * count + shuffled, self._new[name])
                return Pick(name, permute(index, self._new[name], f"{self._seed}/{name}/{turn}"), is_replay=False)
            shuffled -= count
        raise AssertionError("the quotas do not add up")

    @cached_property
    def _quotas(self) -> dict[str, int]:
        """New rows of each source in an epoch: all of them, or the weights' shares by largest remainder."""
        if self._weights is None:
            return self._new
        total = sum(Fraction(one) for one in self._weights.values())
        exact = {name: Fraction(one) * self.new_per_epoch / total for name, one in self._weights.items()}
        quotas = {name: int(one) for name, one in exact.items()}
        by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
        for name in by_remainder[: self.new_per_epoch - sum(quotas.values())]:
            quotas[name] += 1
        return quotas


def permute(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) sends an index: a Feistel network, walked until it lands inside.

    The walk visits each number of the enclosing power of four at most once, so the map is one to one.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for one in keys:
            left, right = right, left ^ (_mix(right ^ one) & ((1 << half) - 1))
        index = (left << half) | right
        if index < size:
            return index


_KEYS: dict[str, tuple[int, ...]] = {}


def _round_keys(key: str) -> tuple[int, ...]:
    keys = _KEYS.get(key)
    if keys is None:
        digest = hashlib.sha512(key.encode()).digest()
        keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(FEISTEL_ROUNDS))
        if len(_KEYS) > 256:
            _KEYS.clear()
        _KEYS[key] = keys
    return keys


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014): a fast 64-bit mix."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def lengths_of(sources: Mapping[str, Sequence[Any]]) -> dict[tuple[str, int], int]:
    """Lengths by (source, index) of encoded rows, for `Stream.batch`."""
    return {(name, i): len(row.ids) for name, rows in sources.items() for i, row in enumerate(rows)}
