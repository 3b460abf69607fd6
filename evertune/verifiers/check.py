"""The verifiers, each a function of (argument, output, answer); one table names them."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evertune.errors import ProbeError

REGEX_SECONDS = 1.0
MATH_SECONDS = 5
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """What a verifier found.

    Attributes:
        score: 0 to 1.
        valid: the output has the form that was asked for, right or wrong.
        parsed: the part of the output that was compared, if any.
        error: why the verifier itself failed, or None. Then `score` means nothing.
    """

    score: float
    valid: bool
    parsed: str | None = None
    error: str | None = None


Verifier = Callable[[Any, str, Any], Outcome]


def check(verifier: Mapping[str, Any], *, output: str, answer: Any) -> Outcome:
    """Check one output with a verifier given as `{kind: argument}`, as in a recipe."""
    ((kind, argument),) = verifier.items()
    try:
        return VERIFIERS[kind](argument, output, answer)
    except Exception as error:
        # Whatever goes wrong inside a verifier is its own failure, never a wrong answer.
        return Outcome(0.0, False, error=f"{type(error).__name__}: {error}")


def validate(verifier: Mapping[str, Any], answer: Any, *, place: str) -> None:
    """Refuse, before anything runs, an answer that the verifier could never accept, or a malformed argument.

    Raises:
        ProbeError: with `place`, what was found and what was expected.
    """
    ((kind, argument),) = verifier.items()
    if kind in ("exact", "contains") and not (isinstance(answer, str) and answer.strip()):
        raise ProbeError(f"{place}: verifier '{kind}' needs a text as 'answer', found {answer!r}.")
    if kind == "math":
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ProbeError(f"{place}: verifier 'math' needs a number or a text as 'answer', found {answer!r}.")
        if not _gold_math(answer):
            raise ProbeError(f"{place}: verifier 'math' finds no number or expression in the answer {answer!r}.")
    if kind == "regex":
        _compile(argument, place)
    if kind == "json_schema":
        _check_schema(argument, place)


def _exact(_: Any, output: str, answer: Any) -> Outcome:
    found, wanted = output.strip(), str(answer).strip()
    # One line was asked for and one line came: right or wrong, the form is right.
    valid = bool(found) and found.count("\n") == wanted.count("\n")
    return Outcome(float(found == wanted), valid, parsed=found)


def _contains(_: Any, output: str, answer: Any) -> Outcome:
    return Outcome(float(str(answer) in output), bool(output.strip()), parsed=output.strip())


def _math(_: Any, output: str, answer: Any) -> Outcome:
    from math_verify import parse, verify

    found = parse(output, parsing_timeout=MATH_SECONDS)
    if not found:
        return Outcome(0.0, False)
    right = bool(verify(_gold_math(answer), found, timeout_seconds=MATH_SECONDS))
    return Outcome(float(right), True, parsed=str(found[-1]))


def _gold_math(answer: Any) -> list[Any]:
    """The parsed answer; a bare expression is read as LaTeX."""
    from math_verify import parse

    found: list[Any] = parse(str(answer), parsing_timeout=MATH_SECONDS)
    return found or parse(f"${answer}$", parsing_timeout=MATH_SECONDS)


def _regex(pattern: str, output: str, _: Any) -> Outcome:
    import regex

    found = output.strip()
    try:
        # The `regex` package bounds the time of a match: a pattern that backtracks for ever is a failure, not a hang.
        matched = regex.fullmatch(pattern, found, timeout=REGEX_SECONDS) is not None
    except TimeoutError:
        return Outcome(0.0, False, error=f"the pattern {pattern!r} took longer than {REGEX_SECONDS:g} s")
    return Outcome(float(matched), matched, parsed=found)


def _json_schema(schema: Any, output: str, answer: Any) -> Outcome:
    import jsonschema

    text = output.strip()
    fenced = _FENCED.search(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (json.JSONDecodeError, RecursionError):
        return Outcome(0.0, False)
    parsed = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if not jsonschema.Draft202012Validator(schema).is_valid(value):
        return Outcome(0.0, False, parsed=parsed)
    right = value == answer if isinstance(answer, dict | list) else True
    return Outcome(float(right), True, parsed=parsed)


def _compile(pattern: Any, place: str) -> None:
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ProbeError(f"{place}: the pattern {pattern!r} is not a regular expression: {error}.") from error


def _check_schema(schema: Any, place: str) -> None:
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ProbeError(f"{place}: not a JSON Schema: {error.message}.") from error


VERIFIERS: dict[str, Verifier] = {
    "exact": _exact,
    "contains": _contains,
    "math": _math,
    "regex": _regex,
    "json_schema": _json_schema,
}
