"""Values from JSONL, Parquet and Arrow, read strictly: what JSON does not allow, or would lose in silence, is an error.

    bytes that are not UTF-8, a byte order mark      a key that stands twice (the last would win)
    a line that is cut off or longer than 8 MiB      NaN, Infinity, 1e999 (no JSON values)
    half a surrogate pair (no character)             a line that is not an object

Empty lines are skipped and counted. Parquet and Arrow have no absent fields, so their nulls are read as absent; columns
whose type JSON does not have (times, bytes, decimals) are left out.
"""

import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, cast

from evertune.errors import DataError

if TYPE_CHECKING:
    import pyarrow

LINE_BYTES = 8 << 20
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20
# Fields that some row format reads: a column of this name must have a type that JSON has.
_READ = ("id", "messages", "prompt", "chosen", "rejected", "choices", "answer", "text", "cluster")
_SURROGATE = re.compile("[\ud800-\udfff]")


# What is told of a row that cannot be read: its number, its bytes where there are any, and what is wrong.
Bad = Callable[[int, bytes | None, DataError], None]


def values_of(path: Path, *, bad: Bad | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line (1-based; the row's number in Parquet and Arrow) and value of every row of a file, read as it is asked for.

    Args:
        bad: is told of each row that cannot be read, and reading goes on behind it; without it the first is raised. A
            file that cannot be read further is an error in any case.

    Raises:
        DataError: with file, line, what was found and what was expected.
    """
    if path.name.endswith(".parquet"):
        return _table_values(path, _parquet_batches, bad)
    if path.name.endswith(".arrow"):
        return _table_values(path, _arrow_batches, bad)
    return _json_values(path, bad)


def is_json(path: Path) -> bool:
    """Its rows are lines of JSON, whatever they are packed in."""
    return not path.name.endswith((".parquet", ".arrow"))


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the lines of a JSONL file that was read before; those that are too long are left out."""
    number = 0
    with _open(path) as file:
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) <= LINE_BYTES:
                yield number, line
            while len(line) > LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES + 1)


def read_line(line: bytes) -> dict[str, Any]:
    """The value of a line that was read before."""
    return _parse(line, "")


def _json_values(path: Path, bad: Bad | None) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                try:
                    _check_length(line, f"{path}:{number}")
                    value = _parse(line, f"{path}:{number}") if line.strip() else None
                except DataError as error:
                    if bad is None:
                        raise
                    bad(number, line, error)
                    while len(line) > LINE_BYTES and not line.endswith(b"\n"):
                        line = file.readline(LINE_BYTES + 1)
                    continue
                if value is not None:
                    yield number, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: found broken gzip data ({error}), expected a complete .gz file.",
            remedy="Compress the file again.",
        ) from error
    except OSError as error:
        if path.name.endswith(".zst") and error.errno is None:
            raise DataError(
                f"{path}:{number + 1}: found broken zstd data ({error}), expected a complete .zst file.",
                remedy="Compress the file again.",
            ) from error
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.", remedy="Check the file.") from error


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        import pyarrow

        with path.open("rb"):
            pass  # the system's own words where it cannot be opened
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb", buffering=BUFFER_BYTES)


def _check_length(line: bytes, place: str) -> None:
    if len(line) > LINE_BYTES:
        raise DataError(
            f"{place}: found a line longer than {LINE_BYTES >> 20} MiB, expected one row a line.",
            remedy="Split the row, or put a line end after each row.",
        )


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 1].hex()
        raise DataError(
            f"{place}: found byte 0x{found} at byte {error.start + 1} of the line, expected UTF-8 ({error.reason}).",
            remedy="Save the file as UTF-8.",
        ) from error
    if text.startswith("\ufeff"):
        raise DataError(
            f"{place}: found a byte order mark, expected '{{'.", remedy="Save the file as UTF-8 without it."
        )
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        _raise_malformed(error, place, is_cut=not line.endswith(b"\n"))
    except RecursionError as error:
        raise DataError(f"{place}: found lists or objects nested too deeply, expected a row.") from error
    except ValueError as error:
        raise DataError(f"{place}: found {error}.", remedy="Correct the line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: found {kind_of(value)}, expected an object.", remedy="Write one object a line.")
    if "\\ud" in text.lower() and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise DataError(
            f"{place}: found half of a surrogate pair (\\ud800 to \\udfff), which is no character.",
            remedy="Remove it, or write the pair in full.",
        )
    return value


def _raise_malformed(error: json.JSONDecodeError, place: str, *, is_cut: bool) -> NoReturn:
    found = f"{place}: found malformed JSON at column {error.colno} ({error.msg}), expected one complete object"
    if is_cut:
        raise DataError(f"{found}; the last line has no line end.", remedy="The file seems cut off: copy it again.")
    raise DataError(f"{found}.", remedy="Write one object a line, as json.dumps does.")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} twice in one object, expected it once")
    return value


def _refuse_number(literal: str) -> Any:
    raise ValueError(f"{literal}, expected a JSON value; numbers are finite")


def _finite(literal: str) -> float:
    number = float(literal)
    return number if math.isfinite(number) else _refuse_number(literal)


# Made once: json.loads would make one for each line.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_refuse_number, parse_float=_finite)


def _table_values(
    path: Path, batches: Callable[[Path], Iterator["pyarrow.RecordBatch"]], bad: Bad | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    number = 0
    try:
        for batch in batches(path):
            for value in _batch_values(batch, path, number, bad):
                number += 1
                if value is None:
                    continue
                try:
                    present = _present(value, f"{path}:{number}")
                except DataError as error:
                    if bad is None:
                        raise
                    bad(number, None, error)
                    continue
                yield number, present
    except (pyarrow.ArrowException, OSError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "Parquet" if path.name.endswith(".parquet") else "Arrow"
        raise DataError(f"{path}: not a readable {kind} file: {found}.", remedy="Write the file again.") from error


def _parquet_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    yield from file.iter_batches(batch_size=BATCH_ROWS, columns=_columns(file.schema_arrow, path))


def _arrow_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    """Of an Arrow file, or of the stream that `datasets` caches under the same suffix."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            file = pyarrow.ipc.open_file(source)
            schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            schema, batches = stream.schema, iter(stream)
        columns = _columns(schema, path)
        for batch in batches:
            batch = batch.select(columns)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _columns(schema: "pyarrow.Schema", path: Path) -> list[str]:
    """Columns whose type JSON has.

    Raises:
        DataError: two columns have one name, or a field that formats read has a type JSON lacks.
    """
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise DataError(f"{path}: found two columns '{repeated[0]}', expected one.", remedy="Rename one.")
    kept = [field.name for field in schema if _has_json_form(field.type)]
    lost = [field for field in schema if field.name not in kept and field.name in _READ]
    if lost:
        raise DataError(
            f"{path}: column '{lost[0].name}' has type {lost[0].type}, expected texts, numbers, lists or structs.",
            remedy="Cast the column and write the file again.",
        )
    return kept


def _has_json_form(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return all(_has_json_form(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _has_json_form(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(fits(kind) for fits in plain)


def _batch_values(
    batch: "pyarrow.RecordBatch", path: Path, before: int, bad: Bad | None
) -> Iterator[dict[str, Any] | None]:
    """Rows of a batch, None for a bad one; `before` rows came earlier. Arrow does not check UTF-8 when it reads, Python
    does here."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = None
    if values is not None:
        yield from values
        return
    for i in range(batch.num_rows):
        try:
            value = batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            problem = DataError(
                f"{path}:{before + i + 1}: found a text that is not UTF-8 ({error.reason}), expected UTF-8.",
                remedy="Write the file again from texts that are UTF-8.",
            )
            if bad is None:
                raise problem from error
            bad(before + i + 1, None, problem)
            value = None
        yield value


def _present(value: Any, place: str) -> Any:
    """The value without null fields."""
    if isinstance(value, dict):
        return {name: _present(one, place) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_present(one, place) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{place}: found {value}, expected finite numbers.", remedy="Write null for what is missing.")
    return value


def kind_of(value: Any) -> str:
    """The value's JSON type, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
