"""The exact join against all pairs compared one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evertune.data import similar
from evertune.data.shingles import Shingles
from evertune.data.similar import Rarity, jaccard, pairs_between, pairs_within, postings_of

# Few elements, so that many pairs lie just below, at and above the threshold.
sets = st.lists(st.frozensets(st.integers(0, 15), max_size=12), max_size=25)
thresholds = st.sampled_from([0.5, 0.6, 2 / 3, 0.75, 0.8, 0.9, 1.0])


def of(rows: list[frozenset[int]]) -> Shingles:
    # Spread over all 52 bits; the low bits of small integers would share buckets.
    hashes = [sorted(one * 0x9E3779B97F4A7 % (1 << 52) for one in row) for row in rows]
    starts = np.cumsum([0, *map(len, hashes)])
    return Shingles(starts.astype(np.int64), np.array([one for row in hashes for one in row], dtype=np.uint64))


def similarity(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other) if one and other else 0.0


def listed(pairs: Any) -> dict[tuple[int, int], float]:
    return {(i, j): value for i, j, value in zip(*(one.tolist() for one in pairs), strict=True)}


@given(sets, thresholds)
@example([frozenset(range(5)), frozenset(range(4))], 0.8)
@settings(max_examples=200, deadline=None)
def test_every_similar_pair_is_found_and_no_other(rows: list[frozenset[int]], threshold: float) -> None:
    expected = {
        (i, j): similarity(one, other)
        for j, other in enumerate(rows)
        for i, one in enumerate(rows[:j])
        if similarity(one, other) >= threshold
    }
    assert listed(pairs_within(of(rows), threshold)) == pytest.approx(expected)


@given(sets, sets, thresholds)
@settings(max_examples=100, deadline=None)
def test_every_pair_between_new_and_old_is_found(
    new: list[frozenset[int]], old: list[frozenset[int]], threshold: float
) -> None:
    rarity = Rarity.of(of(old))
    found = pairs_between(of(new), of(old), postings_of(of(old), rarity, threshold), rarity, threshold)
    expected = {
        (i, j): similarity(one, other)
        for i, one in enumerate(new)
        for j, other in enumerate(old)
        if similarity(one, other) >= threshold
    }
    assert listed(found) == pytest.approx(expected)


def test_small_batches_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [frozenset(rng.integers(0, 40, 20).tolist()) for _ in range(150)]
    whole = listed(pairs_within(of(rows), 0.5))
    monkeypatch.setattr(similar, "BATCH_PAIRS", 500)
    monkeypatch.setattr(similar, "BATCH_SHINGLES", 100)
    assert listed(pairs_within(of(rows), 0.5)) == whole
    assert len(whole) > 30


def test_the_similarity_by_hand() -> None:
    # {1,2,3,4} and {3,4,5}: two of five.
    both = of([frozenset({1, 2, 3, 4}), frozenset({3, 4, 5}), frozenset()])
    found = jaccard(both, both, np.array([0, 0, 2]), np.array([1, 0, 2]))
    assert found.tolist() == [0.4, 1.0, 0.0]


def test_too_many_candidates_are_refused_before_they_are_compared() -> None:
    rows = [frozenset(range(20)) for _ in range(100)]
    assert pairs_within(of(rows), 0.8, most_candidates=100) is None
    found = pairs_within(of(rows), 0.8)
    assert found is not None and len(found.left) == 4950
