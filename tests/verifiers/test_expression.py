"""math: numbers and expressions by value, whatever way they are written."""

import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.errors import ProbeError
from evertune.verifiers import check, validate

EQUAL = [
    ("85", "85"),
    ("85", "The answer is 85."),
    ("85", "#### 85"),
    ("85", "First 12, then 73 more, so 12 + 73 = 85"),
    ("14", "14.28 at 70 * $0.2 = $14, rounded.\n#### 14"),
    ("85", "85 ####"),
    ("85", "85.0"),
    ("85", "$85"),
    ("85", "85 dollars"),
    ("85", r"\boxed{85}"),
    ("#### 85", "85"),
    ("She has 12 and 73.\n#### 85", "85"),
    ("1234", "1,234"),
    ("1,234", "#### 1234"),
    ("1 234", "1234"),
    ("0.5", "1/2"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"$\frac{1}{2}$", "1/2"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("-3", "−3"),
    ("−3", "-3"),
    ("7", "3+4"),
    ("0.333333", "1/3"),
    ("x^2+1", "so it is $1+x^2$"),
    (r"\sqrt{2}", r"$\sqrt2$"),
    ("1e3", "1000"),
    (85, "85"),
    (0.5, "1/2"),
    (1e-3, "0.001"),
]
UNEQUAL = [
    ("85", "84"),
    ("85", "185"),
    ("85", "8.5"),
    ("85", "-85"),
    ("85", "85, no, 86"),
    ("1000000", "1000001"),
    ("0.5", "1/3"),
    ("x^2+1", "$x^2-1$"),
]


@pytest.mark.parametrize("answer, output", EQUAL)
def test_equal_values_score(answer: Any, output: str) -> None:
    validate({"math": {}}, answer, place="p:1")
    found = check({"math": {}}, output=output, answer=answer)
    assert (found.score, found.valid, found.error) == (1.0, True, None)


@pytest.mark.parametrize("answer, output", UNEQUAL)
def test_other_values_do_not(answer: Any, output: str) -> None:
    found = check({"math": {}}, output=output, answer=answer)
    assert (found.score, found.valid, found.error) == (0.0, True, None)


@pytest.mark.parametrize("output", ["", "I do not know.", "eighty-five", r"$\frac{1$", "()", "****"])
def test_an_output_without_a_number_has_not_the_form(output: str) -> None:
    found = check({"math": {}}, output=output, answer="85")
    assert (found.score, found.valid, found.parsed, found.error) == (0.0, False, None, None)


def test_what_was_read_is_shown() -> None:
    assert check({"math": {}}, output="So 40 + 45 = 85 in all.", answer="85").parsed == "85"


@pytest.mark.slow
def test_a_number_nobody_can_compute_ends_in_time() -> None:
    start = time.process_time()
    found = check({"math": {}}, output="9^9^9^9", answer="85")
    assert (found.score, found.error) == (0.0, None)
    assert time.process_time() - start < 15


@pytest.mark.parametrize("answer", [None, "", True, [1], {"a": 1}, float("nan"), float("inf")])
def test_an_answer_of_the_wrong_type_is_refused(answer: Any) -> None:
    with pytest.raises(ProbeError, match=r"^p:7: found .* in 'answer', expected a number or an expression"):
        validate({"math": {}}, answer, place="p:7")


@pytest.mark.parametrize("answer", ["yes", "Paris", "sin(x)", "!?", "eighty-five", "ab"])
def test_an_answer_that_would_be_misread_is_refused(answer: str) -> None:
    # As LaTeX, "yes" is the product of y, e and s: no output would ever equal it.
    with pytest.raises(ProbeError, match=r"^p:7: found the answer .* that math-verify reads"):
        validate({"math": {}}, answer, place="p:7")


numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.integers(0, 10**9).map("{:,}".format),
    st.decimals(-(10**6), 10**6, places=3, allow_nan=False).map("{:f}".format),
    st.integers(0, 999).map(".{:03d}".format),
    st.integers(0, 100).map("{}%".format),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map("{0[0]}/{0[1]}".format),
)


@given(numbers)
@settings(max_examples=60, deadline=None)
def test_plain_numbers_pass_unread_and_are_read_rightly(text: str) -> None:
    # validate takes a plain number on sight; math-verify must then agree with its value.
    value = Fraction(text) if "/" in text else Fraction(Decimal(text.strip("%").replace(",", "")))
    value = value / 100 if text.endswith("%") else value
    validate({"math": {}}, text, place="p:1")
    assert check({"math": {}}, output=f"{value.numerator}/{value.denominator}", answer=text).score == 1.0
    assert check({"math": {}}, output=f"{value.numerator + 7}/{value.denominator}", answer=text).score == 0.0


def test_plain_numbers_are_validated_without_sympy() -> None:
    code = (
        "import sys; from evertune.verifiers import validate\n"
        "for answer in ('85', '1,234', '-1/2', 3.5): validate({'math': {}}, answer, place='p:1')\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
