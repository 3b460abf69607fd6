"""Rows as token ids with the mask of what counts. A row that is too long is an error or left out, never cut."""

# T tokens of a row

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from evertune.data.rows import Row, messages_of, preference_turns
from evertune.errors import CheckpointError, DataError

if TYPE_CHECKING:  # a check that knows the lengths of its rows reads no tokenizer
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

    @property
    def rows(self) -> "tuple[EncodedRow, ...]":
        """What goes through the model: itself."""
        return (self,)

    def as_replay(self) -> "EncodedRow":
        """The same row, drawn as replay."""
        return replace(self, is_replay=True)


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """Two answers to one prompt, of which the first is preferred; only the answers' tokens count."""

    source: str
    id: str
    chosen: EncodedRow
    rejected: EncodedRow

    @property
    def is_replay(self) -> bool:
        return False

    @property
    def rows(self) -> tuple[EncodedRow, ...]:
        """What goes through the model: both conversations."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A question that the model will answer, with what its answer is checked against.

    Attributes:
        prompt: the conversation up to where the assistant is to speak; nothing in it counts.
        answer: what a verifier compares with; None where it reads none.
        task: for an episode, the conversation in words (`messages`), `environment`, `state` and `goal`.
    """

    source: str
    id: str
    prompt: EncodedRow
    answer: Any
    task: Mapping[str, Any] | None = None

    @property
    def is_replay(self) -> bool:
        return False

    @property
    def rows(self) -> tuple[EncodedRow, ...]:
        """The prompt, which is all that is known before the model speaks."""
        return (self.prompt,)


class Item(Protocol):
    """What the stream is made of: one or more rows that belong together."""

    @property
    def source(self) -> str: ...

    @property
    def id(self) -> str: ...

    @property
    def is_replay(self) -> bool: ...

    @property
    def rows(self) -> tuple[EncodedRow, ...]: ...


AnyItem = TypeVar("AnyItem", EncodedRow, EncodedPair, EncodedPrompt)


def tokens_of(item: Item) -> int:
    """Tokens that go through the model."""
    return sum(len(row.ids) for row in item.rows)


def counted_of(item: Item) -> int:
    """Tokens that carry loss. The first of a row has nothing before it and never does."""
    return sum(int(row.counted[1:].sum()) for row in item.rows)


@dataclass(frozen=True)
class DroppedRow:
    """A row that was left out for its length: its source, `file:line`, and its length in tokens."""

    source: str
    place: str
    tokens: int


@dataclass(frozen=True)
class Encoding(Generic[AnyItem]):
    """Encoded rows, and the rows left out."""

    rows: tuple[AnyItem, ...]
    dropped: tuple[DroppedRow, ...]


def encode_rows(
    rows: Sequence[Row], codec: "Codec", *, max_tokens: int, too_long: Literal["error", "drop"]
) -> Encoding[EncodedRow]:
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
    found = [(row, _encoded(row, *_tokens(row, codec))) for row in rows]
    return _within(found, max_tokens, too_long)


def encode_pairs(
    rows: Sequence[Row], codec: "Codec", *, max_tokens: int, too_long: Literal["error", "drop"]
) -> Encoding[EncodedPair]:
    """Encode `preference` rows: the prompt with each of its two answers, of which only the answer counts.

    Args:
        max_tokens: of the longer of the two conversations of a pair that is kept.
        too_long: as for `encode_rows`.

    Raises:
        DataError: as for `encode_rows`, or the two answers of a row are the same tokens.
        CheckpointError: as for `encode_rows`.
    """
    found = [(row, _pair(row, codec)) for row in rows]
    return _within(found, max_tokens, too_long)


def encode_prompts(
    rows: Sequence[Row], codec: "Codec", *, max_tokens: int, too_long: Literal["error", "drop"]
) -> Encoding[EncodedPrompt]:
    """Encode questions: `verifiable` and `episode` rows, `choice` rows (the answer is the right choice's text), and
    `messages` rows (the last turn is the answer).

    Args:
        max_tokens: of the longest prompt that is kept.
        too_long: as for `encode_rows`.

    Raises:
        DataError: as for `encode_rows`.
        CheckpointError: as for `encode_rows`.
    """
    found = [(row, _prompt(row, codec)) for row in rows]
    return _within(found, max_tokens, too_long, counts=False)


def question_of(row: Row) -> tuple[list[dict[str, str]], Any]:
    """The turns of a question, and the answer that a verifier compares with.

    Raises:
        DataError: the row is no question.
    """
    if row.format == "messages":
        turns = messages_of(row.value)
        return turns[:-1], turns[-1]["content"]
    if row.format == "choice":
        answer = row.value["answer"]
        return messages_of(row.value), answer if isinstance(answer, str) else row.value["choices"][answer]
    if row.format in ("verifiable", "episode"):
        return messages_of(row.value), row.value["answer"]
    raise DataError(
        f"{row.place}: found a row of format '{row.format}', expected verifiable, episode, choice or messages.",
        remedy="Name a source of such rows.",
    )


def _within(
    found: Sequence[tuple[Row, AnyItem]], max_tokens: int, too_long: Literal["error", "drop"], *, counts: bool = True
) -> Encoding[AnyItem]:
    """The items that are short enough, each with something that counts where that is asked."""
    kept, dropped = [], []
    for row, item in found:
        length = max(len(one.ids) for one in item.rows)
        if length > max_tokens:
            dropped.append(DroppedRow(row.source, row.place, length))
        elif counts and not all(one.counted[1:].any() for one in item.rows):
            raise DataError(
                f"{row.place}: found no token that carries loss among {length}, expected one or more.",
                remedy="The row is too short, or the chat template hides what the assistant says.",
            )
        else:
            kept.append(item)
    if dropped and too_long == "error":
        shown = ", ".join(f"{one.place} ({one.tokens} tokens)" for one in dropped[:3])
        raise DataError(
            f"{shown}: found {len(dropped)} of {len(found)} rows longer than expected: max_tokens is {max_tokens}.",
            remedy="Raise max_tokens, shorten the rows, or set 'too_long: drop' to leave them out. Rows are never cut.",
        )
    if dropped and not kept:
        raise DataError(
            f"source '{dropped[0].source}': found only rows longer than max_tokens {max_tokens}, the shortest has "
            f"{min(one.tokens for one in dropped)} tokens.",
            remedy="Raise max_tokens.",
        )
    return Encoding(tuple(kept), tuple(dropped))


def _tokens(row: Row, codec: "Codec") -> tuple[list[int], list[bool]]:
    if row.format == "text":
        ids = codec.encode(row.value["text"], special=True)
        return ids, [i > 0 for i in range(len(ids))]
    if row.format != "messages":
        raise DataError(
            f"{row.place}: found a row of format '{row.format}', expected messages or text.",
            remedy="Name a source of such rows.",
        )
    return _chat(row, messages_of(row.value), codec)


def _chat(
    row: Row, messages: Sequence[dict[str, str]], codec: "Codec", *, answers: int | None = None
) -> tuple[list[int], list[bool]]:
    try:
        encoded = codec.encode_chat(messages, answers=answers)
    except (CheckpointError, DataError) as error:
        raise type(error)(f"{row.place}: {error.message}", remedy=error.remedy) from error
    return encoded.ids, encoded.counted


def _pair(row: Row, codec: "Codec") -> EncodedPair:
    if row.format != "preference":
        raise DataError(
            f"{row.place}: found a row of format '{row.format}', expected preference.",
            remedy="Name a source of such rows.",
        )
    chosen, rejected = (
        _encoded(row, *_chat(row, conversation, codec, answers=answers))
        for conversation, answers in (preference_turns(row.value, name) for name in ("chosen", "rejected"))
    )
    if chosen.digest == rejected.digest:
        raise DataError(
            f"{row.place}: found the same tokens in 'chosen' and 'rejected', expected two answers that differ.",
            remedy="Remove the row: nothing can be preferred.",
        )
    return EncodedPair(row.source, row.id, chosen, rejected)


def _prompt(row: Row, codec: "Codec") -> EncodedPrompt:
    turns, answer = question_of(row)
    try:
        ids = codec.encode_prompt(turns)
    except (CheckpointError, DataError) as error:
        raise type(error)(f"{row.place}: {error.message}", remedy=error.remedy) from error
    return EncodedPrompt(row.source, row.id, _encoded(row, ids, [False] * len(ids)), answer, _task(row, turns))


def _task(row: Row, turns: list[dict[str, str]]) -> dict[str, Any] | None:
    if row.format != "episode":
        return None
    value = row.value
    state, goal = value.get("state") or {}, value.get("goal")
    return {"messages": turns, "environment": value["environment"], "state": state, "goal": goal}


def _encoded(row: Row, ids: list[int], counted: list[bool]) -> EncodedRow:
    ids_T, counted_T = np.array(ids, dtype="<i4"), np.array(counted, dtype=np.bool_)
    digest = hashlib.sha256(ids_T.tobytes() + counted_T.tobytes()).hexdigest()
    return EncodedRow(row.source, row.id, ids_T, counted_T, is_replay=False, digest=digest)
