"""The ledger only grows, survives what a disk can do, can be rebuilt from folders, and every altered row is named."""

import errno
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evertune import ledger as ledger_module
from evertune.errors import IntegrityError, WorkspaceError
from evertune.hashing import digest_json
from evertune.ledger import (
    Ledger,
    adopt_orphans,
    champion,
    rebuild,
    record_event,
    verify_workspace,
    write_current,
)
from evertune.workspace import Workspace
from tests.machine import as_nobody, folder_for_all, largest_file

OBJECT = "0b" * 32


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "run", create=True)


@pytest.fixture
def ledger(workspace: Workspace) -> Ledger:
    return Ledger.open(workspace.root / "ledger.sqlite", create=True)


def _record(workspace: Workspace, ledger: Ledger, kind: str, body: dict[str, Any], *, at: float = 1.0) -> None:
    record_event(workspace, ledger, kind, digest_json(body), body, {"time": at})


def _fill(workspace: Workspace, ledger: Ledger, *, at: float = 1.0) -> None:
    """A small history: a run, a checkpoint with an object, a failure, a probe, a promotion; mirrored."""
    workspace.publish(
        kind="checkpoint", key=OBJECT, record={}, write=lambda to: (to / "w").write_bytes(b"w" * 99) and None
    )
    _record(workspace, ledger, "run", {"name": "team"}, at=at)
    _record(workspace, ledger, "checkpoint", {"label": "one/1-sft", "digest": "d1", "object": OBJECT}, at=at)
    ledger.append("failure", "f1", {"error": "out of memory"}, volatile={"time": at})
    _record(workspace, ledger, "probe", {"label": "one/1-sft", "value": 0.75}, at=at)
    _record(workspace, ledger, "promotion", {"label": "one/1-sft", "checkpoint": "d1"}, at=at)
    write_current(workspace, ledger)


def _tamper(ledger: Ledger, *statements: str) -> None:
    """What someone with a sqlite shell can do."""
    with sqlite3.connect(ledger.path, isolation_level=None) as connection:
        made = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in made:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _, sql in made:
            connection.execute(sql)
    connection.close()


# Appending


def test_events_come_back_in_order_as_they_were_appended(ledger: Ledger) -> None:
    body = {"x": 0.1, "text": "é模\n", "deep": [{"n": None}, [1, 2.0, True]], "big": 10**18}
    first = ledger.append("probe", "k1", body, volatile={"time": 1.5})
    second = ledger.append("probe", "k2", {}, volatile={})
    third = ledger.append("run", "k1", {}, volatile={})
    assert ledger.events() == [first, second, third]
    assert ledger.events("run") == [third]
    assert (first.body, first.volatile, first.seq, third.seq) == (body, {"time": 1.5}, 1, 3)
    assert ledger.find("probe", "k2") == second
    assert ledger.find("run", "k2") is None
    assert ledger.count() == 3


def test_each_hash_covers_the_event_and_the_hash_before_it(ledger: Ledger) -> None:
    assert ledger.head() == "0" * 64
    first = ledger.append("run", "k", {"a": 1}, volatile={"time": 2.0})
    facts = {"seq": 1, "kind": "run", "key": "k", "body": {"a": 1}, "volatile": {"time": 2.0}, "prev": "0" * 64}
    assert first.hash == digest_json(facts)
    second = ledger.append("run", "k2", {}, volatile={})
    assert second.prev == first.hash
    assert ledger.head() == second.hash


def test_the_same_kind_and_key_again_returns_the_stored_event(ledger: Ledger) -> None:
    first = ledger.append("run", "k", {"a": 1}, volatile={"time": 1.0})
    assert ledger.append("run", "k", {"a": 2}, volatile={"time": 2.0}) == first
    assert ledger.count() == 1


def test_what_json_cannot_hold_is_refused_and_the_ledger_stays_usable(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="nan"):
        ledger.append("run", "k", {"loss": float("nan")}, volatile={})
    assert ledger.append("run", "k", {"loss": 1.0}, volatile={}).seq == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET body = '{}' WHERE seq = 1",
        "DELETE FROM event WHERE seq = 2",
        "DELETE FROM event",
        "INSERT OR REPLACE INTO event SELECT seq, kind, key, '{}', volatile, prev, hash FROM event WHERE seq = 1",
        "INSERT OR REPLACE INTO event SELECT 9, kind, key, '{}', volatile, prev, hash FROM event WHERE seq = 1",
        "INSERT INTO event SELECT 0, kind, 'new', body, volatile, prev, hash FROM event WHERE seq = 1",
    ],
)
def test_sqlite_itself_refuses_to_change_history(ledger: Ledger, statement: str) -> None:
    for key in ("a", "b"):
        ledger.append("run", key, {"key": key}, volatile={})
    with sqlite3.connect(ledger.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    assert ledger.count() == 2
    assert ledger.verify() == []


def test_a_commit_is_on_disk_before_append_returns(ledger: Ledger) -> None:
    with ledger._connect() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# What happened, and who is champion


def test_tree_says_what_happened_whenever_and_in_whatever_order(tmp_path: Path) -> None:
    trees = []
    for number, at in enumerate((1.0, 5e9)):
        workspace = Workspace.open(tmp_path / f"{number}", create=True)
        ledger = Ledger.open(workspace.root / "ledger.sqlite", create=True)
        _fill(workspace, ledger, at=at)
        trees.append(ledger.tree())
        ledger.append("failure", f"f{at}", {"error": "again"}, volatile={"time": at})
        _record(workspace, ledger, "run", {"name": "again"})
        assert ledger.tree() == trees[-1]
    assert trees[0] == trees[1]
    _record(workspace, ledger, "probe", {"label": "one/1-sft", "value": 0.5})
    assert ledger.tree() != trees[0]


def test_the_champion_is_the_last_promoted_by_number_though_the_clock_went_back(
    workspace: Workspace, ledger: Ledger
) -> None:
    assert champion(ledger) is None
    _record(workspace, ledger, "promotion", {"label": "two", "checkpoint": "d2"}, at=2_000_000_000.0)
    _record(workspace, ledger, "rollback", {"label": "one", "checkpoint": "d1"}, at=1_000_000_000.0)
    _record(workspace, ledger, "probe", {"label": "x"}, at=3_000_000_000.0)
    now = champion(ledger)
    assert now is not None
    assert now.body["label"] == "one"


def test_current_json_mirrors_champion_and_head(workspace: Workspace, ledger: Ledger) -> None:
    write_current(workspace, ledger)
    place = workspace.root / "current.json"
    assert json.loads(place.read_bytes()) == {"champion": "base", "checkpoint": None, "head": "0" * 64, "events": 0}
    _fill(workspace, ledger)
    expected = {"champion": "one/1-sft", "checkpoint": "d1", "head": ledger.head(), "events": 5}
    assert json.loads(place.read_bytes()) == expected
    before = place.stat().st_ino
    write_current(workspace, ledger)
    assert place.stat().st_ino == before


# Publish, then record; adopt; rebuild


def test_an_event_is_also_an_object(workspace: Workspace, ledger: Ledger) -> None:
    body = {"label": "base"}
    event = record_event(workspace, ledger, "probe", "k", body, {"time": 3.0})
    (manifest,) = workspace.manifests()
    recorded = {"kind": "probe", "key": "k", "body": body, "volatile": {"time": 3.0}, "seq": 1}
    assert manifest.record == {"event": recorded}
    assert record_event(workspace, ledger, "probe", "k", {"label": "other"}, {}) == event
    assert len(workspace.keys()) == ledger.count() == 1


def test_an_event_that_names_an_object_holds_the_digest_of_its_files(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    manifest = workspace.manifest(OBJECT)
    assert manifest is not None
    assert ledger.events("checkpoint")[0].volatile["tree"] == manifest.tree


def test_events_published_before_a_crash_are_appended_in_the_order_they_were_made(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path, create=True)
    ahead = Ledger.open(tmp_path / "ahead.sqlite", create=True)
    for number in range(8):
        _record(workspace, ahead, "probe", {"number": number}, at=float(-number))
    ledger = Ledger.open(tmp_path / "ledger.sqlite", create=True)
    adopted = adopt_orphans(workspace, ledger)
    assert [event.body["number"] for event in adopted] == list(range(8))
    assert ledger.events() == adopted == ahead.events()
    assert adopt_orphans(workspace, ledger) == []


def test_a_published_event_that_was_not_adopted_is_appended_as_published(workspace: Workspace, ledger: Ledger) -> None:
    ahead = Ledger.open(workspace.root / "ahead.sqlite", create=True)
    published = record_event(workspace, ahead, "probe", "k", {"value": 1}, {"time": 1.0})
    assert record_event(workspace, ledger, "probe", "k", {"value": 1}, {"time": 2.0}) == published


@pytest.mark.parametrize("restore", [adopt_orphans, lambda workspace, ledger: _fill(workspace, ledger)])
def test_an_event_whose_object_is_lost_gets_it_back(
    workspace: Workspace, ledger: Ledger, restore: Callable[[Workspace, Ledger], Any]
) -> None:
    _fill(workspace, ledger)
    before = {one.key: one for one in workspace.manifests()}
    for key in before:
        if key != OBJECT:
            shutil.rmtree(workspace.path(key))
    assert len(verify_workspace(workspace, ledger)) == 4
    restore(workspace, ledger)
    assert verify_workspace(workspace, ledger) == []
    assert {one.key: one for one in workspace.manifests()} == before


def test_a_lost_ledger_is_rebuilt_from_the_objects(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    again = rebuild(workspace.root / "again.sqlite", workspace)
    assert again.tree() == ledger.tree()
    assert [event.kind for event in again.events()] == ["run", "checkpoint", "probe", "promotion"]
    assert [event.volatile for event in again.events()] == [
        event.volatile for event in ledger.events() if event.kind != "failure"
    ]
    assert again.verify() == []
    with pytest.raises(WorkspaceError, match="exists"):
        rebuild(workspace.root / "again.sqlite", workspace)


def test_nothing_is_built_on_an_altered_ledger(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    _tamper(ledger, "UPDATE event SET body = replace(body, '0.75', '0.95')")
    with pytest.raises(IntegrityError, match=r"event 4 \(probe\).*move the ledger away"):
        adopt_orphans(workspace, ledger)


# Verification


def test_an_untouched_workspace_has_no_problem(workspace: Workspace, ledger: Ledger) -> None:
    assert verify_workspace(workspace, ledger) == []
    _fill(workspace, ledger)
    assert verify_workspace(workspace, ledger) == []
    _record(workspace, ledger, "probe", {"after": "current.json was written"})
    assert verify_workspace(workspace, ledger) == []


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "change",
    [
        "kind = 'x' || kind",
        "key = 'x' || key",
        'body = \'{"label":"forged"}\'',
        "body = body || ' '",
        "body = 'not JSON'",
        "body = '{\"x\":NaN}'",
        "volatile = replace(volatile, '1.0', '1.5')",
        "prev = replace(prev, substr(prev, 1, 1), 'x')",
        "hash = substr(hash, 2) || 'f'",
        "seq = seq + 100",
    ],
)
def test_an_edit_of_any_field_of_any_row_is_found_and_named(
    workspace: Workspace, ledger: Ledger, seq: int, change: str
) -> None:
    _fill(workspace, ledger)
    _tamper(ledger, f"UPDATE event SET {change} WHERE seq = {seq}")
    numbers = {f"event {seq} ", f"event {seq + 100} "}
    assert any(number in one.place for one in ledger.verify() for number in numbers)
    assert verify_workspace(workspace, ledger) != []


def test_a_row_forged_with_a_right_hash_breaks_the_chain_after_it(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    event = ledger.events()[3]
    forged = ledger_module._chained(4, "probe", event.key, {**event.body, "value": 1.0}, event.volatile, event.prev)
    body = ledger_module._row(forged)[3]
    _tamper(ledger, f"UPDATE event SET body = '{body}', hash = '{forged.hash}' WHERE seq = 4")
    assert [one.place.split("sqlite ")[1] for one in ledger.verify()] == ["event 5 (promotion)"]


def test_a_gap_in_the_numbers_is_found_though_the_hashes_fit(ledger: Ledger) -> None:
    first = ledger.append("run", "a", {}, volatile={})
    forged = ledger_module._chained(3, "run", "b", {}, {}, first.hash)
    with ledger._connect() as connection:
        connection.execute("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", ledger_module._row(forged))
    assert [(one.found, one.expected) for one in ledger.verify()] == [("number 3", "number 2")]


def test_a_whole_chain_forged_after_an_edit_differs_from_the_objects_and_from_current(
    workspace: Workspace, ledger: Ledger
) -> None:
    _fill(workspace, ledger)
    events = ledger.events()
    ledger.path.unlink()
    forged = Ledger.open(ledger.path, create=True)
    for event in events:
        body = {**event.body, "value": 1.0} if event.kind == "probe" else event.body
        forged.append(event.kind, event.key, body, volatile=event.volatile)
    assert forged.verify() == []
    places = [Path(one.place).name for one in verify_workspace(workspace, forged)]
    assert places == [ledger_module._object_key("probe", events[3].key), "current.json"]


def test_a_removed_row_is_found_wherever_it_stood(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    _tamper(ledger, "DELETE FROM event WHERE seq = 3")
    assert "event 4 (probe)" in ledger.verify()[0].place
    with sqlite3.connect(ledger.path, isolation_level=None) as connection:
        connection.execute("DROP TRIGGER event_is_never_deleted")
        connection.execute("DELETE FROM event")
    connection.close()
    assert [one.found for one in ledger.verify()] == ["altered tables or triggers"]


def test_a_cut_off_end_is_found_though_the_chain_is_sound(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    key = ledger_module._object_key("promotion", ledger.events()[4].key)
    _tamper(ledger, "DELETE FROM event WHERE seq = 5")
    assert ledger.verify() == []
    problems = verify_workspace(workspace, ledger)
    assert [Path(one.place).name for one in problems] == [key, "current.json"]
    assert problems[0].found == "a promotion event that the ledger lacks"
    # A failure has no object: only current.json knows of it.
    _tamper(ledger, "DELETE FROM event WHERE seq >= 3")
    assert Path(verify_workspace(workspace, ledger)[-1].place).name == "current.json"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'{"events": "many"}', b'{"champion":"base","checkpoint":null,"events":5,"head":"x"}']
)
def test_a_changed_current_json_is_found(workspace: Workspace, ledger: Ledger, data: bytes) -> None:
    _fill(workspace, ledger)
    (workspace.root / "current.json").write_bytes(data)
    assert [Path(one.place).name for one in verify_workspace(workspace, ledger)] == ["current.json"]


def test_a_flipped_bit_in_any_file_of_any_object_is_found_and_named(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    draw = random.Random(11)
    files = [one for one in workspace.objects.rglob("*") if one.is_file()]
    assert len(files) == 6
    for number in range(30):
        file = files[number % len(files)]
        before = file.read_bytes()
        after = bytearray(before)
        after[draw.randrange(len(after))] ^= 1 << draw.randrange(8)
        file.chmod(0o644)
        file.write_bytes(after)
        assert [one.place for one in verify_workspace(workspace, ledger)] == [str(file)]
        file.write_bytes(before)


def test_a_deleted_object_is_named_with_the_event_that_needs_it(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    shutil.rmtree(workspace.path(OBJECT))
    (problem,) = verify_workspace(workspace, ledger)
    assert (problem.place, problem.found) == (str(workspace.path(OBJECT)), "nothing")
    assert problem.expected == "the object of event 2 (checkpoint)"


def test_an_object_replaced_with_a_manifest_that_fits_differs_from_the_ledger(
    workspace: Workspace, ledger: Ledger
) -> None:
    _fill(workspace, ledger)
    shutil.rmtree(workspace.path(OBJECT))
    workspace.publish(kind="checkpoint", key=OBJECT, record={}, write=lambda to: (to / "w").write_bytes(b"x") and None)
    assert workspace.verify(OBJECT) == []
    (problem,) = verify_workspace(workspace, ledger)
    assert problem.place == str(workspace.path(OBJECT))
    assert "of event 2" in problem.expected


def test_a_byte_changed_inside_the_sqlite_file_is_found(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    data = ledger.path.read_bytes()
    assert data.count(b"0.75") == 1
    ledger.path.write_bytes(data.replace(b"0.75", b"0.85"))
    assert "event 4 (probe)" in ledger.verify()[0].place
    with pytest.raises(IntegrityError, match=r"event 4 \(probe\) was altered"):
        ledger.events()


# What a disk and other programs can do


def test_a_ledger_that_is_missing_is_not_made_by_readers(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="there is no ledger"):
        Ledger.open(tmp_path / "ledger.sqlite", create=False)
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(WorkspaceError, match="is no ledger"):
        Ledger.open(tmp_path / "empty.sqlite", create=False)
    assert (tmp_path / "empty.sqlite").stat().st_size == 0


def test_a_ledger_deleted_under_way_is_a_clear_error_and_is_not_made_anew(ledger: Ledger) -> None:
    ledger.append("run", "a", {}, volatile={})
    ledger.path.unlink()
    with pytest.raises(WorkspaceError, match=r"cannot be used: unable to open.*Check that it is there"):
        ledger.append("run", "b", {}, volatile={})
    assert not ledger.path.exists()


@pytest.mark.parametrize("make", [lambda path: path.write_text("not sqlite at all" * 100), lambda path: path.mkdir()])
@pytest.mark.parametrize("create", [True, False])
def test_what_is_no_ledger_is_refused(tmp_path: Path, make: Callable[[Path], None], create: bool) -> None:
    make(tmp_path / "ledger.sqlite")
    with pytest.raises(WorkspaceError, match="cannot be used"):
        Ledger.open(tmp_path / "ledger.sqlite", create=create)


def test_another_programs_database_and_a_newer_ledger_are_refused_and_left_alone(tmp_path: Path) -> None:
    for name, statement, words in (
        ("other", "CREATE TABLE notes (text)", "is no ledger"),
        ("newer", "PRAGMA user_version = 2", "has version 2; this Evertune reads version 1"),
    ):
        with sqlite3.connect(tmp_path / name) as connection:
            connection.execute(statement)
        connection.close()
        before = (tmp_path / name).read_bytes()
        with pytest.raises(WorkspaceError, match=words):
            Ledger.open(tmp_path / name, create=True)
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_cut_file_is_a_problem_and_not_a_crash(workspace: Workspace, ledger: Ledger, keep: float) -> None:
    _fill(workspace, ledger)
    data = ledger.path.read_bytes()
    ledger.path.write_bytes(data[: int(len(data) * keep)])
    assert str(ledger.path) in [one.place for one in verify_workspace(workspace, ledger)]


def test_a_ledger_held_by_another_program_is_a_clear_error(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "BUSY_SECONDS", 0.05)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(WorkspaceError, match="locked.*Another program has it open"):
        ledger.append("run", "a", {}, volatile={})
    other.execute("ROLLBACK")
    other.close()
    assert ledger.append("run", "a", {}, volatile={}).seq == 1


def test_a_refused_write_is_one_clear_error_and_costs_no_event(workspace: Workspace, ledger: Ledger) -> None:
    _fill(workspace, ledger)
    before = ledger.events()
    with largest_file(20_000), pytest.raises(WorkspaceError, match="Free some disk space"):
        ledger.append("probe", "big", {"text": "x" * 100_000}, volatile={})
    assert ledger.events() == before
    assert verify_workspace(workspace, ledger) == []
    assert ledger.append("probe", "big", {"text": "x" * 100_000}, volatile={}).seq == 6


def test_current_json_that_cannot_be_written_stays_as_it_was(
    workspace: Workspace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        assert Path(source).parent == workspace.tmp  # where the next start sweeps it after a kill
        raise OSError(errno.ENOSPC, "No space left on device")

    _fill(workspace, ledger)
    before = (workspace.root / "current.json").read_bytes()
    _record(workspace, ledger, "rollback", {"label": "base", "checkpoint": None})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WorkspaceError, match=r"current\.json cannot be written: No space left.*Free some disk"):
        write_current(workspace, ledger)
    assert (workspace.root / "current.json").read_bytes() == before
    assert list(workspace.tmp.iterdir()) == []


def test_a_ledger_in_a_read_only_folder_can_be_read_and_not_written() -> None:
    with folder_for_all() as folder:
        workspace = Workspace.open(folder / "run", create=True)
        ledger = Ledger.open(workspace.root / "ledger.sqlite", create=True)
        _fill(workspace, ledger)
        events = ledger.events()
        workspace.root.chmod(0o555)
        ledger.path.chmod(0o444)

        def read() -> None:
            opened = Ledger.open(ledger.path, create=False)
            assert opened.events() == events
            assert verify_workspace(Workspace.open(workspace.root, create=False), opened) == []
            with pytest.raises(WorkspaceError, match=r"readonly.*Check the permissions"):
                opened.append("run", "new", {}, volatile={})

        as_nobody(read)
