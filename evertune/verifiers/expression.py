"""The verifier `math`: numbers and expressions, through math-verify (the one door to it)."""

import math
import re
from decimal import Decimal
from typing import Any

from evertune.errors import ProbeError
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.plain import check_no_options

SECONDS = 5
_NUMBER = re.compile(r"-?(\d{1,3}([ ,]\d{3})+|\d+)?(\.\d+)?%?|-?\d+/\d+")
_POWER_OF_TEN = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}")
_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def equal_expression(_: Any, output: str, answer: str | int | float) -> Outcome:
    r"""The output's final number or expression equals the answer, to six decimals. Valid: there is one.

    Read are numbers and sums anywhere (`#### 1,234`, `x = 5`, `1/2`) and LaTeX inside `$...$` or `\boxed{...}`. What
    stands after `####` comes first. A percentage equals its share and its bare number: `50%` is 0.5 and 50.
    Reading and comparing stop after five seconds each: what takes longer counts as not read, or not equal. The limit
    is an alarm signal, so this runs in a process's main thread only.
    """
    from math_verify import verify

    found = _parse(output.rpartition("####")[2]) or _parse(output)
    if not found:
        return Outcome(0.0, False)
    is_equal = verify(_parse_answer(answer), found, timeout_seconds=SECONDS)
    return Outcome(float(is_equal), True, parsed=_shown(found))


def check_expression_answer(argument: Any, answer: Any, *, place: str) -> None:
    """Refuse an answer that is no number and holds none.

    Raises:
        ProbeError: with the place.
    """
    check_no_options(argument, place=place, kind="math")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not is_number and not (isinstance(answer, str) and answer.strip()):
        raise ProbeError(
            f"{place}: found {answer!r} in 'answer', expected a number or an expression for the verifier 'math'."
        )
    # Plain numbers are most answers; looking at them here spares `check` the import of sympy.
    if not is_number and not _is_number(answer) and not _parse_answer(answer):
        raise ProbeError(
            f"{place}: found the answer {answer!r}, expected a number or an expression that math-verify reads.",
            remedy="Write the answer alone, as a number or as LaTeX between dollar signs.",
        )


def _parse_answer(answer: str | int | float) -> list[Any]:
    r"""The answer's expression, after the last `####` if there is one.

    A bare one (`x^2 + 1`, `\frac{1}{2}`) is read as LaTeX, but not where it has words: `yes` would be read as a
    product of letters, and no output would ever equal it.
    """
    text = str(answer).rpartition("####")[2].strip()
    if _POWER_OF_TEN.fullmatch(text):
        text = format(Decimal(text), "f")
    if _is_number(text) or _MARKED.search(text) or _WORD.search(text):
        return _parse(text)
    return _parse(f"${text}$") or _parse(text)


def _parse(text: str) -> list[Any]:
    """What math-verify reads in a text, ready for `verify`; empty when it finds marks of mathematics but no meaning."""
    from math_verify import parse

    found: list[Any] = parse(text.replace("\u2212", "-"), parsing_timeout=SECONDS)
    return found if any(not isinstance(one, str) for one in found) else []


def _is_number(text: str) -> bool:
    return any(char.isdigit() for char in text) and _NUMBER.fullmatch(text.strip()) is not None


def _shown(found: list[Any]) -> str:
    """The text that was read. Printing an expression instead could take for ever: 9^9^9 is computed first."""
    return next((one for one in reversed(found) if isinstance(one, str)), "")
