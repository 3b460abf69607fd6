"""What happened, in order: an append-only sqlite file whose events are chained by hash.

An event's hash covers its sequence number, kind, key, body, volatile facts and the hash before it. The body holds what
a repeated run would write again, bit for bit; times and machine facts are `volatile`. Every event but a failure is also
a small object in the workspace, so that the ledger can be rebuilt from folders.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import WorkspaceError
from evertune.failpoint import reach
from evertune.hashing import canonical_json, digest_json
from evertune.workspace import Manifest, Problem, Workspace, write_atomically

GENESIS = "0" * 64
VERSION = 1
# Kinds that a repeated run need not write again.
UNREPEATABLE = ("failure", "run")
SCHEMA = """
CREATE TABLE event (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    volatile TEXT NOT NULL,
    prev TEXT NOT NULL,
    hash TEXT NOT NULL,
    UNIQUE (kind, key)
) STRICT;
CREATE TRIGGER event_is_never_updated BEFORE UPDATE ON event
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER event_is_never_deleted BEFORE DELETE ON event
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class Event:
    """One fact. `body` repeats exactly when a run is repeated; `volatile` (time, seconds, machine) does not."""

    seq: int
    kind: str
    key: str
    body: dict[str, Any]
    volatile: dict[str, Any]
    prev: str
    hash: str


class Ledger:
    """Reads and appends events of one workspace. Appending needs the workspace's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, *, create: bool) -> "Ledger":
        """Open a ledger, making it when asked.

        Raises:
            WorkspaceError: it is missing, not a ledger, or of a newer version.
        """
        if not path.exists() and not create:
            raise WorkspaceError(f"there is no ledger at {path}.", remedy="Run a recipe first.")
        ledger = cls(path)
        with ledger._connect() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
            elif version != VERSION:
                raise WorkspaceError(
                    f"{path} has version {version}; this Evertune reads version {VERSION}.",
                    remedy="Use the Evertune that wrote it, or a newer one.",
                )
        return ledger

    def append(self, kind: str, key: str, body: Mapping[str, Any], *, volatile: Mapping[str, Any]) -> Event:
        """Append an event in one transaction; the same (kind, key) again returns the stored event unchanged.

        Raises:
            WorkspaceError: the file cannot be written.
        """
        present = self.find(kind, key)
        if present is not None:
            return present
        reach("ledger.begin")
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            last = connection.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
            seq, prev = (last[0] + 1, last[1]) if last else (1, GENESIS)
            facts = {"seq": seq, "kind": kind, "key": key, "body": dict(body), "volatile": dict(volatile), "prev": prev}
            event = Event(**facts, hash=digest_json(facts))  # type: ignore[arg-type]
            connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", _row(event))
            reach("ledger.inserted")
            connection.execute("COMMIT")
        reach("ledger.committed")
        return event

    def events(self, kind: str | None = None) -> list[Event]:
        """All events in order, or those of one kind."""
        query = "SELECT * FROM event" + (" WHERE kind = ?" if kind else "") + " ORDER BY seq"
        with self._connect() as connection:
            return [_event(row) for row in connection.execute(query, (kind,) if kind else ())]

    def find(self, kind: str, key: str) -> Event | None:
        """The event of this kind and key, or None."""
        with self._connect() as connection:
            row = connection.execute("SELECT * FROM event WHERE kind = ? AND key = ?", (kind, key)).fetchone()
        return _event(row) if row else None

    def head(self) -> str:
        """Hash of the last event; 64 zeros for an empty ledger."""
        with self._connect() as connection:
            row = connection.execute("SELECT hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        return str(row[0]) if row else GENESIS

    def tree(self) -> str:
        """Digest of what happened, whenever and however often it was interrupted.

        Order, times and machine facts are left out, and so are failures and the notes that a run began: a run that was
        killed and started again has the tree of one that was not.
        """
        facts = [[one.kind, one.key, one.body] for one in self.events() if one.kind not in UNREPEATABLE]
        return digest_json(sorted(facts, key=canonical_json))

    def verify(self) -> list[Problem]:
        """Every event whose hash, number or predecessor does not fit."""
        problems = []
        prev, seq = GENESIS, 1
        for one in self.events():
            facts = {name: getattr(one, name) for name in ("seq", "kind", "key", "body", "volatile", "prev")}
            place = f"{self.path} event {one.seq} ({one.kind})"
            if one.seq != seq:
                problems.append(Problem(place, f"number {one.seq}", f"number {seq}"))
            if one.prev != prev:
                problems.append(Problem(place, f"predecessor {one.prev[:12]}", f"predecessor {prev[:12]}"))
            if one.hash != digest_json(facts):
                problems.append(Problem(place, "content that does not match its hash", f"hash {one.hash[:12]}"))
            prev, seq = one.hash, one.seq + 1
        return problems

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=10)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                # FULL: an acknowledged event survives a power loss, not only a crash.
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            remedy = "If the file is damaged, move it away and run 'evertune verify': it is rebuilt from the objects."
            raise WorkspaceError(f"the ledger {self.path} cannot be used: {error}.", remedy=remedy) from error
        except OSError as error:
            raise WorkspaceError(
                f"the ledger {self.path} cannot be written: {error.strerror or error}.",
                remedy="Free the disk and run the same command again: nothing is lost.",
            ) from error


def record_event(
    workspace: Workspace, ledger: Ledger, kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any]
) -> Event:
    """Publish the event as an object, then append it; the same (kind, key) again changes nothing."""
    present = ledger.find(kind, key)
    if present is not None:
        return present
    seq = len(ledger.events()) + 1
    record = {"event": {"kind": kind, "key": key, "body": body, "volatile": volatile, "seq": seq}}
    workspace.publish(kind="event", key=_object_key(kind, key), record=record, write=lambda folder: None)
    return ledger.append(kind, key, body, volatile=volatile)


def adopt_orphans(workspace: Workspace, ledger: Ledger) -> list[Event]:
    """Append the events whose objects were published before a crash and whose rows were not yet written."""
    orphans = []
    for manifest in workspace.manifests():
        if manifest.kind == "event":
            event = manifest.record["event"]
            if ledger.find(event["kind"], event["key"]) is None:
                orphans.append(manifest)
    return [_append_from(ledger, manifest) for manifest in sorted(orphans, key=lambda one: one.record["event"]["seq"])]


def rebuild(path: Path, workspace: Workspace) -> Ledger:
    """Make a ledger anew from the workspace's objects. Failures, which no object holds, are not in it.

    Raises:
        WorkspaceError: a ledger is there already.
    """
    if path.exists():
        raise WorkspaceError(f"{path} exists.", remedy="Move it away before rebuilding.")
    ledger = Ledger.open(path, create=True)
    adopt_orphans(workspace, ledger)
    return ledger


def champion(ledger: Ledger) -> Event | None:
    """The last promotion or rollback; None while the base stands."""
    decided = [event for event in ledger.events() if event.kind in ("promotion", "rollback")]
    return decided[-1] if decided else None


def write_current(workspace: Workspace, ledger: Ledger) -> None:
    """Mirror champion and head in `current.json`, for readers without sqlite, and against a cut-off ledger."""
    now = champion(ledger)
    body = {"champion": now.body["label"] if now else "base", "checkpoint": now.body["checkpoint"] if now else None}
    reach("current.begin")
    data = canonical_json({**body, "head": ledger.head(), "events": len(ledger.events())})
    place = workspace.root / "current.json"
    if not place.exists() or place.read_bytes() != data:
        try:
            write_atomically(place, data)
        except OSError as error:
            raise WorkspaceError(f"{place} cannot be written: {error.strerror}.", remedy="Check the disk.") from error
    reach("current.end")


def verify_workspace(workspace: Workspace, ledger: Ledger) -> list[Problem]:
    """Read every byte of a workspace again: objects, ledger chain, `current.json`, and that they agree."""
    problems = [problem for one in sorted(workspace.keys()) for problem in workspace.verify(one)]
    problems += ledger.verify()
    events = ledger.events()
    for event in events:
        if event.kind == "failure":
            continue
        for key in (_object_key(event.kind, event.key), event.body.get("object")):
            if key and not workspace.path(key).is_dir():
                problems.append(Problem(f"objects/{key}", "nothing", f"the object of event {event.seq} ({event.kind})"))
    if not problems:
        problems += _disagreements(workspace, events)
    return problems + _current_problems(workspace, ledger, events)


def _disagreements(workspace: Workspace, events: list[Event]) -> list[Problem]:
    """Events whose object says something else, and event objects that the ledger does not have."""
    rows = {_object_key(event.kind, event.key): event for event in events if event.kind != "failure"}
    problems = []
    for manifest in workspace.manifests():
        if manifest.kind != "event":
            continue
        row = rows.get(manifest.key)
        if row is None:
            problems.append(Problem(f"objects/{manifest.key}", "an event the ledger lacks", "a row in the ledger"))
        elif canonical_json(row.body) != canonical_json(manifest.record["event"]["body"]):
            problems.append(Problem(f"ledger event {row.seq}", "another body than its object's", "the same body"))
    return problems


def _current_problems(workspace: Workspace, ledger: Ledger, events: list[Event]) -> list[Problem]:
    place = workspace.root / "current.json"
    if not place.exists():
        return []
    try:
        body = json.loads(place.read_bytes())
        count, head = int(body["events"]), str(body["head"])
    except (ValueError, KeyError, TypeError) as error:
        return [Problem(str(place), f"unreadable ({error})", "champion, head and number of events")]
    if count > len(events) or (count and events[count - 1].hash != head):
        return [Problem(str(ledger.path), f"{len(events)} events", f"event {count} with hash {head[:12]}")]
    return []


def _object_key(kind: str, key: str) -> str:
    return digest_json({"event": kind, "key": key})


def _append_from(ledger: Ledger, manifest: Manifest) -> Event:
    event = manifest.record["event"]
    return ledger.append(event["kind"], event["key"], event["body"], volatile=event["volatile"])


def _row(event: Event) -> tuple[Any, ...]:
    body, volatile = canonical_json(event.body).decode(), canonical_json(event.volatile).decode()
    return (event.seq, event.kind, event.key, body, volatile, event.prev, event.hash)


def _event(row: tuple[Any, ...]) -> Event:
    seq, kind, key, body, volatile, prev, digest = row
    return Event(seq, kind, key, json.loads(body), json.loads(volatile), prev, digest)
