"""What a merge has finished, so that a killed one goes on: a line for each segment, written after its bytes are safe.

    {"plan": digest}
    {"tensor": 3, "segment": 0, "sum": 1234}
    {"tensor": 3, "statistics": {...}}

A cut last line is ignored. Before a line is written the data files are synced, so a line never promises too much.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

SYNC_BYTES = 64 << 20


class Journal:
    """An open journal. Lines of one merge may come from any thread.

    finished: (tensor, segment) -> checksum, of an earlier process.
    statistics: tensor -> what was measured.
    """

    def __init__(self, path: Path, plan_digest: str) -> None:
        self.finished: dict[tuple[int, int], int] = {}
        self.statistics: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._unsynced = 0
        self._data: list[int] = []
        known = self._read(path, plan_digest)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not known:
            os.ftruncate(self._file, 0)
            os.write(self._file, (json.dumps({"plan": plan_digest}) + "\n").encode())
            os.fsync(self._file)

    def watch(self, descriptors: list[int]) -> None:
        """The data files that must be synced before a line is written."""
        self._data = descriptors

    def segment(self, tensor: int, segment: int, checksum: int, size: int) -> None:
        """Record a segment whose `size` bytes were written."""
        with self._lock:
            self._lines.append(json.dumps({"tensor": tensor, "segment": segment, "sum": checksum}))
            self._unsynced += size
            if self._unsynced >= SYNC_BYTES:
                self._flush()

    def measured(self, tensor: int, statistics: dict[str, Any]) -> None:
        """Record the statistics of a tensor."""
        with self._lock:
            self._lines.append(json.dumps({"tensor": tensor, "statistics": statistics}))

    def close(self) -> None:
        """Sync what is left."""
        with self._lock:
            self._flush()
            os.close(self._file)

    def abandon(self) -> None:
        """Close without writing what is not synced yet."""
        os.close(self._file)

    def _flush(self) -> None:
        for descriptor in self._data:
            os.fdatasync(descriptor)
        if self._lines:
            os.write(self._file, ("\n".join(self._lines) + "\n").encode())
            os.fsync(self._file)
        self._lines, self._unsynced = [], 0

    def _read(self, path: Path, plan_digest: str) -> bool:
        """Take over an earlier journal; False when there is none of this plan."""
        if not path.is_file():
            return False
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            return False
        if not lines or lines[0] != {"plan": plan_digest}:
            return False
        for one in lines[1:]:
            if "statistics" in one:
                self.statistics[one["tensor"]] = one["statistics"]
            else:
                self.finished[one["tensor"], one["segment"]] = one["sum"]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        return True
