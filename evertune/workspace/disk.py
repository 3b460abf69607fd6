"""How bytes get to disk so that they survive a power loss, and who may write: fsync, rename, flock, clear errors."""

import contextlib
import errno
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from evertune.errors import WorkspaceError

NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre"}
MOUNTS = Path("/proc/mounts")
_REMEDIES = {
    errno.ENOSPC: "Free some disk space and run the same command again: nothing is lost.",
    errno.EDQUOT: "The disk quota is used up. Free some and run the same command again: nothing is lost.",
    errno.EFBIG: "The file is larger than this process may write: see 'ulimit -f'.",
    errno.EACCES: "Check the folder's permissions.",
    errno.EPERM: "Check the folder's permissions.",
    errno.EROFS: "The file system is read-only: choose another 'workspace'.",
    errno.ENOENT: "Something removed it meanwhile. Run the same command again.",
}
# How libraries written in Rust, safetensors among them, report a failed write.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_locks: set[int] = set()


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes are on disk."""
    with naming(path), path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file that something else wrote are on disk."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, through: Path | None = None) -> None:
    """Replace a file at once: a temporary one, fsync, rename, fsync of the folder.

    Args:
        through: folder on the same file system for the temporary file; beside `path` when not given.
    """
    temporary = (through or path.parent) / f".{uuid.uuid4().hex}"
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)  # noqa: PTH105 - the name that the test of the order watches
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def flock(folder: Path, operation: int) -> Iterator[bool]:
    """Lock a folder itself, so that no deleted lock file can let two in; the kernel frees it on any death.

    Yields whether the lock was got: False only for a non-blocking operation. A forked child gives its copy of the
    descriptor up at once, and an executed one never has it: a child that outlives us must not hold our lock.

    Raises:
        WorkspaceError: the folder is gone, or its file system knows no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise disk_error(error, f"cannot lock {folder}") from error
    _locks.add(descriptor)
    try:
        yield _try_lock(descriptor, operation, folder)
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


def file_system(folder: Path) -> str:
    """Type of the file system a folder lies on, or "" where the system does not say."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = folder.resolve()
    best, kind = Path(), ""
    for line in lines:
        point, fs_type = line.split(" ")[1:3]
        mounted = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), point))
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, fs_type
    return kind


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` the path it is about where the call knew only a descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def os_error(error: Exception) -> OSError | None:
    """The system's error behind an exception, also where a library reports it in its own words; None for any other."""
    if isinstance(error, OSError):
        return error
    found = _RUST_OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def disk_error(error: OSError, what: str) -> WorkspaceError:
    """A `WorkspaceError` that says what could not be done, why, with which file, and what to do."""
    file = f" ({error.filename})" if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0, "Check the disk and run the same command again: nothing is lost.")
    return WorkspaceError(f"{what}: {error.strerror or error}{file}.", remedy=remedy)


def _try_lock(descriptor: int, operation: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise disk_error(error, f"cannot lock {folder}") from error
    return True


def _drop_locks() -> None:
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_drop_locks)
