"""Answers sampled from a model in memory, in groups of several to one prompt, whose attention cache they share.

Every answer has random numbers of its own, made from its seed alone: the same weights and seeds give the same answers,
however they are batched, but for the last bits of a bfloat16.
"""

# B answers in a batch, V vocabulary

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.forward import Forward
from evertune.model.speak import speak


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
    batch_tokens: int | None = None,
) -> list[list[SampledAnswer]]:
    """Sample answers from the whole distribution, without top-k or top-p.

    The model must be in evaluation mode.

    Args:
        seeds: per prompt, one seed below 2^63 for each of its answers, the same number for every prompt.
        temperature: what the logits are divided by, above 0.
        batch_tokens: as `speak` has it.

    Returns:
        Per prompt, its answers in the order of the seeds.
    """
    if not prompts:
        return []
    numbers = [_uniform(seed, max_new_tokens).tolist() for group in seeds for seed in group]

    def choose(logits_BV: Tensor, answers: Sequence[int], said: Sequence[int]) -> Tensor:
        # An answer that has ended stays a while among the others; what is drawn for it is not noted.
        drawn = [numbers[answer][min(count, max_new_tokens - 1)] for answer, count in zip(answers, said, strict=True)]
        return draw_tokens(logits_BV / temperature, torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device))

    (group,) = {len(one) for one in seeds}
    said = speak(
        forward,
        prompts,
        answers=group,
        choose=choose,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        batch_tokens=batch_tokens,
    )
    answers = iter([SampledAnswer(tuple(one.ids), one.stopped) for one in said])
    return [[next(answers) for _ in one] for one in seeds]


def draw_tokens(logits_BV: Tensor, drawn_B: Tensor) -> Tensor:
    """The word at which the cumulative probability first passes each drawn number in [0, 1): (B,) ids."""
    # In float64: over a large vocabulary a float32 sum ends visibly beside 1.
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    threshold_B1 = drawn_B.unsqueeze(1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp_(max=logits_BV.shape[1] - 1)


def _uniform(seed: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1), from a CPU generator so that every device draws the same."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
