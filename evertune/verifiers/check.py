"""The table of verifiers, and the two doors to it: `validate` before anything runs, `check` for each output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from evertune.errors import ProbeError
from evertune.verifiers.calling import calls_alike, check_call
from evertune.verifiers.classifier import check_class, same_class
from evertune.verifiers.expression import check_expression_answer, equal_expression
from evertune.verifiers.function import any_answer, own_function
from evertune.verifiers.ifeval import check_instructions, follows_instructions
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.plain import check_pattern, check_refusal, check_text_answer, contains, exact, refusal, regex
from evertune.verifiers.program import check_tests, passes_tests
from evertune.verifiers.schema import check_schema, satisfies_schema


class Validate(Protocol):
    """Refuses, with `place`, an argument that is malformed or an answer that no output could equal."""

    def __call__(self, argument: Any, answer: Any, /, *, place: str) -> None: ...


@dataclass(frozen=True)
class Verifier:
    """A way to check outputs: `run(argument, output, answer)`, and what is refused beforehand."""

    run: Callable[[Any, str, Any], Outcome]
    validate: Validate


def weighted_parts(parts: Mapping[str, Any], output: str, answer: Any) -> Outcome:
    """The weighted mean of the parts' scores. Valid: every part finds the form it asks for.

    Where one part fails, the whole has failed: what is left would be another reward.
    """
    found = {name: check(part["check"], output=output, answer=answer) for name, part in parts.items()}
    failed = [f"{name}: {one.error}" for name, one in found.items() if one.error is not None]
    if failed:
        return Outcome(0.0, False, error=failed[0])
    total = sum(part["weight"] for part in parts.values())
    score = sum(parts[name]["weight"] * one.score for name, one in found.items()) / total
    scores = {name: one.score for name, one in found.items()}
    return Outcome(score, all(one.valid for one in found.values()), parts=scores)


def check_parts(parts: Any, answer: Any, *, place: str) -> None:
    """Refuse what any of the parts refuses.

    Raises:
        ProbeError: with the place.
    """
    for part in parts.values():
        validate(part["check"], answer, place=place)


VERIFIERS = {
    "exact": Verifier(exact, partial(check_text_answer, kind="exact")),
    "contains": Verifier(contains, partial(check_text_answer, kind="contains")),
    "math": Verifier(equal_expression, check_expression_answer),
    "classifier": Verifier(same_class, check_class),
    "refusal": Verifier(refusal, check_refusal),
    "regex": Verifier(regex, check_pattern),
    "json_schema": Verifier(satisfies_schema, check_schema),
    "ifeval": Verifier(follows_instructions, check_instructions),
    "python": Verifier(passes_tests, check_tests),
    "function": Verifier(own_function, any_answer),
    "tool_call": Verifier(calls_alike, check_call),
    "parts": Verifier(weighted_parts, check_parts),
}


def check(verifier: Mapping[str, Any], *, output: str, answer: Any) -> Outcome:
    """Check one output with a verifier given as `{kind: argument}`, as in a recipe.

    Whatever goes wrong inside the verifier is its own failure, never a wrong answer: it comes back as `error`.
    """
    ((kind, argument),) = verifier.items()
    try:
        return VERIFIERS[kind].run(argument, output, answer)
    except Exception as error:
        return Outcome(0.0, False, error=f"{type(error).__name__}: {error}")


def validate(verifier: Mapping[str, Any], answer: Any, *, place: str) -> None:
    """Refuse, before anything runs, a malformed argument and an answer that no output could equal.

    Raises:
        ProbeError: with `place` (`file:line`), what was found and what was expected.
    """
    if len(verifier) != 1 or next(iter(verifier)) not in VERIFIERS:
        raise ProbeError(f"{place}: found the verifier {dict(verifier)!r}, expected one of {', '.join(VERIFIERS)}.")
    ((kind, argument),) = verifier.items()
    VERIFIERS[kind].validate(argument, answer, place=place)
