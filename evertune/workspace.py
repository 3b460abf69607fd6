"""The folder of a run: immutable objects, published atomically, each with a manifest of sizes and digests.

    lock, worker.lock      flock, freed by the kernel on any death
    tmp/<uuid>/            what is being written; swept at the next start
    objects/<key>/         published: MANIFEST.json beside the files it names
    work/<key>/step-*/     resume points of unfinished stages
    cache/                 what can be made again
    quarantine/            objects that did not match their manifest; nothing is deleted
    ledger.sqlite, current.json

Publishing: files, each fsynced; the manifest last; the folder fsynced; one rename; the parent fsynced.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from evertune.errors import IntegrityError, WorkspaceError
from evertune.failpoint import reach
from evertune.hashing import canonical_json, digest_file, digest_json

MANIFEST = "MANIFEST.json"
KEY = re.compile(r"^[0-9a-f]{64}$")
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
ORPHAN_SECONDS = 30.0

Write = Callable[[Path], dict[str, Any] | None]


@dataclass(frozen=True)
class FileEntry:
    """One file of an object: name relative to the folder, size in bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an object says of itself."""

    kind: str
    key: str
    record: dict[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def tree(self) -> str:
        """Digest of the names, sizes and digests of all files."""
        return digest_json(sorted([one.path, one.size, one.sha256] for one in self.files))

    def to_bytes(self) -> bytes:
        body = {
            "schema": 1,
            "kind": self.kind,
            "key": self.key,
            "record": self.record,
            "files": [[one.path, one.size, one.sha256] for one in self.files],
        }
        return canonical_json({**body, "digest": digest_json(body)})


@dataclass(frozen=True)
class Problem:
    """One difference between what is on disk and what was recorded."""

    place: str
    found: str
    expected: str


@dataclass(frozen=True)
class Recovery:
    """What an interrupted run left, and what was done about it."""

    swept: tuple[str, ...]
    quarantined: tuple[Problem, ...]

    def lines(self) -> list[str]:
        """One line each, for a person."""
        lines = [f"removed the unfinished folder tmp/{name}" for name in self.swept]
        return lines + [f"moved {one.place} to quarantine: found {one.found}" for one in self.quarantined]


class Workspace:
    """Opens a run's folder; holds no lock until asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / "objects"
        self.tmp = root / "tmp"
        self.work = root / "work"
        self.cache = root / "cache"
        self.quarantine = root / "quarantine"

    @classmethod
    def open(cls, root: Path, *, create: bool) -> "Workspace":
        """Open a workspace, making its folders when asked.

        Raises:
            WorkspaceError: the folder is missing, a file, on a network file system, or cannot be written.
        """
        root = root.absolute()
        if root.exists() and not root.is_dir():
            raise WorkspaceError(f"{root} is a file; a workspace is a folder.", remedy="Choose another 'workspace'.")
        if not create and not root.is_dir():
            raise WorkspaceError(f"there is no workspace at {root}.", remedy="Run a recipe first.")
        workspace = cls(root)
        try:
            for folder in (workspace.objects, workspace.tmp, workspace.work, workspace.cache, workspace.quarantine):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _disk_error(error, f"cannot make the workspace {root}") from error
        kind = _file_system(root)
        if kind in NETWORK_FILE_SYSTEMS:
            raise WorkspaceError(
                f"{root} lies on a network file system ({kind}), where locks and renames cannot be trusted.",
                remedy="Put the workspace on a local disk.",
            )
        return workspace

    @contextlib.contextmanager
    def lock(self, *, purpose: str) -> Iterator[None]:
        """Hold the workspace alone; the kernel frees it when the process dies.

        Raises:
            WorkspaceError: another process holds it; its pid, host, purpose and start are named.
        """
        with _flock(self.root / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            if file is None:
                holder = (self.root / "lock").read_text(encoding="utf-8").strip() or "an unknown process"
                raise WorkspaceError(f"{self.root} is in use by {holder}.", remedy="Wait for it, or stop it.")
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.seek(0)
            file.truncate()
            file.write(f"pid {os.getpid()} on {socket.gethostname()} ({purpose}, since {started})")
            file.flush()
            yield

    @contextlib.contextmanager
    def worker_lock(self) -> Iterator[None]:
        """Held, shared, by every child while it works, so that a new run can wait for orphans of a dead one."""
        with _flock(self.root / "worker.lock", fcntl.LOCK_SH):
            yield

    def recover(self) -> Recovery:
        """Clear what an interrupted run left. Call it under the lock, before anything is read.

        Waits until no child of a dead run works any more, empties `tmp/`, and moves objects whose files or sizes do
        not match their manifest to `quarantine/`.

        Raises:
            WorkspaceError: a child still works after 30 seconds.
        """
        self._await_orphans()
        swept = tuple(sorted(one.name for one in self.tmp.iterdir()))
        for name in swept:
            place = self.tmp / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        quarantined = []
        for folder in sorted(self.objects.iterdir()):
            problems = _structure_problems(folder)
            if problems:
                quarantined.append(problems[0])
                self.quarantine_object(folder)
        return Recovery(swept=swept, quarantined=tuple(quarantined))

    def quarantine_object(self, folder: Path) -> Path:
        """Move an object out of the way; nothing is deleted."""
        target = self.quarantine / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        folder.rename(target)
        return target

    def publish(self, *, kind: str, key: str, record: Mapping[str, Any], write: Write) -> Manifest:
        """Make an object appear at once and whole, or not at all.

        Args:
            kind: what it is, such as `checkpoint`.
            key: 64 hex digits; if an object has it already, that one is returned and `write` is not called.
            record: JSON facts kept in the manifest.
            write: fills the empty folder it gets; a mapping it returns is added to the record.

        Raises:
            WorkspaceError: the disk is full or cannot be written; nothing is left behind.
        """
        if not KEY.match(key):
            raise ValueError(f"a key is 64 hex digits, found {key!r}")
        present = self.manifest(key)
        if present is not None:
            return present
        return self._publish(self.objects / key, kind, key, record, write, "publish")

    def publish_folder(self, destination: Path, *, record: Mapping[str, Any], write: Write) -> Manifest:
        """The same for a resume point: `destination` lies under `work/` and must not exist."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        key = digest_json({"resume": str(destination.relative_to(self.work))})
        return self._publish(destination, "resume", key, record, write, "resume")

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of an object, or None when there is no such object."""
        folder = self.objects / key
        return read_manifest(folder) if folder.is_dir() else None

    def path(self, key: str) -> Path:
        """The folder of an object."""
        return self.objects / key

    def keys(self) -> list[str]:
        """Keys of all published objects, sorted."""
        return sorted(one.name for one in self.objects.iterdir() if KEY.match(one.name))

    def manifests(self) -> list[Manifest]:
        """Manifests of all published objects, by key."""
        return [read_manifest(self.objects / key) for key in self.keys()]

    def verify(self, key: str) -> list[Problem]:
        """Read every byte of an object again."""
        return verify_folder(self.objects / key)

    def _publish(
        self, destination: Path, kind: str, key: str, record: Mapping[str, Any], write: Write, failpoint: str
    ) -> Manifest:
        folder = self.tmp / uuid.uuid4().hex
        try:
            reach(f"{failpoint}.begin")
            folder.mkdir()
            added = write(folder) or {}
            files = tuple(_seal(path, folder, failpoint) for path in _files(folder))
            manifest = Manifest(kind=kind, key=key, record={**record, **added}, files=files)
            _write_synced(folder / MANIFEST, manifest.to_bytes())
            for inside in sorted({path.parent for path in _files(folder)}, reverse=True):
                _sync_folder(inside)
            if failpoint == "publish":
                reach("publish.manifest_synced")
            _rename(folder, destination)
            reach(f"{failpoint}.renamed")
            _sync_folder(destination.parent)
        except OSError as error:
            raise _disk_error(error, f"cannot publish {kind} {destination.name[:12]} in {self.root}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        reach(f"{failpoint}.end")
        return manifest

    def _await_orphans(self) -> None:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while True:
            with _flock(self.root / "worker.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
                if file is not None:
                    return
            if time.monotonic() > deadline:
                raise WorkspaceError(
                    f"a child process of an earlier run still works in {self.root}.",
                    remedy="End it (look for 'evertune' among the processes) and start again.",
                )
            time.sleep(0.05)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder.

    Raises:
        IntegrityError: it is missing, malformed, or its own digest does not match.
    """
    place = folder / MANIFEST
    try:
        body = json.loads(place.read_bytes())
        digest = body.pop("digest")
        files = tuple(FileEntry(str(path), int(size), str(sha256)) for path, size, sha256 in body["files"])
        manifest = Manifest(kind=body["kind"], key=body["key"], record=body["record"], files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{place} is not a readable manifest ({error}).", remedy="See 'evertune verify'."
        ) from error
    if digest != digest_json(body):
        raise IntegrityError(f"{place} was altered: its own digest does not match.", remedy="See 'evertune verify'.")
    for one in files:
        if not _is_plain(one.path):
            raise IntegrityError(f"{place} names the file {one.path!r}, which is not a plain name inside the folder.")
    return manifest


def verify_folder(folder: Path) -> list[Problem]:
    """Everything in which a published folder differs from its manifest, reading every byte."""
    problems = _structure_problems(folder)
    if any(one.place.endswith(MANIFEST) for one in problems):
        return problems
    for one in read_manifest(folder).files:
        place = folder / one.path
        if not place.is_symlink() and place.is_file() and place.stat().st_size == one.size:
            found = digest_file(place)
            if found != one.sha256:
                problems.append(Problem(str(place), f"sha256 {found[:12]}", f"sha256 {one.sha256[:12]}"))
    return problems


def _structure_problems(folder: Path) -> list[Problem]:
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        return [Problem(str(folder / MANIFEST), error.message, "the manifest that was published")]
    if KEY.match(folder.name) and manifest.key != folder.name:
        return [Problem(str(folder / MANIFEST), f"key {manifest.key[:12]}", f"key {folder.name[:12]}")]
    problems = []
    for one in manifest.files:
        place = folder / one.path
        if place.is_symlink() or not place.is_file():
            problems.append(Problem(str(place), "no plain file", f"a file of {one.size} bytes"))
        elif place.stat().st_size != one.size:
            problems.append(Problem(str(place), f"{place.stat().st_size} bytes", f"{one.size} bytes"))
    named = {one.path for one in manifest.files} | {MANIFEST}
    for extra in sorted(path for path in _files(folder) if path.relative_to(folder).as_posix() not in named):
        problems.append(Problem(str(extra), "a file the manifest does not name", "no such file"))
    return problems


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _seal(path: Path, folder: Path, failpoint: str) -> FileEntry:
    """Sync a file, make it read-only and take its digest."""
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not _is_plain(name):
        raise AssertionError(f"{name!r} cannot be part of an object: plain files with plain names only")
    path.chmod(0o444)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if failpoint == "publish":
        reach("publish.file_synced")
    return FileEntry(name, path.stat().st_size, digest_file(path))


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o444)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(folder: Path, destination: Path) -> None:
    """Rename into place; when another process published the same key first, keep that one."""
    try:
        os.rename(folder, destination)  # noqa: PTH104 - Path.rename replaces an empty folder silently on some systems
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _structure_problems(destination):
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file at once: a temporary one beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


@contextlib.contextmanager
def _flock(path: Path, operation: int) -> Iterator[Any]:
    """The open, locked file; None when a non-blocking lock is held elsewhere. Not inherited by children."""
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            yield None
            return
        yield file


def _file_system(folder: Path) -> str:
    """Type of the file system a folder lies on, or "" where the system does not say."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    best, kind = "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, fs_type, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = str(folder) == point or str(folder).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fs_type
    return kind


def _disk_error(error: OSError, what: str) -> WorkspaceError:
    remedy = {
        errno.ENOSPC: "Free some disk space and run the same command again: nothing is lost.",
        errno.EDQUOT: "The disk quota is used up. Free some and run the same command again.",
        errno.EACCES: "Check the folder's permissions.",
        errno.EROFS: "The file system is read-only: choose another 'workspace'.",
    }.get(error.errno or 0, "Check the disk and run the same command again: nothing is lost.")
    return WorkspaceError(f"{what}: {error.strerror or error}.", remedy=remedy)
