"""Training and probe rows from JSONL and Parquet, read strictly: what is wrong is named by file and line.

Formats (what a row must hold; other fields are kept and ignored):

    messages     {"messages": [{"role", "content"}, ...]}, the last turn the assistant's
    preference   {"prompt", "chosen", "rejected"}: texts or lists of turns
    verifiable   {"prompt" | "messages", "answer"}
    choice       {"prompt" | "messages", "choices": [two or more texts], "answer": index or text}
    text         {"text"}
"""

import glob
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import DataError
from evertune.hashing import digest_file, digest_json

LINE_BYTES = 8 << 20
ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One checked row: its source, a unique id, the file and 1-based line (row number in Parquet), and its value."""

    source: str
    id: str
    line: int
    file: Path
    value: dict[str, Any]

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


def files_of(pattern: Path) -> list[Path]:
    """The files a path or glob names, sorted by name.

    Raises:
        DataError: nothing matches, or something that matches is not a readable JSONL or Parquet file.
    """
    is_glob = any(sign in pattern.name or sign in str(pattern.parent) for sign in "*?[")
    found = [pattern] if not is_glob else [Path(one) for one in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    if not found:
        raise DataError(f"{pattern}: no file matches.", remedy="Paths are relative to the recipe.")
    for path in found:
        if not path.exists():
            raise DataError(f"{path}: there is no such file.", remedy="Paths are relative to the recipe.")
        if path.is_dir():
            raise DataError(f"{path} is a folder; a file or a glob is expected.", remedy=f"Try {path}/*.jsonl.")
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: found {path.suffix or 'no'} suffix, expected one of {', '.join(SUFFIXES)}.")
    return found


def digest_rows(pattern: Path) -> str:
    """Digest of the bytes of all files, in order; their names do not count."""
    return digest_json([digest_file(path) for path in files_of(pattern)])


def read_rows(pattern: Path, *, format: str, source: str, limit: int | None = None) -> list[Row]:
    """Read and check the rows of a source, in file order.

    Args:
        pattern: a file or a glob.
        format: see the module's text.
        source: the name rows carry.
        limit: stop after this many rows; what follows is not checked.

    Raises:
        DataError: at the first thing that is wrong, with file, line, what was found and what was expected.
    """
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for path in files_of(pattern):
        for line, value in _values(path):
            if limit is not None and len(rows) == limit:
                return rows
            problem = _PROBLEMS[format](value)
            if problem:
                raise DataError(f"{path}:{line}: {problem}", remedy=f"Format '{format}' is described in docs/data.md.")
            name = value.get("id")
            row = Row(source, name if isinstance(name, str) else f"{path.stem}:{line}", line, path, value)
            if row.id in seen:
                raise DataError(f"{row.place}: the id {row.id!r} stands already at {seen[row.id]}; ids must differ.")
            seen[row.id] = row.place
            rows.append(row)
    if not rows:
        raise DataError(f"{pattern} holds no rows.", remedy="Remove the source or fill the file.")
    return rows


def messages_of(value: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a row that has `messages`, or a `prompt` as one user turn."""
    if "messages" in value:
        return [{"role": one["role"], "content": one["content"]} for one in value["messages"]]
    return [{"role": "user", "content": value["prompt"]}]


def _values(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.name.endswith(".parquet"):
        yield from _parquet_values(path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line is longer than {LINE_BYTES >> 20} MiB.")
                if line.strip():
                    yield number, _parse(line, f"{path}:{number}")
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} is not UTF-8 ({line[error.start : error.start + 1]!r}).",
            remedy="Save the file as UTF-8.",
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else " It has no line end: the file may be cut off."
        raise DataError(f"{place}: not valid JSON at column {error.colno}: {error.msg}.{cut}") from error
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply.") from error
    except ValueError as error:
        raise DataError(f"{place}: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: found {_kind(value)}, expected an object.")
    if "\\ud" in text.lower() and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{place}: holds half of a surrogate pair, which is no character.")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _parquet_values(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield number, {name: one for name, one in value.items() if one is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _text_problem(value: Any, name: str, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        return f"'{name}' is {_kind(value)}, expected a text."
    return "" if value.strip() or may_be_blank else f"'{name}' is empty."


def _turns_problem(turns: Any, name: str, *, ends_with: tuple[str, ...]) -> str:
    if not isinstance(turns, list) or not turns:
        return f"'{name}' is {_kind(turns) if turns != [] else 'an empty list'}, expected a list of turns."
    for i, turn in enumerate(turns):
        place = f"{name}[{i}]"
        if not isinstance(turn, dict):
            return f"'{place}' is {_kind(turn)}, expected an object with role and content."
        if turn.get("role") not in ROLES:
            return f"'{place}.role' is {turn.get('role')!r}, expected one of {', '.join(ROLES)}."
        problem = _text_problem(turn.get("content"), f"{place}.content", may_be_blank=turn["role"] == "system")
        if problem:
            return problem
    last = turns[-1]["role"]
    if last not in ends_with:
        return f"'{name}' ends with a turn of '{last}', expected {' or '.join(ends_with)}."
    return ""


def _messages_problem(value: dict[str, Any]) -> str:
    if "messages" not in value:
        return f"'messages' is missing; the row has: {', '.join(value) or 'nothing'}."
    return _turns_problem(value["messages"], "messages", ends_with=("assistant",))


def _prompt_problem(value: dict[str, Any]) -> str:
    if "messages" in value:
        return _turns_problem(value["messages"], "messages", ends_with=("user", "tool"))
    if "prompt" not in value:
        return f"neither 'prompt' nor 'messages' is there; the row has: {', '.join(value) or 'nothing'}."
    return _text_problem(value["prompt"], "prompt")


def _verifiable_problem(value: dict[str, Any]) -> str:
    problem = _prompt_problem(value)
    if problem:
        return problem
    return "" if value.get("answer") is not None else "'answer' is missing."


def _choice_problem(value: dict[str, Any]) -> str:
    problem = _prompt_problem(value)
    if problem:
        return problem
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        return f"'choices' is {_kind(choices)}, expected a list of two texts or more."
    for i, one in enumerate(choices):
        problem = _text_problem(one, f"choices[{i}]")
        if problem:
            return problem
    if len(set(choices)) != len(choices):
        return "'choices' holds the same text twice."
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return f"'answer' is {_kind(answer)}, expected the index of a choice or its text."
    if isinstance(answer, int) and not 0 <= answer < len(choices):
        return f"'answer' is {answer}, expected an index from 0 to {len(choices) - 1}."
    if isinstance(answer, str) and answer not in choices:
        return f"'answer' is {answer!r}, which is none of the choices."
    return ""


def _preference_problem(value: dict[str, Any]) -> str:
    for name, ends in (("prompt", ("user", "tool")), ("chosen", ("assistant",)), ("rejected", ("assistant",))):
        if name not in value:
            return f"'{name}' is missing; the row has: {', '.join(value) or 'nothing'}."
        one = value[name]
        problem = _turns_problem(one, name, ends_with=ends) if isinstance(one, list) else _text_problem(one, name)
        if problem:
            return problem
    return "'chosen' and 'rejected' are the same." if value["chosen"] == value["rejected"] else ""


def _plain_problem(value: dict[str, Any]) -> str:
    if "text" not in value:
        return f"'text' is missing; the row has: {', '.join(value) or 'nothing'}."
    return _text_problem(value["text"], "text")


_PROBLEMS = {
    "messages": _messages_problem,
    "preference": _preference_problem,
    "verifiable": _verifiable_problem,
    "choice": _choice_problem,
    "text": _plain_problem,
}
