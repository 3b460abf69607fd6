"""What a merge reads: tensors of model folders and adapters by their real names, found from headers alone.

No architecture is known here. A model is the union of the tensors in its files; an adapter is its base's tensors with
low-rank updates on some of them, which are materialised row by row, never as a model.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evertune.errors import CheckpointError, MergeError
from evertune.merge import kernels
from evertune.merge.kernels import Array
from evertune.model.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    read_json,
    weight_files,
)
from evertune.model.header import DTYPE_BITS, TensorInfo, read_header
from evertune.model.lora_config import PREFIX, check_plain, pair_names, scale_of

FLOATS = {"BF16": kernels.BF16, "F16": kernels.F16, "F32": kernels.F32, "F64": kernels.F64}
# Of each end of a tensor, for a fingerprint.
END_BYTES = 4096
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")


@dataclass(frozen=True)
class Located:
    """Bytes of one tensor in one file."""

    file: Path
    info: TensorInfo


@dataclass(frozen=True)
class LowRank:
    """One update of a tensor by an adapter: scale * B @ A, read when the tensor's turn comes.

    module: name of the changed module, as the adapter calls it.
    transposed: the tensor is stored as (inputs, outputs).
    """

    module: str
    a: Located
    b: Located
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Source:
    """One input of a merge.

    Attributes:
        name: as the configuration calls it.
        checkpoint: the folder and its digest.
        config: config.json of the model, or of the adapter's base.
        tensors: name -> bytes; a tied head that is not stored is the embedding's bytes.
        updates: name -> updates of an adapter stack, from the bottom up.
        rows: name -> for each row of the output, the row of this input that holds its token; -1 for none.
    """

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, Located]
    updates: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    rows: Mapping[str, Array] = field(default_factory=dict)

    @property
    def is_tied(self) -> bool:
        """The head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", _head_name(self.tensors) is None))


def read_source(name: str, checkpoint: Checkpoint) -> Source:
    """Find the tensors of a checkpoint from its files' headers.

    Raises:
        CheckpointError: a broken file, a variant of LoRA that is not known, or an update that fits no tensor.
    """
    base = checkpoint.base
    tensors: dict[str, Located] = {}
    for file in weight_files(base.path):
        for key, info in read_header(file).items():
            if key in tensors:
                raise CheckpointError(f"{file}: tensor {key} is also in {tensors[key].file.name}.")
            tensors[key] = Located(file, info)
    updates: dict[str, list[LowRank]] = {}
    for adapter in checkpoint.stack[1:]:
        for key, update in _updates(adapter.path, tensors):
            updates.setdefault(key, []).append(update)
    return Source(name, checkpoint, read_json(base.path / "config.json"), tensors, updates)


def fingerprint(source: Source) -> str:
    """A digest of names, shapes and the two ends of every tensor: the same however the model is divided into files.

    It orders experts and seeds what is drawn for them. It does not replace the checkpoint's digest.
    """
    hasher = hashlib.sha256()
    pieces = [(name, at) for name, at in sorted(source.tensors.items())]
    for name, updates in sorted(source.updates.items()):
        for one in updates:
            hasher.update(f"{name}|{one.scale!r}|{one.transposed}".encode())
            pieces += [(name, one.a), (name, one.b)]
    opened: dict[Path, BinaryIO] = {}
    with contextlib.ExitStack() as stack:
        for name, at in pieces:
            hasher.update(f"{name}|{at.info.dtype}|{at.info.shape}".encode())
            if at.file not in opened:
                opened[at.file] = stack.enter_context(at.file.open("rb"))
            for begin in (0, max(0, at.info.bytes - END_BYTES)):
                opened[at.file].seek(at.info.begin + begin)
                hasher.update(opened[at.file].read(min(END_BYTES, at.info.bytes)))
    return hasher.hexdigest()


def head_and_embedding(source: Source) -> tuple[str | None, str | None]:
    """Names of the head and of the input embedding among the stored tensors, where they are known by name."""
    embeddings = [name for name in source.tensors if _EMBEDDING.search(name)]
    return _head_name(source.tensors), embeddings[0] if len(embeddings) == 1 else None


def _head_name(tensors: Mapping[str, Located]) -> str | None:
    return next((name for name in tensors if _HEAD.search(name)), None)


def _updates(folder: Path, tensors: Mapping[str, Located]) -> Iterator[tuple[str, LowRank]]:
    config = read_json(folder / ADAPTER_CONFIG)
    check_plain(folder, config)
    file = folder / ADAPTER_WEIGHTS
    header = read_header(file)
    transposed = bool(config.get("fan_in_fan_out"))
    for key in pair_names(file, header):
        a, b = header[f"{key}.lora_A.weight"], header[f"{key}.lora_B.weight"]
        module = key.removeprefix(PREFIX)
        stored = stored_name(module, tensors, folder)
        shape = tensors[stored].info.shape
        right = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
        outputs_inputs = (b.shape[0], a.shape[1]) if right else (0, 0)
        if not right or shape != (outputs_inputs[::-1] if transposed else outputs_inputs):
            raise CheckpointError(
                f"{file}: the update of {module} has factors {b.shape} and {a.shape}, the base's {stored} is {shape}.",
                remedy="Check that base and adapter belong together.",
            )
        if a.dtype not in FLOATS or b.dtype not in FLOATS:
            raise CheckpointError(f"{file}: {key} has dtype {a.dtype}, expected one of {', '.join(FLOATS)}.")
        scale = scale_of(folder, config, module, a.shape[0])
        yield stored, LowRank(module, Located(file, a), Located(file, b), scale, transposed)


def stored_name(module: str, tensors: Mapping[str, Any], place: Path) -> str:
    """The stored name of a module's weight; some models are stored without the outermost part of the name."""
    wanted = f"{module}.weight"
    if wanted in tensors:
        return wanted
    found = [key for key in tensors if wanted.endswith(f".{key}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{place}: an adapter changes {module}, but no tensor {wanted} is stored.",
            remedy="Check that base and adapter belong together.",
        )
    return found[0]


class Files:
    """Input files, each opened once and read by position, from any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._facts: dict[Path, tuple[int, int]] = {}

    def add(self, file: Path) -> None:
        """Open a file. Call it before threads read."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            facts = os.fstat(self._open[file])
            self._facts[file] = (facts.st_size, facts.st_mtime_ns)

    def read(self, file: Path, offset: int, into: Array) -> None:
        """Fill a byte array from a place in a file.

        Raises:
            CheckpointError: the file ends before.
        """
        done = 0
        while done < len(into):
            got = os.preadv(self._open[file], [into.data[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{file}: ends at byte {offset + done}.", remedy="Fetch or copy the file again.")
            done += got

    def check_unchanged(self) -> None:
        """Raise CheckpointError for a file that was written to since it was opened."""
        for file, descriptor in self._open.items():
            facts = os.fstat(descriptor)
            if (facts.st_size, facts.st_mtime_ns) != self._facts[file]:
                raise CheckpointError(
                    f"{file}: was changed while it was read.", remedy="Merge again when nothing writes to it."
                )

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def read_matrix(files: Files, at: Located, what: str) -> Array:
    """A whole small tensor in float64.

    Raises:
        MergeError: it holds NaN or Inf.
    """
    files.add(at.file)
    raw = np.empty(at.info.bytes, np.uint8)
    files.read(at.file, at.info.begin, raw)
    values = np.empty(at.info.bytes * 8 // DTYPE_BITS[at.info.dtype])
    kernels.decode(raw, FLOATS[at.info.dtype], values)
    if not kernels.is_finite(raw, FLOATS[at.info.dtype]):
        raise MergeError(f"{at.file}: {what} holds NaN or Inf.", remedy="Train or copy it again.")
    return values.reshape(at.info.shape)


def left_and_right(files: Files, update: LowRank, name: str) -> tuple[Array, Array]:
    """Two float64 factors whose product, rows by columns of the stored tensor, is the update."""
    a = read_matrix(files, update.a, f"lora_A of {name}")
    b = read_matrix(files, update.b, f"lora_B of {name}") * update.scale
    return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if update.transposed else (b, a)
