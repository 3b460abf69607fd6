"""The verifier `tool_call`: the output calls the tools that the answer calls, or says what it says."""

import json
from typing import Any

from evertune.agents import calls_in
from evertune.errors import ProbeError
from evertune.verifiers.outcome import Outcome


def calls_alike(argument: Any, output: str, answer: Any) -> Outcome:
    """The same calls with the same arguments, in order; JSON values are equal whatever the order of their keys.

    Where the answer calls nothing, the output must call nothing and be the same text after trimming. Valid: the output
    has the form that is asked for, a call where the answer is one, and no call where it is none.
    """
    wanted, made = calls_in(answer), calls_in(output)
    assert wanted is not None, "validated"
    if made is None or bool(made) != bool(wanted):
        return Outcome(0.0, False)
    if not wanted:
        return Outcome(float(output.strip() == answer.strip()), True, parsed=output.strip())
    shown = json.dumps([one.to_json() for one in made], ensure_ascii=False, sort_keys=True)
    expected = json.dumps([one.to_json() for one in wanted], ensure_ascii=False, sort_keys=True)
    return Outcome(float(shown == expected), True, parsed=shown)


def check_call(argument: Any, answer: Any, *, place: str) -> None:
    """Refuse an answer that is no text, or calls in a broken form.

    Raises:
        ProbeError: with the place.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise ProbeError(f"{place}: found the answer {answer!r} for 'tool_call', expected what the agent should say.")
    if calls_in(answer) is None:
        raise ProbeError(
            f"{place}: found a call in a broken form in 'answer', expected "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call> and nothing behind it.',
            remedy="Correct the answer.",
        )
