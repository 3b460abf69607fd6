"""Safetensors headers: equal to the library's, and no cut or inconsistent file passes."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from evertune.errors import CheckpointError
from evertune.model.header import read_header


def test_names_shapes_and_sizes_equal_the_library_s(tiny_model: Path) -> None:
    found = read_header(tiny_model / "model.safetensors")
    expected = load_file(tiny_model / "model.safetensors")
    assert {name: info.shape for name, info in found.items()} == {k: tuple(v.shape) for k, v in expected.items()}
    assert {name: info.bytes for name, info in found.items()} == {k: v.nbytes for k, v in expected.items()}
    assert {info.dtype for info in found.values()} == {"F32"}


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 2000, -1])
def test_a_cut_file_is_refused(tiny_model: Path, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes((tiny_model / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: broken"):
        read_header(file)


def write(path: Path, header: Any, payload: bytes) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + payload)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        ({"a": GOOD}, b"\0" * 9),
        ({"a": GOOD}, b"\0" * 7),
        ({"a": {**GOOD, "shape": [3]}}, b"\0" * 8),
        ({"a": {**GOOD, "dtype": "F3"}}, b"\0" * 8),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12),
        ({"a": GOOD, "b": GOOD}, b"\0" * 8),
        ({"a": {**GOOD, "shape": [-2]}}, b"\0" * 8),
        ({"a": {"dtype": "F32"}}, b"\0" * 8),
        ({"a": 3}, b"\0" * 8),
        ([], b""),
        (b"{nonsense", b""),
        (b"\xff\xfe", b""),
    ],
)
def test_a_header_that_contradicts_itself_is_refused_as_the_library_refuses_it(
    tmp_path: Path, header: Any, payload: bytes
) -> None:
    file = write(tmp_path / "odd.safetensors", header, payload)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: broken"):
        read_header(file)
    with pytest.raises(SafetensorError), safe_open(file, framework="np"):
        pass


def test_a_good_header_passes(tmp_path: Path) -> None:
    file = write(tmp_path / "good.safetensors", {"a": GOOD, "__metadata__": {"format": "pt"}}, b"\0" * 8)
    assert read_header(file)["a"].shape == (2,)
