"""Leaks: probe items in training rows, exactly and normalised, without crying wolf."""

from pathlib import Path
from typing import Any

import pytest

from evertune.data import leak as leak_module
from evertune.data import similar
from evertune.data.leak import Leak, ProbeText, find_leaks
from evertune.data.rows import Row

PROMPT = "A train leaves Turin at 10:30. When does it reach Milan, if it takes 55 minutes?"
FILE = Path("rows.jsonl")


def item(text: str, name: str = "i1", probe: str = "p") -> ProbeText:
    return ProbeText(probe, name, text)


def row(value: dict[str, Any], format: str, line: int = 1) -> Row:
    return Row("s", f"r{line}", line, FILE, value, format)


def chat(*texts: str, line: int = 1) -> Row:
    roles = ("user", "assistant")
    return row(
        {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}, "messages", line
    )


def hows(leaks: list[Leak]) -> list[str]:
    return [leak.how for leak in leaks]


def test_a_leak_names_row_and_item() -> None:
    found = find_leaks([chat("other", "x", line=1), chat(PROMPT, "x", line=2)], [item("unrelated", "i0"), item(PROMPT)])
    assert found == [Leak("s", FILE, 2, "p", "i1", "exact", 1.0, "r2")]


@pytest.mark.parametrize(
    "text, how",
    [
        (PROMPT, ["exact"]),
        (f"\n{PROMPT} ", ["exact"]),
        (PROMPT.upper().replace("?", " ?!"), ["normalised"]),
        (PROMPT.replace("Turin", "Genoa"), ["overlap"]),  # 12 of 16 words stand in shared runs of 8
        (PROMPT.replace("10:30", "10:31"), ["overlap"]),
        (PROMPT.replace("at", "around").replace("if", "given that"), []),  # no run of 8 words is left
        (f"Answer briefly. {PROMPT}", ["near-duplicate"]),  # 14 of 16 shingles of three words
        (f"Please read this twice and answer briefly, without a mark or a sign: {PROMPT}", ["contained"]),
    ],
)
def test_each_kind_of_leak_is_found(text: str, how: list[str]) -> None:
    assert hows(find_leaks([chat(text, "x")], [item(PROMPT)])) == how


ROWS = {
    "a later turn": chat("Hello", "Hi", PROMPT, "11:25"),
    "an answer": chat("Write an exercise.", PROMPT),
    "a text": row({"text": PROMPT}, "text"),
    "a prompt": row({"prompt": PROMPT, "answer": "11:25"}, "verifiable"),
    "a choice": row({"prompt": PROMPT, "choices": ["a", "b"], "answer": 0}, "choice"),
    "a preference": row({"prompt": PROMPT, "chosen": "a", "rejected": "b"}, "preference"),
    "a preference of turns": row(
        {
            "prompt": [{"role": "user", "content": PROMPT}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": "b",
        },
        "preference",
    ),
    "a rejected answer": row({"prompt": "Write an exercise.", "chosen": "a", "rejected": PROMPT}, "preference"),
}


@pytest.mark.parametrize("found", ROWS.values(), ids=ROWS.keys())
def test_an_item_is_found_wherever_a_row_may_hold_it(found: Row) -> None:
    assert hows(find_leaks([found], [item(PROMPT)])) == ["exact"]


def test_a_system_turn_is_no_leak() -> None:
    turns = [("system", PROMPT), ("user", "Hi"), ("assistant", "Hello")]
    held = row({"messages": [{"role": role, "content": text} for role, text in turns]}, "messages")
    assert find_leaks([held], [item(PROMPT)]) == []


def test_a_short_prompt_is_a_leak_only_as_all_that_a_row_asks() -> None:
    short = item("Hello")
    assert hows(find_leaks([chat("hello!", "Hi")], [short])) == ["normalised"]
    assert hows(find_leaks([row({"text": "Hello"}, "text")], [short])) == ["exact"]
    assert find_leaks([chat("Hello", "Hi", "Where is Turin?", "In Italy.")], [short]) == []
    assert find_leaks([chat("Say a greeting.", "Hello")], [short]) == []
    assert find_leaks([chat("Hello there", "Hi")], [short]) == []


def test_prompts_of_nothing_but_marks_are_not_all_the_same() -> None:
    assert find_leaks([chat("!!!", "x")], [item("???")]) == []
    assert hows(find_leaks([chat("???", "x")], [item("???")])) == ["exact"]


def test_items_that_share_a_text_give_one_leak_a_probe() -> None:
    items = [item(PROMPT, "a"), item(PROMPT, "b"), item(PROMPT, "c", probe="q")]
    assert [(leak.probe, leak.item) for leak in find_leaks([chat(PROMPT, PROMPT)], items)] == [("p", "a"), ("q", "c")]


def test_an_exact_leak_in_one_turn_outweighs_a_normalised_one_in_another() -> None:
    assert hows(find_leaks([chat(PROMPT, PROMPT.upper())], [item(PROMPT)])) == ["exact"]
    assert hows(find_leaks([chat(PROMPT.upper(), PROMPT)], [item(PROMPT)])) == ["exact"]


LONG = (
    "The harbour of the old town was closed in the autumn of that year because the pier had begun to lean, and the "
    "boats went to the mill instead. Who decided that the boats should go there, and on which day was it decided?"
)


def test_the_scores_by_hand() -> None:
    # 44 words, the last one changed: 42 shingles each, 41 shared, 43 in all.
    near = find_leaks([chat(LONG.replace("decided?", "settled?"), "x")], [item(LONG)])
    assert [(one.how, one.score) for one in near] == [("near-duplicate", round(41 / 43, 4))]
    # The first 36 of 44 words inside a longer text: 36 / 44 are covered by runs of 8.
    part = "Read this: " + " ".join(LONG.split()[:36]) + " " + " ".join(f"word{i}" for i in range(40))
    held = find_leaks([row({"text": part}, "text")], [item(LONG)])
    assert [(one.how, one.score) for one in held] == [("contained", round(36 / 44, 4))]


def test_what_is_below_the_bound_is_told_and_is_no_leak() -> None:
    part = "Read this: " + " ".join(LONG.split()[:25]) + " " + " ".join(f"word{i}" for i in range(40))
    (found,) = find_leaks([row({"text": part}, "text")], [item(LONG)])
    assert (found.how, found.score, found.is_leak) == ("overlap", round(25 / 44, 4), False)
    less = "Read this: " + " ".join(LONG.split()[:20])
    assert find_leaks([row({"text": less}, "text")], [item(LONG)]) == []


def test_a_short_item_is_contained_only_as_a_whole() -> None:
    short = "Which of these two rivers carries more water in the early spring?"  # 12 words
    inside = "Here is a task for you. " + short + " Answer with the name of the river and with nothing else."
    assert hows(find_leaks([chat(inside, "x")], [item(short)])) == ["contained"]
    assert hows(find_leaks([chat(inside.replace("spring", "autumn"), "x")], [item(short)])) == ["overlap"]


TASK = "Which command is the user giving? User: {} Options: play music, get weather, rate a book. Answer with one."


def test_a_template_of_the_probe_is_no_leak() -> None:
    asked = [f"put {word} {i} on the list of {word} things" for i, word in enumerate("abcdefghijklmnopqrstuvwxyz")]
    items = [item(TASK.format(one), f"i{i}") for i, one in enumerate(asked)]
    rows = [chat(TASK.format(f"will it rain on {day} in the north"), "get weather") for day in ("monday", "friday")]
    assert find_leaks(rows, items) == []
    assert hows(find_leaks([chat(TASK.format(asked[3]).upper(), "play music")], items)) == ["normalised"]


def test_a_template_of_the_rows_is_no_leak() -> None:
    # One item alone shows no template; sixty rows do.
    held = item("In this lesson you will learn how a river carries stones to the sea over a long time. Why?")
    text = "In this lesson you will learn how a river carries stones to the sea over a long time. {} {}"
    rows = [row({"text": text.format(i, f"part {i} of {i * 7} " * 20)}, "text", line=i) for i in range(60)]
    assert find_leaks(rows, [held]) == []
    assert hows(find_leaks(rows[:40], [held])) == ["contained"] * 40


def test_rows_are_searched_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leak_module, "BATCH_ROWS", 3)
    inside = "Please read this twice and answer briefly, without a mark or a sign: " + PROMPT
    rows = [chat(PROMPT if i % 4 == 0 else inside if i % 4 == 1 else f"row {i}", "x", line=i) for i in range(1, 12)]
    found = find_leaks(rows, [item(PROMPT)])
    assert [(one.line, one.how) for one in found] == [
        (1, "contained"), (4, "exact"), (5, "contained"), (8, "exact"), (9, "contained"),
    ]  # fmt: skip
    assert [one.row_id for one in found] == ["r1", "r4", "r5", "r8", "r9"]


def test_rows_times_items_is_not_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs that are compared in full are counted, not seconds.
    looked = []
    whole = similar.jaccard
    monkeypatch.setattr(similar, "jaccard", lambda *given: looked.append(len(given[2])) or whole(*given))
    rows = [chat(f"Question {i} about the weather in Turin tomorrow", "Rain.", line=i) for i in range(5000)]
    items = [
        item(f"Question {i} about the weather in Milan tomorrow and on the day after it", f"i{i}") for i in range(5000)
    ]
    assert find_leaks(rows, items) == []
    assert sum(looked) < 25_000
