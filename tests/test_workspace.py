"""Objects appear at once and whole or not at all, one run at a time, and every altered byte is named."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.errors import IntegrityError, WorkspaceError
from evertune.hashing import canonical_json, digest_bytes, digest_json
from evertune.workspace import Manifest, Workspace, disk, read_manifest, store, verify_folder, write_atomically
from tests.machine import as_nobody, folder_for_all, largest_file

ROOT = Path(__file__).parent.parent
KEY = "a" * 64
OTHER = "b" * 64


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "run", create=True)


def _write(folder: Path) -> dict[str, Any]:
    (folder / "weights.bin").write_bytes(b"w" * 3000)
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "é.txt").write_text("notes")
    return {"loss": 0.25}


def _publish(workspace: Workspace, key: str = KEY, write: store.Write = _write) -> Manifest:
    return workspace.publish(kind="checkpoint", key=key, record={"step": 3}, write=write)


def _is_untouched(workspace: Workspace) -> bool:
    return not list(workspace.tmp.iterdir()) and not workspace.keys()


# Publishing


def test_a_published_object_is_what_was_written_with_sizes_and_digests(workspace: Workspace) -> None:
    manifest = _publish(workspace)
    assert [(one.path, one.size) for one in manifest.files] == [("a/b/é.txt", 5), ("weights.bin", 3000)]
    assert manifest.files[1].sha256 == digest_bytes(b"w" * 3000)
    assert manifest.record == {"step": 3, "loss": 0.25}
    assert read_manifest(workspace.path(KEY)) == manifest
    assert workspace.manifest(KEY) == manifest
    assert workspace.manifests() == [manifest]
    assert workspace.keys() == [KEY]
    assert workspace.verify(KEY) == []
    assert list(workspace.tmp.iterdir()) == []


def test_tree_is_the_digest_of_names_sizes_and_digests_and_not_of_the_record(workspace: Workspace) -> None:
    tree = digest_json([["a/b/é.txt", 5, digest_bytes(b"notes")], ["weights.bin", 3000, digest_bytes(b"w" * 3000)]])
    assert _publish(workspace).tree == tree
    assert workspace.publish(kind="other", key=OTHER, record={}, write=_write).tree == tree


def test_files_are_read_only_and_folders_can_be_cleaned_up(workspace: Workspace) -> None:
    _publish(workspace)
    modes = {one.name: one.stat().st_mode & 0o777 for one in workspace.path(KEY).rglob("*") if one.is_file()}
    assert modes == {"weights.bin": 0o444, "é.txt": 0o444, "MANIFEST.json": 0o444}
    shutil.rmtree(workspace.path(KEY))


def test_an_object_that_is_there_is_not_written_again(workspace: Workspace) -> None:
    first = _publish(workspace)

    def never(folder: Path) -> None:
        raise AssertionError("written twice")

    assert _publish(workspace, write=never) == first


def test_two_that_publish_one_key_get_the_first_one(workspace: Workspace) -> None:
    inner: list[Manifest] = []

    def overtaken(folder: Path) -> dict[str, Any]:
        inner.append(workspace.publish(kind="checkpoint", key=KEY, record={"by": "the other"}, write=_write))
        return _write(folder)

    assert _publish(workspace, write=overtaken) == inner[0]
    assert inner[0].record["by"] == "the other"
    assert list(workspace.tmp.iterdir()) == []


def test_two_that_publish_different_bytes_under_one_key_are_told(workspace: Workspace) -> None:
    def overtaken(folder: Path) -> None:
        _publish(workspace)
        (folder / "weights.bin").write_bytes(b"different")

    with pytest.raises(IntegrityError, match="made twice, with different bytes"):
        _publish(workspace, write=overtaken)
    assert workspace.verify(KEY) == []
    assert list(workspace.tmp.iterdir()) == []


def test_publishing_over_a_damaged_object_says_so(workspace: Workspace) -> None:
    _publish(workspace)
    (workspace.path(KEY) / "weights.bin").unlink()
    with pytest.raises(IntegrityError, match=r"weights\.bin: found no plain file.*quarantine"):
        _publish(workspace)


def test_an_error_while_writing_leaves_nothing_and_travels_on(workspace: Workspace) -> None:
    def broken(folder: Path) -> None:
        _write(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _publish(workspace, write=broken)
    assert _is_untouched(workspace)


def test_a_record_with_nan_is_refused_and_leaves_nothing(workspace: Workspace) -> None:
    with pytest.raises(ValueError, match="nan has no JSON form"):
        _publish(workspace, write=lambda folder: {"loss": float("nan")})
    assert _is_untouched(workspace)


@pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_a_key_is_64_hex_digits(workspace: Workspace, key: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        _publish(workspace, key=key)


@pytest.mark.parametrize(
    "name",
    ["MANIFEST.json", "e\u0301.txt", "back\\slash", os.fsdecode(b"\xff")],
    ids=["manifest", "nfd", "slash", "bytes"],
)
def test_names_that_would_not_come_back_are_refused(workspace: Workspace, name: str) -> None:
    # JSON holds NFC strings only: a decomposed name would be recorded under another one and never be found again.
    with pytest.raises(WorkspaceError, match="cannot be part of an object"):
        _publish(workspace, write=lambda folder: (folder / name).write_text("x") and None)
    assert _is_untouched(workspace)


@pytest.mark.parametrize(
    "make", [lambda to: to.symlink_to("/etc/hostname"), lambda to: to.symlink_to("/etc"), os.mkfifo]
)
def test_links_and_pipes_are_refused(workspace: Workspace, make: Callable[[Path], None]) -> None:
    with pytest.raises(WorkspaceError, match="'strange' cannot be part of an object"):
        _publish(workspace, write=lambda folder: make(folder / "strange"))
    assert _is_untouched(workspace)


def test_names_that_differ_in_case_or_script_are_different_files(workspace: Workspace) -> None:
    names = ["a.txt", "A.txt", "模型.txt", "п р.txt", "x" * 250, ".hidden"]

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).write_text(name)

    manifest = _publish(workspace, write=write)
    assert [one.path for one in manifest.files] == sorted(names)
    assert workspace.verify(KEY) == []


def test_a_name_too_long_for_the_disk_is_named(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match=r"cannot publish checkpoint aaaaaaaaaaaa .*File name too long \(.*xxxx"):
        _publish(workspace, write=lambda folder: (folder / ("x" * 300)).write_text("") and None)
    assert _is_untouched(workspace)


def test_a_refused_write_is_one_clear_error_and_leaves_nothing(workspace: Workspace) -> None:
    with largest_file(1000), pytest.raises(WorkspaceError, match=r"cannot publish.*File too large.*ulimit"):
        _publish(workspace)
    assert _is_untouched(workspace)
    assert _publish(workspace).files[1].size == 3000


def test_a_refused_write_of_a_safetensors_file_is_the_same_error(workspace: Workspace) -> None:
    # The library reports the system's error in words of its own and not as an OSError.
    from safetensors.numpy import save_file

    def write(folder: Path) -> None:
        save_file({"w": np.zeros(5000, np.float32)}, folder / "weights.safetensors")

    with largest_file(1000), pytest.raises(WorkspaceError, match="File too large"):
        _publish(workspace, write=write)
    assert _is_untouched(workspace)


def test_files_and_folders_are_on_disk_before_the_name_and_the_name_before_the_return(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kill -9 cannot show this, because the page cache survives a process: so the order of the calls is read.
    calls = _watch_disk(monkeypatch, workspace.root)
    manifest = _publish(workspace)
    folder = calls[0][1].parts[1]
    assert calls == [
        ("fsync", Path("tmp", folder, "a/b/é.txt"), 5),
        ("fsync", Path("tmp", folder, "weights.bin"), 3000),
        ("fsync", Path("tmp", folder, "MANIFEST.json"), len(manifest.to_bytes())),
        ("fsync", Path("tmp", folder, "a/b"), None),
        ("fsync", Path("tmp", folder, "a"), None),
        ("fsync", Path("tmp", folder), None),
        ("rename", Path("objects", KEY), None),
        ("fsync", Path("objects"), None),
    ]


def test_a_resume_point_is_published_by_the_same_steps(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    place = workspace.work / "stage" / "step-000005"
    calls = _watch_disk(monkeypatch, workspace.root)
    manifest = workspace.publish_folder(place, record={"step": 5}, write=_write)
    names = [(call, path.name) for call, path, _ in calls]
    assert names[2:3] == [("fsync", "MANIFEST.json")]
    assert names[-3:] == [("fsync", "work"), ("rename", "step-000005"), ("fsync", "stage")]
    assert read_manifest(place) == manifest
    assert verify_folder(place) == []


def test_a_file_is_replaced_by_the_same_steps(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _watch_disk(monkeypatch, workspace.root)
    write_atomically(workspace.root / "page.html", b"hello")
    assert [call for call, _, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[0][2] == 5
    assert calls[1][1] == Path("page.html")
    assert calls[2][1] == Path()


def test_a_file_that_cannot_be_replaced_stays_as_it_was(workspace: Workspace) -> None:
    place = workspace.root / "page.html"
    write_atomically(place, b"old")
    with largest_file(2), pytest.raises(OSError, match="too large"):
        write_atomically(place, b"new and longer")
    assert place.read_bytes() == b"old"
    assert [one.name for one in workspace.root.iterdir() if one.is_file()] == ["page.html"]


def _watch_disk(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[tuple[str, Path, int | None]]:
    """Every fsync with the size synced, and every rename with its target, relative to the root and in order."""
    calls: list[tuple[str, Path, int | None]] = []

    def fsync(descriptor: int, call: Callable[[int], None] = os.fsync) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(("fsync", path.relative_to(root), path.stat().st_size if path.is_file() else None))
        call(descriptor)

    def moved(source: Path, target: Path, call: Callable[[Path, Path], None]) -> None:
        calls.append(("rename", Path(target).relative_to(root), None))
        call(source, target)

    rename, replace = os.rename, os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: moved(source, target, rename))
    monkeypatch.setattr(os, "replace", lambda source, target: moved(source, target, replace))
    return calls


# Manifests and verification


def test_a_flipped_bit_in_any_file_is_found_and_named(workspace: Workspace) -> None:
    _publish(workspace)
    draw = random.Random(7)
    files = [one for one in workspace.path(KEY).rglob("*") if one.is_file()]
    for number in range(90):
        file = files[number % len(files)]
        before = file.read_bytes()
        after = bytearray(before)
        after[draw.randrange(len(after))] ^= 1 << draw.randrange(8)
        file.chmod(0o644)
        file.write_bytes(after)
        assert [one.place for one in workspace.verify(KEY)] == [str(file)]
        file.write_bytes(before)
    assert workspace.verify(KEY) == []


def test_every_kind_of_alteration_is_found_and_named(workspace: Workspace) -> None:
    _publish(workspace)
    folder = workspace.path(KEY)
    (folder / "added.txt").write_text("x")
    assert [(one.place, one.expected) for one in workspace.verify(KEY)] == [(str(folder / "added.txt"), "no such file")]
    (folder / "added.txt").unlink()
    (folder / "weights.bin").rename(folder / "weights")
    assert {Path(one.place).name for one in workspace.verify(KEY)} == {"weights", "weights.bin"}
    (folder / "weights.bin").symlink_to("weights")
    assert {Path(one.place).name for one in workspace.verify(KEY)} == {"weights", "weights.bin"}
    (folder / "MANIFEST.json").unlink()
    assert [one.place for one in workspace.verify(KEY)] == [str(folder / "MANIFEST.json")]


def test_an_object_in_another_objects_place_is_found(workspace: Workspace) -> None:
    _publish(workspace)
    _publish(workspace, key=OTHER)
    workspace.path(KEY).rename(workspace.root / "aside")
    workspace.path(OTHER).rename(workspace.path(KEY))
    assert [one.place for one in workspace.verify_all()] == [str(workspace.path(KEY))]


def test_a_link_in_an_objects_place_is_found_and_moved_away(workspace: Workspace) -> None:
    # What it points to can change, or go with the disk it lies on.
    _publish(workspace)
    workspace.path(KEY).rename(workspace.root / "aside")
    workspace.path(KEY).symlink_to(workspace.root / "aside")
    assert [(one.place, one.found) for one in workspace.verify_all()] == [(str(workspace.path(KEY)), "a symbolic link")]
    assert len(workspace.recover().quarantined) == 1
    assert workspace.keys() == []
    assert verify_folder(workspace.root / "aside") == []


def test_an_edited_record_with_the_old_digest_is_an_error(workspace: Workspace) -> None:
    manifest = _publish(workspace)
    place = workspace.path(KEY) / "MANIFEST.json"
    place.chmod(0o644)
    place.write_bytes(manifest.to_bytes().replace(b'"step":3', b'"step":4'))
    with pytest.raises(IntegrityError, match="altered"):
        workspace.manifest(KEY)


def _signed(**changes: Any) -> bytes:
    """A manifest with a right digest and one wrong field."""
    body = {"schema": 1, "kind": "x", "key": KEY, "record": {}, "files": [["a", 1, "0" * 64]], **changes}
    return canonical_json({**body, "digest": digest_json(body)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": NaN}',
        _signed(schema=2),
        _signed(record=[]),
        _signed(record="text"),
        _signed(files=3),
        _signed(files=[["a", 1]]),
        _signed(files=[["a", -1, "0" * 64]]),
        _signed(files=[["a", True, "0" * 64]]),
        _signed(files=[["a", 1, "0"]]),
        _signed(files=[[1, 1, "0" * 64]]),
        _signed(files=[["/etc/passwd", 1, "0" * 64]]),
        _signed(files=[["../a", 1, "0" * 64]]),
        _signed(files=[["a/../../b", 1, "0" * 64]]),
        _signed(files=[["./a", 1, "0" * 64]]),
        _signed(files=[["", 1, "0" * 64]]),
        _signed() + b" ",
        _signed().replace(b'"digest"', b'"key":"%s","digest"' % KEY.encode()),
        _signed().replace(b'"x"', b'"\\ud800"'),
    ],
)
def test_a_malformed_manifest_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "MANIFEST.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json"):
        read_manifest(tmp_path)
    assert [one.place for one in verify_folder(tmp_path)] == [str(tmp_path / "MANIFEST.json")]


# Recovering


def test_recovery_sweeps_what_was_not_finished_and_keeps_what_was(workspace: Workspace) -> None:
    _publish(workspace)
    (workspace.tmp / "half").mkdir()
    (workspace.tmp / "half" / "weights.bin").write_bytes(b"x")
    (workspace.tmp / "job.json").write_text("{}")
    (workspace.tmp / "link").symlink_to(workspace.path(KEY))
    recovery = workspace.recover()
    assert recovery.swept == ("half", "job.json", "link")
    assert recovery.quarantined == ()
    assert recovery.lines()[0] == "removed the unfinished tmp/half"
    assert list(workspace.tmp.iterdir()) == []
    assert workspace.verify(KEY) == []


def test_recovery_moves_bad_objects_to_quarantine_and_deletes_nothing(workspace: Workspace) -> None:
    for key in (KEY, OTHER, "c" * 64):
        _publish(workspace, key=key)
    file = workspace.path(KEY) / "weights.bin"
    file.chmod(0o644)
    file.write_bytes(b"cut")
    (workspace.objects / "not an object").write_text("x")
    workspace.path(OTHER).rename(workspace.path("d" * 64))
    recovery = workspace.recover()
    places = [Path(one.place).relative_to(workspace.objects) for one in recovery.quarantined]
    assert places == [Path(KEY, "weights.bin"), Path("d" * 64), Path("not an object", "MANIFEST.json")]
    assert workspace.keys() == ["c" * 64]
    kept = {one.name.split("-")[0]: one for one in workspace.quarantine.iterdir()}
    assert set(kept) == {KEY, "d" * 64, "not an object"}
    assert (kept[KEY] / "weights.bin").read_bytes() == b"cut"
    assert _publish(workspace).files[1].size == 3000


def test_recovery_waits_for_a_child_of_a_dead_run(workspace: Workspace) -> None:
    freed_at = 0.0

    def work() -> None:
        nonlocal freed_at
        with workspace.worker_lock():
            started.set()
            time.sleep(0.3)
            freed_at = time.monotonic()

    started = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    workspace.recover()
    assert time.monotonic() >= freed_at > 0
    thread.join()


def test_recovery_gives_up_on_a_child_that_does_not_end(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ORPHAN_SECONDS", 0.1)
    with workspace.worker_lock(), pytest.raises(WorkspaceError, match="a child process of an earlier run still works"):
        workspace.recover()


def test_workers_do_not_wait_for_each_other(workspace: Workspace) -> None:
    with workspace.worker_lock(), workspace.worker_lock():
        pass


# Locking

HOLDER = """
import subprocess, sys, time, os
from pathlib import Path
from evertune.workspace import Workspace
workspace = Workspace.open(Path(sys.argv[1]), create=True)
with workspace.lock(purpose="run team.yaml"):
    child = 0
    if sys.argv[2] == "fork":
        # The child lets go of the lock when it first runs: only then is it right to look.
        runs, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"1")
            time.sleep(60)
        os.read(runs, 1)
    if sys.argv[2] == "exec":
        child = subprocess.Popen(["sleep", "60"]).pid
    print(os.getpid(), child, flush=True)
    time.sleep(60)
"""


@contextmanager
def _holder(workspace: Workspace, children: str) -> Iterator[tuple[int, int]]:
    """A process that holds the lock, and its pid and that of its child."""
    command = [sys.executable, "-c", HOLDER, str(workspace.root), children]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, child = (int(one) for one in process.stdout.readline().split())
    try:
        yield pid, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("children", ["none", "fork", "exec"])
def test_a_second_run_is_refused_while_the_first_lives_and_free_at_once_after_its_death(
    workspace: Workspace, children: str
) -> None:
    with _holder(workspace, children) as (pid, child):
        with pytest.raises(
            WorkspaceError, match=rf"in use by pid {pid} on \S+ \(run team\.yaml, since \d{{4}}-"
        ) as told:
            workspace.lock(purpose="test").__enter__()
        assert "Wait for it, or stop it" in str(told.value)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if child:
            os.kill(child, 0)
        with workspace.lock(purpose="test"):
            pass


def test_deleting_the_lock_file_lets_nobody_in(workspace: Workspace) -> None:
    with workspace.lock(purpose="first"):
        (workspace.root / "lock").unlink()
        with pytest.raises(WorkspaceError, match="in use by another process"), workspace.lock(purpose="second"):
            pass


def test_of_several_that_ask_at_once_exactly_one_gets_the_lock(workspace: Workspace) -> None:
    runners = 4
    for _ in range(50):
        barrier = threading.Barrier(runners)
        winners: list[str] = []

        def ask(barrier: threading.Barrier = barrier, winners: list[str] = winners) -> None:
            barrier.wait()
            try:
                with workspace.lock(purpose="race"):
                    winners.append("got it")
                    barrier.wait()
            except WorkspaceError:
                barrier.wait()

        threads = [threading.Thread(target=ask) for _ in range(runners)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_a_lock_on_a_workspace_that_is_gone_is_a_clear_error(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root)
    with pytest.raises(WorkspaceError, match="cannot lock"), workspace.lock(purpose="x"):
        pass


def test_a_file_system_without_locks_is_a_clear_error(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WorkspaceError, match="cannot lock .*No locks available"), workspace.lock(purpose="x"):
        pass


# Opening


def test_opening_makes_the_folders_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="there is no workspace at"):
        Workspace.open(tmp_path / "run", create=False)
    with pytest.raises(WorkspaceError, match="there is no workspace at"):
        Workspace.open(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []
    Workspace.open(tmp_path / "deep" / "run", create=True)
    assert Workspace.open(tmp_path / "deep" / "run", create=False).keys() == []


@pytest.mark.parametrize("place", ["file", "file/run", "dangling"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WorkspaceError, match=place):
        Workspace.open(tmp_path / place, create=True)


@pytest.mark.parametrize(
    ("mounts", "is_refused"),
    [
        ("server:/x {root} nfs4 rw 0 0", True),
        ("//server/x {parent} cifs rw 0 0", True),
        ("host {parent} 9p rw 0 0", True),
        ("me@host: {root} fuse.sshfs rw 0 0", False),
        ("server:/x {parent} nfs4 rw 0 0\n/dev/sda {root} ext4 rw 0 0", False),
        ("/dev/sda {root} ext4 rw 0 0\nserver:/x {parent} nfs4 rw 0 0", False),
        ("server:/x {root}-other nfs4 rw 0 0\n/dev/sda / ext4 rw 0 0", False),
    ],
)
def test_network_file_systems_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounts: str, is_refused: bool
) -> None:
    root = tmp_path / "my runs" / "run"
    table = mounts.format(root=str(root).replace(" ", "\\040"), parent=str(root.parent).replace(" ", "\\040"))
    (tmp_path / "mounts").write_text(table)
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    if is_refused:
        with pytest.raises(WorkspaceError, match="network file system"):
            Workspace.open(root, create=True)
        assert not root.exists()
    else:
        Workspace.open(root, create=True)


def test_the_file_system_behind_a_link_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "far")
    (tmp_path / "mounts").write_text(f"server:/x {tmp_path / 'far'} nfs rw 0 0")
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    assert disk.file_system(tmp_path / "run") == "nfs"


def test_a_read_only_workspace_can_be_read_and_verified_and_not_run_in() -> None:
    with folder_for_all() as folder:
        workspace = Workspace.open(folder / "run", create=True)
        _publish(workspace)
        workspace.root.chmod(0o555)
        workspace.tmp.chmod(0o555)

        def read() -> None:
            opened = Workspace.open(workspace.root, create=False)
            assert opened.verify(KEY) == []
            with pytest.raises(WorkspaceError, match="cannot make the workspace .*Permission denied"):
                Workspace.open(workspace.root, create=True)
            with pytest.raises(WorkspaceError, match="cannot lock the workspace .*Permission denied"):
                opened.lock(purpose="x").__enter__()
            with pytest.raises(
                WorkspaceError, match=r"cannot publish .*Permission denied .*Check the folder's permissions"
            ):
                _publish(opened, key=OTHER)

        as_nobody(read)


def test_a_file_that_cannot_be_read_is_a_problem_and_not_a_crash() -> None:
    with folder_for_all() as folder:
        workspace = Workspace.open(folder / "run", create=True)
        _publish(workspace)
        (workspace.path(KEY) / "weights.bin").chmod(0)

        def read() -> None:
            (problem,) = Workspace.open(workspace.root, create=False).verify(KEY)
            assert problem.place.endswith("weights.bin")
            assert problem.found == "unreadable: Permission denied"

        as_nobody(read)
