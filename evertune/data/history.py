"""The rows of promoted rounds that are kept for later replay."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evertune.data.fingerprint import fingerprint
from evertune.data.replay import reservoir
from evertune.data.rows import Row
from evertune.data.select import class_balanced, class_of, coverage


@dataclass(frozen=True)
class Budget:
    """How much of a source a promoted round keeps.

    Attributes:
        rows: at most so many rows.
        bytes: at most so many bytes, as JSONL; None for no bound.
        policy: which rows (see `select.py`).
        by: field with a row's class, for `class_balanced`.
    """

    rows: int = 10_000
    bytes: int | None = None
    policy: Literal["reservoir", "class_balanced", "coverage"] = "reservoir"
    by: str = "answer"


def choose(rows: Sequence[Row], budget: Budget, seed: int) -> list[Row]:
    """The rows of one source that are kept, in their order, one or more.

    Where bytes are short, the policy's rows are taken in a random order until the next one does not fit: stopping
    there, and not looking for a shorter one, keeps long rows as likely as short ones.

    Raises:
        DataError: a row lacks the field that holds its class.
    """
    if budget.policy == "class_balanced":
        kept = class_balanced(rows, budget.rows, class_of=lambda row: class_of(row, budget.by), seed=seed)
    elif budget.policy == "coverage":
        kept = [rows[i] for i in coverage(fingerprint(rows).shingles, budget.rows)]
    else:
        kept = reservoir(rows, budget.rows, seed)
    return kept if budget.bytes is None else _within(kept, budget.bytes, seed)


def _within(rows: Sequence[Row], limit: int, seed: int) -> list[Row]:
    # Only `random()` keeps its sequence between versions of Python.
    rng = random.Random(seed)
    order = sorted(range(len(rows)), key=[rng.random() for _ in rows].__getitem__)
    used = np.cumsum([len(_line(rows[i])) for i in order])
    return [rows[i] for i in sorted(order[: max(1, int((used <= limit).sum()))])]


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of one source as JSONL, each with its id; `read_rows` with the rows' format reads them again."""
    with path.open("wb") as file:
        file.writelines(map(_line, rows))


def _line(row: Row) -> bytes:
    value: dict[str, Any] = {**row.value, "id": row.id}
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
