"""What an object says of itself, and everything in which its bytes can differ from that."""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from evertune.errors import IntegrityError
from evertune.hashing import canonical_json, digest_file, digest_json

MANIFEST = "MANIFEST.json"
SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of an object: name relative to the folder, size in bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was published: kind, key, the facts recorded beside the files, and the files."""

    kind: str
    key: str
    record: dict[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def tree(self) -> str:
        """Digest of the names, sizes and digests of all files."""
        return digest_json(sorted([one.path, one.size, one.sha256] for one in self.files))

    def to_bytes(self) -> bytes:
        """The content of MANIFEST.json: canonical JSON that carries its own digest."""
        body = {
            "schema": SCHEMA,
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder.

    Raises:
        IntegrityError: it is missing, malformed, of a newer version, or differs in any byte from what was written.
    """
    place = folder / MANIFEST
    remedy = "Run 'evertune verify' on the workspace."
    try:
        data = place.read_bytes()
        body = json.loads(data)
        if body["schema"] != SCHEMA:
            raise IntegrityError(f"{place} has schema {body['schema']!r}; this Evertune reads {SCHEMA}.")
        files = tuple(_entry(*one) for one in body["files"])
        manifest = Manifest(kind=str(body["kind"]), key=str(body["key"]), record=dict(body["record"]), files=files)
        is_altered = manifest.to_bytes() != data
    except OSError as error:
        raise IntegrityError(f"{place} cannot be read: {error.strerror}.", remedy=remedy) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{place} is not a manifest: {error!r}.", remedy=remedy) from error
    if is_altered:
        raise IntegrityError(f"{place} was altered: its own digest does not match.", remedy=remedy)
    return manifest


def verify_folder(folder: Path) -> list[Problem]:
    """Everything in which a published folder differs from its manifest, reading every byte."""
    problems = structure_problems(folder)
    if any(one.place == str(folder / MANIFEST) for one in problems):
        return problems
    broken = {one.place for one in problems}
    for one in read_manifest(folder).files:
        place = folder / one.path
        if str(place) in broken:
            continue
        try:
            found = f"sha256 {digest_file(place)}"
        except OSError as error:
            found = f"unreadable: {error.strerror}"
        if found != f"sha256 {one.sha256}":
            problems.append(Problem(str(place), found, f"sha256 {one.sha256}"))
    return problems


def structure_problems(folder: Path) -> list[Problem]:
    """The part of `verify_folder` that reads no content: manifest, names, sizes, files that do not belong."""
    try:
        manifest = read_manifest(folder)
    except IntegrityError as error:
        return [Problem(str(folder / MANIFEST), error.message, "the manifest that was published")]
    problems = []
    for one in manifest.files:
        place = folder / one.path
        if place.is_symlink() or not place.is_file():
            problems.append(Problem(str(place), "no plain file", f"a file of {one.size} bytes"))
        elif place.stat().st_size != one.size:
            problems.append(Problem(str(place), f"{place.stat().st_size} bytes", f"{one.size} bytes"))
    named = {one.path for one in manifest.files} | {MANIFEST}
    for path in files_of(folder):
        if path.relative_to(folder).as_posix() not in named:
            problems.append(Problem(str(path), "a file the manifest does not name", "no such file"))
    return problems


def files_of(folder: Path) -> list[Path]:
    """Everything below a folder that is not itself a folder, symbolic links to folders included."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def is_plain(name: str) -> bool:
    """Whether a name stays inside its folder and comes back from JSON and from any file system as it was."""
    parts = PurePosixPath(name).parts
    inside = bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set("\\\0")
    return inside and name == unicodedata.normalize("NFC", name) and name == str(PurePosixPath(name)) and _is_utf8(name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _entry(path: Any, size: Any, sha256: Any) -> FileEntry:
    if not isinstance(path, str) or not is_plain(path):
        raise ValueError(f"{path!r} is not a plain name inside the folder")
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"size {size!r} and sha256 {sha256!r} of {path!r}")
    return FileEntry(path, size, sha256)
