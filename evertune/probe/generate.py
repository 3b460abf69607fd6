"""Answers in batches: the likeliest token, or a drawn one, again and again, until a stop token or the limit.

Sampling settings of a model's generation_config.json do not apply: a probe must say the same thing twice. A drawn token
is the largest of logit / temperature + Gumbel noise, which draws from the softmax. The noise of an answer comes from
its seed alone, so two models that are asked with the same seeds differ where their logits do, not where luck does.
"""

# B rows still speaking, T tokens, V vocabulary

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.forward import BATCH_TOKENS, Forward, batches
from evertune.model.packed_weights import packed_weights


@dataclass(frozen=True)
class Answer:
    """What the model said.

    ids: tokens of the answer without its stop token.
    stopped: whether a stop token came before the limit.
    is_finite: False when the model's logits were NaN or Inf at some step; then `ids` means nothing.
    """

    ids: tuple[int, ...]
    stopped: bool
    is_finite: bool


@torch.no_grad()
def generate_answers(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    temperature: float | None = None,
    seeds: Sequence[int] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> list[Answer]:
    """Answers, in the order of the prompts. Batches depend on the prompts' lengths alone.

    Args:
        temperature: of drawn answers; the likeliest ones when not given.
        seeds: of drawn answers, one for each prompt.
    """
    answers: list[Answer | None] = [None] * len(prompts)
    # A recurrent state reads padding too, so such a model gets each prompt alone.
    budget = batch_tokens if forward.can_branch else 0
    with packed_weights(forward.model, tokens=max_new_tokens):
        for batch in batches([len(one) + max_new_tokens for one in prompts], budget=budget):
            draw = _Draw(temperature, [seeds[i] for i in batch]) if temperature is not None else None
            said = _speak(forward, [prompts[i] for i in batch], max_new_tokens, stop_ids, draw)
            for i, answer in zip(batch, said, strict=True):
                answers[i] = answer
    return [one for one in answers if one is not None]


class _Draw:
    """Draws tokens for the rows of a batch, each row from a generator of its own, on the CPU wherever the model is."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """(B,) tokens; `rows` says which row of the batch each line of logits belongs to."""
        uniform_BV = torch.stack([torch.rand(logits_BV.shape[-1], generator=self._generators[row]) for row in rows])
        gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
        return (logits_BV / self._temperature + gumbel_BV.to(logits_BV.device)).argmax(dim=-1)


def _speak(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Set[int],
    draw: _Draw | None,
) -> list[Answer]:
    said: list[list[int]] = [[] for _ in prompts]
    stopped, finite = [False] * len(prompts), [True] * len(prompts)
    alive = list(range(len(prompts)))
    outputs, last_BH, mask_BT, cache = forward.read_prompts(prompts)
    for step in range(max_new_tokens):
        logits_BV = forward.logits(outputs, last_BH)
        best_B, next_B = logits_BV.max(dim=-1)
        if draw is not None:
            next_B = draw(logits_BV, alive)
        for row, token, is_finite in zip(alive, next_B.tolist(), best_B.isfinite().tolist(), strict=True):
            if not stopped[row]:
                finite[row] &= is_finite
                stopped[row] = token in stop_ids
                said[row] += [] if stopped[row] else [token]
        speaking = [b for b, row in enumerate(alive) if not stopped[row]]
        if not speaking or step == max_new_tokens - 1:
            break
        # Rows that have stopped leave the batch when they are half of it: each time the cache is copied.
        if len(speaking) <= len(alive) // 2:
            kept = torch.tensor(speaking, device=forward.device)
            cache.batch_select_indices(kept)
            next_B, mask_BT = next_B[kept], mask_BT[kept]
            alive = [alive[b] for b in speaking]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
        outputs = forward.read_on(next_B.unsqueeze(1), mask_BT, cache)
        last_BH = outputs.last_hidden_state[:, -1]
    return [Answer(tuple(said[row]), stopped[row], finite[row]) for row in range(len(prompts))]
