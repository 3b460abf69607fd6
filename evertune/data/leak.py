"""Probe items that occur in training data: a probe that was trained on measures nothing.

    exact            a turn of the row, or its text, is the item's prompt
    normalised       the same but for case, marks, spaces and look-alike characters
    near-duplicate   3-word shingles of turn and item have a Jaccard similarity of 0.8 or more
    contained        runs of 8 words that turn and item share cover 80 % of the item's words (all, where it has fewer
                     than 16): the item stands inside a longer text
    overlap          they cover half of them, the bound of Tulu 3 (arXiv:2411.15124): often a problem with other numbers
                     or a passage that two questions share. No leak by itself, and never removed; it is told.

What many items of a probe share ("Answer with one option.") is a template and says nothing of one of them: runs of 3
words in more than a tenth of a probe's items, and in more than five of them, are not counted; nor are runs in more than
half of a source's rows. A paraphrase or a translation is not found.
"""

# I items, T turns of a batch of rows

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from evertune.data.compared import normalise_text
from evertune.data.fingerprint import batched
from evertune.data.rows import Row, messages_of
from evertune.data.shingles import WIDTH, Hashes, Shingles, distinct, runs, shingle
from evertune.data.similar import Rarity, pairs_between, postings_of

How = Literal["exact", "normalised", "near-duplicate", "contained", "overlap"]
_KINDS: tuple[How, ...] = get_args(How)

LEAK_VERSION = 1  # raised by hand when what counts as a leak changes
SHORT_CHARACTERS = 32
RUN_WORDS = 8
MIN_COVERAGE = 0.8
MIN_OVERLAP = 0.5
# An item of fewer words counts as contained only as a whole.
WHOLE_WORDS = 16
MIN_JACCARD = 0.8
# An item of fewer shingles is too short for a similarity: it counts where it is equal.
MIN_SHINGLES = 8
ITEM_TEMPLATE = (0.1, 5)
ROW_TEMPLATE = (0.5, 50)
BATCH_ROWS = 2048


@dataclass(frozen=True)
class ProbeText:
    """What must not be trained on: the whole prompt of an item (its last user turn), or its text."""

    probe: str
    item: str
    text: str


@dataclass(frozen=True)
class Leak:
    """A training row that holds a probe item, or a large part of it.

    Attributes:
        score: similarity or coverage, 1 for equal texts.
        row_id: the row's id within its source.
    """

    source: str
    file: Path
    line: int
    probe: str
    item: str
    how: How
    score: float = 1.0
    row_id: str = ""

    @property
    def is_leak(self) -> bool:
        """It must not be trained on."""
        return self.how != "overlap"


def find_leaks(rows: Iterable[Row], items: Iterable[ProbeText]) -> list[Leak]:
    """Training rows that hold an item, in the rows' order; at most one leak per row and item, of the first kind above.

    Compared are each turn of a row but the system's, both answers of a preference row, or the plain text. A short item
    (below 32 characters when normalised, such as "Why?" or "Hello") counts only where it is all that a row asks, not
    one turn among several. Where items of a probe share a text, the first is named.
    """
    return LeakFinder(items).find(rows)


def rows_by_probe(leaks: Sequence[Leak]) -> dict[str, int]:
    """Rows that hold items, by probe."""
    return dict(Counter(probe for probe, _ in {(one.probe, one.row_id): None for one in leaks}))


class Place(NamedTuple):
    """Where a row stands."""

    source: str
    file: Path
    line: int
    row_id: str

    @classmethod
    def of(cls, row: Row) -> "Place":
        return cls(row.source, row.file, row.line, row.id)


@dataclass(frozen=True, eq=False)
class Looked:
    """What was met in a part of a source.

    Attributes:
        count: rows of the part.
        found: by row and item, the kind and the score of what one row shows by itself.
        places: where rows stand of which anything was met.
        rows, hashes: runs of items that stand in rows. Whether they cover an item is known when all parts are seen.
    """

    count: int
    found: dict[int, dict[int, tuple[How, float]]]
    places: dict[int, Place]
    rows: NDArray[np.int64]
    hashes: Hashes


class LeakFinder:
    """The items of probes, made ready once to search any number of sources."""

    def __init__(self, items: Iterable[ProbeText]) -> None:
        self._wanted: dict[str, dict[str, ProbeText]] = {}
        for item in items:
            key = normalise_text(item.text) or item.text
            self._wanted.setdefault(key, {}).setdefault(item.probe, item)
        self._items = [(item, key) for key, each in self._wanted.items() for item in each.values()]
        self._near = _Near(self._items)
        self._contained = _Contained(self._items)

    def find(self, rows: Iterable[Row]) -> list[Leak]:
        """Leaks in one source's rows, read once; see `find_leaks`."""
        return [leak for _, leak in self.judge([self.look(rows)])]

    def look(self, rows: Iterable[Row]) -> "Looked":
        """What is met in a part of a source: parts may be looked through apart, and are judged together."""
        found: dict[int, dict[int, tuple[How, float]]] = {}
        places: dict[int, Place] = {}
        count = 0
        number = {item: i for i, (item, _) in enumerate(self._items)}
        contained = _Hits()
        for batch in batched(rows, BATCH_ROWS):
            turns, of_row = [], []
            for i, row in enumerate(batch):
                kinds: dict[int, tuple[How, float]] = {}
                for text, key, is_all in _turns(row):
                    turns.append(key)
                    of_row.append(count + i)
                    for item, how in self._equal(text, key, is_all):
                        if kinds.get(number[item], ("", 0))[0] != "exact":
                            kinds[number[item]] = (how, 1.0)
                if kinds:
                    found[count + i] = kinds
            for turn, item_number, value in self._near.hits(turns):
                kinds = found.setdefault(of_row[turn], {})
                kinds.setdefault(item_number, ("near-duplicate", value))
            contained.add(self._contained.hits(turns, np.array(of_row, dtype=np.int64)))
            hit = {one for one in found if one >= count} | set(contained.rows_from(count).tolist())
            places |= {one: Place.of(batch[one - count]) for one in hit}
            count += len(batch)
        return Looked(count, found, places, contained.rows, contained.hashes)

    def judge(self, parts: Sequence["Looked"]) -> list[tuple[int, Leak]]:
        """Leaks in one source, of all its parts in order, each with the number of its row in the source."""
        found: dict[int, dict[int, tuple[How, float]]] = {}
        places: dict[int, Place] = {}
        contained = _Hits()
        count = 0
        for part in parts:
            found |= {count + row: dict(kinds) for row, kinds in part.found.items()}
            places |= {count + row: place for row, place in part.places.items()}
            contained.add((part.rows + count, part.hashes))
            count += part.count
        for row_number, item_number, how, value in self._contained.covered(contained, rows=count):
            found.setdefault(row_number, {}).setdefault(item_number, (how, value))
        return [
            (row_number, leak)
            for row_number in sorted(found)
            for leak in self._once(places[row_number], found[row_number])
        ]

    def _once(self, place: Place, found: Mapping[int, tuple[How, float]]) -> list[Leak]:
        """One leak of each item, where several texts stand for one: of the first kind, and of its highest score."""
        best: dict[tuple[str, str], Leak] = {}
        for item_number in sorted(found):
            leak = self._leak(place, item_number, *found[item_number])
            known = best.setdefault((leak.probe, leak.item), leak)
            if (_KINDS.index(leak.how), -leak.score) < (_KINDS.index(known.how), -known.score):
                best[leak.probe, leak.item] = leak
        return list(best.values())

    def _equal(self, text: str, key: str, is_all: bool) -> Iterator[tuple[ProbeText, How]]:
        if key in self._wanted and (len(key) >= SHORT_CHARACTERS or is_all):
            for item in self._wanted[key].values():
                yield item, "exact" if item.text.strip() == text.strip() else "normalised"

    def _leak(self, place: Place, item_number: int, how: How, score: float) -> Leak:
        item = self._items[item_number][0]
        return Leak(*place[:3], item.probe, item.item, how, round(score, 4), place.row_id)


class _Near:
    """Items by their shingles, less templates; those that are too short are never met."""

    def __init__(self, items: Sequence[tuple[ProbeText, str]]) -> None:
        whole = shingle([key for _, key in items])
        self._templates = _item_templates(whole, items)
        left = whole.without(self._templates)
        self._rows = np.flatnonzero(left.sizes >= MIN_SHINGLES)
        self._shingles = left.take(self._rows)
        self._rarity = Rarity.of(self._shingles)
        self._postings = postings_of(self._shingles, self._rarity, MIN_JACCARD)

    def hits(self, turns: Sequence[str]) -> Iterator[tuple[int, int, float]]:
        """Turn, item and similarity."""
        new = shingle(turns).without(self._templates)
        pairs = pairs_between(new, self._shingles, self._postings, self._rarity, MIN_JACCARD)
        for turn, place, value in zip(*(one.tolist() for one in pairs), strict=True):
            yield turn, int(self._rows[place]), value


class _Run(NamedTuple):
    """Where a run stands: the item, and its first word."""

    item: int
    word: int


class _Hits:
    """Runs of items that were met in rows: pairs of a row and a hash."""

    def __init__(self) -> None:
        self.rows = np.zeros(0, np.int64)
        self.hashes = np.zeros(0, np.uint64)

    def add(self, met: tuple[NDArray[np.int64], Hashes]) -> None:
        self.rows, self.hashes = np.concatenate([self.rows, met[0]]), np.concatenate([self.hashes, met[1]])

    def rows_from(self, first: int) -> NDArray[np.int64]:
        # Not np.unique, for which numpy imports its masked arrays.
        return first + np.flatnonzero(np.bincount(self.rows[self.rows >= first] - first))


class _Contained:
    """Runs of 8 words of items, free of template words, with their places."""

    def __init__(self, items: Sequence[tuple[ProbeText, str]]) -> None:
        texts = [key for _, key in items]
        found, short = runs(texts, RUN_WORDS), runs(texts, WIDTH)
        templates = _item_templates(shingle(texts), items)
        counts = runs(texts, 1).sizes.tolist()
        self._places: dict[int, list[_Run]] = {}
        self._words: list[int] = []
        is_template = np.isin(short.hashes, templates)
        for i, words in enumerate(counts):
            is_own = np.ones(words, np.bool_)
            for word in np.flatnonzero(is_template[short.starts[i] : short.starts[i + 1]]).tolist():
                is_own[word : word + WIDTH] = False
            self._words.append(int(is_own.sum()))
            for word, one in enumerate(_row(found, i).tolist() if words >= RUN_WORDS else ()):
                if is_own[word : word + RUN_WORDS].all():
                    self._places.setdefault(one, []).append(_Run(i, word))
        self._known = np.array(sorted(self._places), dtype=np.uint64)

    def hits(self, turns: Sequence[str], of_row: NDArray[np.int64]) -> tuple[NDArray[np.int64], Hashes]:
        """Rows, and the runs of items that stand in them."""
        if len(self._known) == 0 or not turns:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64)
        found = shingle(turns, RUN_WORDS)
        place = np.minimum(np.searchsorted(self._known, found.hashes), len(self._known) - 1)
        is_known = self._known[place] == found.hashes
        return np.repeat(of_row, found.sizes)[is_known], found.hashes[is_known]

    def covered(self, hits: _Hits, *, rows: int) -> Iterator[tuple[int, int, How, float]]:
        """Row, item, kind and coverage where it is large enough."""
        share, least = ROW_TEMPLATE
        in_rows = Counter(one for row, one in {*zip(hits.rows.tolist(), hits.hashes.tolist(), strict=True)})
        words: dict[tuple[int, int], set[int]] = {}
        for row, one in zip(hits.rows.tolist(), hits.hashes.tolist(), strict=True):
            if in_rows[one] > max(share * rows, least):
                continue
            for run in self._places[one]:
                words.setdefault((row, run.item), set()).update(range(run.word, run.word + RUN_WORDS))
        for (row, item), found in words.items():
            coverage = len(found) / self._words[item]
            if coverage >= (MIN_COVERAGE if self._words[item] >= WHOLE_WORDS else 1.0):
                yield row, item, "contained", coverage
            elif coverage >= MIN_OVERLAP:
                yield row, item, "overlap", coverage


def _item_templates(shingles: Shingles, items: Sequence[tuple[ProbeText, str]]) -> Hashes:
    """Hashes that many items of one probe share."""
    share, least = ITEM_TEMPLATE
    found = [np.zeros(0, np.uint64)]
    probes = np.array([item.probe for item, _ in items])
    for probe in dict.fromkeys(probes.tolist()):
        own = np.flatnonzero(probes == probe)
        hashes, counts = np.unique(shingles.take(own).hashes, return_counts=True)
        found.append(hashes[counts > max(share * len(own), least)])
    return distinct(np.concatenate(found))


def _row(shingles: Shingles, i: int) -> Hashes:
    return shingles.hashes[shingles.starts[i] : shingles.starts[i + 1]]


def _turns(row: Row) -> Iterator[tuple[str, str, bool]]:
    """Texts of a row, as they are and normalised, each with whether it is all that the row asks."""
    for text, is_all in _texts(row):
        yield text, normalise_text(text) or text.strip(), is_all


def _texts(row: Row) -> Iterator[tuple[str, bool]]:
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
