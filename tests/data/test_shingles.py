"""Shingles against sets of tuples of words, and what counts as a word."""

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data.compared import normalise_text
from evertune.data.shingles import common_hashes, concatenate, shingle

texts = st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "é", "ß1", "-"]), max_size=9).map(" ".join), max_size=20)


def tuples(text: str, width: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))} if words else set()


@given(texts, st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_equal_hashes_are_equal_runs_of_words(rows: list[str], width: int) -> None:
    found = shingle(rows, width)
    sets = [set(found.hashes[a:b].tolist()) for a, b in zip(found.starts, found.starts[1:], strict=False)]
    assert [len(one) for one in sets] == [len(tuples(row, width)) for row in rows]
    for one, row in zip(sets, rows, strict=True):
        for other, again in zip(sets, rows, strict=True):
            assert len(one & other) == len(tuples(row, width) & tuples(again, width))


@given(texts, st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_a_row_has_the_same_shingles_in_any_company(rows: list[str], cut: int) -> None:
    whole = shingle(rows)
    parts = concatenate([shingle(rows[:cut]), shingle(rows[cut:])])
    assert np.array_equal(whole.starts, parts.starts)
    assert np.array_equal(whole.hashes, parts.hashes)


def test_hashes_are_the_same_in_another_process() -> None:
    code = "from evertune.data.shingles import shingle; print(shingle(['to be or not to be']).hashes.tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(shingle(["to be or not to be"]).hashes.tolist())


def test_more_rows_than_a_chunk_holds() -> None:
    rows = [f"row number {i} says {i % 7}" for i in range(5000)]
    assert shingle(rows).sizes.tolist() == [3] * 5000
    assert len(set(shingle([f"{i}" for i in range(20_000)]).hashes.tolist())) == 20_000


def test_where_no_spaces_are_written_each_character_is_a_word() -> None:
    assert shingle(["东京是日本的首都"]).sizes.tolist() == [6]  # eight characters, six runs of three
    assert shingle(["東京 tower が高い"], 1).sizes.tolist() == [6]


def test_a_template_is_what_most_rows_share() -> None:
    rows = shingle([f"answer with one option {i} {i + 1} {i + 2}" for i in range(10)])
    common = common_hashes(rows, 0.5)
    assert set(common.tolist()) == set(shingle(["answer with one option"]).hashes.tolist())
    assert rows.without(common).sizes.tolist() == [3] * 10
    assert common_hashes(rows, 1.0).tolist() == []


@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_plain_ascii_is_normalised_as_any_text_is(text: str) -> None:
    # One letter beyond ASCII takes the general way.
    assert normalise_text(text + " é") == f"{normalise_text(text)} é".strip()
