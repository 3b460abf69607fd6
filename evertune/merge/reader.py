"""Chunks of a tensor from all models at once: bytes from files, updates of adapters added, every value checked."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.kernels import Array
from evertune.merge.methods import Chunk
from evertune.merge.plan import MergePlan, TensorPlan
from evertune.merge.sources import FLOATS, Files, Source, left_and_right
from evertune.model.header import DTYPE_BITS

Factors = tuple[Array, Array]
# Chunks read at once: reading in small pieces costs more than it saves in cache.
BLOCK_CHUNKS = 8


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


@dataclass(frozen=True)
class Inputs:
    """The models of one tensor, ready to be read by position.

    factors: for each model, the low-rank updates of this tensor.
    """

    tensor: TensorPlan
    experts: Sequence[Source]
    base: Source | None
    factors: Sequence[Sequence[Factors]]

    @property
    def models(self) -> list[Source]:
        return [*self.experts, *([self.base] if self.base else [])]


def open_inputs(plan: MergePlan, tensor: TensorPlan, files: Files) -> Inputs:
    """Open the files of a tensor's models and read the factors of its updates."""
    experts = [plan.sources[i] for i in tensor.experts]
    models = [*experts, *([plan.base] if plan.base else [])]
    for one in models:
        files.add(one.tensors[tensor.name].file)
    factors = [
        [left_and_right(files, update, tensor.name) for update in one.updates.get(tensor.name, ())] for one in models
    ]
    return Inputs(tensor, experts, plan.base, factors)


@dataclass
class Reader:
    """One worker's buffers. A chunk it yields is valid until the next one."""

    files: Files
    seconds: Seconds = field(default_factory=Seconds)
    _raw: list[Array] = field(default_factory=list)
    _values: dict[str, Array] = field(default_factory=dict)

    def chunks(self, inputs: Inputs, begin: int, end: int) -> Iterator[Chunk]:
        """Elements [begin, end) of a tensor in all models, a chunk at a time; files are read in larger blocks.

        Raises:
            MergeError: a value is NaN or Inf; names the model, the tensor and the place.
        """
        step = inputs.tensor.chunk
        for block in range(begin, end, BLOCK_CHUNKS * step):
            block_end = min(block + BLOCK_CHUNKS * step, end)
            started = time.thread_time()
            raw = [self._read(inputs, i, block, block_end) for i in range(len(inputs.models))]
            self.seconds.read += time.thread_time() - started
            for first in range(block, block_end, step):
                yield self._decode(inputs, raw, block, first, min(first + step, block_end))

    def whole(self, inputs: Inputs, begin: int, end: int) -> Chunk:
        """Elements [begin, end) as one chunk."""
        raw = [self._read(inputs, i, begin, end) for i in range(len(inputs.models))]
        return self._decode(inputs, raw, begin, begin, end)

    def rows(self, count: int, elements: int, *, double: bool, use: str = "in") -> Array:
        """A (count, elements) array of this worker's, float64 or float32."""
        key = f"{use}{double}"
        if key not in self._values or self._values[key].size < count * elements:
            self._values[key] = np.empty(count * elements, np.float64 if double else np.float32)
        return self._values[key][: count * elements].reshape(count, elements)

    def _read(self, inputs: Inputs, i: int, begin: int, end: int) -> Array | None:
        """Bytes of one model; None where rows must be gathered."""
        model, name = inputs.models[i], inputs.tensor.name
        if name in model.rows:
            return None
        at = model.tensors[name]
        width = DTYPE_BITS[at.info.dtype] // 8
        raw = self._bytes(i, (end - begin) * width)
        self.files.read(at.file, at.info.begin + begin * width, raw)
        return raw

    def _decode(self, inputs: Inputs, raw: Sequence[Array | None], block: int, begin: int, end: int) -> Chunk:
        name = inputs.tensor.name
        values = self.rows(len(inputs.models), end - begin, double=inputs.tensor.double)
        for i, (model, data) in enumerate(zip(inputs.models, raw, strict=True)):
            if data is None:
                self._load_rows(inputs, model, model.rows[name], begin, values[i])
                continue
            dtype = model.tensors[name].info.dtype
            width = DTYPE_BITS[dtype] // 8
            if kernels.decode(data[(begin - block) * width : (end - block) * width], FLOATS[dtype], values[i]):
                _refuse(model, name, begin, values[i])
            for left, right in inputs.factors[i]:
                kernels.add_low_rank(begin, left, right, values[i])
        count = len(inputs.experts)
        return Chunk(values[count] if inputs.base else None, values[:count], begin)

    def _load_rows(self, inputs: Inputs, model: Source, rows: Array, begin: int, into: Array) -> None:
        """Rows of another vocabulary, by token; of a token that this model has not, the row it changes nothing by."""
        tensor, columns = inputs.tensor, inputs.tensor.shape[-1]
        other = inputs.base or next(one for one in inputs.models if tensor.name not in one.rows)
        for k in range(len(into) // columns):
            wanted = int(rows[begin // columns + k])
            source, row = (model, wanted) if wanted >= 0 else (other, begin // columns + k)
            at = source.tensors[tensor.name]
            size = columns * DTYPE_BITS[at.info.dtype] // 8
            raw = self._bytes(0, size)
            self.files.read(at.file, at.info.begin + row * size, raw)
            if kernels.decode(raw, FLOATS[at.info.dtype], into[k * columns : (k + 1) * columns]):
                _refuse(source, tensor.name, row * columns, into[k * columns : (k + 1) * columns])

    def _bytes(self, i: int, size: int) -> Array:
        while len(self._raw) <= i:
            self._raw.append(np.empty(0, np.uint8))
        if len(self._raw[i]) < size:
            self._raw[i] = np.empty(size, np.uint8)
        return self._raw[i][:size]


def _refuse(model: Source, name: str, begin: int, values: Array) -> None:
    place = begin + int(np.flatnonzero(~np.isfinite(values))[0])
    raise MergeError(
        f"{name} of '{model.name}' holds {values[place - begin]} at element {place} ({model.tensors[name].file}).",
        remedy="Nothing was written. Leave that model out, or go back to an earlier checkpoint of it.",
    )
