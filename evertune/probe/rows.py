"""What a model makes of training rows: how likely it finds what is said, or what a reward model gives for it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from evertune.data.quality import asked_and_said
from evertune.data.rows import Row, messages_of
from evertune.errors import CheckpointError, DataError
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.codec import Codec
from evertune.model.forward import Forward, Tokens, score_rows
from evertune.model.open import open_classifier, open_model

Scorer = Callable[[Sequence[Row]], NDArray[np.float64]]


def answer_bits(model: str) -> Scorer:
    """Bits per UTF-8 byte of what a row says, given what it asks, under a language model; NaN for a row that is longer
    than the model's context or that its chat template refuses. The last answer counts, without its stop token.

    Args:
        model: a bundled name or a folder.
    """
    opened = open_model(describe(resolve_base(model, folder=Path())), dtype="bfloat16", device="auto", fold=True)
    forward = Forward(opened)

    def score(rows: Sequence[Row]) -> NDArray[np.float64]:
        found = np.full(len(rows), np.nan)
        tokens = [_answer_tokens(row, opened.codec) for row in rows]
        fits = [
            i for i, one in enumerate(tokens) if one and not (forward.max_tokens and len(one.ids) > forward.max_tokens)
        ]
        logps = score_rows(forward, [one for i in fits if (one := tokens[i]) is not None])
        for i, values in zip(fits, logps, strict=True):
            size = len(asked_and_said(rows[i])[1].encode())
            found[i] = -sum(values) / np.log(2) / size if size else np.nan
        return found

    return score


def row_states(model: str) -> Callable[[Sequence[Row]], NDArray[np.float64]]:
    """A vector (rows, H) for each row under a language model: its last hidden states, in the mean over its tokens; NaN
    for a row that is longer than the model's context or that its chat template refuses.

    Args:
        model: a bundled name or a folder.
    """
    opened = open_model(describe(resolve_base(model, folder=Path())), dtype="bfloat16", device="auto", fold=True)
    forward = Forward(opened)

    @torch.no_grad()
    def states(rows: Sequence[Row]) -> NDArray[np.float64]:
        found = np.full((len(rows), opened.model.config.get_text_config().hidden_size), np.nan)
        for i, row in enumerate(rows):
            try:
                ids = _whole(row, opened.codec)
            except (CheckpointError, DataError):
                continue
            if ids and not (forward.max_tokens and len(ids) > forward.max_tokens):
                ids_BT, _ = forward.pad([ids])
                hidden = forward.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
                found[i] = hidden[0].float().mean(dim=0).cpu().numpy()
        return found

    return states


def classifier_score(folder: Path, label: int) -> Scorer:
    """The reward of a model with one output, else the probability of a class; NaN for a row longer than its context.

    Raises:
        DataError: the classifier has no such class.
    """
    model, codec = open_classifier(folder)
    classes = int(model.config.num_labels)
    if classes > 1 and label >= classes:
        raise DataError(
            f"{folder}: found {classes} classes, expected more than {label}.", remedy="Choose a lower --label."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def score(rows: Sequence[Row]) -> NDArray[np.float64]:
        found = np.full(len(rows), np.nan)
        for i, row in enumerate(rows):
            ids = _whole(row, codec)
            if longest is None or len(ids) <= longest:
                logits = model(input_ids=torch.tensor([ids])).logits[0].float()
                found[i] = float(logits[0]) if classes == 1 else float(logits.softmax(dim=-1)[label])
        return found

    return score


def _turns(row: Row) -> list[dict[str, str]]:
    if row.format == "messages":
        return messages_of(row.value)
    return [*messages_of(row.value), {"role": "assistant", "content": asked_and_said(row)[1]}]


def _whole(row: Row, codec: Codec) -> list[int]:
    if row.format == "text" or codec.template is None:
        asked, said = asked_and_said(row)
        return codec.encode(f"{asked}\n{said}".strip(), special=True)
    return codec.encode_chat(_turns(row)).ids


def _answer_tokens(row: Row, codec: Codec) -> Tokens | None:
    """A row through its last answer; None where the template refuses it, or nothing is said."""
    if row.format == "text":
        ids = codec.encode(row.value["text"], special=True)
        return Tokens(tuple(ids), tuple(i > 0 for i in range(len(ids)))) if len(ids) > 1 else None
    try:
        chat = codec.encode_chat(_turns(row))
    except (CheckpointError, DataError):
        return None
    counts = [counted and one not in codec.stop_ids for one, counted in zip(chat.ids, chat.counted, strict=True)]
    if True not in counts[1:]:
        return None
    # Of several answers the last alone: it is the run of counted tokens that ends last.
    end = len(counts) - counts[::-1].index(True)
    first = end
    while first > 1 and counts[first - 1]:
        first -= 1
    return Tokens(tuple(chat.ids[:end]), tuple(first <= i for i in range(end)))
