"""The rows of promoted rounds, kept for later replay."""

import json
from collections.abc import Sequence
from pathlib import Path

from evertune.data.rows import Row


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of one source as JSONL, each with its id; `read_rows` with the rows' format reads them again."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            value = {**row.value, "id": row.id}
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
