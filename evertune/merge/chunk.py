"""A run of elements of one tensor in all models; bfloat16 as it was read, widened where numbers are asked for."""

# M models (K experts, then the base if there is one), N elements of the chunk

import math
import threading
from collections import deque
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


class Pool:
    """Byte arrays of one size, at most so many of them, for any thread; made when they are first taken."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        self._missing = limit // size
        self._free: deque[Array] = deque()
        self._lock = threading.Lock()

    def take(self) -> Array | None:
        """An array of any content, or None when all are taken."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._missing == 0:
                return None
            self._missing -= 1
        return np.empty(self.size, np.uint8)

    def give_back(self, array: Array) -> None:
        """Let others have an array that was taken."""
        with self._lock:
            self._free.append(array)


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
    """Elements begin, begin + 1, ... of a tensor. The arrays are the worker's own and may be overwritten.

    models_MN: the experts, then the base if there is one, checked to hold no NaN or Inf. uint16: bfloat16's bits, where
        all models are stored so; otherwise floats of the dtype to compute in.
    double: compute in float64; otherwise in float32.
    """

    models_MN: Array
    begin: int
    has_base: bool
    double: bool
    room: Room

    @property
    def count(self) -> int:
        return int(self.models_MN.shape[1])

    @property
    def like(self) -> Array:
        """An empty array of the dtype to compute in."""
        return _LIKE[self.double]

    def values(self) -> Values:
        """The models' numbers, valid until the next call."""
        widened = self.room.take("values", self.models_MN.shape, self.like.dtype)
        if self.models_MN.dtype == np.uint16:
            kernels.decode(self.models_MN.view(np.uint8), kernels.BF16, widened)
        else:
            widened[...] = self.models_MN
        return Values(widened[-1], widened[:-1]) if self.has_base else Values(None, widened)

    def task_vectors(self) -> Values:
        """The base, and the experts' differences from it."""
        values = self.values()
        np.subtract(values.experts, values.start, out=values.experts)
        return values
