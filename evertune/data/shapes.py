"""What a row of each format must hold. A check returns what is wrong as `found ..., expected ...`, or "".

    messages     {"messages": [{"role", "content"}, ...]}, the last turn the assistant's; `tool_calls` of its turns
                 are written out as words at their end (agents/calls.py)
    preference   {"prompt", "chosen", "rejected"}: texts or lists of turns
    verifiable   {"prompt" | "messages", "answer"}; the answer is null where the verifier reads none
    episode      {"prompt" | "messages", "environment", "answer", "state", "goal"}: a task for an agent (agents/)
    choice       {"prompt" | "messages", "choices": [two or more texts], "answer": index or text}
    text         {"text"}

Other fields are kept and ignored. Where a prompt may be `prompt` or `messages`, `messages` is read if both are there.
"""

from typing import Any

from evertune.agents import check_task, with_calls
from evertune.data.lines import kind_of

ROLES = ("system", "user", "assistant", "tool")
_FIELDS = {
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "verifiable": ("answer",),
    "episode": ("environment", "answer"),
    "choice": ("choices", "answer"),
    "text": ("text",),
}


def problem_of(value: dict[str, Any], format: str) -> str:
    """What keeps a value from being a row of the format, or ""."""
    for name in _FIELDS[format]:
        if name not in value:
            return f"found the fields {', '.join(value) or 'none'}, expected '{name}'"
    return _PROBLEMS[format](value)


def fitting_formats(value: dict[str, Any]) -> list[str]:
    """Formats that the value is a row of."""
    return [name for name in _PROBLEMS if not problem_of(value, name)]


def _messages(value: dict[str, Any]) -> str:
    return _turns(value["messages"], "messages", ends_with=("assistant",))


def _text(value: dict[str, Any]) -> str:
    return _filled(value["text"], "text")


def _verifiable(value: dict[str, Any]) -> str:
    return _prompt(value)


def _episode(value: dict[str, Any]) -> str:
    return _prompt(value) or check_task(value)


def _choice(value: dict[str, Any]) -> str:
    return _prompt(value) or _choices(value["choices"]) or _chosen(value["answer"], value["choices"])


def _preference(value: dict[str, Any]) -> str:
    for name, ends in (("prompt", ("user", "tool")), ("chosen", ("assistant",)), ("rejected", ("assistant",))):
        one = value[name]
        problem = _turns(one, name, ends_with=ends) if isinstance(one, list) else _filled(one, name)
        if problem:
            return problem
    if value["chosen"] == value["rejected"]:
        return "found the same answer in 'chosen' and 'rejected', expected two that differ"
    return ""


def _prompt(value: dict[str, Any]) -> str:
    if "messages" in value:
        return _turns(value["messages"], "messages", ends_with=("user", "tool"))
    if "prompt" in value:
        return _filled(value["prompt"], "prompt")
    return f"found the fields {', '.join(value)}, expected 'prompt' or 'messages'"


def _choices(choices: Any) -> str:
    if not isinstance(choices, list):
        return f"found {kind_of(choices)} in 'choices', expected a list of two texts or more"
    if len(choices) < 2:
        return f"found {len(choices)} choices, expected two or more"
    for i, one in enumerate(choices):
        problem = _filled(one, f"choices[{i}]")
        if problem:
            return problem
    return "" if len(set(choices)) == len(choices) else "found the same text twice in 'choices', expected it once"


def _chosen(answer: Any, choices: list[str]) -> str:
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        return f"found {kind_of(answer)} in 'answer', expected the index of a choice or its text"
    if isinstance(answer, int) and not 0 <= answer < len(choices):
        return f"found the answer {answer}, expected an index from 0 to {len(choices) - 1}"
    if isinstance(answer, str) and answer not in choices:
        return f"found the answer {answer!r}, expected one of the choices"
    return ""


def _filled(value: Any, name: str) -> str:
    if not isinstance(value, str):
        return f"found {kind_of(value)} in '{name}', expected a text"
    return "" if value.strip() else f"found nothing in '{name}', expected a text"


def _turns(turns: Any, name: str, *, ends_with: tuple[str, ...]) -> str:
    if not isinstance(turns, list):
        return f"found {kind_of(turns)} in '{name}', expected a list of turns"
    if not turns:
        return f"found no turn in '{name}', expected one or more"
    for i, turn in enumerate(turns):
        problem = _turn(turn, f"{name}[{i}]")
        if problem:
            return problem
    last = turns[-1]["role"]
    return (
        "" if last in ends_with else f"found '{last}' as the last turn of '{name}', expected {' or '.join(ends_with)}"
    )


def _turn(turn: Any, place: str) -> str:
    if not isinstance(turn, dict):
        return f"found {kind_of(turn)} in '{place}', expected an object with role and content"
    calls = turn.get("tool_calls")
    missing = [name for name in ("role", "content") if name not in turn and not (calls and name == "content")]
    if missing:
        return f"found the fields {', '.join(turn) or 'none'} in '{place}', expected '{missing[0]}'"
    role = turn["role"]
    if role not in ROLES:
        shown = repr(role) if isinstance(role, str) else kind_of(role)
        return f"found {shown} in '{place}.role', expected one of {', '.join(ROLES)}"
    if calls:
        return _calls(turn, place)
    if role == "system" and turn["content"] == "":
        return ""  # the usual way to switch a template's own system text off
    return _filled(turn["content"], f"{place}.content")


def _calls(turn: dict[str, Any], place: str) -> str:
    """Calls become words of the turn: reading only the content would train half an answer."""
    if turn["role"] != "assistant":
        return f"found 'tool_calls' in '{place}', a turn of {turn['role']}, expected them in the assistant's turns only"
    if not isinstance(turn.get("content", ""), str | None):
        return f"found {kind_of(turn['content'])} in '{place}.content', expected a text or null"
    try:
        with_calls(turn)
    except ValueError as error:
        return f"{error}, in '{place}'"
    return ""


_PROBLEMS = {
    "messages": _messages,
    "preference": _preference,
    "verifiable": _verifiable,
    "episode": _episode,
    "choice": _choice,
    "text": _text,
}
