"""Strict values from JSONL and Parquet: each way a file can be wrong gives one error with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evertune.data.lines import LINE_BYTES, values_of
from evertune.errors import DataError

GOOD = b'{"text": "fine"}\n'

BROKEN = {
    "bad UTF-8": (GOOD + b'{"text": "caf\xe9"}\n', ":2: found byte 0xe9 at byte 14 of the line, expected UTF-8"),
    "a truncated character": (GOOD + b'{"text": "\xc3"}\n', ":2: found byte 0xc3 at byte 11"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), ":1: found byte 0xff at byte 1"),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, ":1: found a byte order mark"),
    "a cut last line": (GOOD + b'{"text": "fi', ":2: found malformed JSON at column 10"),
    "a cut last line is called so": (GOOD + b'{"text": "fi', "the last line has no line end. The file seems cut off"),
    "a comma too much": (b'{"text": "a",}\n', ":1: found malformed JSON at column 14"),
    "two objects in a line": (b'{"text": "a"} {"text": "b"}\n', ":1: found malformed JSON at column 15 (Extra data)"),
    "an object over two lines": (b'{"text":\n"a"}\n', ":1: found malformed JSON"),
    "a list": (b'["a"]\n', ":1: found a list, expected an object"),
    "a bare number": (b"3.5\n", ":1: found a number, expected an object"),
    "null": (b"null\n", ":1: found null, expected an object"),
    "a key twice": (GOOD + b'{"text": "a", "text": "b"}\n', ":2: found the key 'text' twice in one object"),
    "a key twice, deep down": (b'{"a": [{"k": 1, "k": 1}]}\n', ":1: found the key 'k' twice"),
    "NaN": (b'{"a": NaN}\n', ":1: found NaN, expected a JSON value"),
    "Infinity": (b'{"a": [Infinity]}\n', ":1: found Infinity"),
    "-Infinity": (b'{"a": -Infinity}\n', ":1: found -Infinity"),
    "a number too large for a float": (b'{"a": 1e999}\n', ":1: found 1e999, expected a JSON value"),
    "an integer of 5000 digits": (b'{"a": ' + b"1" * 5000 + b"}\n", ":1: found Exceeds the limit"),
    "half a surrogate pair": (GOOD + b'{"text": "\\ud83d"}\n', ":2: found half of a surrogate pair"),
    "half a surrogate pair in a key": (b'{"\\uDE00": 1}\n', ":1: found half of a surrogate pair"),
    "deep nesting": (
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        ":1: found lists or objects nested too deep",
    ),
    "a line over 8 MiB": (GOOD + b'{"text": "' + b"a" * LINE_BYTES + b'"}\n', ":2: found a line longer than 8 MiB"),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_line_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", data)
    with pytest.raises(DataError) as caught:
        list(values_of(path))
    assert str(caught.value).startswith(f"{path}:")
    assert message in str(caught.value)


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    values = values_of(write(tmp_path / "rows.jsonl", GOOD + b"broken\n"))
    assert next(values) == (1, {"text": "fine"})


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + b"\r\n  \n" + GOOD + b"\n")
    assert [line for line, _ in values_of(path)] == [1, 4]


def test_a_last_line_without_end_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"text": "a"}\r\n{"text": "b"}')
    assert [value["text"] for _, value in values_of(path)] == ["a", "b"]


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"text": "\\ud83d\\ude00 \\u00e9"}\n')
    assert [value["text"] for _, value in values_of(path)] == ["\U0001f600 é"]


def test_gzip_is_read_like_plain(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(GOOD * 3))
    assert [value for _, value in values_of(path)] == [{"text": "fine"}] * 3


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"plain text", lambda data: data[:20]])
def test_broken_gzip_is_named(tmp_path: Path, damage: Any) -> None:
    packed = gzip.compress(b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(2000)))
    path = write(tmp_path / "rows.jsonl.gz", damage(packed))
    with pytest.raises(DataError, match="broken gzip data"):
        list(values_of(path))


def test_flipped_bits_in_gzip_are_named(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"".join(json.dumps({"text": str(i * i)}).encode() + b"\n" for i in range(5000))))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(DataError):
        list(values_of(write(tmp_path / "rows.jsonl.gz", bytes(packed))))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        list(values_of(tmp_path / "gone.jsonl"))


def test_parquet_gives_the_values_of_the_same_jsonl(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}], "n": 1},
        {"id": "b", "messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "n": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert list(values_of(tmp_path / "rows.parquet")) == list(values_of(tmp_path / "rows.jsonl"))


def test_parquet_nulls_are_absent_fields_and_times_are_left_out(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "note": ["x", None],
            "when": pa.array([0, 1], pa.timestamp("s")),
            "turns": [[{"role": "user", "name": None}], None],
            "label": pa.array(["p", "q"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [value for _, value in values_of(tmp_path / "rows.parquet")] == [
        {"text": "a", "note": "x", "turns": [{"role": "user"}], "label": "p"},
        {"text": "b", "label": "q"},
    ]


def parquet_of_bad_utf8() -> pa.Table:
    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")]
    )
    return pa.table({"text": texts})


BROKEN_PARQUET = {
    "a text that is not UTF-8": (parquet_of_bad_utf8(), ":2: found a text that is not UTF-8"),
    "NaN": (pa.table({"text": ["a", "b"], "score": [1.0, float("nan")]}), ":2: found nan, expected finite"),
    "bytes where a text belongs": (pa.table({"text": [b"a"]}), ": column 'text' has type binary, expected"),
    "a column twice": (pa.table([["a"], ["b"]], names=["text", "text"]), ": found two columns 'text'"),
}


@pytest.mark.parametrize("table, message", BROKEN_PARQUET.values(), ids=BROKEN_PARQUET.keys())
def test_a_broken_parquet_value_is_named(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError) as caught:
        list(values_of(path))
    assert str(caught.value).startswith(str(path) + message)


@pytest.mark.parametrize("kept", [0, 4, 200])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(values_of(path))


def test_row_numbers_run_on_over_parquet_batches(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(3000)]}), path, row_group_size=700)
    assert list(values_of(path)) == [(i + 1, {"text": str(i)}) for i in range(3000)]
