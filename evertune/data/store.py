"""Rows on disk that are read in any order, by number, in memory that does not grow with them.

One Arrow file of record batches, written once, streaming, and mapped into memory: `row`, a row's JSON; `id`; `tokens`,
its length where a tokenizer was given. A batch is looked up by division; nothing is read before it is asked for.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from evertune.data.fingerprint import batched
from evertune.data.rows import Row
from evertune.errors import DataError
from evertune.workspace.disk import sync_file, sync_folder

BATCH_ROWS = 1 << 13
OPEN_BATCHES = 64
_SCHEMA = pyarrow.schema([("id", pyarrow.large_string()), ("row", pyarrow.large_binary()), ("tokens", pyarrow.int32())])


def write_store(
    rows: Iterable[Row], path: Path, *, count_tokens: Callable[[Row], int] | None = None, place: str = "the source"
) -> "RowStore":
    """Write rows in their order; the file appears when it is whole.

    Args:
        count_tokens: length of a row as a model reads it; 0 for all when not given.
        place: where the rows come from, for the message.

    Raises:
        DataError: there are no rows.
    """
    temporary = path.with_name(f".{path.name}")
    count = 0
    with pyarrow.OSFile(str(temporary), "wb") as file, pyarrow.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batched(rows, BATCH_ROWS):
            count += len(batch)
            columns = [
                pyarrow.array([row.id for row in batch], pyarrow.large_string()),
                pyarrow.array([_bytes_of(row.value) for row in batch], pyarrow.large_binary()),
                pyarrow.array([count_tokens(row) if count_tokens else 0 for row in batch], pyarrow.int32()),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=_SCHEMA))
    if not count:
        temporary.unlink()
        raise DataError(f"{place}: found no rows, expected one or more.")
    sync_file(temporary)
    temporary.rename(path)
    sync_folder(path.parent)
    return RowStore(path)


class RowStore(Sequence[dict[str, Any]]):
    """The rows of a store, by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        last = self._file.get_batch(self._file.num_record_batches - 1).num_rows
        self._count = (self._file.num_record_batches - 1) * BATCH_ROWS + last
        self._batch = lru_cache(maxsize=OPEN_BATCHES)(self._file.get_batch)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            raise TypeError(f"a row is asked for by its number, found {index!r}")
        if not 0 <= index < self._count:
            raise IndexError(index)
        return json.loads(self._batch(index // BATCH_ROWS).column(1)[index % BATCH_ROWS].as_py())

    def take(self, indices: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The rows of these numbers, in this order: faster than one by one."""
        found: list[dict[str, Any]] = [{}] * len(indices)
        order = np.argsort(indices, kind="stable")
        number = indices[order] // BATCH_ROWS
        edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            places = order[first:last]
            column = self._batch(int(number[first])).column(1)
            values = column.take(pyarrow.array(indices[places] % BATCH_ROWS)).to_pylist()
            for place, value in zip(places.tolist(), values, strict=True):
                found[place] = json.loads(value)
        return found

    def ids(self) -> Iterator[str]:
        """The ids of all rows, in order."""
        for i in range(self._file.num_record_batches):
            yield from self._file.get_batch(i).column(0).to_pylist()

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(
            int(self._file.get_batch(i).column(2).to_numpy().sum()) for i in range(self._file.num_record_batches)
        )


def _bytes_of(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
