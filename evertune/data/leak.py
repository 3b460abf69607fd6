"""Probe items that occur in training data: a probe that was trained on measures nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evertune.data.replay import normalise_text
from evertune.data.rows import Row, messages_of


@dataclass(frozen=True)
class ProbeText:
    """What must not be trained on: the whole prompt of an item (its last user turn), or its text."""

    probe: str
    item: str
    text: str


@dataclass(frozen=True)
class Leak:
    """A training row that holds a probe item."""

    source: str
    file: Path
    line: int
    probe: str
    item: str
    how: Literal["exact", "normalised"]


def find_leaks(rows: Sequence[Row], items: Iterable[ProbeText]) -> list[Leak]:
    """Every (row, item) where a turn or text of the row equals the item's text, exactly or normalised.

    Whole texts are compared, so a short prompt is found only as a whole turn, never inside a longer one.
    """
    exact: dict[str, list[ProbeText]] = {}
    normalised: dict[str, list[ProbeText]] = {}
    for item in items:
        exact.setdefault(item.text.strip(), []).append(item)
        normalised.setdefault(normalise_text(item.text), []).append(item)
    leaks = []
    for row in rows:
        for text in _texts(row):
            same = exact.get(text.strip(), [])
            near = [one for one in normalised.get(normalise_text(text), []) if one not in same]
            leaks += [Leak(row.source, row.file, row.line, one.probe, one.item, "exact") for one in same]
            leaks += [Leak(row.source, row.file, row.line, one.probe, one.item, "normalised") for one in near]
    return leaks


def _texts(row: Row) -> list[str]:
    if "text" in row.value and "messages" not in row.value:
        return [row.value["text"]]
    return [one["content"] for one in messages_of(row.value) if one["role"] != "system"]
