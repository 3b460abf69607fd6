"""What is kept for replay under each policy, by hand."""

import itertools
import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data.select import class_balanced, coverage, highest_score
from evertune.data.shingles import shingle


def test_classes_get_the_same_number_and_small_ones_all_they_have() -> None:
    rows = [*("a" * 100), *("b" * 10), *("c" * 3)]
    kept = class_balanced(list(enumerate(rows)), 20, class_of=lambda one: one[1], seed=0)
    # c has 3; the other 17 are 8 and 9.
    assert Counter(one for _, one in kept) == {"a": 9, "b": 8, "c": 3}
    assert kept == sorted(kept)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1), st.integers(0, 60), st.integers(0, 99)
)
@settings(max_examples=50, deadline=None)
def test_a_budget_is_used_up_and_never_exceeded(counts: dict[str, int], size: int, seed: int) -> None:
    rows = [(name, i) for name, count in counts.items() for i in range(count)]
    kept = class_balanced(rows, size, class_of=lambda one: one[0], seed=seed)
    assert len(kept) == min(size, len(rows))
    assert len(set(kept)) == len(kept)
    given_out = Counter(name for name, _ in kept)
    assert all(given_out[a] >= given_out[b] - 1 or given_out[a] == counts[a] for a in counts for b in counts)


def test_coverage_takes_what_is_new_and_not_what_is_said_again() -> None:
    # Runs of three words: 1 in the first, 4 in the second (the first among them), 3 others in the third.
    texts = ["a b c", "a b c d e f", "u v w x y", "a b c d"]
    assert coverage(shingle(texts), 1) == [1]
    assert coverage(shingle(texts), 2) == [1, 2]


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=3, max_size=8).map(" ".join), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_coverage_is_as_good_as_its_bound(texts: list[str]) -> None:
    found = shingle(texts)
    sets = [set(found.hashes[a:b].tolist()) for a, b in itertools.pairwise(found.starts.tolist())]
    for size in range(1, len(texts) + 1):
        best = max(len(set().union(*some)) for some in itertools.combinations(sets, size))
        kept = coverage(found, size)
        assert len(kept) == size
        assert len(set().union(*(sets[i] for i in kept))) >= (1 - 1 / math.e) * best


def test_the_highest_scores_and_never_a_row_without_one() -> None:
    assert highest_score([1.0, 3.0, math.nan, 3.0, 2.0], 2) == [1, 3]
    assert highest_score([1.0, 3.0, math.nan, 3.0, 2.0], 9) == [0, 1, 3, 4]
