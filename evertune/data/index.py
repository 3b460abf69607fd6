"""What was kept before, on disk: an index of fingerprints that is extended by each batch and never built anew.

    <folder>/segments.json          names of the segments that count, in order; replaced in one step
    <folder>/<name>/*.npy, rows.txt one batch, or several that were joined: written and synced before it is named

A process that is killed leaves the index as it was before the batch, or with all of it; what it left unnamed is removed
by the next that writes. Segments double in size like the digits of a number (the logarithmic method of Bentley and Saxe
1980), so that n batches cost n log n, and a new one is compared with few segments, through memory-mapped files.
"""

# R rows of a segment

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fcntl import LOCK_EX, LOCK_NB
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evertune.data.dedup import THRESHOLD, Several, by_text, find_texts, resolve
from evertune.data.fingerprint import Fingerprints, fingerprint, join
from evertune.data.rows import Row
from evertune.data.shingles import WIDTH, Hashes, Indices, Shingles, distinct
from evertune.data.similar import MAX_ROWS, Pairs, Postings, Rarity, pairs_between, postings_of
from evertune.errors import DataError, IntegrityError, WorkspaceError
from evertune.hashing import digest_bytes
from evertune.workspace.disk import flock, sync_file, sync_folder, write_atomically

VERSION = 1
NAMES = "segments.json"
_MAPPED_BYTES = 4096
_ARRAYS = ("texts", "rows", "starts", "hashes", "templates", "levels", "postings")


@dataclass(frozen=True)
class IndexSettings:
    """What every row of an index was made with: another choice would compare unlike with unlike."""

    part: str
    width: int
    threshold: float


DEFAULT = IndexSettings("both", WIDTH, THRESHOLD)


class Segment:
    """Fingerprints of some kept rows, read as they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def shingles(self) -> Shingles:
        """Less the templates of the batch."""
        return Shingles(self._array("starts"), self._array("hashes"))

    @property
    def templates(self) -> Hashes:
        return self._array("templates")

    @property
    def texts(self) -> NDArray[np.uint64]:
        """Digests, ascending."""
        return self._array("texts")

    @property
    def count(self) -> int:
        return len(self._array("rows"))

    @cached_property
    def labels(self) -> list[str]:
        """What each row is called."""
        return (self.folder / "rows.txt").read_text(encoding="utf-8").split("\n")[: self.count]

    def prints(self) -> Fingerprints:
        return Fingerprints(self.texts, self._array("rows"), self.shingles)

    def same_text(self, texts: NDArray[np.uint64]) -> Indices:
        """The row with each text, or -1."""
        return find_texts(self.texts, texts)

    def similar(self, shingles: Shingles, threshold: float) -> Pairs:
        rarity, postings = Rarity(self._array("levels")), Postings(self._array("postings"))
        return pairs_between(shingles, self.shingles, postings, rarity, threshold)

    def _array(self, name: str) -> Any:
        path = self.folder / f"{name}.npy"
        try:
            # An array without elements cannot be mapped.
            is_large = path.stat().st_size > _MAPPED_BYTES
            return np.load(path, mmap_mode="r" if is_large else None, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"{path} cannot be read: {error}.",
                remedy="Remove the index and build it again from the data.",
            ) from error


class DedupIndex:
    """Kept rows of all batches so far. Make one with `open_index`."""

    def __init__(self, folder: Path, settings: IndexSettings, segments: Sequence[Segment]) -> None:
        self.folder = folder
        self.settings = settings
        self.segments = list(segments)

    def __len__(self) -> int:
        return sum(one.count for one in self.segments)

    @property
    def templates(self) -> Hashes:
        """Shingles left out of any batch."""
        return self._all.templates

    def same_text(self, texts: NDArray[np.uint64]) -> Indices:
        return self._all.same_text(texts)

    def similar(self, shingles: Shingles, threshold: float) -> Pairs:
        return self._all.similar(shingles, threshold)

    @property
    def _all(self) -> Several:
        return Several([(one, one.count) for one in self.segments])

    def label(self, row: int) -> str:
        """What the row of this number is called."""
        for one in self.segments:
            if row < one.count:
                return one.labels[row]
            row -= one.count
        raise IndexError(row)

    def add(self, prints: Fingerprints, labels: Sequence[str], templates: Hashes) -> None:
        """Keep rows that repeat nothing in the index; on disk, whole, when this returns.

        Args:
            labels: what each row is called; line ends become spaces.
            templates: shingles that were left out when the rows were compared.

        Raises:
            DataError: more rows than a segment holds.
            WorkspaceError: another process writes to the index.
        """
        if len(prints) == 0:
            return
        with _alone(self.folder):
            _sweep(self.folder, self.segments)
            names = [one.replace("\n", " ").replace("\r", " ") for one in labels]
            stripped = Fingerprints(prints.texts, prints.rows, prints.shingles.without(templates))
            held, kept, shed = list(self.segments), (stripped, names, templates), []
            while held and held[-1].count < 2 * len(kept[0]):
                last = held.pop()
                kept = (
                    join([last.prints(), kept[0]]),
                    [*last.labels, *kept[1]],
                    distinct(np.concatenate([last.templates, kept[2]])),
                )
                shed.append(last)
            held.append(self._write(*kept))
            _publish(self.folder, self.settings, held)
            self.segments = held
            for one in shed:
                if one.folder != held[-1].folder:
                    shutil.rmtree(one.folder)

    def _write(self, prints: Fingerprints, labels: Sequence[str], templates: Hashes) -> Segment:
        if len(prints) > MAX_ROWS:
            raise DataError(f"{self.folder}: found {len(prints)} rows for one segment, expected at most {MAX_ROWS}.")
        order = by_text(prints.texts)
        prints, labels = prints.take(order), [labels[i] for i in order]
        rarity = Rarity.of(prints.shingles)
        arrays: dict[str, NDArray[Any]] = {
            "texts": prints.texts,
            "rows": prints.rows,
            "starts": prints.shingles.starts,
            "hashes": prints.shingles.hashes,
            "templates": templates,
            "levels": rarity.levels,
            "postings": postings_of(prints.shingles, rarity, self.settings.threshold).packed,
        }
        name = digest_bytes(b"".join(np.ascontiguousarray(arrays[one]).tobytes() for one in ("texts", "rows")))[:32]
        folder = self.folder / name
        if folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir()
        for one in _ARRAYS:
            np.save(folder / f"{one}.npy", arrays[one], allow_pickle=False)
            sync_file(folder / f"{one}.npy")
        (folder / "rows.txt").write_text("".join(f"{one}\n" for one in labels), encoding="utf-8")
        sync_file(folder / "rows.txt")
        sync_folder(folder)
        sync_folder(self.folder)
        return Segment(folder)


def open_index(folder: Path, settings: IndexSettings, *, create: bool) -> DedupIndex:
    """Open an index, or begin one.

    Raises:
        DataError: there is none and `create` is False, or it was made with other settings.
        IntegrityError: its list of segments is damaged, or names one that is not there.
    """
    place = folder / NAMES
    if not place.is_file():
        if not create:
            raise DataError(f"{folder}: found no index there ({NAMES}).", remedy="Build one with --extend.")
        folder.mkdir(parents=True, exist_ok=True)
        _publish(folder, settings, [])
    try:
        body = json.loads(place.read_text(encoding="utf-8"))
        found = IndexSettings(**body["settings"])
        segments = [Segment(folder / name) for name in body["segments"]]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{place}: found no list of segments ({error}).", remedy="Remove the index and build it again."
        ) from error
    if body["version"] != VERSION or found != settings:
        raise DataError(
            f"{folder}: the index was built with {found}, asked for is {settings}.",
            remedy="Ask for the same part, width and threshold, or build another index.",
        )
    for one in segments:
        if not one.folder.is_dir():
            raise IntegrityError(
                f"{one.folder} is missing from the index.", remedy="Remove the index and build it again from the data."
            )
    return DedupIndex(folder, settings, segments)


def remember(folder: Path, rows: Sequence[Row], *, round_name: str) -> None:
    """Add the rows to the index of all promoted rounds, those that repeat nothing in it.

    `evertune data dedup --index` then finds what was trained on before. Adding the same rows again changes nothing.
    """
    index = open_index(folder, DEFAULT, create=True)
    prints = fingerprint(rows)
    found = resolve(prints, earlier=index)
    kept = np.flatnonzero(found.stays)
    index.add(
        prints.take(kept), [f"{round_name}: {rows[i].source}/{rows[i].id}" for i in kept.tolist()], found.templates
    )


def _publish(folder: Path, settings: IndexSettings, segments: Sequence[Segment]) -> None:
    body = {"version": VERSION, "settings": settings.__dict__, "segments": [one.folder.name for one in segments]}
    write_atomically(folder / NAMES, json.dumps(body, indent=1).encode())


def _sweep(folder: Path, segments: Sequence[Segment]) -> None:
    """Remove what a killed process left."""
    named = {NAMES, *(one.folder.name for one in segments)}
    for one in folder.iterdir():
        if one.name not in named:
            shutil.rmtree(one) if one.is_dir() else one.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with flock(folder, LOCK_EX | LOCK_NB) as is_ours:
        if not is_ours:
            raise WorkspaceError(f"{folder} is being written by another process.", remedy="Wait for it, or stop it.")
        yield
