"""exact, contains and regex: right, wrong, malformed, and bounded in time."""

import time
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.verifiers import check, validate


@pytest.mark.parametrize(
    "output, answer, score, valid",
    [
        ("desk: repair", "desk: repair", 1.0, True),
        ("  desk: repair\n", "desk: repair ", 1.0, True),
        ("desk: billing", "desk: repair", 0.0, True),
        ("Desk: repair", "desk: repair", 0.0, True),
        ("desk: repair.", "desk: repair", 0.0, True),
        ("desk: repair\nbecause it broke", "desk: repair", 0.0, False),
        ("", "desk: repair", 0.0, False),
        (" \n", "desk: repair", 0.0, False),
        ("a\nb", "a\nb", 1.0, True),
    ],
)
def test_exact_compares_trimmed_texts(output: str, answer: str, score: float, valid: bool) -> None:
    found = check({"exact": {}}, output=output, answer=answer)
    assert (found.score, found.valid, found.error) == (score, valid, None)
    assert found.parsed == output.strip()


@pytest.mark.parametrize(
    "output, score, valid",
    [("It is Paris, of course.", 1.0, True), ("It is paris.", 0.0, True), ("Rome", 0.0, True), (" ", 0.0, False)],
)
def test_contains_looks_for_the_answer(output: str, score: float, valid: bool) -> None:
    found = check({"contains": {}}, output=output, answer=" Paris ")
    assert (found.score, found.valid) == (score, valid)


@pytest.mark.parametrize(
    "output, score",
    [("2026-11-24", 1.0), (" 2026-11-24\n", 1.0), ("on 2026-11-24", 0.0), ("2026-11-24!", 0.0), ("", 0.0)],
)
def test_regex_matches_the_whole_trimmed_output(output: str, score: float) -> None:
    found = check({"regex": r"\d{4}-\d\d-\d\d"}, output=output, answer="never read")
    assert (found.score, found.valid) == (score, score == 1.0)


def test_a_pattern_that_backtracks_for_ever_is_the_verifiers_failure() -> None:
    start = time.process_time()
    found = check({"regex": "(a|aa)+$"}, output="a" * 200 + "!", answer=None)
    assert time.process_time() - start < 6
    assert found.error is not None
    assert "the pattern '(a|aa)+$' backtracked for more than 1 s" in found.error


@pytest.mark.parametrize("kind", ["exact", "contains"])
@pytest.mark.parametrize("answer", [None, "", "  ", 42, 1.5, True, ["a"], {"a": 1}])
def test_an_answer_that_is_no_text_is_refused(kind: str, answer: Any) -> None:
    with pytest.raises(ProbeError) as caught:
        validate({kind: {}}, answer, place="probe.jsonl:3")
    assert str(caught.value).startswith(f"probe.jsonl:3: found {answer!r} in 'answer', expected a text")


@pytest.mark.parametrize("kind", ["exact", "contains", "math"])
def test_options_are_refused_where_there_are_none(kind: str) -> None:
    with pytest.raises(ProbeError, match="expected no options"):
        validate({kind: {"case": False}}, "1", place="probe.jsonl:1")


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "", None, 3, ["a"]])
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(ProbeError, match=r"^probe\.jsonl:1: found the pattern"):
        validate({"regex": pattern}, None, place="probe.jsonl:1")


def test_good_items_pass() -> None:
    validate({"exact": {}}, "a", place="p:1")
    validate({"contains": {}}, "a", place="p:1")
    validate({"regex": r"\d+"}, None, place="p:1")
