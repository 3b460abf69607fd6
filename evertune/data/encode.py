"""Rows as token ids with the mask of what counts. A row that is too long is an error or left out, never cut."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evertune.data.rows import Row, messages_of
from evertune.errors import DataError
from evertune.model.codec import Codec


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model reads it.

    Attributes:
        source, id: where it came from.
        ids: (T,) int32 token ids.
        counted: (T,) bool, True where a token carries loss.
        is_replay: drawn from old or general data.
        digest: hex SHA-256 of ids and mask.
    """

    source: str
    id: str
    ids: NDArray[np.int32]
    counted: NDArray[np.bool_]
    is_replay: bool
    digest: str

    def as_replay(self) -> "EncodedRow":
        """The same row, drawn as replay."""
        return replace(self, is_replay=True)


@dataclass(frozen=True)
class DroppedRow:
    """A row that was left out for its length."""

    source: str
    place: str
    tokens: int


@dataclass(frozen=True)
class Encoding:
    """Encoded rows, and the rows left out."""

    rows: tuple[EncodedRow, ...]
    dropped: tuple[DroppedRow, ...]


def encode_rows(rows: Sequence[Row], codec: Codec, *, max_tokens: int, too_long: str) -> Encoding:
    """Encode `messages` and `text` rows.

    Of a conversation the assistant's tokens count, stop tokens included; of a text every token but the first, which
    nothing predicts.

    Args:
        max_tokens: the longest row.
        too_long: `error`, or `drop` to leave longer rows out and name them.

    Raises:
        DataError: a row is too long and `too_long` is `error`, no token of a row counts, or every row was dropped.
    """
    kept, dropped = [], []
    for row in rows:
        ids, counted = _encode(row, codec)
        if len(ids) > max_tokens:
            dropped.append(DroppedRow(row.source, row.place, len(ids)))
        elif not any(counted[1:]):
            raise DataError(
                f"{row.place}: no token of this row carries loss.",
                remedy="The chat template may hide the assistant's turn; see 'evertune check --sample 1'.",
            )
        else:
            kept.append(_row(row, ids, counted))
    if dropped and too_long == "error":
        shown = ", ".join(f"{one.place} ({one.tokens} tokens)" for one in dropped[:3])
        raise DataError(
            f"{len(dropped)} of {len(rows)} rows are longer than max_tokens {max_tokens}: {shown}.",
            remedy="Raise max_tokens, shorten the rows, or set 'too_long: drop' to leave them out. Rows are never cut.",
        )
    if rows and not kept:
        raise DataError(f"source '{rows[0].source}': every row is longer than max_tokens {max_tokens}.")
    return Encoding(tuple(kept), tuple(dropped))


def _encode(row: Row, codec: Codec) -> tuple[list[int], list[bool]]:
    if "text" in row.value and "messages" not in row.value:
        ids = codec.encode(row.value["text"], special=True)
        return ids, [False] + [True] * (len(ids) - 1)
    encoded = codec.encode_chat(messages_of(row.value))
    return encoded.ids, encoded.counted


def _row(row: Row, ids: list[int], counted: list[bool]) -> EncodedRow:
    ids_T, counted_T = np.array(ids, dtype=np.int32), np.array(counted, dtype=np.bool_)
    digest = hashlib.sha256(ids_T.tobytes() + counted_T.tobytes()).hexdigest()
    return EncodedRow(row.source, row.id, ids_T, counted_T, is_replay=False, digest=digest)
