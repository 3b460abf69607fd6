"""Probe items that occur in training data: a probe that was trained on measures nothing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.data.compared import normalise_text
from evertune.data.rows import Row, messages_of

SHORT_CHARACTERS = 32


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


def find_leaks(rows: Iterable[Row], items: Iterable[ProbeText]) -> list[Leak]:
    """Training rows that hold an item's prompt or text, in the rows' order; at most one leak per row and item.

    Whole texts are compared, as they are and normalised: an item with each turn of a row but the system's, and with a
    plain text. An item inside a longer text is not found, nor is a paraphrase. A short item (below 32 characters when
    normalised, such as "Why?" or "Hello") counts only where it is all that a row asks, not one turn among several.
    Where items of a probe share a text, the first is named.
    """
    wanted: dict[str, dict[str, ProbeText]] = {}
    for item in items:
        key = normalise_text(item.text) or item.text
        wanted.setdefault(key, {}).setdefault(item.probe, item)
    return [leak for row in rows for leak in _leaks_of(row, wanted)]


def _leaks_of(row: Row, wanted: Mapping[str, Mapping[str, ProbeText]]) -> Iterator[Leak]:
    is_exact: dict[ProbeText, bool] = {}
    for text, is_all in _texts(row):
        key = normalise_text(text) or text
        if key not in wanted or (len(key) < SHORT_CHARACTERS and not is_all):
            continue
        for item in wanted[key].values():
            is_exact[item] = item.text.strip() == text.strip() or is_exact.get(item, False)
    for item, exact in is_exact.items():
        yield Leak(row.source, row.file, row.line, item.probe, item.item, "exact" if exact else "normalised")


def _texts(row: Row) -> Iterator[tuple[str, bool]]:
    """Texts of a row, each with whether it is all that the row asks."""
    if row.format == "text":
        yield row.value["text"], True
        return
    turns = [*messages_of(row.value), *_answers(row.value)]
    questions = [one["content"] for one in turns if one["role"] == "user"]
    for one in turns:
        if one["role"] != "system":
            yield one["content"], questions == [one["content"]] and one["role"] == "user"


def _answers(value: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    """The turns of both answers of a preference row."""
    for name in ("chosen", "rejected"):
        if isinstance(value.get(name), str):
            yield {"role": "assistant", "content": value[name]}
        elif isinstance(value.get(name), list):
            yield from value[name]
