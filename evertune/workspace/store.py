"""The workspace: opening, locking, recovering, publishing and verifying."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import IntegrityError, WorkspaceError
from evertune.failpoint import reach
from evertune.hashing import digest_file, digest_json
from evertune.workspace import disk
from evertune.workspace.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    Problem,
    files_of,
    is_plain,
    read_manifest,
    structure_problems,
    verify_folder,
)

KEY = re.compile(r"[0-9a-f]{64}")
ORPHAN_SECONDS = 30.0

Write = Callable[[Path], dict[str, Any] | None]


@dataclass(frozen=True)
class Recovery:
    """What an interrupted run left, and what was done about it."""

    swept: tuple[str, ...]
    quarantined: tuple[Problem, ...]

    def lines(self) -> list[str]:
        """One line each, for a person."""
        lines = [f"removed the unfinished tmp/{name}" for name in self.swept]
        return lines + [f"moved {one.place} to quarantine: found {one.found}" for one in self.quarantined]


class Workspace:
    """A run's folder. Holds no lock until asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.tmp = root / "tmp"
        self.work = root / "work"
        self.cache = root / "cache"
        self.quarantine = root / "quarantine"

    @classmethod
    def open(cls, root: Path, *, create: bool) -> "Workspace":
        """Open a workspace, making its folders when asked. Without `create`, a read-only one can be read.

        Raises:
            WorkspaceError: the folder is missing, a file, on a network file system, or `create` and not writable.
        """
        workspace = cls(root.absolute())
        root = workspace.root
        if root.exists() and not root.is_dir():
            raise WorkspaceError(f"{root} is a file; a workspace is a folder.", remedy="Choose another 'workspace'.")
        if not create and not workspace.objects.is_dir():
            raise WorkspaceError(f"there is no workspace at {root}.", remedy="Run a recipe first.")
        kind = disk.file_system(root)
        if kind in disk.NETWORK_FILE_SYSTEMS:
            raise WorkspaceError(
                f"{root} lies on a network file system ({kind}), where locks and renames cannot be trusted.",
                remedy="Put the workspace on a local disk.",
            )
        if create or os.access(root, os.W_OK):
            workspace._make_folders()
        return workspace

    @contextlib.contextmanager
    def lock(self, *, purpose: str) -> Iterator[None]:
        """Hold the workspace alone; the kernel frees it when the process dies.

        The lock is on the folder itself; the file `lock` only tells who holds it.

        Raises:
            WorkspaceError: another process holds it; its pid, host, purpose and start are named.
        """
        note = self.root / "lock"
        with disk.flock(self.root, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_ours:
            if not is_ours:
                holder = note.read_text(encoding="utf-8") if note.is_file() else ""
                raise WorkspaceError(
                    f"{self.root} is in use by {holder or 'another process'}.", remedy="Wait for it, or stop it."
                )
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            try:
                note.write_text(f"pid {os.getpid()} on {socket.gethostname()} ({purpose}, since {since})", "utf-8")
            except OSError as error:
                raise disk.disk_error(error, f"cannot lock the workspace {self.root}") from error
            yield

    @contextlib.contextmanager
    def worker_lock(self) -> Iterator[None]:
        """Held, shared, by every child while it works, so that a new run can wait for orphans of a dead one."""
        with disk.flock(self.work, fcntl.LOCK_SH):
            yield

    def recover(self) -> Recovery:
        """Clear what an interrupted run left. Call it under the lock, before anything is read.

        Waits until no child of a dead run works any more, empties `tmp/`, and moves objects whose manifest, files or
        sizes are not right to `quarantine/`.

        Raises:
            WorkspaceError: a child still works after 30 seconds, or the disk refuses.
        """
        self._await_orphans()
        try:
            swept = tuple(sorted(one.name for one in self.tmp.iterdir()))
            for name in swept:
                place = self.tmp / name
                shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
            quarantined = []
            for folder in sorted(self.objects.iterdir()):
                problems = self._misfits(folder, structure_problems(folder))
                if problems:
                    quarantined.append(problems[0])
                    self._quarantine(folder)
        except OSError as error:
            raise disk.disk_error(error, f"cannot recover the workspace {self.root}") from error
        return Recovery(swept=swept, quarantined=tuple(quarantined))

    def publish(self, *, kind: str, key: str, record: Mapping[str, Any], write: Write) -> Manifest:
        """Make an object appear at once and whole, or not at all.

        Args:
            kind: what it is, such as `checkpoint`.
            key: 64 hex digits; if an object has it already, that one is returned and `write` is not called.
            record: JSON facts kept in the manifest.
            write: fills the empty folder it gets; a mapping it returns is added to the record.

        Raises:
            WorkspaceError: the disk is full or cannot be written, or `write` left what cannot be part of an object;
                nothing is left behind.
            IntegrityError: an object has this key and does not match its manifest.
        """
        if not KEY.fullmatch(key):
            raise ValueError(f"a key is 64 hex digits, found {key!r}")
        if self.path(key).exists():
            return _matching(self.path(key))
        return self._publish(self.path(key), kind, key, record, write, "publish")

    def publish_folder(self, destination: Path, *, record: Mapping[str, Any], write: Write) -> Manifest:
        """The same for a resume point: `destination` lies under `work/`."""
        key = digest_json({"resume": destination.relative_to(self.work).as_posix()})
        return self._publish(destination, "resume", key, record, write, "resume")

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of an object, or None when there is no such object.

        Raises:
            IntegrityError: the manifest was altered.
        """
        folder = self.path(key)
        return read_manifest(folder) if folder.is_dir() else None

    def path(self, key: str) -> Path:
        """The folder of an object."""
        return self.objects / key

    def keys(self) -> list[str]:
        """Keys of all published objects, sorted."""
        return sorted(one.name for one in self.objects.iterdir() if KEY.fullmatch(one.name))

    def manifests(self) -> list[Manifest]:
        """Manifests of all published objects, by key."""
        return [read_manifest(self.path(key)) for key in self.keys()]

    def verify(self, key: str) -> list[Problem]:
        """Read every byte of an object again."""
        return self._misfits(self.path(key), verify_folder(self.path(key)))

    def verify_all(self) -> list[Problem]:
        """Read every byte of every object again, and name what in `objects/` is none."""
        return [problem for one in sorted(self.objects.iterdir()) for problem in self.verify(one.name)]

    def _make_folders(self) -> None:
        is_new = not self.objects.is_dir()
        try:
            for folder in (self.objects, self.tmp, self.work, self.cache, self.quarantine):
                folder.mkdir(parents=True, exist_ok=True)
            if is_new:
                disk.sync_folder(self.root)
                disk.sync_folder(self.root.parent)
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root))
        except OSError as error:
            raise disk.disk_error(error, f"cannot make the workspace {self.root}") from error

    def _publish(
        self, destination: Path, kind: str, key: str, record: Mapping[str, Any], write: Write, failpoint: str
    ) -> Manifest:
        folder = self.tmp / uuid.uuid4().hex
        try:
            reach(f"{failpoint}.begin")
            folder.mkdir()
            added = write(folder) or {}
            files = tuple(_seal(path, folder, failpoint) for path in files_of(folder))
            manifest = Manifest(kind=kind, key=key, record={**record, **added}, files=files)
            disk.write_synced(folder / MANIFEST, manifest.to_bytes())
            (folder / MANIFEST).chmod(0o444)
            _sync_folders(folder)
            reach(f"{failpoint}.manifest_synced")
            published = _rename(folder, destination, manifest)
            reach(f"{failpoint}.renamed")
            disk.sync_folder(destination.parent)
            reach(f"{failpoint}.end")
        except Exception as error:
            cause = disk.os_error(error)
            if cause is None:
                raise
            raise disk.disk_error(cause, f"cannot publish {kind} {destination.name[:12]} in {self.root}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return published

    def _misfits(self, folder: Path, problems: list[Problem]) -> list[Problem]:
        """`problems`, or that a sound folder does not lie where its key says."""
        if folder.is_symlink():
            return [Problem(str(folder), "a symbolic link", "a folder")]
        if not problems and read_manifest(folder).key != folder.name:
            return [Problem(str(folder), f"the object {read_manifest(folder).key}", f"the object {folder.name}")]
        return problems

    def _quarantine(self, folder: Path) -> None:
        folder.rename(self.quarantine / f"{folder.name[:64]}-{uuid.uuid4().hex[:8]}")
        disk.sync_folder(self.quarantine)
        disk.sync_folder(self.objects)

    def _await_orphans(self) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            with disk.flock(self.work, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_ours:
                if is_ours:
                    return
            if time.monotonic() > deadline:
                raise WorkspaceError(
                    f"a child process of an earlier run still works in {self.root}.",
                    remedy="End it (look for 'evertune' among the processes) and start again.",
                )
            time.sleep(0.05)


def _seal(path: Path, folder: Path, failpoint: str) -> FileEntry:
    """Sync a file, make it read-only and take its digest."""
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not path.is_file() or not is_plain(name) or name == MANIFEST:
        raise WorkspaceError(
            f"{name!r} cannot be part of an object: plain files with plain names (UTF-8, NFC, no backslash) only.",
            remedy="Rename it, or replace the link by the file.",
        )
    path.chmod(0o444)
    disk.sync_file(path)
    reach(f"{failpoint}.file_synced")
    return FileEntry(name, path.stat().st_size, digest_file(path))


def _sync_folders(folder: Path) -> None:
    """The folders below first, so that none is named on disk before its content is."""
    for inside in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        disk.sync_folder(inside)
    disk.sync_folder(folder)


def _rename(folder: Path, destination: Path, manifest: Manifest) -> Manifest:
    """Rename into place; when another process published the same key first, that one stands."""
    if not destination.parent.is_dir():
        destination.parent.mkdir()
        disk.sync_folder(destination.parent.parent)
    try:
        os.rename(folder, destination)  # noqa: PTH104 - the name that the test of the order watches
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        present = _matching(destination)
        if present.tree != manifest.tree:
            raise IntegrityError(
                f"{destination} was made twice, with different bytes: {manifest.tree[:12]} and {present.tree[:12]}.",
                remedy="The same inputs must give the same bytes; report this with the recipe.",
            ) from None
        return present
    return manifest


def _matching(folder: Path) -> Manifest:
    """The manifest of a folder that is what its manifest says, by names and sizes."""
    problems = structure_problems(folder)
    if problems:
        raise IntegrityError(
            f"{problems[0].place}: found {problems[0].found}, expected {problems[0].expected}.",
            remedy="Run the same command again: it moves the object to quarantine and makes it anew.",
        )
    return read_manifest(folder)
