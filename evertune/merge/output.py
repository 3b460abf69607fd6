"""Output files written by position, and their SHA-256 computed while the bytes are still in memory."""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from evertune.merge.kernels import Array
from evertune.merge.plan import OutputFile

REREAD_BYTES = 1 << 20


class OutputFiles:
    """The weights files of a merge, all of their full size from the start; segments arrive in any order.

    A digest needs its bytes in order. Whoever finishes the segment that is next in line goes on with those that were
    finished before their turn, reading them back from the page cache. So no thread waits and nothing is kept.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile]) -> None:
        self._files = []
        for one in files:
            descriptor = os.open(folder / one.name, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(descriptor, one.size)
            os.pwrite(descriptor, one.header, 0)
            self._files.append(_Digesting(descriptor, one))

    @property
    def descriptors(self) -> list[int]:
        return [one.descriptor for one in self._files]

    def write(self, file: int, offset: int, data: Array) -> None:
        """Put bytes at a place."""
        done, view = 0, data.data
        while done < len(data):
            done += os.pwrite(self._files[file].descriptor, view[done:], offset + done)

    def digest(self, file: int, offset: int, data: Array) -> None:
        """Take note of bytes that were written, or that an earlier process wrote."""
        self._files[file].add(offset, data)

    def read(self, file: int, offset: int, into: Array) -> None:
        """Read bytes back."""
        done, view = 0, into.data
        while done < len(into):
            got = os.preadv(self._files[file].descriptor, [view[done:]], offset + done)
            if got == 0:
                return
            done += got

    def close(self) -> list[str]:
        """Sync, close, and return each file's SHA-256."""
        digests = []
        for one in self._files:
            os.fsync(one.descriptor)
            digests.append(one.finish())
            os.close(one.descriptor)
        return digests

    def abandon(self) -> None:
        """Close the descriptors."""
        for one in self._files:
            os.close(one.descriptor)


class _Digesting:
    def __init__(self, descriptor: int, file: OutputFile) -> None:
        self.descriptor = descriptor
        self._size = file.size
        self._hash = hashlib.sha256(file.header)
        self._next = len(file.header)
        self._waiting: dict[int, int] = {}
        self._noting = threading.Lock()
        self._hashing = threading.Lock()

    def add(self, offset: int, data: Array) -> None:
        with self._noting:
            self._waiting[offset] = len(data)
        if not self._hashing.acquire(blocking=False):
            return
        try:
            if offset == self._next:
                self._take(offset, data)
            self._drain()
        finally:
            self._hashing.release()

    def finish(self) -> str:
        with self._hashing:
            self._drain()
            if self._next != self._size:
                raise AssertionError(f"digested {self._next} of {self._size} bytes")
            return self._hash.hexdigest()

    def _take(self, offset: int, data: Array) -> None:
        self._hash.update(data.data)
        self._next = offset + len(data)
        with self._noting:
            del self._waiting[offset]

    def _drain(self) -> None:
        while True:
            with self._noting:
                size = self._waiting.get(self._next)
            if size is None:
                return
            end = self._next + size
            with self._noting:
                del self._waiting[self._next]
            while self._next < end:
                data = os.pread(self.descriptor, min(REREAD_BYTES, end - self._next), self._next)
                self._hash.update(data)
                self._next += len(data)
