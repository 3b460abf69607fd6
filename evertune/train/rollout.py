"""Rollouts: the questions of a few steps answered by the policy as it is, checked, compared within their groups, and
then trained on. The feed of an rl stage. The answer to a task is a whole episode (episodes.py).

    stream step     0    1    2    3    4    5          rollouts of 2 stream steps, passed over twice:
    optimizer step  0 1  0 1                            rollout 0 serves optimizer steps 0 to 3, rollout 1 steps 4 to 7
"""

# N counted positions, A prompts, G answers to each

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.data.encode import EncodedPrompt, EncodedRow, Item
from evertune.train.episodes import Answer, Played
from evertune.train.losses import group_advantages
from evertune.train.material import Material
from evertune.train.sample import SampledAnswer
from evertune.train.sink import Metrics

LogProbabilities = Callable[[Sequence[EncodedRow]], list[Tensor]]
"""Rows -> per row, the log-probabilities (N,) float32 of its counted tokens."""


@dataclass(frozen=True)
class Checked:
    """What a verifier found: a score in [0, 1], or the error that kept it from finding one; and scores of its parts."""

    score: float
    error: str | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


Play = Callable[[Sequence[EncodedPrompt], Sequence[Sequence[int]]], list[list[Played]]]
"""(tasks, seeds of the episodes of each) -> episodes in the same order."""

Check = Callable[[str, str, Any], Checked]
"""(source, output, answer) -> what the source's verifier finds."""


@dataclass(frozen=True)
class Said:
    """An answer, or an episode, behind its prompt.

    Attributes:
        ids: what follows the prompt.
        counted: per token, whether the policy said it.
        stopped: it ended by itself: with a stop token, an episode with an answer.
        found: by the verifier.
    """

    ids: Sequence[int]
    counted: Sequence[bool]
    stopped: bool
    found: Checked


@dataclass(frozen=True, eq=False)
class EncodedAnswer:
    """One sampled answer as it is trained on.

    Attributes:
        row: the conversation; what the policy said counts, stop tokens included.
        reward: NaN where the verifier failed.
        advantage: against the other answers to the prompt; 0 where the verifier failed.
        is_flat: all answers to the prompt have one reward, so that there is nothing to learn from them.
        parts: scores of the verifier's parts, where it has several.
        stopped: the answer ended by itself.
        old_logp_N: what the policy that sampled gave its tokens; None where each answer is used once, at once.
        ref_logp_N: what the reference gives them; None where nothing is held to it.
    """

    source: str
    id: str
    row: EncodedRow
    reward: float
    advantage: float
    is_flat: bool
    stopped: bool
    repeats: float
    old_logp_N: Tensor | None
    ref_logp_N: Tensor | None
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_replay(self) -> bool:
        return False

    @property
    def rows(self) -> tuple[EncodedRow, ...]:
        return (self.row,)


@dataclass(frozen=True)
class RolloutSettings:
    """How questions are answered and answers compared.

    Attributes:
        group: answers to each prompt.
        steps: stream steps answered at once.
        iterations: passes over them.
        scale: divide a group's advantages by its standard deviation.
    """

    group: int
    steps: int
    iterations: int
    max_new_tokens: int
    temperature: float
    scale: bool
    seed: int

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps that one rollout serves."""
        return self.steps * self.iterations


class RolloutFeed:
    """The answers and replayed rows of each optimizer step.

    `prepare` must be called with each step in order, from the first one of a rollout on: what it has made is held
    until the next rollout. Nothing else remembers anything.

    Args:
        material: prompts and replayed rows.
        steps: optimizer steps of the stage.
        answer: the policy's answers, as it is: (prompts as token ids, seeds of each prompt's answers) -> answers.
        play: the policy's episodes, as it is.
        old: log-probabilities under the policy as it is; None when every answer is used once.
        reference: the same under the reference; None when nothing is held to it.
    """

    def __init__(
        self,
        material: Material,
        settings: RolloutSettings,
        *,
        steps: int,
        answer: Answer,
        play: Play,
        stop_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        check: Check,
        old: LogProbabilities | None,
        reference: LogProbabilities | None,
        gather: Callable[[list[Any]], list[Any]],
        rank: int = 0,
    ) -> None:
        self._material, self.settings, self.steps = material, settings, steps
        self._answer, self._play = answer, play
        self._stop_ids, self._decode, self._check = stop_ids, decode, check
        self._old, self._reference = old, reference
        self._gather, self._rank = gather, rank
        self._held: dict[int, list[Item]] = {}
        self._rollout = -1

    @property
    def save_every(self) -> int:
        """Only between rollouts is nothing held: there a resume point needs no answers."""
        return self.settings.optimizer_steps

    @property
    def micro_steps(self) -> int:
        """Forward passes of one process in a step in which every row is a prompt."""
        material = self._material
        most = material.batch_rows * self.settings.group
        return -(-most // (material.micro_batch_rows * material.world_size))

    def recall(self, history: Sequence[Metrics]) -> None:
        """What a step shows depends on its number and the weights alone."""

    def prepare(self, step: int) -> Metrics:
        """Answer the questions of the rollout that a step belongs to, if that is not done."""
        rollout = step // self.settings.optimizer_steps
        if rollout == self._rollout:
            return {}
        first = rollout * self.settings.steps
        stream_steps = range(first, first + self.settings.steps)
        self._held = self._answer_all({one: self._material.step_rows(one) for one in stream_steps})
        self._rollout = rollout
        return {}

    def step_rows(self, step: int) -> Sequence[Item]:
        """The answers and replayed rows of a step, over all processes, longest first."""
        return self._held[self._stream_step(step)]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[Item]:
        size = self._material.micro_batch_rows
        first = (micro_step * self._material.world_size + rank) * size
        return self.step_rows(step)[first : first + size]

    def _stream_step(self, step: int) -> int:
        rollout, place = divmod(step, self.settings.optimizer_steps)
        return rollout * self.settings.steps + place % self.settings.steps

    def _answer_all(self, steps: dict[int, list[Item]]) -> dict[int, list[Item]]:
        """The items of each stream step with its prompts replaced by answers."""
        places = [(one, i) for one, items in steps.items() for i, item in enumerate(items) if not item.is_replay]
        mine = places[self._rank :: self._material.world_size]
        prompts = [_prompt(steps[one][i]) for one, i in mine]
        answers = dict(zip(mine, self._answers_to(prompts, mine), strict=True))
        answers = dict(self._gather(list(answers.items())))
        return {
            one: sorted(
                [answer for i, item in enumerate(items) for answer in answers.get((one, i), [item])],
                key=lambda item: -len(item.rows[0].ids),
            )
            for one, items in steps.items()
        }

    def _answers_to(
        self, prompts: Sequence[EncodedPrompt], places: Sequence[tuple[int, int]]
    ) -> list[list[EncodedAnswer]]:
        settings = self.settings
        seeds = [[answer_seed(settings.seed, *place, g) for g in range(settings.group)] for place in places]
        said: dict[int, list[Said]] = {}
        for is_task, speak in ((False, self._answered), (True, self._played)):
            chosen = [i for i, prompt in enumerate(prompts) if (prompt.task is not None) == is_task]
            # A server is asked by all processes at once, by those without a question too.
            if chosen or not is_task:
                found = speak([prompts[i] for i in chosen], [seeds[i] for i in chosen])
                said.update(zip(chosen, found, strict=True))
        groups = [self._judged(prompt, said[i]) for i, prompt in enumerate(prompts)]
        flat = [answer for group in groups for answer in group]
        rows = [answer.row for answer in flat]
        old, reference = (one(rows) if one else [None] * len(rows) for one in (self._old, self._reference))
        done = iter(
            replace(answer, old_logp_N=before, ref_logp_N=held)
            for answer, before, held in zip(flat, old, reference, strict=True)
        )
        return [[next(done) for _ in group] for group in groups]

    def _answered(self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int]]) -> list[list[Said]]:
        groups = self._answer([prompt.prompt.ids.tolist() for prompt in prompts], seeds)
        return [[self._heard(prompt, one) for one in group] for prompt, group in zip(prompts, groups, strict=True)]

    def _heard(self, prompt: EncodedPrompt, answer: SampledAnswer) -> Said:
        text = self._decode([one for one in answer.ids if one not in self._stop_ids])
        found = self._check(prompt.source, text, prompt.answer)
        return Said(answer.ids, [True] * len(answer.ids), answer.stopped, found)

    def _played(self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int]]) -> list[list[Said]]:
        groups = self._play(prompts, seeds)
        return [[self._ended(prompt, one) for one in group] for prompt, group in zip(prompts, groups, strict=True)]

    def _ended(self, prompt: EncodedPrompt, played: Played) -> Said:
        """An episode is worth what its answer is, in a state that its task asks; without one, nothing."""
        found = self._check(prompt.source, played.episode.final or "", prompt.answer)
        if not played.has_reached_goal:
            found = replace(found, score=0.0)
        return Said(played.ids, played.counted, played.has_answered, found)

    def _judged(self, prompt: EncodedPrompt, answers: Sequence[Said]) -> list[EncodedAnswer]:
        """The answers to one prompt with their rewards and advantages."""
        rewards = torch.tensor([[float("nan") if one.found.error else one.found.score for one in answers]])
        known = rewards[~rewards.isnan()]
        is_flat = bool((known == known[0]).all()) if len(known) else True
        advantages = group_advantages(rewards, scale=self.settings.scale)[0].tolist()
        return [
            EncodedAnswer(
                source=prompt.source,
                id=f"{prompt.id}/{g}",
                row=_conversation(prompt, answer),
                reward=reward,
                advantage=advantage,
                is_flat=is_flat,
                stopped=answer.stopped,
                repeats=repeated_share([one for one, counts in zip(answer.ids, answer.counted, strict=True) if counts]),
                old_logp_N=None,
                ref_logp_N=None,
                parts=answer.found.parts,
            )
            for g, (answer, reward, advantage) in enumerate(zip(answers, rewards[0].tolist(), advantages, strict=True))
        ]


def answer_seed(seed: int, stream_step: int, row: int, answer: int) -> int:
    """Seed of one answer's random numbers, below 2^63: a function of the recipe's seed and of the answer's place."""
    digest = hashlib.sha256(f"{seed}/rollout/{stream_step}/{row}/{answer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def repeated_share(ids: Sequence[int], *, length: int = 4) -> float:
    """Share of an answer's runs of `length` tokens that stood before in it: 0 for what never repeats, near 1 for a
    loop."""
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def _conversation(prompt: EncodedPrompt, answer: Said) -> EncodedRow:
    ids = np.concatenate([prompt.prompt.ids, np.array(answer.ids, dtype="<i4")]).astype("<i4")
    counted = np.concatenate([np.zeros(len(prompt.prompt.ids), dtype=np.bool_), np.array(answer.counted, np.bool_)])
    digest = hashlib.sha256(ids.tobytes() + counted.tobytes()).hexdigest()
    return EncodedRow(prompt.source, prompt.id, ids, counted, is_replay=False, digest=digest)


def _prompt(item: Item) -> EncodedPrompt:
    assert isinstance(item, EncodedPrompt), "an rl stage's new rows are prompts"
    return item
