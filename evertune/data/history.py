"""The rows of promoted rounds, kept for later replay."""

import json
from collections.abc import Sequence
from pathlib import Path

from evertune.data.rows import Row


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, each with its id; `read_rows` reads them again."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row.value, "id": row.id}, ensure_ascii=False) + "\n")
