"""Whole episodes by the policy: it speaks, its calls are answered by the environment, until it gives an answer.

    prompt | turn 1 <stop> | what the tools say, up to where the agent speaks again | turn 2 <stop> | ...
             counted                                                                  counted

A conversation is grown token by token: what the agent said stays the tokens that were sampled, and between its turns
stands what the chat template puts there. Rendering it anew could split the agent's words into other tokens, whose
probabilities nobody drew from.
"""

# A prompts, G answers to each

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evertune.agents import Episode, State
from evertune.data.encode import EncodedPrompt
from evertune.model.codec import Codec
from evertune.train.sample import SampledAnswer

Answer = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[SampledAnswer]]]
"""(prompts, seeds of the answers to each) -> answers in the same order."""


@dataclass
class Played:
    """One episode with its tokens.

    Attributes:
        episode: turns, state, and the agent's answer if it gave one.
        ids: what follows the prompt: the agent's turns, stop tokens included, and what stands between them.
        counted: per token of `ids`, whether the agent said it.
        is_over: nothing more will be said.
        goal: the part of the state that must be reached; None where the answer is all.
    """

    episode: Episode
    ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    is_over: bool = False
    goal: State | None = None

    def extend(self, ids: Sequence[int], *, counted: bool) -> None:
        self.ids += ids
        self.counted += [counted] * len(ids)

    @property
    def said(self) -> list[int]:
        """The agent's own tokens."""
        return [one for one, counts in zip(self.ids, self.counted, strict=True) if counts]

    @property
    def has_answered(self) -> bool:
        return self.episode.final is not None

    @property
    def has_reached_goal(self) -> bool:
        """Whether the agent has answered in a state that has all that its task asks."""
        return self.has_answered and self.episode.reached(self.goal)


def play_episodes(
    answer: Answer,
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[Sequence[int]],
    *,
    codec: Codec,
    max_steps: int,
    max_new_tokens: int,
    context: int | None,
) -> list[list[Played]]:
    """Play each task once for each of its seeds, all episodes a turn at a time.

    An episode ends with the agent's answer; without one after `max_steps` turns, where a turn was cut off at its limit,
    or where another one of `max_new_tokens` would not fit the `context`.

    Args:
        prompts: with a `task` each.
        seeds: of each episode; those of its later turns are made from it.

    Raises:
        CheckpointError: the chat template has no place for a tool's turn behind an assistant's.
    """
    played = [[_begin(prompt) for _ in group] for prompt, group in zip(prompts, seeds, strict=True)]
    for turn in range(max_steps):
        if turn == 0:
            said = answer([prompt.prompt.ids.tolist() for prompt in prompts], seeds)
            heard = [pair for group, each in zip(played, said, strict=True) for pair in zip(group, each, strict=True)]
        else:
            acting = [
                (one, [*prompt.prompt.ids.tolist(), *one.ids], turn_seed(seed, turn))
                for prompt, group, own in zip(prompts, played, seeds, strict=True)
                for one, seed in zip(group, own, strict=True)
                if not one.is_over
            ]
            if not acting:
                break
            said = answer([ids for _, ids, _ in acting], [[seed] for _, _, seed in acting])
            heard = [(one, each) for (one, _, _), (each,) in zip(acting, said, strict=True)]
        for one, each in heard:
            _hear(one, each, codec)
        for prompt, group in zip(prompts, played, strict=True):
            for one in group:
                tokens = len(prompt.prompt.ids) + len(one.ids) + max_new_tokens
                one.is_over = one.is_over or (context is not None and tokens > context)
    return played


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a later turn's random numbers, below 2^63: a function of the episode's seed and the turn."""
    digest = hashlib.sha256(f"{seed}/turn/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _begin(prompt: EncodedPrompt) -> Played:
    assert prompt.task is not None, "only tasks are played"
    task = prompt.task
    return Played(Episode(task["environment"], list(task["messages"]), task["state"]), goal=task["goal"])


def _hear(played: Played, answer: SampledAnswer, codec: Codec) -> None:
    """The agent's next turn, and what the environment says to it."""
    played.extend(answer.ids, counted=True)
    if not answer.stopped:
        played.is_over = True
        return
    episode, before = played.episode, list(played.episode.messages)
    episode.hear(codec.decode([one for one in answer.ids if one not in codec.stop_ids]))
    if played.has_answered:
        played.is_over = True
        return
    played.extend(codec.encode_reply(before, dict(episode.messages[-1])), counted=False)
