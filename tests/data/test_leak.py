"""Leaks: probe items in training rows, exactly and normalised, without crying wolf."""

import time
from pathlib import Path
from typing import Any

import pytest

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
    assert found == [Leak("s", FILE, 2, "p", "i1", "exact")]


@pytest.mark.parametrize(
    "text, how",
    [
        (PROMPT, ["exact"]),
        (f"\n{PROMPT} ", ["exact"]),
        (PROMPT.upper().replace("?", " ?!"), ["normalised"]),
        (PROMPT.replace("Turin", "Genoa"), []),
        (PROMPT.replace("10:30", "10:31"), []),
        (f"Answer briefly. {PROMPT}", []),
    ],
)
def test_whole_turns_are_compared_exactly_and_normalised(text: str, how: list[str]) -> None:
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


def test_rows_times_items_is_not_the_cost() -> None:
    rows = [chat(f"Question {i} about the weather in Turin tomorrow", "Rain.", line=i) for i in range(5000)]
    items = [item(f"Question {i} about the weather in Milan tomorrow", f"i{i}") for i in range(5000)]
    start = time.process_time()
    assert find_leaks(rows, items) == []
    assert time.process_time() - start < 2.0
