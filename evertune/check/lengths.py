"""How long rows are in tokens, remembered between checks: who changes a recipe checks the same rows again and again.

Kept beside the fetched models, under a digest of all that the lengths follow from; a speed-up only. Where nothing can
be kept, or what was kept cannot be read, rows are encoded. A model's files are known by path, size and time, as they
are everywhere in a check; `evertune verify` reads them.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import evertune
from evertune.data.encode import DroppedRow, Encoding, counted_of, tokens_of
from evertune.data.rows import Row
from evertune.errors import WorkspaceError
from evertune.hashing import digest_json
from evertune.model.bundled import home
from evertune.model.checkpoint import Checkpoint

LENGTHS_VERSION = 1  # raised by hand when rows are encoded otherwise
# Of so many sources, for each model, encoder and limit of length, and so many bytes; what was made first goes first.
KEPT, KEPT_BYTES = 256, 1 << 28
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Length:
    """An item of the stream without its tokens: how many go through the model, and how many carry loss."""

    source: str
    id: str
    tokens: int
    counted: int


@dataclass(frozen=True)
class Lengths:
    """Of a source's rows, and the rows left out."""

    rows: tuple[Length, ...]
    dropped: tuple[DroppedRow, ...]

    @classmethod
    def of(cls, encoding: Encoding[Any]) -> "Lengths":
        rows = tuple(Length(one.source, one.id, tokens_of(one), counted_of(one)) for one in encoding.rows)
        return cls(rows, encoding.dropped)


def key_of_rows(base: Checkpoint, rows: Sequence[Row], encoder: str, max_tokens: int, too_long: str) -> str:
    """What the lengths follow from: the model's files, the rows with their places, how they are read."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps([row.source, row.id, row.place, row.format, row.value]).encode())
    return _key("rows", base, encoder, max_tokens, too_long, hasher.hexdigest())


def key_of_tokenizer(base: Checkpoint) -> str:
    return _key("tokenizer", base)


def known_lengths(key: str) -> Lengths | None:
    with contextlib.suppress(*_UNREADABLE):
        found = json.loads(_place(key).read_bytes())
        source = found["source"]
        rows = tuple(Length(source, str(one), int(tokens), int(counted)) for one, tokens, counted in found["rows"])
        dropped = tuple(DroppedRow(source, str(place), int(tokens)) for place, tokens in found["dropped"])
        if all(one.tokens >= one.counted >= 0 for one in rows):
            return Lengths(rows, dropped)
    return None


def keep_lengths(key: str, source: str, found: Lengths) -> None:
    rows = [[one.id, one.tokens, one.counted] for one in found.rows]
    dropped = [[one.place, one.tokens] for one in found.dropped]
    _keep(key, {"source": source, "rows": rows, "dropped": dropped})


def known_words(key: str) -> int | None:
    """How many tokens a tokenizer knows in which a check has found nothing wrong."""
    with contextlib.suppress(*_UNREADABLE):
        return int(json.loads(_place(key).read_bytes())["words"])
    return None


def keep_words(key: str, words: int) -> None:
    _keep(key, {"words": words})


def _key(what: str, base: Checkpoint, *parts: Any) -> str:
    made_by = [evertune.__version__, version("tokenizers"), version("jinja2")]
    return digest_json([LENGTHS_VERSION, *made_by, what, base.base.digest, *parts])


def _place(key: str) -> Path:
    return home() / "lengths" / f"{key}.json"


def _keep(key: str, value: dict[str, Any]) -> None:
    from evertune.workspace.disk import write_atomically

    place = _place(key)
    with contextlib.suppress(OSError, WorkspaceError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(value).encode())
        files = sorted(place.parent.glob("*.json"), key=lambda file: -file.stat().st_mtime_ns)
        sizes = accumulate(file.stat().st_size for file in files)
        for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
            if i >= KEPT or size > KEPT_BYTES:
                file.unlink(missing_ok=True)
