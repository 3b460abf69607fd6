"""What happened, in order: an append-only sqlite file whose events are chained by hash.

An event's hash covers its sequence number, kind, key, body, volatile facts and the hash before it. The body holds what
a repeated run would write again, bit for bit; times and machine facts are `volatile`. Every event but a failure is also
a small object in the workspace, so that the ledger can be rebuilt from folders.

What an alteration meets: triggers refuse UPDATE, DELETE and REPLACE; without them, the chain shows an edited, removed
or reordered row; `current.json` and the events' objects show a cut-off end. Who rewrites ledger, objects and
`current.json` alike is found only by someone who kept an earlier `head()`.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import IntegrityError, WorkspaceError
from evertune.failpoint import reach
from evertune.hashing import canonical_json, digest_json
from evertune.workspace import Manifest, Problem, Workspace, read_manifest, write_atomically
from evertune.workspace.disk import disk_error

GENESIS = "0" * 64
VERSION = 1
BUSY_SECONDS = 10.0
# Kinds that a repeated run need not write again.
UNREPEATABLE = ("failure", "position", "run")
SCHEMA = (
    """CREATE TABLE event (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    body TEXT NOT NULL,
    volatile TEXT NOT NULL,
    prev TEXT NOT NULL,
    hash TEXT NOT NULL,
    UNIQUE (kind, key)
) STRICT""",
    """CREATE TRIGGER event_is_never_updated BEFORE UPDATE ON event
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER event_is_never_deleted BEFORE DELETE ON event
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    # INSERT OR REPLACE deletes without calling the trigger on DELETE.
    """CREATE TRIGGER event_is_never_replaced BEFORE INSERT ON event
    WHEN EXISTS (SELECT 1 FROM event WHERE seq >= NEW.seq OR (kind = NEW.kind AND key = NEW.key))
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)
_REBUILT = "If the file is damaged, move it away and run the recipe again: it is rebuilt from the objects."
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "Another program has it open: close that and run the same command again.",
    sqlite3.SQLITE_FULL: "Free some disk space and run the same command again: nothing is lost.",
    sqlite3.SQLITE_IOERR: "Free some disk space or check the disk, and run the same command again: nothing is lost.",
    sqlite3.SQLITE_READONLY: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_CANTOPEN: "Check that it is there, and the permissions of the file and its folder.",
}


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
            WorkspaceError: it is missing, not a ledger, of another version, or cannot be used.
        """
        if not create and not path.exists():
            raise WorkspaceError(f"there is no ledger at {path}.", remedy="Run a recipe first.")
        ledger = cls(path)
        with ledger._connect(create=create) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if create and version == 0 and tables == 0:
                ledger._make(connection)
            elif version != VERSION:
                found = f"has version {version}" if version else "is no ledger"
                raise WorkspaceError(
                    f"{path} {found}; this Evertune reads version {VERSION}.",
                    remedy=_REBUILT if version == 0 else "Use the Evertune that wrote it, or a newer one.",
                )
        return ledger

    def append(self, kind: str, key: str, body: Mapping[str, Any], *, volatile: Mapping[str, Any]) -> Event:
        """Append an event in one transaction; the same (kind, key) again returns the stored event unchanged.

        Raises:
            WorkspaceError: the file cannot be written; the event is then not in it.
            ValueError: body or volatile holds what JSON cannot, such as NaN.
        """
        with self._connect() as connection:
            reach("ledger.begin")
            connection.execute("BEGIN IMMEDIATE")
            present = _find(connection, kind, key)
            if present is not None:
                return present
            last = connection.execute("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
            seq, prev = (last[0] + 1, last[1]) if last else (1, GENESIS)
            event = _chained(seq, kind, key, dict(body), dict(volatile), prev)
            connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", _row(event))
            reach("ledger.inserted")
            connection.execute("COMMIT")
            reach("ledger.committed")
        return event

    def events(self, kind: str | None = None) -> list[Event]:
        """All events in order, or those of one kind.

        Raises:
            IntegrityError: a row is not what was appended, taken by itself; `verify` checks the chain too.
        """
        query = "SELECT * FROM event" + (" WHERE kind = ?" if kind else "") + " ORDER BY seq"
        with self._connect() as connection:
            return [_event(row) for row in connection.execute(query, (kind,) if kind else ())]

    def find(self, kind: str, key: str) -> Event | None:
        """The event of this kind and key, or None."""
        with self._connect() as connection:
            return _find(connection, kind, key)

    def head(self) -> str:
        """Hash of the last event; 64 zeros for an empty ledger. It stands for all that happened."""
        with self._connect() as connection:
            row = connection.execute("SELECT hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        return str(row[0]) if row else GENESIS

    def count(self) -> int:
        """Number of events."""
        with self._connect() as connection:
            return int(connection.execute("SELECT count(*) FROM event").fetchone()[0])

    def tree(self) -> str:
        """Digest of what happened, whenever and however often it was interrupted.

        Order, times and machine facts are left out, and so are failures and the notes that a run began: a run that was
        killed and started again has the tree of one that was not.
        """
        facts = [[one.kind, one.key, one.body] for one in self.events() if one.kind not in UNREPEATABLE]
        return digest_json(sorted(facts, key=canonical_json))

    def verify(self) -> list[Problem]:
        """Everything in which the file differs from a chain of appended events; empty when it is one."""
        return self.read_checked()[1]

    def read_checked(self) -> tuple[list[Event], list[Problem]]:
        """The events that can be read, and what `verify` finds."""
        try:
            with self._connect() as connection:
                rows = connection.execute("SELECT * FROM event ORDER BY seq").fetchall()
                state = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
                made = {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        except WorkspaceError as error:
            return [], [Problem(str(self.path), error.message, "a readable ledger")]
        problems = [] if state == "ok" else [Problem(str(self.path), state, "a sound sqlite file")]
        if made != set(SCHEMA):
            problems.append(Problem(str(self.path), "altered tables or triggers", "those it was made with"))
        events, broken = self._walk(rows)
        return events, problems + broken

    def _walk(self, rows: list[tuple[Any, ...]]) -> tuple[list[Event], list[Problem]]:
        events, problems = [], []
        prev, seq = GENESIS, 1
        for row in rows:
            place = f"{self.path} event {row[0]} ({row[1]})"
            if row[0] != seq:
                problems.append(Problem(place, f"number {row[0]}", f"number {seq}"))
            if row[5] != prev:
                problems.append(Problem(place, f"predecessor {row[5]}", f"predecessor {prev}"))
            try:
                events.append(_event(row))
            except IntegrityError as error:
                problems.append(Problem(place, error.message, f"the event with hash {row[6]}"))
            prev, seq = row[6], row[0] + 1
        return events, problems

    @contextlib.contextmanager
    def _connect(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._uri(create), uri=True, isolation_level=None, timeout=BUSY_SECONDS)
            try:
                # FULL: an acknowledged event survives a power loss, not only a crash.
                connection.execute("PRAGMA synchronous = FULL")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            # The low byte is the kind of error, the rest its detail.
            remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, _REBUILT)
            raise WorkspaceError(f"the ledger {self.path} cannot be used: {error}.", remedy=remedy) from error
        except OSError as error:
            raise disk_error(error, f"the ledger {self.path} cannot be written") from error

    def _uri(self, create: bool) -> str:
        place = self.path.absolute().as_uri()
        # sqlite wants to write beside a WAL file even to read it; one in a read-only folder is read as it lies.
        if not os.access(self.path.parent, os.W_OK) and not self.path.with_name(f"{self.path.name}-wal").exists():
            return f"{place}?mode=ro&immutable=1"
        return f"{place}?mode={'rwc' if create else 'rw'}"

    def _make(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")


def record_event(
    workspace: Workspace, ledger: Ledger, kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any]
) -> Event:
    """Publish the event as an object, then append it; the same (kind, key) again changes nothing.

    When the body names an `object`, the digest of its files is recorded beside it (`volatile["tree"]`): so the chain
    covers every byte that an event speaks of.
    """
    present = ledger.find(kind, key)
    if present is not None and workspace.path(_object_key(kind, key)).is_dir():
        return present
    if present is None:
        named = workspace.manifest(body["object"]) if body.get("object") else None
        bound = {"tree": named.tree} if named else {}
        facts = {"body": body, "volatile": {**volatile, **bound}, "seq": ledger.count() + 1}
    else:
        facts = {"body": present.body, "volatile": present.volatile, "seq": present.seq}
    return _append_from(ledger, _publish_event(workspace, kind, key, facts))


def adopt_orphans(workspace: Workspace, ledger: Ledger) -> list[Event]:
    """Make ledger and objects agree after a crash: call it under the lock, after `Workspace.recover`.

    Events whose objects were published before the crash and whose rows were not yet written are appended, in the order
    they were made; events whose objects are gone (quarantined, say) are published again from their rows.

    Returns:
        The appended events.

    Raises:
        IntegrityError: the ledger was altered; nothing must be built on it.
    """
    events, problems = ledger.read_checked()
    if problems:
        raise IntegrityError(
            f"{problems[0].place}: found {problems[0].found}, expected {problems[0].expected}.",
            remedy="Run 'evertune verify'. To go on, move the ledger away: it is rebuilt from the objects.",
        )
    known = {(event.kind, event.key) for event in events}
    orphans = [one for one in workspace.manifests() if one.kind == "event" and _name(one) not in known]
    for event in events:
        if event.kind != "failure" and not workspace.path(_object_key(event.kind, event.key)).is_dir():
            facts = {"body": event.body, "volatile": event.volatile, "seq": event.seq}
            _publish_event(workspace, event.kind, event.key, facts)
    return [_append_from(ledger, manifest) for manifest in sorted(orphans, key=lambda one: one.record["event"]["seq"])]


def rebuild(path: Path, workspace: Workspace) -> Ledger:
    """Make a ledger anew from the workspace's objects. Failures, which no object holds, are not in it.

    The tree is that of the lost ledger; hashes and head may differ.

    Raises:
        WorkspaceError: a ledger is there already.
    """
    if path.exists():
        raise WorkspaceError(f"{path} exists.", remedy="Move it away before rebuilding.")
    ledger = Ledger.open(path, create=True)
    adopt_orphans(workspace, ledger)
    return ledger


def champion(ledger: Ledger) -> Event | None:
    """The last promotion or rollback, by sequence, not by time; None while the base stands."""
    return _champion(ledger.events())


def write_current(workspace: Workspace, ledger: Ledger) -> None:
    """Mirror champion and head in `current.json`, for readers without sqlite, and against a cut-off ledger.

    Raises:
        WorkspaceError: the disk is full or cannot be written; the old file stands.
    """
    data = canonical_json(_current(ledger.events()))
    place = workspace.root / "current.json"
    try:
        reach("current.begin")
        if not place.is_file() or place.read_bytes() != data:
            write_atomically(place, data, through=workspace.tmp)
        reach("current.end")
    except OSError as error:
        raise disk_error(error, f"{place} cannot be written") from error


def verify_workspace(workspace: Workspace, ledger: Ledger) -> list[Problem]:
    """Read every byte of a workspace again: objects, ledger chain, `current.json`, and that they agree."""
    problems = workspace.verify_all()
    altered = {Path(one.place).relative_to(workspace.objects).parts[0] for one in problems}
    sound = {key: read_manifest(workspace.path(key)) for key in sorted({*workspace.keys()} - altered)}
    events, broken = ledger.read_checked()
    for event in events:
        problems += _event_problems(workspace, event, sound)
    known = {(event.kind, event.key) for event in events}
    for key, manifest in sound.items():
        if manifest.kind == "event" and _name(manifest) not in known:
            found = f"a {_name(manifest)[0]} event that the ledger lacks"
            expected = "its row: the ledger was cut, or a run stopped here and its next start adds the row"
            problems.append(Problem(str(workspace.path(key)), found, expected))
    return problems + broken + _current_problems(workspace, events)


def _event_problems(workspace: Workspace, event: Event, sound: Mapping[str, Manifest]) -> list[Problem]:
    """Where an event, its own object and the object it speaks of do not agree."""
    if event.kind == "failure":
        return []
    problems = []
    own, named = _object_key(event.kind, event.key), str(event.body.get("object") or "")
    for key in (own, named):
        if key and not workspace.path(key).exists():
            place = str(workspace.path(key))
            problems.append(Problem(place, "nothing", f"the object of event {event.seq} ({event.kind})"))
    if own in sound and not _says(sound[own], event):
        problems.append(Problem(str(workspace.path(own)), "another event than the ledger's", f"event {event.seq}"))
    if named in sound and sound[named].tree != event.volatile.get("tree", sound[named].tree):
        place, tree = str(workspace.path(named)), event.volatile["tree"]
        problems.append(Problem(place, f"tree {sound[named].tree}", f"tree {tree} of event {event.seq}"))
    return problems


def _current_problems(workspace: Workspace, events: list[Event]) -> list[Problem]:
    """Where `current.json`, if there is one, does not mirror the ledger as it was when the file was written."""
    place = workspace.root / "current.json"
    if not place.exists():
        return []
    try:
        found = json.loads(place.read_bytes())
        count = int(found["events"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Problem(str(place), f"unreadable: {error!r}", "champion, head and number of events")]
    expected = _current([event for event in events if event.seq <= count])
    if found != expected:
        return [Problem(str(place), _shown(found), f"{_shown(expected)}, which the ledger says")]
    return []


def _current(events: list[Event]) -> dict[str, Any]:
    now = _champion(events)
    return {
        "champion": now.body["label"] if now else "base",
        "checkpoint": now.body["checkpoint"] if now else None,
        "head": events[-1].hash if events else GENESIS,
        "events": len(events),
    }


def _shown(current: Mapping[str, Any]) -> str:
    return f"{current.get('events')} events, head {str(current.get('head'))[:12]}, champion {current.get('champion')}"


def _champion(events: list[Event]) -> Event | None:
    decided = [event for event in events if event.kind in ("promotion", "rollback")]
    return decided[-1] if decided else None


def _object_key(kind: str, key: str) -> str:
    return digest_json({"event": kind, "key": key})


def _publish_event(workspace: Workspace, kind: str, key: str, facts: Mapping[str, Any]) -> Manifest:
    record = {"event": {"kind": kind, "key": key, **facts}}
    return workspace.publish(kind="event", key=_object_key(kind, key), record=record, write=lambda folder: None)


def _append_from(ledger: Ledger, manifest: Manifest) -> Event:
    event = manifest.record["event"]
    return ledger.append(event["kind"], event["key"], event["body"], volatile=event["volatile"])


def _name(manifest: Manifest) -> tuple[str, str]:
    event = manifest.record["event"]
    return event["kind"], event["key"]


def _says(manifest: Manifest, event: Event) -> bool:
    stored = manifest.record["event"]
    return canonical_json([stored["body"], stored["volatile"]]) == canonical_json([event.body, event.volatile])


def _find(connection: sqlite3.Connection, kind: str, key: str) -> Event | None:
    row = connection.execute("SELECT * FROM event WHERE kind = ? AND key = ?", (kind, key)).fetchone()
    return _event(row) if row else None


def _chained(seq: int, kind: str, key: str, body: dict[str, Any], volatile: dict[str, Any], prev: str) -> Event:
    facts = {"seq": seq, "kind": kind, "key": key, "body": body, "volatile": volatile, "prev": prev}
    return Event(seq, kind, key, body, volatile, prev, digest_json(facts))


def _row(event: Event) -> tuple[Any, ...]:
    body, volatile = canonical_json(event.body).decode(), canonical_json(event.volatile).decode()
    return (event.seq, event.kind, event.key, body, volatile, event.prev, event.hash)


def _event(row: tuple[Any, ...]) -> Event:
    """The event of a row, whose bytes must be those that its hash was taken of."""
    seq, kind, key, body, volatile, prev, digest = row
    try:
        event = _chained(seq, kind, key, json.loads(body), json.loads(volatile), prev)
        is_altered = event.hash != digest or _row(event) != row
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"ledger event {seq} ({kind}) is not readable: {error}.", remedy="Run 'evertune verify'."
        ) from error
    if is_altered:
        raise IntegrityError(
            f"ledger event {seq} ({kind}) was altered: its content does not match its hash.",
            remedy="Run 'evertune verify'.",
        )
    return event
