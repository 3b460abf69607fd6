"""The rows of promoted rounds: kept for later replay, and known to the index that finds them again in new rows."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evertune.data.dedup import resolve
from evertune.data.fingerprint import fingerprint
from evertune.data.index import DEFAULT, open_index
from evertune.data.rows import Row


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of one source as JSONL, each with its id; `read_rows` with the rows' format reads them again."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            value = {**row.value, "id": row.id}
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


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
