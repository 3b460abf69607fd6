"""A recipe's rows as they may be trained on: without probe items, without rows that cannot be read, that break a rule
of the source, or that someone asked to remove.

Nothing is trained on before it has been searched, whatever a check has said: rows of earlier rounds are searched again
for the probes of today. What was found is an object of the workspace, so a source is searched once for each set of
probes. Where nothing is to be removed, the source is used as it lies; else the object holds the rows that stay. It also
holds a digest of every row and turn, by which a text is traced through the stages that were given it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evertune.data.compared import compared_text, normalise_text
from evertune.data.history import write_history
from evertune.data.leak import LEAK_VERSION, Leak, LeakFinder, ProbeText, rows_by_probe
from evertune.data.quality import QUALITY_VERSION, broken_rules, read_rules, rows_by_rule
from evertune.data.rows import BadRows, Row, read_rows
from evertune.data.shapes import fitting_formats
from evertune.errors import DataError
from evertune.hashing import digest_file, digest_json
from evertune.workspace import Workspace

VERSION = 3
KIND = "cleaned"
ROWS = "rows.jsonl"
SEEN, SEEN_LINES = "seen.npy", "seen-lines.npy"
SHOWN = 3

OnLeak = Literal["error", "remove"]
OnBad = Literal["error", "quarantine"]


@dataclass(frozen=True)
class Given:
    """Rows as a recipe names them, with the digest of what they are."""

    source: str
    path: Path
    format: str
    limit: int | None
    digest: str


@dataclass(frozen=True)
class Cleaned:
    """Rows that may be trained on: where they lie, and what was removed.

    Attributes:
        removed: `{"leaks": {probe: rows}, "bad": rows}`; `"rules": {rule: rows}` where the source has rules; and
            `"asked": rows` where some were removed on request. A row that holds items of two probes counts for both.
    """

    path: Path
    limit: int | None
    digest: str
    removed: dict[str, Any]


class Cleaner:
    """The probes of a recipe and what is done about their items in training rows."""

    def __init__(self, items: Sequence[ProbeText], *, on_leak: OnLeak) -> None:
        self._items = list(items)
        self._on_leak = on_leak
        self._digest = digest_json([LEAK_VERSION, [[one.probe, one.item, one.text] for one in self._items]])
        self._finder: LeakFinder | None = None

    def clean(
        self,
        given: Given,
        workspace: Workspace,
        *,
        on_bad: OnBad = "error",
        keep: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> Cleaned:
        """The rows without those that hold an item; searched once, then known.

        Args:
            keep: quality rules of the source (`quality.read_rules`).
            without: digests of texts (`text_digests`) whose rows are left out: someone asked for it.

        Raises:
            DataError: a row holds an item and leaks are errors; a row cannot be read; or no row is left.
            RecipeError: a rule is none.
        """
        rules = [str(one) for one in read_rules(keep)]
        facts = {"data": given.digest, "source": given.source, "format": given.format, "limit": given.limit}
        how = {"kind": "cleaned", "version": VERSION, "items": self._digest, "leak": self._on_leak, "bad": on_bad}
        if rules:
            how |= {"rules": rules, "quality": QUALITY_VERSION}
        if without:
            how["without"] = sorted(without)
        key = digest_json({**how, **facts})
        if workspace.manifest(key) is None:
            workspace.publish(
                kind=KIND,
                key=key,
                record={},
                write=lambda folder: self._write(folder, given, on_bad, rules, set(without)),
            )
        manifest = workspace.manifest(key)
        assert manifest is not None, "published and yet not there"
        kept, removed = manifest.record["kept"], manifest.record["removed"]
        if kept == given.digest:
            return Cleaned(given.path, given.limit, given.digest, removed)
        return Cleaned(workspace.path(key) / ROWS, None, kept, removed)

    def _write(
        self, folder: Path, given: Given, on_bad: OnBad, rules: Sequence[str], without: set[str]
    ) -> dict[str, Any]:
        bad = BadRows()
        rows = read_rows(
            given.path,
            format=given.format,
            source=given.source,
            limit=given.limit,
            bad=bad if on_bad == "quarantine" else None,
        )
        self._finder = self._finder or LeakFinder(self._items)
        broken = broken_rules(rows, read_rules(rules), given.source)
        leaks = [one for one in self._finder.find(row for i, row in enumerate(rows) if i not in broken) if one.is_leak]
        if leaks and self._on_leak == "error":
            raise leak_error(given.source, leaks)
        digests = [row_digests(row) for row in rows]
        asked = {row.id for row, own in zip(rows, digests, strict=True) if not without.isdisjoint(own)}
        names = asked | {one.row_id for one in leaks} | {rows[i].id for i in broken}
        if len(names) == len(rows):
            raise DataError(
                f"source '{given.source}': each of its {len(rows)} rows holds an item of a probe, breaks a rule of "
                "'keep' or was removed.",
                remedy="Train on other rows, probe with other items, or change the rules.",
            )
        kept = given.digest
        if names or bad.found:
            write_history(folder / ROWS, [row for row in rows if row.id not in names])
            kept = digest_file(folder / ROWS)
        if leaks:
            _write_lines(folder / "leaks.jsonl", [leak_facts(one) for one in leaks])
        if bad.found:
            _write_lines(folder / "quarantine.jsonl", bad.found)
        if broken:
            facts = ({**row_facts(rows[i]), "rule": str(one), "value": value} for i, (one, value) in broken.items())
            _write_lines(folder / "filtered.jsonl", list(facts))
        _write_seen(folder, rows, digests, names)
        removed: dict[str, Any] = {"leaks": rows_by_probe(leaks), "bad": len(bad.found)}
        if rules:
            removed["rules"] = rows_by_rule(broken.values())
        if asked:
            removed["asked"] = len(asked)
        return {"source": given.source, "given": given.digest, "kept": kept, "removed": removed}


def row_digests(row: Row) -> list[str]:
    """Digests by which a row is found: of all that is compared of it, then of each turn or text, normalised."""
    texts = [row.value["text"]] if row.format == "text" else list(_contents(row.value))
    turns = [_text_digest(one) for one in texts if one.strip()]
    return list(dict.fromkeys([_digest(compared_text(row)), *turns]))


def text_digests(text: str) -> list[str]:
    """The digest of a row given as JSON, or else of a text that may be one turn of a row."""
    row = _row_in(text)
    return [_text_digest(text)] if row is None else row_digests(row)[:1]


def line_digests(line: str) -> list[str]:
    """All digests of the row in a line of JSON; none where it is no row."""
    row = _row_in(line)
    return [] if row is None else row_digests(row)


def _row_in(text: str) -> Row | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    fitting = fitting_formats(value) if isinstance(value, dict) else []
    formats = ("preference", "choice", "messages", "episode", "verifiable", "text")
    return next((Row("", "", 0, Path(), value, one) for one in formats if one in fitting), None)


def find_seen(folder: Path, digests: Sequence[str]) -> tuple[list[int], list[int]]:
    """Lines of a cleaned source whose row or turn has one of the digests: those that stayed, and those left out."""
    known = np.load(folder / SEEN, allow_pickle=False)
    lines = np.load(folder / SEEN_LINES, allow_pickle=False)
    found: set[int] = set()
    for one in digests:
        wanted = np.frombuffer(bytes.fromhex(one), dtype=">u8")
        first, last = (np.searchsorted(known[:, 0], wanted[0], side=side) for side in ("left", "right"))
        found |= set(lines[first:last][known[first:last, 1] == wanted[1]].tolist())
    return sorted(one for one in found if one > 0), sorted(-one for one in found if one < 0)


def _write_seen(folder: Path, rows: Sequence[Row], digests: Sequence[Sequence[str]], left_out: set[str]) -> None:
    """Digests, ascending, with the line of each; the lines of rows that were left out are negative."""
    flat = np.frombuffer(bytes.fromhex("".join(one for own in digests for one in own)), dtype=">u8").reshape(-1, 2)
    lines = np.repeat(
        [-row.line if row.id in left_out else row.line for row in rows], [len(own) for own in digests]
    ).astype(np.int64)
    order = np.lexsort((lines, flat[:, 1], flat[:, 0]))
    np.save(folder / SEEN, flat[order].astype("<u8"), allow_pickle=False)
    np.save(folder / SEEN_LINES, lines[order], allow_pickle=False)


def _contents(value: dict[str, Any]) -> Iterator[str]:
    for name in ("messages", "prompt", "chosen", "rejected"):
        given = value.get(name)
        if isinstance(given, str):
            yield given
        elif isinstance(given, list):
            # A system turn is shared by many rows and stands for none of them.
            yield from (one["content"] for one in given if one.get("role") != "system")


def _text_digest(text: str) -> str:
    """Of a text for comparison; one of nothing but marks, which would be as any other such, counts as it is."""
    return _digest(normalise_text(text) or text.strip())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def row_facts(row: Row) -> dict[str, Any]:
    """Where a row stands, as plain values."""
    return {"file": str(row.file), "source": row.source, "line": row.line, "row_id": row.id}


def leak_facts(leak: Leak) -> dict[str, Any]:
    """A leak as plain values."""
    names = ("source", "line", "probe", "item", "how", "score", "row_id")
    return {"file": str(leak.file), **{name: getattr(leak, name) for name in names}}


def leak_error(source: str, leaks: Sequence[Leak]) -> DataError:
    """The error of a source with leaks."""
    shown = "; ".join(
        f"{one.file}:{one.line} holds item {one.item!r} of probe '{one.probe}' ({one.how})" for one in leaks[:SHOWN]
    )
    rows = len({one.row_id for one in leaks})
    return DataError(
        f"source '{source}': found {rows} rows that hold items of probes: {shown}.",
        remedy="Remove the rows or the items, or set 'leaks: remove'. A probe that was trained on measures nothing.",
    )


def _write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in values), encoding="utf-8")
