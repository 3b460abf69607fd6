"""Answers token by token, many at a time: what greedy probes, drawn samples and rollouts have in common.

A token more costs reading all weights, for one row as for sixty. So a batch is as large as its attention cache may be,
and when half of its rows have ended they leave it and the next prompts join the others.
"""

# B rows in a batch, T tokens held, V vocabulary

from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evertune.model.forward import Forward
from evertune.model.growing_cache import add_rows, holds_all_tokens, keep_rows
from evertune.model.packed_weights import packed_weights

Choose = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""(float32 logits (B, V), the answer that each line belongs to, how many tokens that has) -> (B,) tokens."""


@dataclass
class Spoken:
    """What the model said to one prompt.

    ids: with the stop token, if it `stopped` before the limit.
    is_finite: False when the logits were NaN or Inf at some step; then `ids` means nothing.
    """

    ids: list[int] = field(default_factory=list)
    stopped: bool = False
    is_finite: bool = True


@torch.no_grad()
def speak(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Set[int],
    answers: int = 1,
    choose: Choose | None = None,
    batch_tokens: int | None = None,
) -> list[Spoken]:
    """Answers to prompts in their order, several to each, all of one prompt before those of the next.

    The longest prompts come first. Who is in a batch with whom depends on the prompts' lengths and on which answers
    have ended, so on weights and prompts alone. The answers to one prompt share the reading of it.

    Args:
        max_new_tokens: at least 1.
        choose: the likeliest tokens when not given.
        batch_tokens: tokens of a batch at most, where a row counts with all it may come to have; `answer_tokens` of
            the forward when not given. A prompt alone above it is a batch of its own.
    """
    batch = _Batch(forward, prompts, answers, max_new_tokens, stop_ids, choose)
    # A recurrent state reads padding too and cannot be branched, so such a model gets each prompt alone, repeated.
    budget = (batch_tokens or forward.answer_tokens) if forward.can_branch else 0
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    with packed_weights(forward.model, tokens=max_new_tokens):
        while waiting or batch.speaking:
            if 2 * len(batch.speaking) <= len(batch.rows):
                batch.leave()
                batch.join(_next(waiting, batch, budget))
            else:
                batch.read_on()
    return batch.spoken


def _next(waiting: deque[int], batch: "_Batch", budget: int) -> list[int]:
    """Take the next prompts that there is room for."""
    chosen: list[int] = []
    if not waiting or (batch.rows and not batch.can_join):
        return chosen
    longest = max(batch.most_tokens(i) for i in [*{row // batch.answers for row in batch.rows}, waiting[0]])
    rows = len(batch.rows)
    while waiting and (not rows or (rows + batch.answers) * longest <= budget):
        chosen.append(waiting.popleft())
        rows += batch.answers
    return chosen


class _Batch:
    """The answers that are being given, and what the model holds of them: attention cache, mask and the last token of
    each, which it has not read yet."""

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        answers: int,
        max_new_tokens: int,
        stop_ids: Set[int],
        choose: Choose | None,
    ) -> None:
        self._forward, self._prompts, self.answers = forward, prompts, answers
        self._limit, self._stop_ids, self._choose = max_new_tokens, stop_ids, choose
        self.spoken = [Spoken() for _ in range(len(prompts) * answers)]
        self.rows: list[int] = []
        self.speaking: list[int] = []
        """Places in the batch of answers that have not ended."""
        self._cache: Any = None
        self._mask_BT = self._next_B = torch.empty(0)

    @property
    def can_join(self) -> bool:
        """A cache that holds a window or a state takes no rows of other lengths."""
        return holds_all_tokens(self._cache)

    def most_tokens(self, prompt: int) -> int:
        return len(self._prompts[prompt]) + self._limit

    def leave(self) -> None:
        """Those that have ended; the cache is copied."""
        if len(self.speaking) == len(self.rows):
            return
        kept_B = torch.tensor(self.speaking, dtype=torch.long, device=self._forward.device)
        self.rows = [self.rows[b] for b in self.speaking]
        self.speaking = list(range(len(self.rows)))
        if not self.rows:
            self._cache = None
            return
        self._mask_BT, self._next_B = self._mask_BT[kept_B], self._next_B[kept_B]
        if self.can_join:
            longest = int(self._mask_BT.sum(dim=1).max())
            self._mask_BT = self._mask_BT[:, -longest:]
            keep_rows(self._cache, kept_B, tokens=longest)
        else:
            self._cache.batch_select_indices(kept_B)

    def join(self, prompts: Sequence[int]) -> None:
        """The answers to these prompts, behind the rows that are there."""
        if not prompts:
            return
        rows = [prompt * self.answers + k for prompt in prompts for k in range(self.answers)]
        owner_B = torch.arange(len(prompts), device=self._forward.device).repeat_interleave(self.answers)
        outputs, last_BH, mask_BT, cache = self._forward.read_prompts([self._prompts[one] for one in prompts])
        if self.answers > 1:
            cache.batch_select_indices(owner_B)
        next_B = self._hear(self._forward.logits(outputs, last_BH)[owner_B], rows)
        mask_BT = mask_BT[owner_B]
        if self.rows:
            add_rows(self._cache, cache)
            T = max(self._mask_BT.shape[1], mask_BT.shape[1])
            padded = [torch.nn.functional.pad(one, (T - one.shape[1], 0)) for one in (self._mask_BT, mask_BT)]
            self._mask_BT, self._next_B = torch.cat(padded), torch.cat([self._next_B, next_B])
        else:
            self._cache, self._mask_BT, self._next_B = cache, mask_BT, next_B
        self.rows = [*self.rows, *rows]
        self._count()

    def read_on(self) -> None:
        """One more token of each."""
        # What is read behind an answer's end is seen by nobody, and counts as no position.
        seen_B = torch.zeros(len(self.rows), dtype=self._mask_BT.dtype)
        seen_B[self.speaking] = 1
        self._mask_BT = torch.cat([self._mask_BT, seen_B.unsqueeze(1).to(self._mask_BT.device)], dim=1)
        outputs = self._forward.read_on(self._next_B.unsqueeze(1), self._mask_BT, self._cache)
        self._next_B = self._hear(self._forward.logits(outputs, outputs.last_hidden_state[:, -1]), self.rows)
        self._count()

    def _hear(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """(B,) chosen tokens, noted where an answer has not ended."""
        best_B, next_B = logits_BV.max(dim=-1)
        if self._choose is not None:
            next_B = self._choose(logits_BV, rows, [len(self.spoken[row].ids) for row in rows])
        for row, token, is_finite in zip(rows, next_B.tolist(), best_B.isfinite().tolist(), strict=True):
            answer = self.spoken[row]
            if not self._has_ended(answer):
                answer.ids.append(token)
                answer.stopped = token in self._stop_ids
                answer.is_finite &= is_finite
        return next_B

    def _has_ended(self, answer: Spoken) -> bool:
        return answer.stopped or len(answer.ids) >= self._limit

    def _count(self) -> None:
        self.speaking = [b for b, row in enumerate(self.rows) if not self._has_ended(self.spoken[row])]
