"""Safetensors headers, read without torch: what tensors a file holds, and whether the file is whole."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from evertune.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """dtype as safetensors names it, shape, size in bytes, and where in the file the bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    begin: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> what the file says of it.

    Raises:
        CheckpointError: the file is cut, has bytes too many, or its header contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _broken(path, f"the header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, f"the header is {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    found: dict[str, TensorInfo] = {}
    ranges = []
    for name, entry in header.items():
        found[name], offsets = _entry(path, name, entry, 8 + length)
        ranges.append(offsets)
    end = 0
    for begin, stop in sorted(ranges):
        if begin != end:
            raise _broken(path, f"tensor bytes are expected at {end} but begin at {begin}")
        end = stop
    if 8 + length + end != size:
        raise _broken(path, f"the file has {size} bytes, its header describes {8 + length + end}")
    return found


def _entry(path: Path, name: str, entry: Any, data_begin: int) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(one) is int and one >= 0 for one in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"tensor {name!r} has a malformed entry") from error
    if dtype not in DTYPE_BITS:
        raise _broken(path, f"tensor {name!r} has dtype {dtype!r}")
    if not whole or end - begin != math.prod(shape) * DTYPE_BITS[dtype] // 8:
        raise _broken(path, f"tensor {name!r} of shape {shape} cannot lie in bytes {begin} to {end}")
    return TensorInfo(dtype, shape, end - begin, data_begin + begin), (begin, end)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: broken safetensors file: {what}.", remedy="Fetch or copy the file again.")
