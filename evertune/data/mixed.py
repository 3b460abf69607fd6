"""A mix written out: the rows in the order in which a stage would see them, as a file that any trainer reads."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evertune.data.quotas import Mixing, quotas_of, warnings_of
from evertune.data.rows import BadRows, Row, files_of
from evertune.data.sift import QUARANTINE, Source, rows_of
from evertune.data.store import RowStore, write_store
from evertune.data.stream import Stream
from evertune.data.write import row_writer
from evertune.errors import DataError
from evertune.hashing import digest_file
from evertune.workspace.disk import write_atomically

CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Mixed:
    """What a mix holds.

    Attributes:
        rows: rows by source, `replay:<name>` for replayed ones.
        passes: how often each source was gone through.
        share: share of all rows that is replay.
        warnings: sources that are shown very often, or not all of them.
    """

    rows: dict[str, int]
    passes: dict[str, float]
    share: float
    warnings: list[str]
    quarantined: int

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def mix(
    new: Sequence[Source],
    out: Path | None,
    *,
    mixing: Mixing,
    replay: Sequence[Source] = (),
    share: float = 0.0,
    epochs: float = 1.0,
    rows: int | None = None,
    seed: int = 0,
    count_tokens: Callable[[Row], int] | None = None,
) -> Mixed:
    """Write the first rows of the stream of these sources to `<out>/mix.jsonl` or `<out>`, with a manifest beside it.

    Sources are written to disk once for access by number, so that memory does not grow with them.

    Args:
        out: a file of `write.OUT_SUFFIXES`; None only counts.
        share: share of all rows that is replay.
        epochs, rows: how much is written; `rows` wins.
        count_tokens: for weights by tokens.

    Raises:
        DataError: as `Stream`, `quotas_of` and the readers.
    """
    if out is not None and (out.exists() or _manifest(out).exists()):
        raise DataError(f"{out}: found something there, expected a new file.", remedy="Choose another --out.")
    bad = BadRows()
    parent = out.parent if out is not None else None
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mix-", dir=parent) as name:
        folder = Path(name)
        stores = {
            one.name: write_store(
                rows_of(one, bad), folder / f"{i}.arrow", count_tokens=count_tokens, place=str(one.path)
            )
            for i, one in enumerate([*new, *replay])
        }
        sizes = {one.name: len(stores[one.name]) for one in new}
        tokens = {one.name: stores[one.name].tokens for one in new} if count_tokens else None
        quotas = quotas_of(mixing, sizes, tokens)
        stream = Stream(sizes, None, {one.name: len(stores[one.name]) for one in replay}, share, seed, quotas=quotas)
        total = rows if rows is not None else round(epochs * stream.rows_per_epoch)
        if out is not None:
            _write(stream, stores, total, out)
        told = stream.describe(total)
    new_rows = sum(told["rows"][name] for name in sizes)
    found = Mixed(
        rows=told["rows"],
        passes={name: round(value, 4) for name, value in told["passes"].items()},
        share=told["share_done"],
        warnings=warnings_of(quotas, sizes, new_rows / stream.new_per_epoch),
        quarantined=len(bad.found),
    )
    if out is not None:
        settings = {"mixing": mixing.__dict__, "share": share, "seed": seed, "rows": total}
        _write_facts(out, [*new, *replay], found, settings, bad)
    return found


def _write(stream: Stream, stores: Mapping[str, RowStore], total: int, out: Path) -> None:
    with row_writer(out) as writer:
        for first in range(0, total, CHUNK_ROWS):
            picks = stream.picks(np.arange(first, min(first + CHUNK_ROWS, total)))
            values: list[dict[str, Any]] = [{}] * len(picks.source)
            for i, name in enumerate(picks.names):
                places = np.flatnonzero(picks.source == i)
                for place, value in zip(places.tolist(), stores[name].take(picks.index[places]), strict=True):
                    values[place] = value
            for value in values:
                writer.add(value)


def _write_facts(out: Path, sources: Sequence[Source], found: Mixed, settings: Mapping[str, Any], bad: BadRows) -> None:
    if bad.found:
        with row_writer(out.with_name(f"{out.name}.{QUARANTINE}")) as writer:
            for one in bad.found:
                writer.add(one)
    body = {
        "evertune": 1,
        "operation": "mix",
        "settings": dict(settings),
        "inputs": [
            {"source": one.name, "file": str(file), "sha256": digest_file(file)}
            for one in sources
            for file in files_of(one.path)
        ],
        "outputs": [{"file": out.name, "rows": sum(found.rows.values()), "sha256": digest_file(out)}],
        **found.to_json(),
    }
    write_atomically(_manifest(out), json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n")


def _manifest(out: Path) -> Path:
    return out.with_name(f"{out.name}.manifest.json")
