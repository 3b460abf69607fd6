"""Scores per item: what every statistic, verdict and report is made of. Stored as Parquet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evertune.errors import ProbeError

VERSION = "1"


@dataclass(frozen=True)
class ItemScores:
    """Scores of one checkpoint on one probe; I items, in the probe's order.

    Attributes:
        probe, kind: the probe's.
        direction: `lower` for a loss.
        ids, cluster, prediction, expected: (I,) texts.
        score: (I,) float64, finite. In [0, 1], or bits per byte.
        weight: (I,) float64; UTF-8 bytes for bits per byte, else 1.
        valid: (I,) 0 or 1, whether the output had the form asked for; None where nothing is generated.
        stopped: (I,) 0 or 1, whether the answer ended with a stop token; None where nothing is generated.
        gap: (I,) nats between the best and the next choice; None but for `choice`.
        items_digest, template_digest: identity of items, and of tokenizer and chat template.
    """

    probe: str
    kind: str
    direction: Literal["higher", "lower"]
    ids: tuple[str, ...]
    score: NDArray[np.float64]
    cluster: tuple[str, ...]
    prediction: tuple[str, ...]
    expected: tuple[str, ...]
    weight: NDArray[np.float64]
    valid: NDArray[np.float64] | None
    stopped: NDArray[np.float64] | None
    gap: NDArray[np.float64] | None
    items_digest: str
    template_digest: str

    def __post_init__(self) -> None:
        bad = np.flatnonzero(~np.isfinite(self.score))
        if len(bad):
            raise ProbeError(
                f"probe '{self.probe}': the score of item {self.ids[bad[0]]!r} is {self.score[bad[0]]}.",
                remedy="A model with NaN or Inf in its outputs cannot be judged.",
            )

    @property
    def value(self) -> float:
        """The probe's figure: the mean score, weighted by bytes for bits per byte."""
        return float(np.average(self.score, weights=self.weight))

    def write_parquet(self, path: Path) -> None:
        """Write a table with one row an item; identity goes into the schema's metadata."""
        import pyarrow
        import pyarrow.parquet

        columns: dict[str, Any] = {
            "item_id": list(self.ids),
            "score": self.score,
            "cluster": list(self.cluster),
            "prediction": list(self.prediction),
            "expected": list(self.expected),
            "weight": self.weight,
        }
        for name in ("valid", "stopped", "gap"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        facts = {
            name: getattr(self, name) for name in ("probe", "kind", "direction", "items_digest", "template_digest")
        }
        table = pyarrow.table(columns).replace_schema_metadata({**facts, "version": VERSION})
        pyarrow.parquet.write_table(table, path)

    @classmethod
    def read_parquet(cls, path: Path) -> "ItemScores":
        """Read what `write_parquet` wrote.

        Raises:
            ProbeError: the file is missing or not such a table.
        """
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
            facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            columns = {name: table.column(name).to_pylist() for name in table.column_names}
            return cls(
                probe=facts["probe"],
                kind=facts["kind"],
                direction=facts["direction"],  # type: ignore[arg-type]
                ids=tuple(columns["item_id"]),
                score=np.array(columns["score"], dtype=np.float64),
                cluster=tuple(columns["cluster"]),
                prediction=tuple(columns["prediction"]),
                expected=tuple(columns["expected"]),
                weight=np.array(columns["weight"], dtype=np.float64),
                items_digest=facts["items_digest"],
                template_digest=facts["template_digest"],
                **{name: _optional(columns, name) for name in ("valid", "stopped", "gap")},
            )
        except (OSError, KeyError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise ProbeError(f"{path} is not a table of item scores ({error}).") from error


def check_paired(after: ItemScores, before: ItemScores) -> None:
    """Raise unless two score tables are of the same items, asked in the same way, in the same order.

    Raises:
        ProbeError: naming what differs.
    """
    for name in ("probe", "kind", "items_digest", "template_digest", "ids"):
        if getattr(after, name) != getattr(before, name):
            shown = "" if name == "ids" else f": {getattr(after, name)!r} and {getattr(before, name)!r}"
            raise ProbeError(
                f"probe '{after.probe}': the two sides differ in {name.replace('_', ' ')}{shown}.",
                remedy="Score both checkpoints with the same items and the same chat template.",
            )


def _optional(columns: dict[str, Sequence[Any]], name: str) -> NDArray[np.float64] | None:
    return np.array(columns[name], dtype=np.float64) if name in columns else None
