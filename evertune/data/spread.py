"""Sources read and divided by an engine, a file at a time: the decision is made here, from what all files gave.

    <out>/<name>/00000.jsonl     what stays of the first file of a source (or .parquet); one after the other these are
                                 what one process would have written
    <out>/removed/00000.jsonl    what goes of the first file of all

A file is the unit of work, so that a source should have several times as many files as there are workers. What is
decided by, fingerprints or signals, is gathered in the memory of the process that was started: for near-duplicates
about 8 bytes for each word of the data.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evertune.data.compared import Part
from evertune.data.engine import Engine
from evertune.data.fingerprint import Fingerprints, batched, fingerprint, join
from evertune.data.leak import Leak, LeakFinder, Looked
from evertune.data.rows import Row, files_of
from evertune.data.sift import (
    REMOVED,
    BadRows,
    Decide,
    DedupSettings,
    Divided,
    Output,
    Places,
    Scorer,
    Sifted,
    Source,
    divide_file,
    measure,
    rows_of,
)
from evertune.data.write import row_writer
from evertune.errors import RecipeError
from evertune.hashing import digest_file


@dataclass(frozen=True)
class _Seen:
    """Something of some rows of a file, the lines they stand at, and the rows that could not be read."""

    value: Any
    lines: NDArray[np.int64]
    bad: list[dict[str, Any]]


class Spread:
    """Reads and writes with an engine; decides as `sift.Here` does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lines: dict[tuple[str, Path], NDArray[np.int64]] = {}

    def fingerprints(
        self, source: Source, settings: DedupSettings, places: Places, bad: BadRows | None
    ) -> Fingerprints:
        work = partial(_fingerprints, part=settings.part, width=settings.width)
        files, seen = self._see(work, source, bad)
        found = []
        for file, one in zip(files, seen, strict=True):
            for piece in one:
                places.extend(file, piece.lines)
                found.append(piece.value)
        return join(found)

    def signals(
        self, source: Source, names: Sequence[str], scorers: Mapping[str, Scorer], bad: BadRows | None
    ) -> dict[str, NDArray[np.float64]]:
        if scorers:
            raise RecipeError(
                f"found the signal '{next(iter(scorers))}', which needs a model, and an engine.",
                remedy="Filter by the model in a command of its own, without --engine.",
            )
        _, seen = self._see(partial(_signals, names=list(names)), source, bad)
        parts = [piece.value for one in seen for piece in one]
        return {name: np.concatenate([np.zeros(0), *(one[name] for one in parts)]) for name in names}

    def leaks(self, source: Source, finder: LeakFinder, bad: BadRows | None) -> list[tuple[int, Leak]]:
        _, seen = self._see(partial(_looks, finder=finder), source, bad)
        return finder.judge([piece.value for one in seen for piece in one])

    def divide(
        self, sources: Sequence[Source], decide: Decide, out: Path | None, *, suffix: str, examples: int
    ) -> tuple[Sifted, list[Output]]:
        parts: list[_Division] = []
        for i, source in enumerate(sources):
            before = 0
            for k, file in enumerate(files_of(source.path)):
                lines = self._lines[source.name, file]
                facts = {n: decide(i, before + n) for n in range(len(lines))}
                removed = {n: one for n, one in facts.items() if one is not None}
                stays = gone = None
                if out is not None:
                    stays = out.resolve() / source.name / f"{k:05d}{suffix}"
                    gone = out.resolve() / Path(REMOVED).stem / f"{len(parts):05d}.jsonl" if removed else None
                parts.append(_Division(_of_file(source, file), lines, removed, stays, gone, examples))
                before += len(lines)
        told, outputs = Sifted({}, {}, 0, {}), []
        for number, (divided, digest) in self._engine.map(_divide, parts):
            source, stays = parts[number].source, parts[number].stays
            told.add(source.name, divided, examples=examples)
            if out is not None and stays is not None:
                name = f"{source.name}/{stays.name}"
                outputs.append(Output(source.name, name, source.format, divided.kept, digest))
        return told, outputs

    def _see(self, work: Any, source: Source, bad: BadRows | None) -> tuple[list[Path], list[list[_Seen]]]:
        """What the work gives for each file of a source, with the rows that could not be read told to `bad`."""
        files = files_of(source.path)
        found: list[list[_Seen]] = [[] for _ in files]
        for number, piece in self._engine.map(work, [_of_file(source, file) for file in files]):
            found[number].append(piece)
            if bad is not None:
                bad.found += piece.bad
        for file, one in zip(files, found, strict=True):
            self._lines[source.name, file] = np.concatenate([piece.lines for piece in one])
        return files, found


def _of_file(source: Source, file: Path) -> Source:
    """The same source with one file; a worker may run in another folder."""
    return Source(source.name, file.absolute(), source.format)


@dataclass(frozen=True)
class _Division:
    """A file to divide: where its rows stand, what is decided about those that go, by number, and where both kinds are
    written."""

    source: Source
    lines: NDArray[np.int64]
    removed: dict[int, Mapping[str, Any]]
    stays: Path | None
    gone: Path | None
    examples: int


def _batches(source: Source) -> Iterator[tuple[list[Row], NDArray[np.int64], list[dict[str, Any]]]]:
    """Rows in batches with their lines, and what could not be read on the way to them."""
    bad = BadRows()
    told = 0
    for rows in batched(rows_of(source, bad)):
        yield rows, np.array([row.line for row in rows], dtype=np.int64), bad.found[told:]
        told = len(bad.found)
    yield [], np.zeros(0, np.int64), bad.found[told:]


def _fingerprints(source: Source, part: Part, width: int) -> Iterator[_Seen]:
    for rows, lines, bad in _batches(source):
        yield _Seen(fingerprint(rows, part=part, width=width), lines, bad)


def _signals(source: Source, names: list[str]) -> Iterator[_Seen]:
    for rows, lines, bad in _batches(source):
        yield _Seen(measure(rows, names, {}), lines, bad)


def _looks(source: Source, finder: LeakFinder) -> Iterator[_Seen]:
    for rows, lines, bad in _batches(source):
        found: Looked = finder.look(rows)
        yield _Seen(found, lines, bad)


def _divide(part: _Division) -> Iterator[tuple[Divided, str]]:
    with ExitStack() as stack:
        stays, gone = (
            stack.enter_context(row_writer(place)) if place is not None else None for place in (part.stays, part.gone)
        )
        told = divide_file(part.source, part.lines.tolist(), part.removed.get, stays, gone, examples=part.examples)
    yield told, digest_file(part.stays) if part.stays is not None else ""
