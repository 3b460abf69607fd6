"""A row's way into a model: which stages were given it, which checkpoints stand on those, and what still holds it.

Rows are looked for by the digest of their whole text or of one turn, normalised, so a question alone finds its rows.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.data.cleaned import KIND, find_seen, line_digests, text_digests
from evertune.data.rows import iter_rows
from evertune.errors import RecipeError
from evertune.hashing import digest_json
from evertune.ledger import Event, record_event, write_current
from evertune.lineage import Opened, current_events
from evertune.workspace import Manifest


@dataclass(frozen=True)
class Sighting:
    """A source of a stage that holds the row.

    Attributes:
        label, round: of the checkpoint that the stage made.
        role: `new` or `replay`.
        lines: the row's lines within the source as it was read.
        shown: how often a row of this source was shown on average; below 1 it may not have been.
    """

    label: str
    round: str
    role: str
    source: str
    lines: list[int]
    shown: float


@dataclass(frozen=True)
class Trace:
    """Where a text has been.

    Attributes:
        sightings: stages that were given it.
        standing: labels of checkpoints that were trained on it or start from one that was.
        kept_out: sources in which it stood and from which it was left out: a probe item, or removed.
        files: files of the workspace that hold it still.
    """

    sightings: list[Sighting]
    standing: list[str]
    kept_out: list[str]
    files: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "sightings": [one.__dict__ for one in self.sightings]}


def trace(opened: Opened, text: str) -> Trace:
    """Where a text, or a row given as JSON, went: through every source that a stage of this workspace was given."""
    digests = text_digests(text)
    sightings: list[Sighting] = []
    kept_out: list[str] = []
    files: list[str] = []
    checkpoints = [event for event in opened.ledger.events() if event.kind == "checkpoint"]
    for manifest in opened.workspace.manifests():
        folder = opened.workspace.path(manifest.key)
        if manifest.kind == KIND:
            lines, out = find_seen(folder, digests)
            if out:
                kept_out.append(manifest.record["source"])
            if lines:
                sightings += [one for event in checkpoints if (one := _sighting(event, manifest, lines)) is not None]
        if manifest.kind in (KIND, "history"):
            files += [str(path) for path in sorted(folder.glob("*.jsonl")) if _holds(path, digests)]
    trained = {one.label for one in sightings}
    return Trace(
        sightings=sorted(sightings, key=lambda one: (one.round, one.label, one.role, one.source)),
        standing=_standing(checkpoints, trained),
        kept_out=sorted(set(kept_out)),
        files=files,
    )


def remove(opened: Opened, texts: Sequence[str], *, reason: str) -> tuple[Event, list[Trace]]:
    """Record that rows must not be used again, and say where each has been.

    From the next round on they are left out of new data, replay and history. Rounds that are settled are not made anew:
    what was trained on the rows is named, so that a person can decide about it.

    Raises:
        RecipeError: there are no texts, or one is empty.
    """
    if not texts or not all(one.strip() for one in texts):
        raise RecipeError("found no text to remove, expected one or more, none of them empty.")
    traces = [trace(opened, one) for one in texts]
    settled = [one.key for one in current_events(opened.ledger) if one.kind == "settled"]
    body = {
        "texts": sorted({digest for one in texts for digest in text_digests(one)}),
        "checkpoints": sorted({label for one in traces for label in one.standing}),
        "after": settled[-1] if settled else "base",
        "reason": reason,
    }
    stamp = {"time": time.time()}
    with opened.workspace.lock(purpose="data remove"):
        event = record_event(opened.workspace, opened.ledger, "removal", digest_json({**body, **stamp}), body, stamp)
        write_current(opened.workspace, opened.ledger)
    return event, traces


def texts_of_file(path: Path, format: str) -> Iterator[str]:
    """The rows of a file as the JSON that `trace` and `remove` take."""
    for row in iter_rows(path, format=format, source=path.name):
        yield json.dumps(row.value, ensure_ascii=False)


def _sighting(event: Event, manifest: Manifest, lines: list[int]) -> Sighting | None:
    body, record = event.body, manifest.record
    source = record["source"]
    for one in body["data"]:
        if one["source"] == source and one["sha256"] in (record["given"], record["kept"]):
            shown = body["new_rows"] / max(sum(each["rows"] for each in body["data"]), 1)
            return Sighting(body["label"], body["round"], "new", source, lines, round(shown, 3))
    replay = body["replay"]
    if replay and replay["sources"].get(source) and replay["sha256"][source] in (record["given"], record["kept"]):
        shown = replay["rows"] / max(replay["pool_rows"], 1)
        return Sighting(body["label"], body["round"], "replay", source, lines, round(shown, 3))
    return None


def _standing(checkpoints: Sequence[Event], trained: set[str]) -> list[str]:
    """Labels of checkpoints that were trained on it, and of all that start from them."""
    digests = {event.body["digest"] for event in checkpoints if event.body["label"] in trained}
    before = -1
    while before != len(digests):
        before = len(digests)
        digests |= {event.body["digest"] for event in checkpoints if event.body["start"] in digests}
    return list(dict.fromkeys(event.body["label"] for event in checkpoints if event.body["digest"] in digests))


def _holds(path: Path, digests: Sequence[str]) -> bool:
    wanted = set(digests)
    with path.open(encoding="utf-8") as file:
        return any(not wanted.isdisjoint(line_digests(line)) for line in file)
