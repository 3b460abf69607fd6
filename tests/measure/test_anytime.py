"""Capital won by betting, against its formula and against what it promises: true at every look."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.measure import anytime, stats


def test_the_capital_is_the_mean_of_the_products() -> None:
    # Two losses, one gain, one item that stays, betting on a mean above -0.1: by hand for each fraction.
    seen = anytime.count([-1, -1, 1, 0])
    products = [(1 - f * 0.9 / 0.9) ** 2 * (1 + f * 1.1 / 0.9) * (1 + f * 0.1 / 0.9) for f in (0.06, 0.13, 0.28, 0.6)]
    assert np.exp(anytime.log_capital(seen, -0.1)) == pytest.approx(np.mean(products))


def test_nothing_seen_says_nothing() -> None:
    nothing = anytime.count([])
    assert (anytime.lower_bound(nothing, 0.05), anytime.p_harm(nothing)) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="expected them in"):
        anytime.count([0.0, 1.5])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=200), st.floats(0.001, 0.2))
def test_the_bound_lies_below_the_mean_and_falls_with_alpha(values: list[float], alpha: float) -> None:
    seen = anytime.count(values)
    bound = anytime.lower_bound(seen, alpha)
    assert -1 <= bound <= np.mean(values) + 1e-9
    assert anytime.lower_bound(seen, alpha / 2) <= bound + 1e-9
    if bound > -1:
        assert anytime.log_capital(seen, bound) == pytest.approx(-np.log(alpha), abs=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_order_does_not_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 0, 1], size=100)
    assert anytime.lower_bound(anytime.count(values), 0.05) == anytime.lower_bound(
        anytime.count(rng.permutation(values)), 0.05
    )


def looks(rng: np.random.Generator, shares: tuple[float, float], *, margin: float) -> tuple[bool, bool, bool]:
    """Whether harm, and its absence, is claimed at any look after each 50 of 1,000 items; and by McNemar's test."""
    d = rng.choice([-1, 1, 0], size=1000, p=[*shares, 1 - sum(shares)])
    harm = safe = fixed = False
    for n in range(50, 1001, 50):
        seen = anytime.count(d[:n])
        harm |= anytime.p_harm(seen) <= 0.05
        safe |= anytime.log_capital(seen, -margin) >= -np.log(0.05)
        fixed |= stats.mcnemar(int(np.sum(d[:n] < 0)), int(np.sum(d[:n] > 0))) <= 0.05
    return harm, safe, fixed


def test_looking_after_every_batch_keeps_the_level_and_a_fixed_test_does_not() -> None:
    rng = np.random.default_rng(0)
    same = np.mean([looks(rng, (0.05, 0.05), margin=0.05) for _ in range(300)], axis=0)
    at_margin = np.mean([looks(rng, (0.075, 0.025), margin=0.05) for _ in range(300)], axis=0)
    # Standard error 1.3 points at 5 %.
    assert same[0] <= 0.06
    assert at_margin[1] <= 0.07
    assert same[2] > 0.12
    # And it is not empty: a loss of 5 points is found, and so is that there is none.
    assert at_margin[0] > 0.8
    assert same[1] > 0.8


def test_clusters_of_unequal_size_are_drawn_whole_and_bounded_in_items() -> None:
    # 40 clusters of one item that stays, 10 of four items that are all lost: mean over items -0.5.
    d = [0.0] * 40 + [-1.0] * 40
    clusters = [f"a{i}" for i in range(40)] + [f"b{i // 4}" for i in range(40)]
    found = stats.compare_anytime(d, clusters, level=0.05)
    assert found.difference == -0.5
    # Sums over the largest cluster: 40 zeros and ten times -1 among 50 draws, mean -0.2; items are 4 / 1.6 times that.
    expected = anytime.lower_bound(anytime.count([0.0] * 40 + [-1.0] * 10), 0.05) * 2.5
    assert found.lower_bound == pytest.approx(expected)
    assert found.ci90[0] < -0.5 < found.ci90[1]
