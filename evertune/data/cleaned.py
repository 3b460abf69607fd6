"""A recipe's rows as they may be trained on: without probe items, without rows that cannot be read.

Nothing is trained on before it has been searched, whatever a check has said: rows of earlier rounds are searched again
for the probes of today. What was found is an object of the workspace, so a source is searched once for each set of
probes. Where nothing is to be removed, the source is used as it lies; else the object holds the rows that stay.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.data.history import write_history
from evertune.data.leak import LEAK_VERSION, Leak, LeakFinder, ProbeText
from evertune.data.rows import read_rows
from evertune.data.sift import BadRows
from evertune.errors import DataError
from evertune.hashing import digest_json
from evertune.workspace import Workspace

VERSION = 1
ROWS = "rows.jsonl"
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
        removed: `{"leaks": {probe: rows}, "bad": rows}`; a row that holds items of two probes counts for both.
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

    def clean(self, given: Given, workspace: Workspace, *, on_bad: OnBad = "error") -> Cleaned:
        """The rows without those that hold an item; searched once, then known.

        Raises:
            DataError: a row holds an item and leaks are errors; a row cannot be read; or no row is left.
        """
        facts = {"data": given.digest, "source": given.source, "format": given.format, "limit": given.limit}
        how = {"kind": "cleaned", "version": VERSION, "items": self._digest, "leak": self._on_leak, "bad": on_bad}
        key = digest_json({**how, **facts})
        if workspace.manifest(key) is None:
            workspace.publish(
                kind="cleaned", key=key, record={}, write=lambda folder: self._write(folder, given, on_bad)
            )
        manifest = workspace.manifest(key)
        assert manifest is not None, "published and yet not there"
        entry = next((one for one in manifest.files if one.path == ROWS), None)
        removed = manifest.record["removed"]
        if entry is None:
            return Cleaned(given.path, given.limit, given.digest, removed)
        return Cleaned(workspace.path(key) / ROWS, None, entry.sha256, removed)

    def _write(self, folder: Path, given: Given, on_bad: OnBad) -> dict[str, Any]:
        bad = BadRows()
        rows = read_rows(
            given.path,
            format=given.format,
            source=given.source,
            limit=given.limit,
            bad=bad if on_bad == "quarantine" else None,
        )
        self._finder = self._finder or LeakFinder(self._items)
        leaks = [one for one in self._finder.find(rows) if one.is_leak]
        if leaks and self._on_leak == "error":
            raise leak_error(given.source, leaks)
        names = {one.row_id for one in leaks}
        if len(names) == len(rows):
            raise DataError(
                f"source '{given.source}': each of its {len(rows)} rows holds an item of a probe.",
                remedy="Train on other rows, or probe with other items.",
            )
        if names or bad.found:
            write_history(folder / ROWS, [row for row in rows if row.id not in names])
        if leaks:
            _write_lines(folder / "leaks.jsonl", [leak_facts(one) for one in leaks])
        if bad.found:
            _write_lines(folder / "quarantine.jsonl", bad.found)
        return {"source": given.source, "removed": {"leaks": rows_by_probe(leaks), "bad": len(bad.found)}}


def rows_by_probe(leaks: Sequence[Leak]) -> dict[str, int]:
    """Rows that hold items, by probe."""
    return dict(Counter(probe for probe, _ in {(one.probe, one.row_id): None for one in leaks}))


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
