"""Replay: the pinned function, what counts as a duplicate, and the sample of past rows."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evertune.data.compared import compared_text, normalise_text
from evertune.data.replay import drop_duplicates, make_replay_stream, reservoir
from evertune.data.rows import Row
from evertune.errors import DataError


def text_row(text: str, name: str = "r") -> Row:
    return Row("s", name, 1, Path("rows.jsonl"), {"text": text}, "text")


def chat_row(*turns: tuple[str, str]) -> Row:
    return Row("s", "r", 1, Path("r"), {"messages": [{"role": role, "content": text} for role, text in turns]})


def test_the_replay_stream_of_the_pinned_example() -> None:
    assert make_replay_stream([0, 1, 2, 3], [100, 101, 102], 0.5, 0) == [
        ("new", 0),
        ("old", 100),
        ("new", 1),
        ("new", 2),
        ("old", 101),
        ("new", 3),
        ("old", 102),
    ]


@given(st.integers(0, 60), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_replay_stream_equals_its_definition(new: int, old: int, ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = [float(torch.rand(1, generator=generator)) < ratio for _ in range(new)]
    expected: list[tuple[str, int]] = []
    for i, is_below in enumerate(draws):
        expected.append(("new", i))
        if is_below:
            expected.append(("old", sum(draws[:i]) % old))
    assert make_replay_stream(range(new), range(old), ratio, seed) == expected


def test_a_ratio_of_three_tenths_is_a_share_of_three_thirteenths() -> None:
    stream = make_replay_stream(range(20_000), range(7))
    # Standard error of the share at 20,000 draws: below 0.003.
    assert sum(kind == "old" for kind, _ in stream) / len(stream) == pytest.approx(0.3 / 1.3, abs=0.01)


def test_the_ratios_at_the_ends() -> None:
    assert make_replay_stream("ab", "xyz", 0.0) == [("new", "a"), ("new", "b")]
    assert make_replay_stream("ab", [], 0.0) == [("new", "a"), ("new", "b")]
    assert make_replay_stream("ab", "x", 1.0) == [("new", "a"), ("old", "x"), ("new", "b"), ("old", "x")]
    assert make_replay_stream([], "x", 0.5) == []


def test_the_replay_stream_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    make_replay_stream(range(10), range(3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf])
def test_a_ratio_outside_zero_to_one_is_refused(ratio: float) -> None:
    with pytest.raises(DataError, match=r"replay_ratio: found .*, expected 0 to 1"):
        make_replay_stream([1], [2], ratio)


def test_replay_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"old_data: found nothing, expected items for a replay_ratio of 0\.3"):
        make_replay_stream([1], [])


SAME = [
    ("Hello, world!", "hello world"),
    ("It's  “fine”", "Its fine"),
    ("It`s", "It´s"),
    ("naïve", "nai\u0308ve"),
    ("Ｆｕｌｌ　ｗｉｄｔｈ？", "full width"),
    ("Straße", "STRASSE"),
    ("soft\u00adhyphen", "softhyphen"),
    ("zero\u200bwidth", "zerowidth"),
    ("a – b", "a - b"),
    ("line\n\tbreak", "line break"),
    ("你好。", "你好"),
    ("¿Qué?", "qué"),
]
DIFFERENT = [
    ("5*3", "5/3"),
    ("5 + 3", "5 - 3"),
    ("x > -5", "x > 5"),
    ("1.5", "15"),
    ("1.5", "1 5"),
    (".5", "5"),
    ("10:30", "10 30"),
    ("x != y", "x = y"),
    ("f(x)", "f[x]"),
    ("50%", "50"),
    ("$5", "5"),
    ("resume", "résumé"),
    ("कि", "की"),
    ("ab", "a b"),
]


@pytest.mark.parametrize("one, other", SAME)
def test_texts_that_read_the_same_are_equal_when_normalised(one: str, other: str) -> None:
    assert normalise_text(one) == normalise_text(other)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_texts_that_mean_different_things_stay_different(one: str, other: str) -> None:
    assert normalise_text(one) != normalise_text(other)


@given(
    st.one_of(st.text(), st.text("aA é\u0300\u0301\u00b4'’`.,:1 5\u200b\u00adßſİıﬁ“-–−－！？．１…Ⅳςͅΐ=", max_size=12))
)
@example("I'\u0300")
@settings(max_examples=300, deadline=None)
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise_text(normalise_text(text)) == normalise_text(text)


def test_a_replay_row_that_is_also_new_is_removed() -> None:
    new = [text_row("The cat sat.")]
    replay = [text_row("the cat  sat", "a"), text_row("The cat stood.", "b")]
    kept, removed = drop_duplicates(replay, new)
    assert ([row.id for row in kept], [row.id for row in removed]) == (["b"], ["a"])


def test_a_replay_row_that_came_already_is_removed() -> None:
    found = drop_duplicates([text_row("a", "1"), text_row("A!", "2")], [])
    assert ([row.id for row in found.kept], [row.id for row in found.removed]) == (["1"], ["2"])


def test_near_duplicates_of_new_and_of_other_replay_rows_are_removed_when_asked() -> None:
    new = [text_row("one two three four five six seven eight nine ten eleven", "n")]
    replay = [
        text_row("One two three four five six seven eight nine ten eleven twelve", "near a new row"),
        text_row("red orange yellow green blue violet white black grey brown pink", "the shorter of two"),
        text_row("red orange yellow green blue violet white black grey brown pink gold", "the longer of two"),
        text_row("something else", "alone"),
    ]
    assert drop_duplicates(replay, new).removed == []
    found = drop_duplicates(replay, new, near=True)
    assert [row.id for row in found.kept] == ["the longer of two", "alone"]
    assert [row.id for row in found.removed] == ["near a new row", "the shorter of two"]


def test_whole_conversations_are_compared() -> None:
    question, answer = ("user", "What is 2 + 2?"), ("assistant", "Four.")
    new = [chat_row(question, answer)]
    others = [
        chat_row(question, ("assistant", "4")),
        chat_row(("system", "Be brief."), question, answer),
        chat_row(question, answer, question, answer),
        text_row("What is 2 + 2? Four."),
    ]
    assert drop_duplicates(others, new).removed == []
    assert drop_duplicates([chat_row(("user", "what is 2 + 2"), ("assistant", "four"))], new).kept == []


def test_roles_are_part_of_what_is_compared() -> None:
    one = chat_row(("user", "a"), ("assistant", "b"))
    other = chat_row(("user", "a"), ("tool", "b"))
    assert compared_text(one) != compared_text(other)


def test_a_text_that_spells_a_conversation_is_not_one() -> None:
    assert compared_text(text_row("user: a assistant: b")) != compared_text(chat_row(("user", "a"), ("assistant", "b")))


@given(st.lists(st.integers()), st.integers(0, 10), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_reservoir_is_a_subsequence_of_the_right_size(rows: list[int], size: int, seed: int) -> None:
    found = reservoir(list(enumerate(rows)), size, seed)
    assert len(found) == min(size, len(rows))
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert found == reservoir(enumerate(rows), size, seed)


def test_every_row_enters_a_reservoir_equally_often() -> None:
    # 4 of 20 rows, 5000 seeds: 1000 each. Sum of squares over 1000 * (1 - 1/5) is near chi-square of 19: 0.999 at 43.8.
    seen: Counter[Any] = Counter(one for seed in range(5000) for one in reservoir(range(20), 4, seed))
    assert sum((seen[i] - 1000) ** 2 / (1000 * 0.8) * (19 / 20) for i in range(20)) < 43.8


def test_the_reservoir_does_not_move_by_accident() -> None:
    assert reservoir(range(100), 5, 0) == [1, 8, 30, 45, 57]
