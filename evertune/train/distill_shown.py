"""Self-distillation: a teacher reads a demonstration before it speaks, and the student that learns from it does not
(SDFT, Shenfeld et al. 2026, arXiv:2601.19897; on the rows' own answers it is context distillation, Snell et al. 2022,
arXiv:2209.15189).

The paper's teacher is a moving average of the student; here it is a frozen checkpoint, the stage's own start where the
model teaches itself.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evertune.data.encode import DroppedRow, EncodedRow, Encoding, encode_rows, question_of
from evertune.data.rows import Row
from evertune.errors import CheckpointError, DataError
from evertune.model.codec import Codec
from evertune.train.distill_policy import answered_row, prompt_of

# Stands in the text of a demonstration for the row's own answer.
ANSWER = "{answer}"


class Demonstrations:
    """Prompts of rows with a demonstration behind the question, as the teachers read them.

    Args:
        text: what stands behind the last question; `{answer}` in it is the row's own answer.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._prompts: dict[tuple[str, str], NDArray[np.int32]] = {}

    def encode(
        self, rows: Sequence[Row], codec: Codec, *, max_tokens: int, too_long: Literal["error", "drop"]
    ) -> Encoding[EncodedRow]:
        """Encode rows as the student reads them, of whose tokens those of the last answer count.

        Args:
            max_tokens: of the longest row that is kept, with its demonstration.
            too_long: as for `encode_rows`.

        Raises:
            DataError, CheckpointError: as `encode_rows`; or a row does not end in a question and its answer.
        """
        plain = encode_rows(rows, codec, max_tokens=max_tokens, too_long=too_long)
        by_id = {row.id: row for row in rows}
        kept, dropped = [], list(plain.dropped)
        for one in plain.rows:
            row = by_id[one.id]
            self._prompts[one.source, one.id] = self._prompt(row, codec)
            last = int(np.flatnonzero(one.counted)[-1])
            own = self.answered(one, one.ids[len(prompt_of(one)) : last + 1].tolist())
            length = len(self.shown(own).ids)
            if length > max_tokens:
                dropped.append(DroppedRow(row.source, row.place, length))
            else:
                kept.append(own)
        if len(dropped) > len(plain.dropped) and (too_long == "error" or not kept):
            worst = max(dropped, key=lambda one: one.tokens)
            raise DataError(
                f"{worst.place}: found {worst.tokens} tokens with the demonstration, expected at most max_tokens "
                f"{max_tokens}.",
                remedy="Raise max_tokens, shorten the demonstration, or set 'too_long: drop'.",
            )
        return Encoding(tuple(kept), tuple(dropped))

    def answered(self, row: EncodedRow, answer: Sequence[int]) -> EncodedRow:
        """The row as the student reads it, with an answer whose tokens count. What its teachers say of it depends on
        the demonstration too, and so does its digest."""
        found = answered_row(row, answer)
        shown = self._prompts[row.source, row.id].tobytes()
        return replace(found, digest=hashlib.sha256(found.digest.encode() + shown).hexdigest())

    def shown(self, row: EncodedRow) -> EncodedRow:
        """The same answer as the teachers read it: behind question and demonstration."""
        prompt = self._prompts[row.source, row.id]
        ids = np.concatenate([prompt, row.ids[row.counted]]).astype("<i4")
        return replace(row, ids=ids, counted=np.arange(len(ids)) >= len(prompt))

    def _prompt(self, row: Row, codec: Codec) -> NDArray[np.int32]:
        turns, answer = question_of(row)
        if not turns or turns[-1]["role"] != "user":
            raise DataError(
                f"{row.place}: found no question of a user before the last answer, expected one to put the "
                "demonstration behind.",
                remedy="Leave such rows out.",
            )
        told: dict[str, Any] = {
            **turns[-1],
            "content": f"{turns[-1]['content']}\n\n{self._text.replace(ANSWER, answer)}",
        }
        try:
            return np.array(codec.encode_prompt([*turns[:-1], told]), dtype="<i4")
        except (CheckpointError, DataError) as error:
            raise type(error)(f"{row.place}: {error.message}", remedy=error.remedy) from error
