"""Chunks of a tensor from all models at once: bytes from files, updates of adapters added, every value checked."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.chunk import Chunk, Room
from evertune.merge.kernels import Array
from evertune.merge.plan import MergePlan, TensorPlan
from evertune.merge.sources import FLOATS, Files, Source, left_and_right

Factors = tuple[Array, Array]
# Models begin at multiples of it in a chunk's bytes.
ALIGNED = 64


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
    codes: for each model, the type of the numbers that a chunk holds of it: as stored, or those computed with.
    stored: for each model, what is read as it is; None where numbers are computed.
    """

    tensor: TensorPlan
    experts: Sequence[Source]
    base: Source | None
    factors: Sequence[Sequence[Factors]]
    codes: Array
    stored: Sequence["Stored | None"]

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
    computed = kernels.F64 if tensor.double else kernels.F32
    stored = [
        None if updates or tensor.name in one.rows else stored_in(one, tensor.name)
        for one, updates in zip(models, factors, strict=True)
    ]
    codes = np.array([computed if one is None else one.code for one in stored])
    return Inputs(tensor, experts, plan.base, factors, codes, stored)


def stored_in(model: Source, name: str) -> Stored:
    """Where a model's tensor lies."""
    at = model.tensors[name]
    code = FLOATS[at.info.dtype]
    return Stored(at.file, at.info.begin, code, kernels.WIDTHS[code])


@dataclass
class Reader:
    """One worker's buffers. A chunk it yields is valid until the next one."""

    files: Files
    room: Room = field(default_factory=Room)
    seconds: Seconds = field(default_factory=Seconds)

    def chunks(self, inputs: Inputs, begin: int, end: int) -> Iterator[Chunk]:
        """Elements [begin, end) of a tensor in all models, a chunk at a time.

        Raises:
            MergeError: a value is NaN or Inf; names the model, the tensor and the place.
        """
        for first in range(begin, end, inputs.tensor.chunk):
            started = time.thread_time()
            chunk = self.chunk(inputs, first, min(first + inputs.tensor.chunk, end))
            self.seconds.read += time.thread_time() - started
            yield chunk

    def chunk(self, inputs: Inputs, begin: int, end: int) -> Chunk:
        """Elements [begin, end) as one chunk.

        Raises:
            MergeError: as `chunks`.
        """
        count = end - begin
        sizes = [count * kernels.WIDTHS[code] for code in inputs.codes.tolist()]
        places = list(itertools.accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0))
        raw = self.room.take("raw", (places[-1],), np.uint8)
        for i, stored in enumerate(inputs.stored):
            data = raw[places[i] : places[i] + sizes[i]]
            if stored is not None:
                self._read(inputs, inputs.models[i], stored, begin, data)
            elif inputs.tensor.name in inputs.models[i].rows:
                self._compute_rows(inputs, i, begin, data)
            else:
                self._compute(inputs, i, begin, data)
        is_double, has_base = inputs.tensor.double, inputs.base is not None
        return Chunk(raw, np.array(places[:-1]), inputs.codes, count, begin, has_base, is_double, self.room)

    def _read(self, inputs: Inputs, model: Source, stored: Stored, begin: int, into: Array) -> None:
        """A model's numbers as they are stored, every one of them finite."""
        self.files.read(stored.file, stored.begin + begin * stored.width, into)
        if not kernels.is_finite(into, stored.code):
            values = np.empty(len(into) // stored.width)
            kernels.decode(into, stored.code, values)
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise MergeError(
                f"{inputs.tensor.name} of '{model.name}' holds {values[place]} at element {begin + place} "
                f"({stored.file}).",
                remedy="Nothing was written. Leave that model out, or go back to an earlier checkpoint of it.",
            )

    def _compute(self, inputs: Inputs, i: int, begin: int, into: Array) -> None:
        """A model's numbers and what its adapters add to them."""
        stored = stored_in(inputs.models[i], inputs.tensor.name)
        values = into.view(np.float64 if inputs.tensor.double else np.float32)
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
        values = into.view(np.float64 if tensor.double else np.float32).reshape(-1, columns)
        for k in range(len(values)):
            wanted = int(rows[begin // columns + k])
            source, row = (model, wanted) if wanted >= 0 else (other, begin // columns + k)
            stored = stored_in(source, tensor.name)
            raw = self.room.take("stored", (columns * stored.width,), np.uint8)
            self._read(inputs, source, stored, row * columns, raw)
            kernels.decode(raw, stored.code, values[k])
