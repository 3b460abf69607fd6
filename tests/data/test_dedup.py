"""Who stays: independent of order and of the number of workers, and every removed row has a survivor like it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data import dedup
from evertune.data.compared import Part
from evertune.data.dedup import Memory, Resolution, resolve
from evertune.data.fingerprint import fingerprint
from evertune.data.rows import Row

words = st.lists(st.sampled_from(list("abcdef")), min_size=1, max_size=10).map(" ".join)
rows_of_text = st.lists(words, max_size=25)


def row(text: str, **more: Any) -> Row:
    return Row("s", "r", 1, Path("r.jsonl"), {"text": text, **more}, "text")


def chat(question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row("s", "r", 1, Path("r.jsonl"), {"messages": turns})


def settle(texts: list[str], **options: Any) -> Resolution:
    return resolve(fingerprint([row(one) for one in texts]), **options)


def survivors(texts: list[str], **options: Any) -> list[str]:
    return [texts[i] for i in np.flatnonzero(settle(texts, **options).stays)]


def grams(text: str) -> set[tuple[str, ...]]:
    split = text.split()
    return {tuple(split[i : i + 3]) for i in range(max(1, len(split) - 2))}


def similarity(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


@given(rows_of_text, st.randoms(use_true_random=False), st.sampled_from([0.5, 0.8]))
@settings(max_examples=100, deadline=None)
def test_the_same_rows_stay_in_any_order(texts: list[str], rng: random.Random, threshold: float) -> None:
    shuffled = rng.sample(texts, len(texts))
    assert sorted(survivors(texts, threshold=threshold)) == sorted(survivors(shuffled, threshold=threshold))


@given(rows_of_text, st.sampled_from([0.5, 0.8]))
@settings(max_examples=100, deadline=None)
def test_no_two_survivors_are_similar_and_each_removed_row_is_like_its_survivor(
    texts: list[str], threshold: float
) -> None:
    found = settle(texts, threshold=threshold)
    kept = np.flatnonzero(found.stays).tolist()
    assert all(similarity(texts[i], texts[j]) < threshold for i in kept for j in kept if i < j)
    for i in np.flatnonzero(~found.stays).tolist():
        assert found.stays[found.cause[i]]
        assert found.jaccard[i] == pytest.approx(similarity(texts[i], texts[found.cause[i]]))
        assert found.jaccard[i] >= threshold
        assert found.is_exact[i] or texts[i] != texts[found.cause[i]]
        assert not found.is_exact[i] or texts.count(texts[i]) > 1


def test_a_copy_of_a_removed_row_names_the_row_that_stays() -> None:
    # In runs of three words all are the one run "a a a"; of equal sizes the digest of the text decides, here the first.
    found = settle(["a a a", "a " * 10, "a " * 10], threshold=0.5)
    assert found.cause.tolist() == [-1, 0, 0]
    assert found.jaccard.tolist() == [0.0, 1.0, 1.0]
    assert found.is_exact.tolist() == [False, False, True]


@given(rows_of_text, st.sampled_from([0.5, 0.8]))
@settings(max_examples=50, deadline=None)
def test_doing_it_twice_removes_nothing_more(texts: list[str], threshold: float) -> None:
    once = survivors(texts, threshold=threshold)
    assert survivors(once, threshold=threshold) == once


def test_a_chain_loses_its_middle_only() -> None:
    # Ten words each, one step apart: neighbours share 7 of 9 runs, the ends 6 of 10. The longest stays; lengths are
    # equal here but for the first, which comes first.
    first, middle, last = "a b c d e f g h i j x", "a b c d e f g h i j y", "z b c d e f g h i j y"
    assert similarity(first, middle) == 0.8
    assert similarity(middle, last) == 0.8
    assert similarity(first, last) < 0.8
    kept = survivors([middle, last, first], rank=[1, 0, 0])
    assert kept == [last, first]


def test_the_longer_of_two_stays() -> None:
    cut = "one two three four five six seven eight nine ten eleven"
    assert survivors([cut, cut + " twelve"]) == [cut + " twelve"]


def test_a_lower_rank_wins_whatever_is_longer() -> None:
    cut = "one two three four five six seven eight nine ten eleven"
    assert survivors([cut, cut + " twelve"], rank=[0, 1]) == [cut]


def test_equal_texts_in_different_rows_leave_the_same_row() -> None:
    rows = [row("The same.", id=str(i)) for i in range(5)]
    kept = {
        shuffled[j].value["id"]
        for seed in range(5)
        for shuffled in [random.Random(seed).sample(rows, 5)]
        for j in np.flatnonzero(resolve(fingerprint(shuffled)).stays)
    }
    assert len(kept) == 1


def test_a_row_that_came_earlier_is_removed() -> None:
    old = fingerprint([row("a b c d e f g h i j x"), row("quite another text")])
    found = settle(
        ["A b c d e f g h i j, x.", "a b c d e f g h i j y", "something new"],
        earlier=Memory(old, np.zeros(0, np.uint64), 0.8),
    )
    assert found.earlier.tolist() == [0, 0, -1]
    assert found.is_exact.tolist() == [True, False, False]
    assert found.jaccard.tolist() == [1.0, 0.8, 0.0]


def test_a_template_does_not_make_rows_alike() -> None:
    task = (
        "What is this about? Options: cards, cash, cheques, currency, top up, refunds, fees, limits. Answer with one."
    )
    texts = [f"{task} {a} {b} {a}{b}" for a in "pqrstuvw" for b in "pqrstuvw"]
    assert len(survivors(texts)) == 64
    assert len(survivors(texts, template_share=1.0)) < 64  # what happens without it


def test_templates_are_those_of_a_source() -> None:
    task = "Answer this question of the exam with one letter and no word beside it please and "
    task += "remember that it must not be given in lower case nor with any mark after it"
    exam = [f"{task} {i} {i + 1} {i + 2}" for i in range(60)]
    other = [f"free {i} talk {i * 7} on {i * 11}" for i in range(200)]
    sources = [0] * 60 + [1] * 200
    assert len(survivors(exam + other, sources=sources)) == 260
    assert len(survivors(exam + other)) < 260


@pytest.mark.parametrize("part, kept", [("both", 3), ("prompt", 2), ("answer", 2)])
def test_what_is_compared(part: Part, kept: int) -> None:
    rows = [chat("What is 2 + 2?", "4"), chat("What is 2 + 2?", "Four"), chat("And 3 + 1?", "4")]
    assert int(resolve(fingerprint(rows, part=part)).stays.sum()) == kept


def test_the_two_answers_of_a_preference_are_compared() -> None:
    value = {"prompt": "Why?", "chosen": "Because of the rain.", "rejected": "No idea."}
    rows = [Row("s", "r", 1, Path("r"), value | more, "preference") for more in ({}, {"rejected": "Ask someone."})]
    assert resolve(fingerprint(rows)).stays.all()
    assert resolve(fingerprint(rows, part="prompt")).stays.sum() == 1


def test_any_number_of_workers_finds_the_same() -> None:
    rng = random.Random(0)
    rows = [row(" ".join(rng.choices("abcdefgh", k=12))) for _ in range(5000)]
    one, four = (fingerprint(rows, workers=count) for count in (1, 4))
    assert np.array_equal(one.texts, four.texts)
    assert np.array_equal(one.rows, four.rows)
    assert np.array_equal(one.shingles.hashes, four.shingles.hashes)


def test_a_crowd_of_near_copies_is_settled_in_halves_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    base = " ".join(rng.choices("abcdefgh", k=40)).split()
    texts = []
    for _ in range(400):
        copy = list(base)
        for _ in range(rng.randrange(4)):
            copy[rng.randrange(40)] = rng.choice("xyz")
        texts.append(" ".join(copy))
    whole = settle(texts, template_share=1.0)
    monkeypatch.setattr(dedup, "MAX_CANDIDATES", 50)
    monkeypatch.setattr(dedup, "_SMALL", 20)
    halved = settle(texts, template_share=1.0)
    assert np.array_equal(whole.cause, halved.cause)
    assert np.array_equal(whole.jaccard, halved.jaccard)
    assert 1 < whole.stays.sum() < 300
