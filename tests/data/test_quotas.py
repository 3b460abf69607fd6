"""Rows of each source in an epoch, by hand."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data.quotas import Mixing, quotas_of, warnings_of
from evertune.errors import DataError


def test_each_row_once_unless_asked_otherwise() -> None:
    assert quotas_of(Mixing(), {"a": 3, "b": 5}) == {"a": 3, "b": 5}


def test_weights_are_shares_of_rows_by_largest_remainder() -> None:
    # 10 rows at 1 : 3 : 5 are 1.11, 3.33, 5.56: floors 1, 3, 5, and the row left over goes to the largest rest.
    assert quotas_of(Mixing({"a": 1, "b": 3, "c": 5}), {"a": 1, "b": 3, "c": 6}) == {"a": 1, "b": 3, "c": 6}


def test_weights_by_tokens_are_shares_of_tokens() -> None:
    # Rows of 10 and of 30 tokens; half of the tokens each: three rows of a for one of b, of 40 rows 30 and 10.
    mixing = Mixing({"a": 1, "b": 1}, by="tokens")
    quotas = quotas_of(mixing, {"a": 20, "b": 20}, {"a": 200, "b": 600})
    assert quotas == {"a": 30, "b": 10}
    assert quotas["a"] * 10 == quotas["b"] * 30


def test_a_temperature_gives_smaller_sources_more() -> None:
    # 900 and 100 rows. T = 2: 30 to 10, so 750 and 250.
    rows = {"a": 900, "b": 100}
    assert quotas_of(Mixing(temperature=2.0), rows) == {"a": 750, "b": 250}
    assert quotas_of(Mixing(temperature=1.0), rows) == rows
    assert quotas_of(Mixing(temperature=1e9), rows) == {"a": 500, "b": 500}


def test_a_temperature_near_zero_gives_all_to_the_largest() -> None:
    assert quotas_of(Mixing(temperature=1e-3), {"a": 20, "b": 10}) == {"a": 30, "b": 0}


def test_passes_of_a_source() -> None:
    assert quotas_of(Mixing(passes={"a": 2.5}), {"a": 4, "b": 3}) == {"a": 10, "b": 3}


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 1000), min_size=1),
    st.floats(0.1, 10),
)
@settings(max_examples=50, deadline=None)
def test_an_epoch_keeps_its_length_and_its_order_of_sizes(rows: dict[str, int], temperature: float) -> None:
    quotas = quotas_of(Mixing(temperature=temperature), rows)
    assert sum(quotas.values()) == sum(rows.values())
    assert all(quotas[a] >= quotas[b] - 1 for a in rows for b in rows if rows[a] >= rows[b])


@pytest.mark.parametrize(
    "mixing, message",
    [
        ({"weights": {"a": 1.0}, "temperature": 2.0}, "found weights and temperature, expected one of them"),
        ({"weights": {"a": 1.0, "x": 1.0}}, "found 'x', expected one of the sources a, b"),
        ({"weights": {"a": 1.0}}, "found no weight for 'b'"),
        ({"passes": {"a": 0.0}}, "expected finite numbers above 0"),
        ({"temperature": 0.0}, "expected finite numbers above 0"),
        ({"weights": {"a": float("inf"), "b": 1.0}}, "expected finite numbers above 0"),
        ({"passes": {"a": float("inf")}}, "expected finite numbers above 0"),
        ({"temperature": -1.0}, "expected finite numbers above 0"),
    ],
)
def test_what_makes_no_mix_is_named(mixing: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        quotas_of(Mixing(**mixing), {"a": 1, "b": 1})


def test_a_source_shown_too_often_and_one_not_shown_whole_are_told() -> None:
    told = warnings_of({"a": 50, "b": 50}, {"a": 10, "b": 100}, 1.5)
    assert told == [
        "'a' is shown 7.5 times: its 10 rows may be learnt by heart.",
        "25 of 100 rows of 'b' are not shown.",
    ]
    assert warnings_of({"a": 10}, {"a": 10}, 3.0) == []
