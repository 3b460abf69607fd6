"""Chunks of a tensor from all models at once: bytes from files, updates of adapters added, every value checked."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.chunk import Chunk, Pool, Room
from evertune.merge.kernels import Array
from evertune.merge.plan import MergePlan, TensorPlan
from evertune.merge.sources import FLOATS, Files, Source, left_and_right

Factors = tuple[Array, Array]
# Of a tensor, where a sample is enough; read in runs of neighbours.
SAMPLE_ELEMENTS = 1 << 15
RUN_ELEMENTS = 1 << 13


@dataclass
class Seconds:
    """CPU seconds of a worker by what it did; wall time of other threads does not count."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    digest: float = 0.0

    def add(self, other: "Seconds") -> None:
        self.read += other.read
        self.compute += other.compute
        self.write += other.write
        self.digest += other.digest


class Stored(NamedTuple):
    """The numbers of one model's tensor: file, where they begin, their type and its size in bytes."""

    file: Path
    begin: int
    code: int
    width: int


@dataclass(frozen=True)
class Inputs:
    """The models of one tensor, ready to be read by position.

    factors: for each model, the low-rank updates of this tensor.
    is_bf16: whether all models are stored in bfloat16 and nothing is added to them.
    kept: words of chunks by their first element, from a pass for those after it.
    """

    tensor: TensorPlan
    experts: Sequence[Source]
    base: Source | None
    factors: Sequence[Sequence[Factors]]
    is_bf16: bool
    kept: dict[int, Array] = field(default_factory=dict)

    @cached_property
    def models(self) -> list[Source]:
        return [*self.experts, *([self.base] if self.base else [])]

    @cached_property
    def has_rows(self) -> bool:
        """Whether a model's rows are found by token, so that chunks must be whole rows."""
        return any(self.tensor.name in one.rows for one in self.models)


def open_inputs(plan: MergePlan, tensor: TensorPlan, files: Files) -> Inputs:
    """Open the files of a tensor's models and read the factors of its updates."""
    experts = [plan.sources[i] for i in tensor.experts]
    models = [*experts, *([plan.base] if plan.base else [])]
    for one in models:
        files.add(one.tensors[tensor.name].file)
    factors = [
        [left_and_right(files, update, tensor.name) for update in one.updates.get(tensor.name, ())] for one in models
    ]
    is_plain = not any(factors) and not any(tensor.name in one.rows for one in models)
    is_bf16 = is_plain and not tensor.double and all(stored_in(one, tensor.name).code == kernels.BF16 for one in models)
    return Inputs(tensor, experts, plan.base, factors, is_bf16)


def stored_in(model: Source, name: str) -> Stored:
    """Where a model's tensor lies."""
    at = model.tensors[name]
    code = FLOATS[at.info.dtype]
    return Stored(at.file, at.info.begin, code, kernels.WIDTHS[code])


def sample_runs(tensor: TensorPlan, *, whole_rows: bool = False) -> Iterator[tuple[int, int]]:
    """Ranges of elements, spread evenly over the tensor; all of a small one."""
    unit = tensor.shape[-1] if whole_rows and tensor.shape else 1
    run = max(unit, RUN_ELEMENTS // unit * unit)
    if tensor.elements <= SAMPLE_ELEMENTS:
        yield from ((begin, min(begin + run, tensor.elements)) for begin in range(0, tensor.elements, run))
        return
    count = max(1, SAMPLE_ELEMENTS // run)
    for i in range(count):
        begin = (tensor.elements - run) * i // max(1, count - 1) // unit * unit
        yield begin, begin + run


@dataclass
class Reader:
    """One worker's buffers. A chunk it yields is valid until the next one.

    pool: of arrays for chunks that are kept between passes; without one, nothing is.
    """

    files: Files
    pool: Pool | None = None
    room: Room = field(default_factory=Room)
    seconds: Seconds = field(default_factory=Seconds)

    def chunks(
        self, inputs: Inputs, begin: int, end: int, *, keep: bool = False, check: bool = True
    ) -> Iterator[Chunk]:
        """Elements [begin, end) of a tensor in all models, a chunk at a time.

        Args:
            keep: another pass follows; of what is read, as much is kept as the pool has room for.
            check: look for NaN and Inf. Who says no sees them in the outcome, and calls `check_finite` then.

        Raises:
            MergeError: a value is NaN or Inf; names the model, the tensor and the place.
        """
        for first in range(begin, end, inputs.tensor.chunk):
            started = time.thread_time()
            held = inputs.kept.get(first)
            is_read = held is not None
            if keep and not is_read and inputs.is_bf16 and self.pool is not None:
                held = self.pool.take()
            last = min(first + inputs.tensor.chunk, end)
            chunk = self.chunk(inputs, first, last, held=held, is_read=is_read, check=check)
            self.seconds.read += time.thread_time() - started
            yield chunk
            if keep and held is not None:
                inputs.kept[first] = held
            elif is_read:
                self._let_go(inputs, first)

    def release(self, inputs: Inputs) -> None:
        """Give back what is still kept of a tensor."""
        for first in tuple(inputs.kept):
            self._let_go(inputs, first)

    def sample(self, inputs: Inputs, *, whole_rows: bool = False) -> Iterator[Chunk]:
        """An even sample of at most `SAMPLE_ELEMENTS` elements, the same in every run.

        Raises:
            MergeError: as `chunks`.
        """
        for begin, end in sample_runs(inputs.tensor, whole_rows=whole_rows or inputs.has_rows):
            yield self.chunk(inputs, begin, end)

    def chunk(
        self,
        inputs: Inputs,
        begin: int,
        end: int,
        *,
        held: Array | None = None,
        is_read: bool = False,
        check: bool = True,
    ) -> Chunk:
        """Elements [begin, end) as one chunk.

        Args:
            held: bytes for the words of a chunk of bfloat16, instead of the room's.
            is_read: they hold them already.
            check: as `chunks`.

        Raises:
            MergeError: as `chunks`.
        """
        shape = (len(inputs.models), end - begin)
        is_double, has_base = inputs.tensor.double, inputs.base is not None
        if inputs.is_bf16:
            words = self.room.take("models", shape, np.uint16)
            if held is not None:
                words = held[: 2 * math.prod(shape)].view(np.uint16).reshape(shape)
            if is_read:
                return Chunk(words, begin, has_base, is_double, self.room)
            for model, row in zip(inputs.models, words, strict=True):
                stored = stored_in(model, inputs.tensor.name)
                self.files.read(stored.file, stored.begin + begin * stored.width, row.view(np.uint8))
            if check and not kernels.is_finite(words.reshape(-1).view(np.uint8), kernels.BF16):
                self._check_words(inputs, begin, words)
            return Chunk(words, begin, has_base, is_double, self.room)
        values = self.room.take("models", shape, np.float64 if is_double else np.float32)
        for i, model in enumerate(inputs.models):
            if inputs.tensor.name in model.rows:
                self._compute_rows(inputs, i, begin, values[i])
            else:
                self._compute(inputs, i, begin, values[i])
        return Chunk(values, begin, has_base, is_double, self.room)

    def check_finite(self, inputs: Inputs, begin: int, end: int) -> None:
        """Raise MergeError, as `chunks`, where one of elements [begin, end) is NaN or Inf in a model."""
        for first in range(begin, end, inputs.tensor.chunk):
            self.chunk(inputs, first, min(first + inputs.tensor.chunk, end))

    def _check_words(self, inputs: Inputs, begin: int, words: Array) -> None:
        for model, row in zip(inputs.models, words, strict=True):
            self._check(inputs, model, stored_in(model, inputs.tensor.name), begin, row.view(np.uint8))

    def _let_go(self, inputs: Inputs, first: int) -> None:
        assert self.pool is not None, "kept without a pool"
        self.pool.give_back(inputs.kept.pop(first))

    def _read(self, inputs: Inputs, model: Source, stored: Stored, begin: int, into: Array) -> None:
        """A model's numbers as they are stored, every one of them finite."""
        self.files.read(stored.file, stored.begin + begin * stored.width, into)
        self._check(inputs, model, stored, begin, into)

    def _check(self, inputs: Inputs, model: Source, stored: Stored, begin: int, raw: Array) -> None:
        if not kernels.is_finite(raw, stored.code):
            values = np.empty(len(raw) // stored.width)
            kernels.decode(raw, stored.code, values)
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise MergeError(
                f"{inputs.tensor.name} of '{model.name}' holds {values[place]} at element {begin + place} "
                f"({stored.file}).",
                remedy="Nothing was written. Leave that model out, or go back to an earlier checkpoint of it.",
            )

    def _compute(self, inputs: Inputs, i: int, begin: int, values: Array) -> None:
        """A model's numbers and what its adapters add to them."""
        stored = stored_in(inputs.models[i], inputs.tensor.name)
        raw = self.room.take("stored", (len(values) * stored.width,), np.uint8)
        self._read(inputs, inputs.models[i], stored, begin, raw)
        kernels.decode(raw, stored.code, values)
        for left, right in inputs.factors[i]:
            kernels.add_low_rank(begin, left, right, values)

    def _compute_rows(self, inputs: Inputs, i: int, begin: int, into: Array) -> None:
        """Rows of another vocabulary, by token; of a token that this model has not, the row it changes nothing by."""
        tensor, model = inputs.tensor, inputs.models[i]
        columns, rows = tensor.shape[-1], model.rows[tensor.name]
        other = inputs.base or next(one for one in inputs.models if tensor.name not in one.rows)
        values = into.reshape(-1, columns)
        for k in range(len(values)):
            wanted = int(rows[begin // columns + k])
            source, row = (model, wanted) if wanted >= 0 else (other, begin // columns + k)
            stored = stored_in(source, tensor.name)
            raw = self.room.take("stored", (columns * stored.width,), np.uint8)
            self._read(inputs, source, stored, row * columns, raw)
            kernels.decode(raw, stored.code, values[k])
