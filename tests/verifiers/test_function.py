"""The verifier `function`: a user's code, kept in a process of its own; whatever it does wrong is its own failure."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.recipe.schema import Verifier
from evertune.verifiers import check, located, placed
from evertune.verifiers.outcome import Outcome

CHECKS = """
import os, sys, time
from helper import longest  # beside it

def shorter(output, answer):
    print("a word on standard output")
    return len(output) <= longest

def share(output, answer):
    return sum(one in output for one in answer["words"]) / len(answer["words"])

def numpy_number(output, answer):
    import numpy
    return numpy.float32(0.5)

def raises(output, answer):
    raise KeyError("gone")

def text(output, answer):
    return "yes"

def two(output, answer):
    return 2

def nan(output, answer):
    return float("nan")

def ends(output, answer):
    os._exit(3)

def hangs(output, answer):
    if output == "hang":
        while True:
            time.sleep(1)
    return 1

def reads(output, answer):
    return sys.stdin.read() == ""

number = 7
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "helper.py").write_text("longest = 5\n")
    # Names of this package's own files must not be found in the place of the user's.
    (tmp_path / "schema.py").write_text("def right(output, answer):\n    return output == answer\n")
    return tmp_path


def ask(folder: Path, call: str, output: str, answer: Any = "a", seconds: float = 5.0) -> Outcome:
    rule = placed(located({"function": {"call": call, "seconds": seconds}}, folder), folder)
    return check(rule, output=output, answer=answer)


@pytest.mark.parametrize(
    ("call", "output", "answer", "score"),
    [
        ("checks:shorter", "brief", "a", 1.0),
        ("checks:shorter", "too long", "a", 0.0),
        ("checks:share", "red, blue ✓\n", {"words": ["red", "green"]}, 0.5),
        ("checks:numpy_number", "", None, 0.5),
        ("checks:reads", "", None, 1.0),
        ("schema:right", "é", "é", 1.0),
        ("math:isinf", "", None, None),
    ],
)
def test_a_function_scores(folder: Path, call: str, output: str, answer: Any, score: float | None) -> None:
    if score is None:
        with pytest.raises(ProbeError, match="'math', which is neither in"):  # built in, without a file
            ask(folder, call, output, answer)
        return
    found = ask(folder, call, output, answer)
    assert (found.score, found.error, found.valid) == (score, None, True)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("checks:raises", "KeyError: 'gone'"),
        ("checks:text", "TypeError: it returned 'yes', expected a number from 0 to 1 or a truth value"),
        ("checks:two", "it returned 2.0, expected a number from 0 to 1"),
        ("checks:nan", "it returned nan, expected a number from 0 to 1"),
        ("checks:ends", "its process ended with code 3"),
        ("checks:number", "it cannot be imported: it is no function"),
    ],
)
def test_a_function_that_fails_scores_nothing(folder: Path, call: str, told: str) -> None:
    found = ask(folder, call, "x")
    assert (found.score, found.error) == (0.0, told)


def test_one_that_hangs_is_ended_and_the_next_question_is_answered(folder: Path) -> None:
    began = time.monotonic()
    assert ask(folder, "checks:hangs", "hang", seconds=0.5).error == "it took longer than 0.5 s"
    assert time.monotonic() - began < 60
    assert ask(folder, "checks:hangs", "go", seconds=30).score == 1.0


def test_a_module_that_cannot_be_imported_says_why(folder: Path) -> None:
    (folder / "broken.py").write_text("import absent_module\ndef f(output, answer): return 1\n")
    assert ask(folder, "broken:f", "x").error == (
        "it cannot be imported: ModuleNotFoundError: No module named 'absent_module'"
    )


def test_a_function_is_one_of_several_parts_and_its_file_is_known_by_digest(folder: Path) -> None:
    parts = {"parts": {"brief": {"weight": 1.0, "check": {"function": {"call": "checks:shorter", "seconds": 5.0}}},
                       "right": {"weight": 1.0, "check": {"exact": {}}}}}  # fmt: skip
    rule = located(parts, folder)
    found = check(placed(rule, folder), output="a", answer="a")
    assert dict(found.parts) == {"brief": 1.0, "right": 1.0}
    assert str(folder) not in json.dumps(rule)
    (folder / "checks.py").write_text(CHECKS + "\n# changed\n")
    assert located(parts, folder) != rule


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("absent:f", "names the module 'absent', which is neither in"),
        ("checks:absent", "names 'absent', which .*checks.py does not define"),
        ("torn:f", "torn.py is no Python that can be read"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_imported(folder: Path, call: str, told: str) -> None:
    (folder / "torn.py").write_text("def f(:\n")
    with pytest.raises(ProbeError, match=told):
        located({"function": {"call": call, "seconds": 5.0}}, folder)


def test_the_recipe_takes_it_short_or_long() -> None:
    assert Verifier.model_validate({"function": "checks:f"}) == Verifier.model_validate(
        {"function": {"call": "checks:f", "seconds": 5}}
    )
    for bad in ("checks", "checks:", "a b:c", ":f"):
        with pytest.raises(ValueError, match="call"):
            Verifier.model_validate({"function": bad})
