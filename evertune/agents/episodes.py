"""One episode: the agent speaks, its calls are answered, until it says something that is no call, or may not go on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evertune.agents.calls import calls_in
from evertune.agents.environments import ENVIRONMENTS, State, ToolError

Turn = Mapping[str, str]


@dataclass
class Episode:
    """An agent in an environment, from its first turn to the last.

    Attributes:
        messages: the conversation so far.
        state: of the environment.
        final: the agent's answer; None until it has given one.
        formed: per step of the agent, whether it was in form: an answer, or calls of tools that exist with the
            arguments they take.
    """

    environment: str
    messages: list[Turn]
    state: State
    final: str | None = None
    formed: list[bool] = field(default_factory=list)

    def hear(self, text: str) -> None:
        """The agent's next turn, and what the tools answer to it."""
        self.messages.append({"role": "assistant", "content": text})
        calls = calls_in(text)
        if calls is None:
            self.formed.append(False)
            self.messages.append({"role": "tool", "content": "error: the call has not the right form"})
            return
        if not calls:
            self.formed.append(True)
            self.final = text
            return
        told, is_formed = [], True
        for call in calls:
            try:
                self.state, answer = ENVIRONMENTS[self.environment].call(self.state, call.name, call.arguments)
            except ToolError as error:
                answer, is_formed = f"error: {error}", False
            told.append(answer)
        self.formed.append(is_formed)
        self.messages.append({"role": "tool", "content": "\n".join(told)})

    def reached(self, goal: State | None) -> bool:
        """Whether the state has everything that a goal asks, whatever else it has."""
        return goal is None or all(self.state.get(name) == one for name, one in goal.items())

    def transcript(self) -> str:
        """What the agent said, step by step."""
        return "\n".join(one["content"] for one in self.messages if one["role"] == "assistant")


def check_task(value: Mapping[str, Any]) -> str:
    """What keeps a row from being a task for an episode, as `found ..., expected ...`, or ""."""
    name, state, goal = value.get("environment"), value.get("state", {}), value.get("goal")
    if not isinstance(name, str) or name not in ENVIRONMENTS:
        return f"found the environment {name!r}, expected one of {', '.join(ENVIRONMENTS)}"
    if not isinstance(state, dict):
        return "found a 'state' that is no object, expected one"
    problem = ENVIRONMENTS[name].problem(state)
    if problem:
        return f"'state' of {name}: {problem}"
    if goal is not None and not isinstance(goal, dict):
        return "found a 'goal' that is no object, expected the part of the state that must be reached"
    return ""
