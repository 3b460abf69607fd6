"""A run of elements of one tensor in all models, as the bytes that were read; decoded where numbers are asked for."""

# M models (K experts, then the base if there is one), N elements of the chunk

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evertune.merge import kernels
from evertune.merge.kernels import Array

_LIKE: dict[bool, Array] = {False: np.empty(0, np.float32), True: np.empty(0, np.float64)}


class Room:
    """A worker's arrays by what they are for, kept between uses: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of any content, valid until the next one of the same use."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        kept = self._kept.get(use)
        if kept is None or kept.nbytes < size:
            kept = self._kept[use] = np.empty(-(-size // 8), np.uint64)
        return kept.view(np.uint8)[:size].view(dtype).reshape(shape)


class Values(NamedTuple):
    """Numbers of a chunk, float32 or float64.

    base: (N,), or None for a merge without one.
    experts: (K, N), in canonical order: the models, or their task vectors.
    """

    base: Array | None
    experts: Array

    @property
    def start(self) -> Array:
        """The base, for a method that cannot do without."""
        assert self.base is not None, "planned without the base that the method needs"
        return self.base


@dataclass(frozen=True)
class Chunk:
    """Elements [begin, begin + count) of a tensor. The arrays are the worker's own and may be overwritten.

    raw: bytes, checked to hold no NaN or Inf.
    places_M, codes_M: where each model begins in `raw`, and of what type its numbers are.
    double: compute in float64; otherwise in float32.
    """

    raw: Array
    places_M: Array
    codes_M: Array
    count: int
    begin: int
    has_base: bool
    double: bool
    room: Room

    @property
    def like(self) -> Array:
        """An empty array of the dtype to compute in."""
        return _LIKE[self.double]

    @property
    def models(self) -> tuple[Array, Array, Array, Array]:
        """What a kernel needs to decode the models: the arguments that `kernels.sum_chunk` and its kin begin with."""
        return self.raw, self.places_M, self.codes_M, self.like

    def values(self) -> Values:
        """The models' numbers, valid until the next call."""
        decoded = self.room.take("values", (len(self.places_M), self.count), self.like.dtype)
        kernels.decode_block(self.raw, self.places_M, self.codes_M, 0, decoded)
        return Values(decoded[-1], decoded[:-1]) if self.has_base else Values(None, decoded)

    def task_vectors(self) -> Values:
        """The base, and the experts' differences from it."""
        values = self.values()
        kernels.subtract(values.start, values.experts)
        return values
