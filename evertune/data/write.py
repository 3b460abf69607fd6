"""Rows written as ordinary files that any trainer reads: JSONL (.gz, .zst) or Parquet, whole or not at all."""

import gzip
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from evertune.errors import DataError, WorkspaceError
from evertune.workspace.disk import disk_error, sync_file, sync_folder

OUT_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
GROUP_ROWS = 10_000


class RowWriter(Protocol):
    """Takes rows one by one."""

    count: int

    def add(self, value: Mapping[str, Any]) -> None:
        """Write one row."""

    def copy(self, line: bytes) -> None:
        """Write one row that is a line of JSON, as it is."""


@contextmanager
def row_writer(path: Path) -> Iterator[RowWriter]:
    """A writer whose file appears under its name when the block ends well, and not at all when it does not.

    Raises:
        DataError: the name has another ending than those of `OUT_SUFFIXES`, or the rows fit no one Parquet schema.
        WorkspaceError: the disk is full or cannot be written.
    """
    if not path.name.endswith(OUT_SUFFIXES):
        raise DataError(
            f"{path}: found a name that ends with '{path.suffix}', expected {', '.join(OUT_SUFFIXES)}.",
            remedy="Choose one of them: it says how rows are written.",
        )
    temporary = path.parent / f".{uuid.uuid4().hex}{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            kind = _ParquetRows if path.name.endswith(".parquet") else _JsonRows
            yield kind(temporary, stack, path)
        sync_file(temporary)
        os.replace(temporary, path)  # noqa: PTH105
        sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, WorkspaceError):
            raise
        raise disk_error(error, f"cannot write {path}") from error
    finally:
        temporary.unlink(missing_ok=True)


class _JsonRows:
    def __init__(self, path: Path, stack: ExitStack, _shown: Path) -> None:
        self.count = 0
        self._file = stack.enter_context(_open(path, stack))

    def add(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.count += 1

    def copy(self, line: bytes) -> None:
        self._file.write(line if line.endswith(b"\n") else line + b"\n")
        self.count += 1


class _ParquetRows:
    """Rows in groups. The first group's schema holds for all: Parquet knows one type a column."""

    def __init__(self, path: Path, stack: ExitStack, shown: Path) -> None:
        self.count = 0
        self._path, self._shown = path, shown
        self._held: list[Mapping[str, Any]] = []
        self._writer: Any = None
        stack.callback(self._close)

    def add(self, value: Mapping[str, Any]) -> None:
        self._held.append(value)
        self.count += 1
        if len(self._held) == GROUP_ROWS:
            self._write()

    def copy(self, line: bytes) -> None:
        self.add(json.loads(line))

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = self._writer.schema if self._writer is not None else None
        try:
            table = pyarrow.Table.from_pylist(self._held, schema=schema)
            unknown = sorted({name for one in self._held for name in one} - set(table.schema.names))
            if unknown:
                raise DataError(
                    f"{self._shown}: found the field '{unknown[0]}' after row {self.count - len(self._held)} for the "
                    "first time, expected the same fields in all rows.",
                    remedy="Write .jsonl, which takes any fields.",
                )
            if self._writer is None:
                self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
            self._writer.write_table(table)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
            raise DataError(
                f"{self._shown}: found rows that fit no one schema: {str(error).splitlines()[0]}",
                remedy="Write .jsonl, which takes any fields.",
            ) from error
        self._held = []

    def _close(self) -> None:
        if self._held or self._writer is None:
            self._write()
        self._writer.close()


def _open(path: Path, stack: ExitStack) -> Any:
    if path.name.endswith(".gz"):
        # Without a name and a time in it the same rows give the same bytes.
        return gzip.GzipFile("", "wb", fileobj=stack.enter_context(path.open("wb")), mtime=0)
    if path.name.endswith(".zst"):
        import pyarrow

        return pyarrow.CompressedOutputStream(str(path), "zstd")
    return path.open("wb")
