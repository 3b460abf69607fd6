"""Rows of training data and probes: files found, values read, shapes checked. What is wrong is named by file and line.

`lines.py` turns a file into values, `shapes.py` says what a row of each format must hold.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evertune.agents import with_calls
from evertune.data.lines import values_of
from evertune.data.shapes import fitting_formats, problem_of
from evertune.errors import DataError
from evertune.hashing import digest_file, digest_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
DATASETS = "datasets:"


# What is told of a bad row: its file, its number, its bytes where there are any, and what is wrong.
BadRow = Callable[[Path, int, bytes | None, DataError], None]


@dataclass(frozen=True)
class Row:
    """One checked row.

    Attributes:
        source: name of the data source or probe.
        id: unique within the source: the row's own `id` if it is a text, else `<file's stem>:<line>`.
        line: 1-based; the row's number in Parquet.
        file: where it stands.
        value: all its fields, unknown ones too.
        format: what the value was checked as.
    """

    source: str
    id: str
    line: int
    file: Path
    value: dict[str, Any]
    format: str = "messages"

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


@dataclass
class BadRows:
    """Rows that could not be read: counted, and kept for the quarantine file."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, file: Path, line: int, data: bytes | None, error: DataError) -> None:
        shown = None if data is None else data[:1000].decode("utf-8", errors="backslashreplace")
        problem = error.message.removeprefix(f"{file}:{line}: ")
        self.found.append({"file": str(file), "line": line, "problem": problem, "bytes": shown})


def files_of(pattern: Path) -> list[Path]:
    """The files a path or a glob names, sorted by path; `**` stands for any folders.

    `datasets:NAME`, or `datasets:NAME:SPLIT` (the split is `train` when not given), stands for the Arrow files that the
    `datasets` library keeps of a data set; it is asked to fetch them where it has none.

    Raises:
        DataError: nothing matches, or something that matches is not a file of JSONL, Parquet or Arrow.
    """
    name = _dataset_name(pattern)
    if name:
        return _dataset_files(*name)
    try:
        is_glob = any(sign in str(pattern) for sign in "*?[") and not pattern.exists()
        matches = sorted(glob.glob(str(pattern), recursive=True)) if is_glob else [str(pattern)]  # noqa: PTH207
        files = [Path(one) for one in matches]
        for path in files:
            _check_file(path)
    except OSError as error:
        raise DataError(f"{pattern}: cannot be read: {error.strerror}.", remedy="Check the path.") from error
    if not files:
        raise DataError(
            f"{pattern}: found no file that matches, expected one or more.",
            remedy="Check the pattern; paths are relative to the recipe.",
        )
    return files


def digest_rows(pattern: Path) -> str:
    """Digest of the bytes of all files, in order; their names do not count.

    Raises:
        DataError: as `files_of`, or a file cannot be read.
    """
    try:
        return digest_json([digest_file(path) for path in files_of(pattern)])
    except OSError as error:
        raise DataError(f"{error.filename or pattern}: cannot be read: {error.strerror}.") from error


def iter_rows(
    pattern: Path, *, format: str, source: str, limit: int | None = None, bad: BadRow | None = None
) -> Iterator[Row]:
    """The checked rows of a source in file order, read as they are asked for. Ids may repeat here.

    Args:
        pattern: a file, a glob, or a name of `datasets`.
        format: see `shapes.py`.
        source: the name rows carry.
        limit: stop after this many good rows; what follows is not checked.
        bad: is told of each bad row, and reading goes on behind it; without it the first is raised.

    Raises:
        DataError: with file, line, what was found and what was expected.
    """
    files = files_of(pattern)
    count = 0
    for path, label in zip(files, _labels(files), strict=True):
        told = None if bad is None else partial(bad, path)
        for line, value in values_of(path, bad=told):
            if count == limit:
                return
            row = Row(source, _id_of(value, label, line), line, path, value, format)
            try:
                _check_shape(row)
            except DataError as error:
                if bad is None:
                    raise
                bad(path, line, json.dumps(value, ensure_ascii=False).encode(), error)
                continue
            count += 1
            yield row


def read_rows(
    pattern: Path, *, format: str, source: str, limit: int | None = None, bad: BadRow | None = None
) -> list[Row]:
    """The same rows in memory, one or more, each with an id of its own.

    Raises:
        DataError: as `iter_rows`; there is no row, or two have one id.
    """
    rows: list[Row] = []
    places: dict[str, str] = {}
    for row in iter_rows(pattern, format=format, source=source, limit=limit, bad=bad):
        if row.id in places:
            raise DataError(
                f"{row.place}: found the id {row.id!r}, also at {places[row.id]}, expected another.",
                remedy="Give each row an id of its own, or leave ids out.",
            )
        places[row.id] = row.place
        rows.append(row)
    if not rows:
        raise DataError(f"{pattern}: found no rows, expected one or more.", remedy="Fill the file, or leave it out.")
    return rows


def detect_format(pattern: Path) -> str:
    """The format that the first row of a source speaks for that can be read; the more demanding one where two fit.

    Raises:
        DataError: there is no row, none can be read, or the first one's fields fit no format.
    """
    unread: list[DataError] = []
    for path in files_of(pattern):
        for line, value in values_of(path, bad=lambda number, data, error: unread.append(error)):
            fitting = fitting_formats(value)
            for format in ("preference", "choice", "messages", "episode", "verifiable", "text"):
                if format in fitting:
                    return format
            raise DataError(
                f"{path}:{line}: found the fields {', '.join(value) or 'none'}, expected those of a format.",
                remedy="Name the format with --format to see what is missing.",
            )
    if unread:
        raise unread[0]
    raise DataError(f"{pattern}: found no rows, expected one or more.", remedy="Fill the file, or leave it out.")


def messages_of(value: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a row that has `messages`, or a `prompt` as one user turn: roles and contents, calls written out."""
    turns = value["messages"] if "messages" in value else value["prompt"]
    if isinstance(turns, str):
        return [{"role": "user", "content": turns}]
    return [{"role": one["role"], "content": with_calls(one)} for one in turns]


def preference_turns(value: dict[str, Any], name: Literal["chosen", "rejected"]) -> tuple[list[dict[str, str]], int]:
    """The conversation that ends with one of a pair's two answers, and how many of the assistant's turns answer."""
    answer = value[name]
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else messages_of({"prompt": answer})
    conversation = [*messages_of({"prompt": value["prompt"]}), *turns]
    return conversation, sum(one["role"] == "assistant" for one in turns)


def _dataset_name(pattern: Path) -> tuple[str, str] | None:
    """Name and split of `datasets:NAME:SPLIT`; a recipe's folder may stand before it."""
    parts = pattern.parts
    at = next((i for i, one in enumerate(parts) if one.startswith(DATASETS)), None)
    if at is None:
        return None
    name, _, split = "/".join(parts[at:]).removeprefix(DATASETS).partition(":")
    return name, split or "train"


def _dataset_files(name: str, split: str) -> list[Path]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"datasets:{name}: the 'datasets' library is not installed.", remedy="pip install datasets"
        ) from error
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises what its loaders, the network and the hub raise
        raise DataError(
            f"datasets:{name}: cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            remedy="Check name and split; without a network the data set must be in its cache.",
        ) from error
    return sorted(Path(one["filename"]) for one in loaded.cache_files)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: found a folder, expected a file or a glob.", remedy=f"Try '{path}/*.jsonl'.")
    if not path.exists():
        raise DataError(
            f"{path}: found nothing there, expected a file.", remedy="Check the path; it is relative to the recipe."
        )
    if not path.is_file():
        raise DataError(f"{path}: found a device or a pipe, expected a file.", remedy="Write the rows to a file.")
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: found a name that ends with '{path.suffix}', expected {', '.join(SUFFIXES)}.",
            remedy="Convert the file, or rename it if it holds one JSON object a line.",
        )


def _check_shape(row: Row) -> None:
    problem = problem_of(row.value, row.format)
    if problem:
        others = fitting_formats(row.value)
        hint = f"The row fits format '{others[0]}'." if others else "Correct the row, or the source's 'format'."
        raise DataError(f"{row.place}: {problem} (format '{row.format}').", remedy=hint)


def _id_of(value: dict[str, Any], label: str, line: int) -> str:
    name = value.get("id")
    return name if isinstance(name, str) and name else f"{label}:{line}"


def _labels(files: Sequence[Path]) -> list[str]:
    """What rows without an id are named after: the file's stem, or its path where stems are not unique."""
    stems = [_stem(path) for path in files]
    if len(set(stems)) == len(stems):
        return stems
    folder = os.path.commonpath([path.parent for path in files])
    return [path.relative_to(folder).as_posix() for path in files]


def _stem(path: Path) -> str:
    return next(path.name.removesuffix(one) for one in SUFFIXES if path.name.endswith(one))
