"""The table: one verifier at a time, and a failure inside one is no score."""

import threading
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.recipe.schema import Verifier as RecipeVerifier
from evertune.verifiers import Outcome, check, validate
from evertune.verifiers.check import VERIFIERS


def test_the_recipe_knows_the_same_verifiers() -> None:
    assert set(RecipeVerifier.model_fields) == set(VERIFIERS)


@pytest.mark.parametrize("verifier", [{}, {"fuzzy": {}}, {"exact": {}, "contains": {}}])
def test_what_is_not_one_known_verifier_is_refused(verifier: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match=r"^p:1: found the verifier .* expected one of exact, contains, math, "):
        validate(verifier, "a", place="p:1")


def test_a_verifier_that_raises_says_so_and_scores_nothing() -> None:
    # An answer that validate would have refused.
    found = check({"exact": {}}, output="a", answer=None)
    assert (found.score, found.valid) == (0.0, False)
    assert found.error == "AttributeError: 'NoneType' object has no attribute 'strip'"


def test_math_outside_the_main_thread_is_a_failure_not_a_zero() -> None:
    # Its time limit is an alarm signal, which only the main thread can set.
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(check({"math": {}}, output="85", answer="85")))
    thread.start()
    thread.join()
    assert found[0].error is not None
    assert "thread" in found[0].error


PARTS = {
    "parts": {
        "right": {"weight": 3.0, "check": {"exact": {}}},
        "brief": {"weight": 1.0, "check": {"regex": ".{1,3}"}},
    }
}


@pytest.mark.parametrize(
    ("output", "score", "parts"),
    [
        ("yes", 1.0, {"right": 1.0, "brief": 1.0}),
        ("no", 0.25, {"right": 0.0, "brief": 1.0}),
        ("no, never", 0.0, {"right": 0.0, "brief": 0.0}),
    ],
)
def test_parts_are_a_weighted_mean(output: str, score: float, parts: dict[str, float]) -> None:
    found = check(PARTS, output=output, answer="yes")
    assert (found.score, dict(found.parts)) == (score, parts)


def test_a_part_that_fails_fails_the_whole_and_is_named() -> None:
    broken = {"parts": {"slow": {"weight": 1.0, "check": {"regex": "("}}, **PARTS["parts"]}}
    found = check(broken, output="yes", answer="yes")
    assert found.error is not None
    assert found.error.startswith("slow: ")


def test_what_a_part_refuses_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"rows.jsonl:2.*expected a text"):
        validate(PARTS, 3, place="rows.jsonl:2")
