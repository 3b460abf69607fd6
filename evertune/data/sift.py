"""Files in, files out: rows that stay are written as they are, rows that go are written with the reason.

    <out>/<name>.jsonl       the rows of each source that stay, in their order (or .parquet)
    <out>/removed.jsonl      {"source", "file", "line", "reason", ..., "row"} for each row that goes
    <out>/quarantine.jsonl   {"file", "line", "problem", "bytes"} for each row that could not be read
    <out>/manifest.json      settings, counts and SHA-256 of what was read and written

Sources are read twice, streaming: once to decide and once to write. Only the decision is held in memory. Reading and
writing are done here, file after file, or over machines (`spread.py`): the decision is one and the same.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evertune.data.compared import Part
from evertune.data.dedup import Earlier, Memory, Several, find_templates, resolve
from evertune.data.fingerprint import Fingerprints, batched, fingerprint, join
from evertune.data.index import DedupIndex
from evertune.data.leak import Leak, LeakFinder, ProbeText
from evertune.data.lines import is_json, raw_lines, read_line
from evertune.data.quality import Rule, bounds_of, broken_rule, signals_of
from evertune.data.replay import reservoir
from evertune.data.rows import BadRows, Row, detect_format, files_of, iter_rows
from evertune.data.select import class_balanced, class_of, coverage, highest_score
from evertune.data.shingles import WIDTH
from evertune.data.write import RowWriter, row_writer
from evertune.errors import DataError, RecipeError
from evertune.hashing import digest_file
from evertune.workspace.disk import write_atomically

MANIFEST = "manifest.json"
REMOVED = "removed.jsonl"
QUARANTINE = "quarantine.jsonl"
SCORED_ROWS = 512
_OWN = {name.partition(".")[0] for name in (MANIFEST, REMOVED, QUARANTINE)}


@dataclass(frozen=True)
class Source:
    """Rows of one name: a file, a glob or a `datasets` name, and the format of its rows."""

    name: str
    path: Path
    format: str


# What is to be done with a row, by the numbers of its source and of the row in it: None where it stays, else facts with
# a `reason`.
Decide = Callable[[int, int], Mapping[str, Any] | None]


def sources_of(paths: Sequence[Path], format: str | None) -> list[Source]:
    """A source for each path, named after it; the format is that of its first row when not given.

    Raises:
        DataError: a path names nothing, or two would have one name.
    """
    names = [_name_of(path) for path in paths]
    if len(set(names)) < len(names) or _OWN & set(names):
        names = [f"{path.parent.name}-{name}" for path, name in zip(paths, names, strict=True)]
    for name, path in zip(names, paths, strict=True):
        if names.count(name) > 1:
            raise DataError(f"{path}: another source is called '{name}' too.", remedy="Rename one of the files.")
    return [Source(name, path, format or detect_format(path)) for name, path in zip(names, paths, strict=True)]


def _name_of(path: Path) -> str:
    plain = path.name.removeprefix("datasets:").split(".")[0]
    return re.sub(r"[^\w-]", "", plain).strip("-_") or "rows"


def rows_of(source: Source, bad: BadRows | None = None) -> Iterator[Row]:
    """The rows of a source, streaming; bad ones are told to `bad`, or raised."""
    return iter_rows(source.path, format=source.format, source=source.name, bad=bad)


class Places:
    """Where rows stand: 16 bytes a row."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._parts: list[Any] = []

    def extend(self, file: Path, lines: NDArray[np.int64]) -> None:
        """Note the next rows, all of one file."""
        number = self._files.setdefault(file, len(self._files))
        self._parts.append(np.stack([np.full(len(lines), number), lines], axis=1))

    def __getitem__(self, number: int) -> str:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        file, line = self._parts[0][number].tolist()
        return f"{list(self._files)[file]}:{line}"


@dataclass(frozen=True)
class DedupSettings:
    """How rows are compared; see `dedup.py` and `compared.py`."""

    part: Part = "both"
    width: int = WIDTH
    threshold: float = 0.8
    template_share: float = 0.5
    workers: int = 1


class Output(NamedTuple):
    """A file of rows that stay."""

    source: str
    file: str
    format: str
    rows: int
    sha256: str


class Reader(Protocol):
    """How sources are read to decide, and read again to be divided."""

    def fingerprints(
        self, source: Source, settings: DedupSettings, places: Places, bad: BadRows | None
    ) -> Fingerprints:
        """Of the rows of a source, in their order; where each stands is noted in `places`."""

    def signals(
        self, source: Source, names: Sequence[str], scorers: Mapping[str, "Scorer"], bad: BadRows | None
    ) -> dict[str, NDArray[np.float64]]:
        """(R,) values of each signal, for the rows of a source in their order."""

    def leaks(self, source: Source, finder: LeakFinder, bad: BadRows | None) -> list[tuple[int, Leak]]:
        """Leaks of a source, each with the number of its row."""

    def divide(
        self, sources: Sequence[Source], decide: Decide, out: Path | None, *, suffix: str, examples: int
    ) -> tuple["Sifted", list[Output]]:
        """Write what stays and what goes below `out`, or only count where it is None."""


def dedup(
    sources: Sequence[Source],
    settings: DedupSettings,
    *,
    against: Sequence[Source] = (),
    index: DedupIndex | None = None,
    bad: BadRows | None = None,
    reader: Reader | None = None,
) -> tuple[Decide, Callable[[], None]]:
    """Decide which rows of the sources repeat another one, one of `against`, or one of the index.

    Returns:
        What decides, and what keeps the rows that stay in the index. Call that when they are written, not before: rows
        that the index knows and no file holds would be lost, as repeats of themselves.
    """
    places = Places()
    reader = reader or Here()
    prints, of_source = _prints(reader, sources, settings, places, bad)
    kept: list[tuple[Earlier, int]] = [(index, len(index))] if index is not None else []
    old_places = Places()
    if against:
        old, of_old = _prints(reader, against, settings, old_places, bad)
        templates = find_templates(join([prints, old]), np.concatenate([of_source, of_old + len(sources)]))
        if index is not None:
            templates = np.union1d(templates, index.templates)
        kept = [(Memory(old, templates, settings.threshold), len(old)), *kept]
    found = resolve(
        prints,
        sources=of_source,
        earlier=Several(kept) if kept else None,
        threshold=settings.threshold,
        template_share=settings.template_share,
    )
    old_count = kept[0][1] if against else 0
    starts = np.searchsorted(of_source, np.arange(len(sources))).tolist()
    stays = found.stays

    def decide(source: int, number: int) -> Mapping[str, Any] | None:
        at = starts[source] + number
        if stays[at]:
            return None
        reason = "exact duplicate" if found.is_exact[at] else "near-duplicate"
        value = round(float(found.jaccard[at]), 4)
        if found.cause[at] >= 0:
            return {"reason": reason, "of": places[int(found.cause[at])], "jaccard": value}
        earlier = int(found.earlier[at])
        if earlier < old_count:
            return {"reason": reason, "of": old_places[earlier], "jaccard": value}
        assert index is not None
        return {"reason": f"{reason} of an earlier round", "of": index.label(earlier - old_count), "jaccard": value}

    def keep() -> None:
        assert index is not None
        rows = np.flatnonzero(stays)
        index.add(prints.take(rows), [places[int(one)] for one in rows], found.templates)

    return decide, keep


def _prints(
    reader: Reader, sources: Sequence[Source], settings: DedupSettings, places: Places, bad: BadRows | None
) -> tuple[Fingerprints, Any]:
    parts = [reader.fingerprints(one, settings, places, bad) for one in sources]
    return join(parts), np.repeat(np.arange(len(parts)), [len(one) for one in parts])


# A signal that a model gives: a value for each of some rows, NaN where it cannot read one.
Scorer = Callable[[Sequence[Row]], NDArray[np.float64]]


def filter_rows(
    sources: Sequence[Source],
    rules: Sequence[Rule],
    *,
    scorers: Mapping[str, Scorer] | None = None,
    bad: BadRows | None = None,
    reader: Reader | None = None,
) -> tuple[Decide, dict[str, dict[str, float]]]:
    """Decide which rows break a rule; also the bounds of the rules by source, quantiles worked out.

    Args:
        scorers: signals beside those of `quality.py`.

    Raises:
        RecipeError: a rule is of a source that is not there.
    """
    there = [source.name for source in sources]
    for rule in rules:
        if rule.source and rule.source not in there:
            raise RecipeError(f"the rule '{rule}' is of source '{rule.source}'; there are: {', '.join(there)}.")
    scored = dict(scorers or {})
    names = list(dict.fromkeys(rule.signal for rule in rules))
    values: list[dict[str, NDArray[np.float64]]] = []
    bounds: list[dict[Rule, float]] = []
    for source in sources:
        values.append((reader or Here()).signals(source, names, scored, bad))
        bounds.append(bounds_of(rules, source.name, values[-1]))

    def decide(source: int, number: int) -> Mapping[str, Any] | None:
        own = {name: float(each[number]) for name, each in values[source].items()}
        broken = broken_rule(bounds[source], own)
        if broken is None:
            return None
        rule, value = broken
        return {"reason": str(rule), "value": value if np.isfinite(value) else None, "bound": bounds[source][rule]}

    told = {
        source.name: {str(rule): bound for rule, bound in each.items()}
        for source, each in zip(sources, bounds, strict=True)
    }
    return decide, told


def measure(rows: Iterable[Row], names: Sequence[str], scorers: Mapping[str, Scorer]) -> dict[str, NDArray[np.float64]]:
    """The values of signals for rows, read once: (R,) each."""
    plain = [name for name in names if name not in scorers]
    found: dict[str, list[NDArray[np.float64]]] = {name: [np.zeros(0)] for name in names}
    for batch in batched(rows, SCORED_ROWS):
        columns = np.array([signals_of(row, plain) for row in batch]).reshape(len(batch), len(plain))
        for i, name in enumerate(plain):
            found[name].append(columns[:, i])
        for name in names:
            if name in scorers:
                found[name].append(scorers[name](batch))
    return {name: np.concatenate(each) for name, each in found.items()}


def decontaminate(
    sources: Sequence[Source],
    items: Sequence[ProbeText],
    *,
    bad: BadRows | None = None,
    reader: Reader | None = None,
) -> Decide:
    """Decide which rows hold an item of a probe; what only overlaps stays."""
    finder = LeakFinder(items)
    found: list[dict[int, Leak]] = []
    for source in sources:
        leaks = [one for one in (reader or Here()).leaks(source, finder, bad) if one[1].is_leak]
        found.append(dict(reversed(leaks)))

    def decide(source: int, number: int) -> Mapping[str, Any] | None:
        leak = found[source].get(number)
        if leak is None:
            return None
        return {"reason": f"{leak.how}: '{leak.probe}'", "probe": leak.probe, "item": leak.item, "score": leak.score}

    return decide


def select_rows(
    sources: Sequence[Source],
    size: int,
    *,
    policy: str,
    class_field: str = "answer",
    scorer: Scorer | None = None,
    seed: int = 0,
    bad: BadRows | None = None,
) -> Decide:
    """Decide which rows of each source are kept for replay; see `select.py`.

    Raises:
        DataError: a row lacks the field that holds its class.
    """
    kept = []
    for source in sources:
        rows = rows_of(source, bad)
        if policy == "reservoir":
            kept.append({i for i, _ in reservoir(enumerate(rows), size, seed)})
        elif policy == "class_balanced":
            named = ((i, class_of(row, class_field)) for i, row in enumerate(rows))
            kept.append({i for i, _ in class_balanced(named, size, class_of=lambda one: one[1], seed=seed)})
        elif policy == "coverage":
            kept.append(set(coverage(fingerprint(rows).shingles, size)))
        else:
            assert scorer is not None, "the highest loss needs a model"
            kept.append(set(highest_score(measure(rows, ["loss"], {"loss": scorer})["loss"].tolist(), size)))

    def decide(source: int, number: int) -> Mapping[str, Any] | None:
        return None if number in kept[source] else {"reason": f"not among the {size} of {policy}"}

    return decide


@dataclass(frozen=True)
class Sifted:
    """What was done: rows read, kept and removed by reason, per source; examples of what was removed."""

    sources: dict[str, dict[str, Any]]
    removed: dict[str, int]
    quarantined: int
    examples: dict[str, list[dict[str, Any]]]

    def add(self, source: str, divided: "Divided", *, examples: int) -> None:
        """Count a source, or a part of one, with at most so many examples of a reason in all."""
        one = self.sources.setdefault(source, {"read": 0, "kept": 0, "removed": {}})
        one["read"] += divided.kept + divided.removed.total()
        one["kept"] += divided.kept
        for reason, count in divided.removed.items():
            one["removed"][reason] = one["removed"].get(reason, 0) + count
            self.removed[reason] = self.removed.get(reason, 0) + count
        for reason, each in divided.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *each][:examples]

    def to_json(self) -> dict[str, Any]:
        """`{"sources": {name: {"read", "kept", "removed": {reason: n}}}, "removed": {reason: n}, "quarantined": n,
        "examples": {reason: [{"file", "line", ...}]}}`"""
        return dict(self.__dict__)


def check_out(out: Path | None) -> None:
    """Raise DataError where the folder to write holds something: before hours of scoring, not after."""
    if out is None or not out.exists() or not any(out.iterdir() if out.is_dir() else [out]):
        return
    if (out / MANIFEST).exists():
        # Rows that an index has taken in stand nowhere else: who deletes them and asks again gets nothing.
        raise DataError(
            f"{out}: found a finished result there ({MANIFEST} is written last), expected a new or empty folder.",
            remedy="Use it, or choose another --out.",
        )
    raise DataError(f"{out}: found something there, expected a new or empty folder.", remedy="Choose another --out.")


def sift(
    sources: Sequence[Source],
    decide: Decide,
    out: Path | None,
    *,
    operation: str,
    settings: Mapping[str, Any],
    bad: BadRows,
    suffix: str = ".jsonl",
    examples: int = 0,
    reader: Reader | None = None,
) -> Sifted:
    """Write what stays and what goes, or only count where `out` is None (a dry run).

    Raises:
        DataError: `out` holds something already, or rows fit no one Parquet schema.
    """
    check_out(out)
    divided, outputs = (reader or Here()).divide(sources, decide, out, suffix=suffix, examples=examples)
    told = replace(divided, quarantined=len(bad.found))
    if out is not None:
        _write_facts(out, sources, outputs, told, operation, settings, bad)
    return told


class Here:
    """Reads and writes in this process, file after file; fingerprints may be made by several."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, Path], array[int]] = {}

    def fingerprints(
        self, source: Source, settings: DedupSettings, places: Places, bad: BadRows | None
    ) -> Fingerprints:
        rows = self._noted(source, bad)
        found = fingerprint(rows, part=settings.part, width=settings.width, workers=settings.workers)
        for file in files_of(source.path):
            places.extend(file, np.array(self._lines.get((source.name, file), ()), dtype=np.int64))
        return found

    def signals(
        self, source: Source, names: Sequence[str], scorers: Mapping[str, Scorer], bad: BadRows | None
    ) -> dict[str, NDArray[np.float64]]:
        return measure(self._noted(source, bad), names, scorers)

    def leaks(self, source: Source, finder: LeakFinder, bad: BadRows | None) -> list[tuple[int, Leak]]:
        return finder.judge([finder.look(self._noted(source, bad))])

    def divide(
        self, sources: Sequence[Source], decide: Decide, out: Path | None, *, suffix: str, examples: int
    ) -> tuple[Sifted, list[Output]]:
        told, outputs = Sifted({}, {}, 0, {}), []
        with ExitStack() as stack:
            gone = stack.enter_context(row_writer(out / REMOVED)) if out is not None else None
            for i, source in enumerate(sources):
                name = f"{source.name}{suffix}"
                kept = before = 0
                with ExitStack() as one:
                    stays = one.enter_context(row_writer(out / name)) if out is not None else None
                    for file in files_of(source.path):
                        part, lines = Source(source.name, file, source.format), self._lines.get((source.name, file))
                        facts_of = partial(_from, decide, i, before)
                        divided = divide_file(part, lines, facts_of, stays, gone, examples=examples)
                        told.add(source.name, divided, examples=examples)
                        kept += divided.kept
                        before += divided.kept + divided.removed.total()
                if out is not None:
                    outputs.append(Output(source.name, name, source.format, kept, digest_file(out / name)))
        return told, outputs

    def _noted(self, source: Source, bad: BadRows | None) -> Iterator[Row]:
        """The rows, and the line of each kept: with it the second reading need not look into lines."""
        file, lines = None, array("q")
        for row in rows_of(source, bad):
            if row.file is not file:
                file = row.file
                lines = self._lines[source.name, file] = array("q")
            lines.append(row.line)
            yield row


def _from(decide: Decide, source: int, before: int, number: int) -> Mapping[str, Any] | None:
    return decide(source, before + number)


@dataclass
class Divided:
    """Rows of a file: how many stay, how many go by reason, and examples of these."""

    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def divide_file(
    source: Source,
    lines: Sequence[int] | None,
    facts_of: Callable[[int], Mapping[str, Any] | None],
    stays: RowWriter | None,
    gone: RowWriter | None,
    *,
    examples: int,
) -> Divided:
    """Write the rows of one file, to the one place or the other where there are any. Lines of JSON stay as they are.

    Args:
        source: of this file alone.
        lines: where its rows stand, when it was read before.
        facts_of: what was decided about a row, by its number in the file.
    """
    told = Divided()
    for number, (line, raw, value) in enumerate(_again(source, lines)):
        facts = facts_of(number)
        if facts is None:
            told.kept += 1
            if stays is None:
                continue
            if raw is not None:
                stays.copy(raw)
            else:
                stays.add(value)
            continue
        reason = str(facts["reason"])
        told.removed[reason] += 1
        shown = told.examples.setdefault(reason, [])
        if gone is not None or len(shown) < examples:
            row = value if raw is None else read_line(raw)
            facts = {"source": source.name, "file": str(source.path), "line": line, **facts, "row": row}
            if len(shown) < examples:
                shown.append(facts)
            if gone is not None:
                gone.add(facts)
    return told


def _again(source: Source, lines: Sequence[int] | None) -> Iterator[tuple[int, bytes | None, dict[str, Any]]]:
    """Rows of a file in their order: line, and bytes or value. What was bad before is bad again, and told already."""
    if lines is None or not is_json(source.path):
        yield from ((row.line, None, row.value) for row in rows_of(source, BadRows()))
        return
    wanted = iter(lines)
    line = next(wanted, None)
    for number, raw in raw_lines(source.path):
        if number == line:
            yield number, raw, {}
            line = next(wanted, None)


def _write_facts(
    out: Path,
    sources: Sequence[Source],
    outputs: Sequence[Output],
    told: Sifted,
    operation: str,
    settings: Mapping[str, Any],
    bad: BadRows,
) -> None:
    if bad.found:
        with row_writer(out / QUARANTINE) as writer:
            for one in bad.found:
                writer.add(one)
    body = {
        "evertune": 1,
        "operation": operation,
        "settings": dict(settings),
        "inputs": [
            {"source": one.name, "file": str(file), "sha256": digest_file(file)}
            for one in sources
            for file in files_of(one.path)
        ],
        "outputs": [one._asdict() for one in outputs],
        "sources": told.sources,
        "removed": told.removed,
        "quarantined": told.quarantined,
    }
    write_atomically(out / MANIFEST, json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n")
