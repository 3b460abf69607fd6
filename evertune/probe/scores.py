"""What a probe says of a checkpoint: a score per item, kept as Parquet with the identity of what was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evertune.errors import ProbeError
from evertune.hashing import canonical_json

VERSION = 1
METADATA_KEY = b"evertune.scores"
# Fields that are arrays, with their dtype; the last four are None where the kind of probe has no such thing.
_ARRAYS: Mapping[str, Any] = {
    "score": np.float64,
    "valid": np.bool_,
    "stopped": np.bool_,
    "gap": np.float64,
    "weight": np.float64,
}
_IDENTITY = ("probe", "kind", "direction", "items_digest", "template_digest", "samples")
_COLUMNS = ("ids", "score", "cluster", "prediction", "expected", "valid", "stopped", "gap", "weight")
_PAIRED = {
    "kind": "the kind of the probe",
    "direction": "the direction of the score",
    "items_digest": "the digest of the items and of how they are scored",
    "template_digest": "the digest of tokenizer and chat template",
    "samples": "the number of samples of each item",
    "ids": "the list of items",
    "cluster": "the clusters of the items",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class ItemScores:
    """One checkpoint on one probe, item by item.

    Attributes:
        probe, kind: name and kind of the probe.
        direction: whether a higher or a lower score is better.
        ids: item ids, unique, in the probe's order; every other field follows them.
        score: float64, finite. 0 or 1 for `choice`, in [0, 1] for `generate`, bits per UTF-8 byte of the item for
            `bits_per_byte`.
        cluster: items that are not independent share one; an item that stands alone has its id.
        prediction: the choice taken or the text generated; "" where nothing is predicted.
        expected: the right answer as text; "" where there is none.
        weight: bytes of the item for `bits_per_byte`; None where items count alike.
        valid: whether the output had the form that was asked for; None where nothing is generated.
        stopped: whether the output ended with a stop token; None where nothing is generated.
        gap: how far the best choice is above the next in what `normalise` compares, nats or nats per byte; None but
            for `choice`.
        items_digest: digest of the items and of how they are asked and scored.
        template_digest: digest of tokenizer, chat template and stop tokens.
        samples: how many answers each item was given; they follow each other, and every other field has an entry for
            each of them.

    Raises:
        ProbeError: a score is not finite; item and probe are named.
    """

    probe: str
    kind: str
    direction: Literal["higher", "lower"]
    ids: tuple[str, ...]
    score: NDArray[np.float64]
    cluster: tuple[str, ...]
    prediction: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    weight: NDArray[np.float64] | None = None
    valid: NDArray[np.bool_] | None = None
    stopped: NDArray[np.bool_] | None = None
    gap: NDArray[np.float64] | None = None
    items_digest: str
    template_digest: str
    samples: int = 1

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=dtype))
        for name in ("prediction", "expected"):
            if not getattr(self, name):
                object.__setattr__(self, name, ("",) * len(self.ids))
        if not self.ids:
            raise ProbeError(f"probe '{self.probe}': no items were scored, expected at least one.")
        for name in _COLUMNS:
            value = getattr(self, name)
            if value is not None and len(value) != len(self.ids):
                raise ValueError(f"{self.probe}: {len(value)} entries of '{name}' for {len(self.ids)} items")
        if len(self.ids) % self.samples:
            raise ValueError(f"{self.probe}: {len(self.ids)} entries are no multiple of {self.samples} samples")
        bad = np.flatnonzero(~np.isfinite(self.score))
        if bad.size:
            raise ProbeError(
                f"probe '{self.probe}': the score of item {self.ids[bad[0]]!r} is {self.score[bad[0]]}, and so for "
                f"{bad.size} of {len(self.ids)} items; expected finite numbers.",
                remedy="A model with NaN or Inf in its outputs cannot be judged.",
            )

    @cached_property
    def value(self) -> float:
        """Mean score; where items have weights the weighted mean: all bits by all bytes."""
        return float(np.average(self.score, weights=self.weight))

    def write_parquet(self, path: Path) -> None:
        """Write the items as columns and the identity as schema metadata; equal scores give equal bytes."""
        import pyarrow as pa
        from pyarrow import parquet

        identity = {"version": VERSION, **{name: getattr(self, name) for name in _IDENTITY}}
        schema = _schema().with_metadata({METADATA_KEY: canonical_json(identity)})
        empty = [None] * len(self.ids)
        values = [empty if (value := getattr(self, name)) is None else list(value) for name in _COLUMNS]
        columns = [pa.array(value, type=field.type) for value, field in zip(values, schema, strict=True)]
        parquet.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd", version="2.6")

    @classmethod
    def read_parquet(cls, path: Path) -> "ItemScores":
        """Read what `write_parquet` wrote.

        Raises:
            ProbeError: missing, not such a file, of another version, or malformed.
        """
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(path).read()
            identity = json.loads((table.schema.metadata or {})[METADATA_KEY])
            version = identity.pop("version")
            if version != VERSION:
                raise ValueError(f"version {version}, expected {VERSION}")
            if not table.schema.remove_metadata().equals(_schema()):
                raise ValueError(f"columns {', '.join(table.schema.names)}")
            return cls(**identity, **{name: _field(table.column(_column(name)), name) for name in _COLUMNS})
        except ProbeError:
            raise
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ProbeError(
                f"{path}: not a readable file of item scores: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}.",
                remedy="Run 'evertune verify' on its workspace, or score the checkpoint again.",
            ) from error


def concatenate(parts: Sequence[ItemScores]) -> ItemScores:
    """Scores of several parts of one probe's items, one after the other.

    Raises:
        ValueError: the parts differ in what was measured.
    """
    first = parts[0]
    if any(getattr(one, name) != getattr(first, name) for one in parts for name in _IDENTITY):
        raise ValueError(f"parts of '{first.probe}' were not measured alike")
    columns: dict[str, Any] = {}
    for name in _COLUMNS:
        values = [getattr(one, name) for one in parts]
        if name in _ARRAYS:
            columns[name] = None if values[0] is None else np.concatenate(values)
        else:
            columns[name] = tuple(entry for value in values for entry in value)
    return ItemScores(**{name: getattr(first, name) for name in _IDENTITY}, **columns)


def check_paired(after: ItemScores, before: ItemScores) -> None:
    """Raise unless two score tables are of the same items, asked and scored in the same way, in the same order.

    Raises:
        ProbeError: names what differs.
    """
    for name, meaning in _PAIRED.items():
        left, right = getattr(after, name), getattr(before, name)
        if left != right:
            shown = f": {left[:12]} and {right[:12]}" if isinstance(left, str) else ""
            raise ProbeError(
                f"probe '{after.probe}': the two checkpoints were not measured alike, {meaning} differs{shown}.",
                remedy="Score both with the same probe, tokenizer and chat template.",
            )


def _schema() -> Any:
    import pyarrow as pa

    types = {np.float64: pa.float64(), np.bool_: pa.bool_()}
    return pa.schema([(_column(name), types[_ARRAYS[name]] if name in _ARRAYS else pa.string()) for name in _COLUMNS])


def _column(field: str) -> str:
    """The only name that differs in the file is that of the ids."""
    return "item_id" if field == "ids" else field


def _field(column: Any, name: str) -> Any:
    """A column as its field's value; a column of nulls is a field that is None."""
    if column.null_count:
        if column.null_count != len(column) or name == "score" or name not in _ARRAYS:
            raise ValueError(f"{column.null_count} empty entries in column '{name}'")
        return None
    return column.to_numpy() if name in _ARRAYS else tuple(column.to_pylist())
