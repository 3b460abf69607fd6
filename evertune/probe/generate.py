"""Greedy answers in batches: left-padded prompts, one cache, an early end when every row has stopped."""

# B rows, T tokens

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.open import OpenModel

BATCH_ROWS = 32


@dataclass(frozen=True)
class Answer:
    """What the model said: text without the stop token, and whether it stopped by itself."""

    text: str
    stopped: bool


@torch.inference_mode()
def generate_answers(
    opened: OpenModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_rows: int = BATCH_ROWS
) -> list[Answer]:
    """The most likely next token, again and again, until a stop token or `max_new_tokens`; in the prompts' order.

    Prompts are batched by length, so the same prompts give the same batches.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), batch_rows):
        batch = order[first : first + batch_rows]
        answers.update(zip(batch, _generate(opened, [prompts[i] for i in batch], max_new_tokens), strict=True))
    return [answers[i] for i in range(len(prompts))]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids that end together, and the mask of what is not padding."""
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, longest - len(row) :] = torch.tensor(row)
        mask_BT[b, longest - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _generate(opened: OpenModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
    stop = torch.tensor(sorted(opened.codec.stop_ids), device=opened.device)
    ids_BT, mask_BT = pad_left(prompts, opened.codec.pad_id, opened.device)
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    said: list[Tensor] = []
    has_stopped_B = torch.zeros(len(prompts), dtype=torch.bool, device=opened.device)
    cache = None
    for _ in range(max_new_tokens):
        output = opened.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        next_B = output.logits[:, -1].float().argmax(dim=-1)
        said.append(torch.where(has_stopped_B, opened.codec.pad_id, next_B))
        has_stopped_B |= torch.isin(next_B, stop)
        if bool(has_stopped_B.all()):
            break
        ids_BT = next_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
        position_BT = position_BT[:, -1:] + 1
    return [
        _answer(opened, row, bool(ended))
        for row, ended in zip(torch.stack(said, 1).tolist(), has_stopped_B, strict=True)
    ]


def _answer(opened: OpenModel, ids: list[int], stopped: bool) -> Answer:
    end = next((i for i, one in enumerate(ids) if one in opened.codec.stop_ids), len(ids))
    return Answer(text=opened.codec.decode(ids[:end]), stopped=stopped)
