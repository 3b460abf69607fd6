"""Rows as token ids with the mask of what counts. A row that is too long is an error or left out, never cut."""

# T tokens of a row

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evertune.data.rows import Row, messages_of
from evertune.errors import CheckpointError, DataError
from evertune.model.codec import Codec


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """A row as the model reads it. Rows are compared by `digest`.

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
    """A row that was left out for its length: its source, `file:line`, and its length in tokens."""

    source: str
    place: str
    tokens: int


@dataclass(frozen=True)
class Encoding:
    """Encoded rows, and the rows left out."""

    rows: tuple[EncodedRow, ...]
    dropped: tuple[DroppedRow, ...]


def encode_rows(rows: Sequence[Row], codec: Codec, *, max_tokens: int, too_long: Literal["error", "drop"]) -> Encoding:
    """Encode `messages` and `text` rows.

    Of a conversation the assistant's tokens count, stop tokens included; of a text every token but the first, which
    nothing predicts.

    Args:
        max_tokens: length of the longest row that is kept.
        too_long: `error`, or `drop` to leave longer rows out and name them.

    Raises:
        DataError: a row is too long and `too_long` is `error`, no token of a row counts, every row was dropped, or a
            row is of another format.
        CheckpointError: the chat template is missing or refuses a conversation, with the row's place.
    """
    kept, dropped = [], []
    for row in rows:
        ids, counted = _tokens(row, codec)
        if len(ids) > max_tokens:
            dropped.append(DroppedRow(row.source, row.place, len(ids)))
        elif not any(counted[1:]):
            raise DataError(
                f"{row.place}: found no token that carries loss among {len(ids)}, expected one or more.",
                remedy="The row is too short, or the chat template hides what the assistant says.",
            )
        else:
            kept.append(_encoded(row, ids, counted))
    if dropped and too_long == "error":
        shown = ", ".join(f"{one.place} ({one.tokens} tokens)" for one in dropped[:3])
        raise DataError(
            f"{shown}: found {len(dropped)} of {len(rows)} rows longer than expected: max_tokens is {max_tokens}.",
            remedy="Raise max_tokens, shorten the rows, or set 'too_long: drop' to leave them out. Rows are never cut.",
        )
    if dropped and not kept:
        raise DataError(
            f"source '{rows[0].source}': found only rows longer than max_tokens {max_tokens}, the shortest has "
            f"{min(one.tokens for one in dropped)} tokens.",
            remedy="Raise max_tokens.",
        )
    return Encoding(tuple(kept), tuple(dropped))


def _tokens(row: Row, codec: Codec) -> tuple[list[int], list[bool]]:
    if row.format == "text":
        ids = codec.encode(row.value["text"], special=True)
        return ids, [i > 0 for i in range(len(ids))]
    if row.format != "messages":
        raise DataError(
            f"{row.place}: found a row of format '{row.format}', expected messages or text.",
            remedy="Name a source of such rows.",
        )
    try:
        encoded = codec.encode_chat(messages_of(row.value))
    except (CheckpointError, DataError) as error:
        raise type(error)(f"{row.place}: {error.message}", remedy=error.remedy) from error
    return encoded.ids, encoded.counted


def _encoded(row: Row, ids: list[int], counted: list[bool]) -> EncodedRow:
    ids_T, counted_T = np.array(ids, dtype="<i4"), np.array(counted, dtype=np.bool_)
    digest = hashlib.sha256(ids_T.tobytes() + counted_T.tobytes()).hexdigest()
    return EncodedRow(row.source, row.id, ids_T, counted_T, is_replay=False, digest=digest)
