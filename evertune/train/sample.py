"""Answers sampled from a model in memory, in groups of several to one prompt, whose attention cache they share.

Every answer has random numbers of its own, made from its seed alone: the same weights and seeds give the same answers,
however they are batched, but for the last bits of a bfloat16.
"""

# A prompts, G answers to each, S = A G answers, V vocabulary

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.forward import Forward, batches
from evertune.model.packed_weights import packed_weights

# Padded tokens of one batch of answers. Larger batches are faster; memory for the attention cache grows with them.
BATCH_TOKENS = 32_768


@dataclass(frozen=True)
class SampledAnswer:
    """What the model said: `ids` with the stop token, if it `stopped` before the limit."""

    ids: tuple[int, ...]
    stopped: bool


@torch.no_grad()
def sample_answers(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    stop_ids: Set[int],
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[SampledAnswer]]:
    """Sample answers from the whole distribution, without top-k or top-p.

    The model must be in evaluation mode. Batches depend on the prompts' lengths alone.

    Args:
        seeds: per prompt, one seed below 2^63 for each of its answers, the same number for every prompt.
        temperature: what the logits are divided by, above 0.

    Returns:
        Per prompt, its answers in the order of the seeds.
    """
    found: list[list[SampledAnswer]] = [[] for _ in prompts]
    lengths = [len(one) + max_new_tokens for one in prompts]
    # A recurrent state reads padding too and cannot be branched, so such a model gets each prompt alone, repeated.
    budget = batch_tokens if forward.can_branch else 0
    with packed_weights(forward.model, tokens=max_new_tokens):
        for batch in batches(lengths, rows=[len(one) for one in seeds], budget=budget):
            said = _speak(
                forward, [prompts[i] for i in batch], [seeds[i] for i in batch], max_new_tokens, temperature, stop_ids
            )
            for i, answers in zip(batch, said, strict=True):
                found[i] = answers
    return found


def _speak(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    stop_ids: Set[int],
) -> list[list[SampledAnswer]]:
    owner_S = torch.tensor([b for b, group in enumerate(seeds) for _ in group], device=forward.device)
    drawn_ST = torch.stack([_uniform(seed, max_new_tokens) for group in seeds for seed in group]).to(forward.device)
    said: list[list[int]] = [[] for _ in range(len(owner_S))]
    stopped = [False] * len(said)
    alive = list(range(len(said)))
    outputs, last_BH, mask_ST, cache = forward.read_prompts(prompts)
    cache.batch_select_indices(owner_S)
    logits_SV, mask_ST = forward.logits(outputs, last_BH)[owner_S], mask_ST[owner_S]
    for step in range(max_new_tokens):
        next_S = draw_tokens(logits_SV / temperature, drawn_ST[alive, step])
        for answer, token in zip(alive, next_S.tolist(), strict=True):
            if not stopped[answer]:
                said[answer].append(token)
                stopped[answer] = token in stop_ids
        speaking = [i for i, answer in enumerate(alive) if not stopped[answer]]
        if not speaking or step == max_new_tokens - 1:
            break
        # Answers that have stopped leave the batch when they are half of it: each time the cache is copied.
        if len(speaking) <= len(alive) // 2:
            kept = torch.tensor(speaking, device=forward.device)
            cache.batch_select_indices(kept)
            next_S, mask_ST = next_S[kept], mask_ST[kept]
            alive = [alive[i] for i in speaking]
        mask_ST = torch.cat([mask_ST, mask_ST.new_ones(len(alive), 1)], dim=1)
        outputs = forward.read_on(next_S.unsqueeze(1), mask_ST, cache)
        logits_SV = forward.logits(outputs, outputs.last_hidden_state[:, -1])
    answers = iter([SampledAnswer(tuple(ids), ended) for ids, ended in zip(said, stopped, strict=True)])
    return [[next(answers) for _ in group] for group in seeds]


def draw_tokens(logits_SV: Tensor, drawn_S: Tensor) -> Tensor:
    """The word at which the cumulative probability first passes each drawn number in [0, 1): (S,) ids."""
    # In float64: over a large vocabulary a float32 sum ends visibly beside 1.
    cumulative_SV = logits_SV.double().softmax(dim=-1).cumsum(dim=-1)
    threshold_S1 = drawn_S.unsqueeze(1) * cumulative_SV[:, -1:]
    return torch.searchsorted(cumulative_SV, threshold_S1, right=True).squeeze(1).clamp_(max=logits_SV.shape[1] - 1)


def _uniform(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), from a CPU generator so that every device draws the same."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
