"""The reference's outputs on disk, computed once for each row and read through a memory map.

A folder of `cache/reference/` belongs to one reference, tokenizer, dtype and kind; rows in it are found by the digest
of their token ids and counted positions. It grows by shards, each published by one rename:

    cache/reference/<key>/<shard>/index.json     {"rows": {row digest: [first, count]}, "arrays": {name: facts}}
    cache/reference/<key>/<shard>/hidden.raw     the array's rows one after another, little-endian
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.errors import IntegrityError
from evertune.hashing import canonical_json, digest_file, digest_json

VERSION = 1
HEAD = "head"
# numpy has no bfloat16: its bits travel as int16.
_STORED: dict[str, tuple[torch.dtype, torch.dtype, np.dtype[Any]]] = {
    "bfloat16": (torch.bfloat16, torch.int16, np.dtype("<i2")),
    "float32": (torch.float32, torch.float32, np.dtype("<f4")),
    "float16": (torch.float16, torch.float16, np.dtype("<f2")),
    "uint16": (torch.uint16, torch.uint16, np.dtype("<u2")),
    "int32": (torch.int32, torch.int32, np.dtype("<i4")),
}


class ReferenceCache:
    """Stored outputs of one reference.

    Args:
        root: the workspace's cache folder.
        tmp: its folder of unfinished files, on the same file system.
        identity: what the outputs depend on besides the row: digests of reference and tokenizer, dtype, kind.

    Raises:
        IntegrityError: a shard's bytes are not those that were written.
    """

    def __init__(self, root: Path, tmp: Path, *, identity: Mapping[str, str]) -> None:
        self.folder = root / "reference" / digest_json({**identity, "version": VERSION})
        self._tmp = tmp
        self._rows: dict[str, dict[str, Tensor]] = {}
        for index in sorted(self.folder.glob("*/index.json")):
            self._load(index.parent)

    def missing(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows not stored yet, each content once, in order."""
        wanted = {row.digest: row for row in rows}
        return [row for key, row in wanted.items() if key not in self._rows]

    def read(self, row: EncodedRow) -> dict[str, Tensor]:
        """A row's stored arrays, first dimension its counted positions."""
        return self._rows[row.digest]

    def add(self, rows: Sequence[EncodedRow], compute: Callable[[EncodedRow], dict[str, Tensor]]) -> None:
        """Compute and store rows as one new shard. Nothing is visible before all of it is on disk."""
        if not rows:
            return
        name = digest_json(sorted(row.digest for row in rows))
        self._publish(name, lambda folder: _write_shard(folder, rows, compute))
        self._load(self.folder / name)

    def head(self) -> dict[str, Tensor] | None:
        """The reference's frozen head (`weight`, perhaps `bias`), where it was stored."""
        file = self.folder / HEAD / "head.safetensors"
        return load_file(file) if file.is_file() else None

    def add_head(self, tensors: Mapping[str, Tensor]) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._publish(HEAD, lambda folder: save_file(plain, folder / "head.safetensors"))

    def _publish(self, name: str, write: Callable[[Path], None]) -> None:
        unfinished = self._tmp / uuid.uuid4().hex
        unfinished.mkdir(parents=True)
        try:
            write(unfinished)
            for path in (*unfinished.iterdir(), unfinished):
                _sync(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished.rename(self.folder / name)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _load(self, shard: Path) -> None:
        index = json.loads((shard / "index.json").read_bytes())
        arrays = {}
        for name, facts in index["arrays"].items():
            file = shard / f"{name}.raw"
            if not file.is_file() or digest_file(file) != facts["sha256"]:
                raise IntegrityError(
                    f"{file}: not the bytes that were stored.", remedy=f"Delete {shard}; its rows are computed again."
                )
            wide, narrow, stored = _STORED[facts["dtype"]]
            # Copy on write: torch wants writable memory, the file stays as it is.
            mapped = np.memmap(file, dtype=stored, mode="c", shape=tuple(facts["shape"]))
            arrays[name] = torch.from_numpy(mapped).view(wide) if wide != narrow else torch.from_numpy(mapped)
        for key, (first, count) in index["rows"].items():
            self._rows[key] = {name: array[first : first + count] for name, array in arrays.items()}


def _write_shard(folder: Path, rows: Sequence[EncodedRow], compute: Callable[[EncodedRow], dict[str, Tensor]]) -> None:
    """Write the rows' arrays one after another, by plain writes: a full disk is then an error, not a crash."""
    places: dict[str, list[int]] = {}
    facts: dict[str, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    first = 0
    try:
        for row in rows:
            outputs = compute(row)
            for name, tensor in outputs.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                if name not in files:
                    files[name] = (folder / f"{name}.raw").open("wb")
                    facts[name] = {"dtype": dtype, "width": list(tensor.shape[1:])}
                _, narrow, stored = _STORED[dtype]
                files[name].write(tensor.contiguous().view(narrow).numpy().astype(stored, copy=False).tobytes())
            count = len(next(iter(outputs.values())))
            places[row.digest] = [first, count]
            first += count
    finally:
        for file in files.values():
            file.close()
    arrays = {
        name: {"dtype": one["dtype"], "shape": [first, *one["width"]], "sha256": digest_file(folder / f"{name}.raw")}
        for name, one in facts.items()
    }
    (folder / "index.json").write_bytes(canonical_json({"rows": places, "arrays": arrays}))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
