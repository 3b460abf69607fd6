"""The stream: exact shares, even spread, true permutations, and no dependence on how a step is divided."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data.stream import Pick, Stream, permute
from evertune.errors import DataError

counts = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40), min_size=1, max_size=3)
shares = st.one_of(st.just(0.0), st.floats(0.01, 0.9))
seeds = st.integers(0, 2**31 - 1)


@st.composite
def arguments(draw: st.DrawFn, *, weighted: bool | None = None) -> dict[str, Any]:
    new = draw(counts)
    has_weights = draw(st.booleans()) if weighted is None else weighted
    weights = {name: draw(st.floats(0.01, 100)) for name in new} if has_weights else None
    return {"new": new, "weights": weights, "replay": draw(counts), "share": draw(shares), "seed": draw(seeds)}


def streams(*, weighted: bool | None = None) -> st.SearchStrategy[Stream]:
    return arguments(weighted=weighted).map(lambda given: Stream(**given))


def epoch(stream: Stream, number: int) -> list[Pick]:
    first = number * stream.rows_per_epoch
    return [stream.pick(first + i) for i in range(stream.rows_per_epoch)]


def test_one_row_in_five_is_replay_at_share_a_fifth() -> None:
    # 8 new rows: 8 * 0.2 / 0.8 = 2 old ones, at the end of each stretch of five.
    stream = Stream({"new": 8}, None, {"old": 3}, 0.2, 0)
    assert [one.is_replay for one in epoch(stream, 0)] == [False, False, False, False, True] * 2


def test_the_share_is_rounded_to_whole_rows_once() -> None:
    # 10 * 0.3 / 0.7 = 4.29: four old rows, a share of 4 / 14.
    stream = Stream({"new": 10}, None, {"old": 100}, 0.3, 0)
    assert (stream.new_per_epoch, stream.replay_per_epoch, stream.rows_per_epoch) == (10, 4, 14)


@given(streams(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_exactly_its_replay_rows(stream: Stream, number: int) -> None:
    assert sum(one.is_replay for one in epoch(stream, number)) == stream.replay_per_epoch


@given(streams(), st.integers(0, 300), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_any_window_is_within_one_row_of_the_share(stream: Stream, start: int, width: int) -> None:
    replayed = sum(stream.pick(start + i).is_replay for i in range(width))
    assert abs(replayed - width * stream.replay_per_epoch / stream.rows_per_epoch) < 1


@given(streams(weighted=False), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_without_weights_each_new_row_comes_once_an_epoch(stream: Stream, number: int) -> None:
    seen = Counter((one.source, one.index) for one in epoch(stream, number) if not one.is_replay)
    assert set(seen.values()) == {1}
    assert len(seen) == stream.new_per_epoch


def test_weights_are_shares_of_the_new_rows_by_largest_remainder() -> None:
    # 10 rows at 1 : 3 : 5 are 1.11, 3.33, 5.56: floors 1, 3, 5, and the row left over goes to the largest rest.
    stream = Stream({"a": 1, "b": 3, "c": 6}, {"a": 1, "b": 3, "c": 5}, {}, 0.0, 0)
    assert Counter(one.source for one in epoch(stream, 0)) == {"a": 1, "b": 3, "c": 6}


@given(arguments(weighted=True))
@settings(max_examples=60, deadline=None)
def test_with_weights_each_source_goes_through_its_rows_before_repeating(given: dict[str, Any]) -> None:
    stream = Stream(**given)
    picks = [one for number in range(3) for one in epoch(stream, number) if not one.is_replay]
    assert len(picks) == 3 * stream.new_per_epoch
    for source, total in Counter(one.source for one in picks).items():
        size = given["new"][source]
        seen = Counter(one.index for one in picks if one.source == source)
        assert set(seen) <= set(range(size))
        assert all(total // size <= seen[i] <= math.ceil(total / size) for i in range(size))


@given(arguments(), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_pool_goes_through_its_rows_before_repeating(given: dict[str, Any], rows: int) -> None:
    drawn = [one for one in map(Stream(**given).pick, range(rows)) if one.is_replay]
    pool = [(name, i) for name, count in given["replay"].items() for i in range(count)]
    seen = Counter((one.source, one.index) for one in drawn)
    assert set(seen) <= set(pool)
    assert all(len(drawn) // len(pool) <= seen[one] <= math.ceil(len(drawn) / len(pool)) for one in pool)


def test_each_pass_over_the_pool_has_its_own_order() -> None:
    stream = Stream({"new": 300}, None, {"old": 20}, 0.5, 0)
    drawn = [one.index for one in epoch(stream, 0) if one.is_replay]
    passes = [tuple(drawn[i : i + 20]) for i in range(0, 300, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len(set(passes)) == 15


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    orders = {
        tuple(one.index for one in epoch(Stream({"new": 30}, None, {}, 0.0, seed), number))
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9


@given(arguments(), st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_a_stream_made_anew_goes_on_where_the_first_stopped(given: dict[str, Any], start: int) -> None:
    whole = [Stream(**given).pick(i) for i in range(start + 50)]
    again = Stream(**given)
    assert [again.pick(start + i) for i in range(50)] == whole[start:]


@given(arguments(), st.lists(st.integers(0, 5000), max_size=40))
@settings(max_examples=60, deadline=None)
def test_many_picks_at_once_are_the_same_picks(given: dict[str, Any], positions: list[int]) -> None:
    stream = Stream(**given)
    found = stream.picks(np.array(positions, dtype=np.int64))
    names = [found.names[i] for i in found.source]
    assert [
        Pick(name, index, is_replay)
        for name, index, is_replay in zip(names, found.index.tolist(), found.is_replay.tolist(), strict=True)
    ] == [stream.pick(position) for position in positions]


def test_quotas_are_rows_of_an_epoch() -> None:
    stream = Stream({"a": 4, "b": 6}, None, {"old": 3}, 0.2, 0, quotas={"a": 8, "b": 0})
    shown = epoch(stream, 0)
    assert Counter((one.source, one.is_replay) for one in shown) == {("a", False): 8, ("old", True): 2}
    assert Counter(one.index for one in shown if one.source == "a") == dict.fromkeys(range(4), 2)
    with pytest.raises(DataError, match="expected a number of rows for"):
        Stream({"a": 4}, None, {}, 0.0, 0, quotas={"a": 0})


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "from evertune.data.stream import Stream\n"
        "s = Stream({'a': 50, 'b': 7}, {'a': 1, 'b': 2}, {'old': 9}, 0.3, 5)\n"
        "print([(p.source, p.index) for p in map(s.pick, range(100))])"
    )
    stream = Stream({"a": 50, "b": 7}, {"a": 1, "b": 2}, {"old": 9}, 0.3, 5)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([(one.source, one.index) for one in map(stream.pick, range(100))])


def test_the_order_does_not_move_by_accident() -> None:
    # Golden: a change here gives every stage of every recipe another order, so its version in the stage key must rise.
    stream = Stream({"a": 6, "b": 3}, None, {"old": 4}, 0.25, 7)
    shown = " ".join(f"{one.source}{one.index}" for one in map(stream.pick, range(14)))
    assert shown == "a1 b1 a3 old0 a2 a5 b0 old2 a0 b2 a4 old1 a0 b1"


divisions = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 5))


@given(arguments(), divisions, st.integers(0, 30), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_step_shows_the_same_rows_however_it_is_divided(
    given: dict[str, Any], division: tuple[int, int, int], step: int, by_length: bool
) -> None:
    stream = Stream(**given)
    batch_rows, micro_batch_rows, world_size = division
    lengths = {(name, i): (i * 7919) % 13 for name in "abcd" for i in range(40)}
    shape: dict[str, Any] = {"batch_rows": batch_rows, "micro_batch_rows": micro_batch_rows, "world_size": world_size}
    dealt = [
        stream.batch(step, micro_step, rank, **shape, lengths=lengths if by_length else None)
        for micro_step in range(stream.micro_steps(**shape))
        for rank in range(world_size)
    ]
    rows = [stream.pick(step * batch_rows + i) for i in range(batch_rows)]
    flat = [one for part in dealt for one in part]
    assert all(len(part) <= micro_batch_rows for part in dealt)
    assert Counter(flat) == Counter(rows)
    if by_length:
        assert [lengths[one.source, one.index] for one in flat] == sorted(
            (lengths[one.source, one.index] for one in rows), reverse=True
        )
    else:
        assert flat == rows


def test_there_is_no_micro_step_without_rows() -> None:
    stream = Stream({"new": 100}, None, {}, 0.0, 0)
    shape: dict[str, Any] = {"batch_rows": 10, "micro_batch_rows": 3, "world_size": 2}
    assert stream.micro_steps(**shape) == 2
    assert [len(stream.batch(0, m, r, **shape)) for m in range(2) for r in range(2)] == [3, 3, 3, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_permutation_is_one_to_one(size: int) -> None:
    assert sorted(permute(i, size, "key") for i in range(size)) == list(range(size))


@given(st.integers(1, 10**12), st.text(max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_a_permutation_of_any_size_stays_inside_and_tells_indices_apart(size: int, key: str, data: Any) -> None:
    one, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    assert 0 <= permute(one, size, key) < size
    assert (permute(one, size, key) == permute(other, size, key)) == (one == other)


def test_all_orders_of_four_come_equally_often() -> None:
    # 24 orders, 4800 keys: 200 each; the chi-square of 23 degrees is below 49.7 with probability 0.999.
    seen = Counter(tuple(permute(i, 4, f"key {key}") for i in range(4)) for key in range(4800))
    assert sum((seen[one] - 200) ** 2 / 200 for one in itertools.permutations(range(4))) < 49.7


def test_every_index_goes_everywhere_equally_often() -> None:
    # 20 x 20 cells, 1000 keys: 50 each; 361 degrees of freedom, 0.999 quantile 450.
    seen = Counter((i, permute(i, 20, f"key {key}")) for key in range(1000) for i in range(20))
    assert sum((seen[i, j] - 50) ** 2 / 50 for i in range(20) for j in range(20)) < 450


def test_describe_counts_rows_and_passes() -> None:
    stream = Stream({"big": 90, "small": 10}, {"big": 1, "small": 1}, {"old": 5}, 0.2, 0)
    found = stream.describe(stream.rows_per_epoch)
    assert found["rows"] == {"big": 50, "small": 50, "replay:old": 25}
    assert found["passes"] == {"big": 50 / 90, "small": 5.0, "replay:old": 5.0}
    assert found["share_done"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "new, weights, replay, share, message",
    [
        ({}, None, {}, 0.0, "found new rows {}"),
        ({"a": 0}, None, {}, 0.0, "expected one or more of every source"),
        ({"a": 1}, None, {"old": 1}, 1.0, "found the replay share 1.0"),
        ({"a": 1}, None, {"old": 1}, -0.1, "found the replay share -0.1"),
        ({"a": 1}, None, {"old": 1}, math.nan, "found the replay share nan"),
        ({"a": 1}, None, {}, 0.2, "found no row to replay"),
        ({"a": 1}, None, {"old": 0}, 0.2, "found no row to replay"),
        ({"a": 1}, {"b": 1.0}, {}, 0.0, "found weights for ['b'], expected them for ['a']"),
        ({"a": 1, "b": 1}, {"a": 1.0, "b": 0.0}, {}, 0.0, "found the weight 0.0 for 'b'"),
        ({"a": 1}, {"a": math.inf}, {}, 0.0, "found the weight inf"),
    ],
)
def test_what_makes_no_stream_is_refused(new: Any, weights: Any, replay: Any, share: float, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Stream(new, weights, replay, share, 0)
    assert message in str(caught.value)
