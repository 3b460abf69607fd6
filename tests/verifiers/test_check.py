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
    with pytest.raises(ProbeError, match=r"^p:1: found the verifier .* expected one of exact, contains, math, regex"):
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
