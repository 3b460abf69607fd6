"""Answers in batches: the likeliest token, or a drawn one, again and again, until a stop token or the limit.

Sampling settings of a model's generation_config.json do not apply: a probe must say the same thing twice. A drawn token
is the largest of logit / temperature + Gumbel noise, which draws from the softmax. The noise of an answer comes from
its seed alone, so two models that are asked with the same seeds differ where their logits do, not where luck does.
"""

# B rows still speaking, V vocabulary

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.forward import Forward
from evertune.model.speak import speak


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


def generate_answers(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    temperature: float | None = None,
    seeds: Sequence[int] = (),
    batch_tokens: int | None = None,
) -> list[Answer]:
    """Answers, in the order of the prompts.

    Args:
        temperature: of drawn answers; the likeliest ones when not given.
        seeds: of drawn answers, one for each prompt.
        batch_tokens: as `speak` has it.
    """
    said = speak(
        forward,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        choose=_Draw(temperature, seeds) if temperature is not None else None,
        batch_tokens=batch_tokens,
    )
    return [Answer(tuple(one.ids[:-1] if one.stopped else one.ids), one.stopped, one.is_finite) for one in said]


class _Draw:
    """Draws tokens, each answer's from a generator of its own, on the CPU wherever the model is."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor, rows: Sequence[int], said: Sequence[int]) -> Tensor:
        """(B,) tokens; `rows` says which answer each line of logits belongs to."""
        uniform_BV = torch.stack([torch.rand(logits_BV.shape[-1], generator=self._generators[row]) for row in rows])
        gumbel_BV = -torch.log(-torch.log(uniform_BV.clamp(1e-20, 1 - 1e-7)))
        return (logits_BV / self._temperature + gumbel_BV.to(logits_BV.device)).argmax(dim=-1)
