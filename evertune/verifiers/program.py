"""The verifier `python`: the output's program is run against tests, in a sandbox.

A test `assert left == right` is split: the program's process computes the left side and nothing else, the right side is
read as a literal here or computed in a process without the program, and the two are compared here as plain data. So
neither an object that equals everything nor a look into the test can make a wrong answer right. Tests of another form
(`assert is_close(f(3), 2)`) can only be computed beside the program, which could forge them: prefer `==`.
"""

import ast
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from evertune.errors import ProbeError
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.plain import check_no_options
from evertune.verifiers.sandbox import require_confinement, run_program

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def passes_tests(_: Any, output: str, answer: Mapping[str, Any]) -> Outcome:
    """Every test of the answer holds for the output's program. Valid: there is a program, and Python reads it.

    The program is the output's last fenced block, or all of it. The answer is `{"tests": [assert statements],
    "setup": statements run after the program, before the tests}`.
    """
    program = program_of(output)
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Outcome(0.0, False, parsed=program)
    if not program.strip():
        return Outcome(0.0, False)
    setup, tests = answer.get("setup") or "", [_split(one) for one in answer["tests"]]
    ran = run_program(f"{program}\n{setup}\n", [left for left, _ in tests])
    if ran.error is not None or len(ran.values) != len(tests):
        return Outcome(0.0, True, parsed=program)
    wanted = _wanted(setup, tuple(right for _, right in tests))
    is_right = all(found == one for found, one in zip(ran.values, wanted, strict=True))
    return Outcome(float(is_right), True, parsed=program)


def program_of(output: str) -> str:
    """The last fenced block of an answer, or the whole answer where there is none."""
    blocks = _FENCED.findall(output)
    return str(blocks[-1]) if blocks else output


def check_tests(argument: Any, answer: Any, *, place: str) -> None:
    """Refuse options, and an answer that holds no tests that can be read.

    Raises:
        ProbeError: with the place; or this machine cannot confine programs.
    """
    check_no_options(argument, place=place, kind="python")
    if not isinstance(answer, dict) or not isinstance(answer.get("tests"), list) or not answer["tests"]:
        raise ProbeError(
            f"{place}: found {answer!r} in 'answer', expected an object with 'tests', a list of assert statements, for "
            "the verifier 'python'."
        )
    setup = answer.get("setup") or ""
    for one in [setup, *answer["tests"]]:
        try:
            if not isinstance(one, str):
                raise ValueError("no text")
            ast.parse(one)
            if one is not setup:
                _split(one)
        except (SyntaxError, ValueError) as error:
            raise ProbeError(
                f"{place}: found the test {one!r}, expected one assert statement: {error}.",
                remedy="Write each test as `assert f(1) == 2`.",
            ) from error
    require_confinement()


@lru_cache(maxsize=65536)
def _split(test: str) -> tuple[str, str]:
    """The two sides of an assertion; what is no `left == right` is asserted to be true.

    Raises:
        ValueError: it is no single assert statement.
    """
    body = ast.parse(test.strip()).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError("it is no single assert statement")
    asked = body[0].test
    if isinstance(asked, ast.Compare) and len(asked.ops) == 1 and isinstance(asked.ops[0], ast.Eq):
        return ast.unparse(asked.left), ast.unparse(asked.comparators[0])
    return f"bool({ast.unparse(asked)})", "True"


@lru_cache(maxsize=65536)
def _wanted(setup: str, rights: tuple[str, ...]) -> tuple[Any, ...]:
    """Values of the right sides, without the program.

    Raises:
        RuntimeError: one cannot be computed without it.
    """
    try:
        return tuple(ast.literal_eval(one) for one in rights)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        ran = run_program(setup, list(rights))
        if ran.error is not None:
            raise RuntimeError(f"the tests' right sides cannot be computed without the program: {ran.error}") from None
        return ran.values
