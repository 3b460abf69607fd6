"""A tool call as text, and back: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

The form that several open chat models are taught (Hermes, Qwen): it needs no special token of a tokenizer, and a plain
chat template renders it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = rf"(?s){OPEN}\s*(.*?)\s*{CLOSE}"


@dataclass(frozen=True)
class Call:
    """A tool by name with its arguments, JSON values."""

    name: str
    arguments: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": dict(self.arguments)}


def render_calls(calls: Sequence[Call]) -> str:
    """The calls as an assistant says them, one a line."""
    return "\n".join(f"{OPEN}{json.dumps(one.to_json(), ensure_ascii=False)}{CLOSE}" for one in calls)


def calls_in(text: str) -> list[Call] | None:
    """The calls that a text makes, in order; an empty list where it makes none.

    None where the form is broken: a mark without its other one, what is no JSON object between them, a name that is no
    text, arguments that are no object, or other words behind a call, which an agent would not have waited for.
    """
    found = re.findall(_CALL, text)
    if text.count(OPEN) != len(found) or text.count(CLOSE) != len(found):
        return None
    if not found:
        return []
    if text.rstrip()[-len(CLOSE) :] != CLOSE:
        return None
    calls = []
    for inside in found:
        try:
            value = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
            return None
        if not isinstance(value["name"], str) or not isinstance(value["arguments"], dict):
            return None
        calls.append(Call(value["name"], value["arguments"]))
    return calls


def with_calls(turn: Mapping[str, Any]) -> str:
    """The words of a turn, with the `tool_calls` that it has beside them written out at the end.

    Raises:
        ValueError: told as `found ..., expected ...`: `tool_calls` that are no list of functions with arguments.
    """
    words = turn.get("content") or ""
    given = turn.get("tool_calls")
    if not given:
        return str(words)
    calls = [_given(one) for one in given] if isinstance(given, list) else None
    if calls is None:
        raise ValueError("found no list in 'tool_calls', expected a list of calls")
    return "\n".join([*([words] if words else []), render_calls(calls)])


def _given(value: Any) -> Call:
    """A call as chat interfaces write it: `{"function": {"name", "arguments"}}`, arguments an object or its JSON."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("found a call without a name in 'tool_calls', expected {'function': {'name', 'arguments'}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"found arguments of {function['name']!r} that are no JSON object, expected one")
    return Call(function["name"], arguments)
