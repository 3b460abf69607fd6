"""What each row format requires, and what is said when it is not there."""

from typing import Any

import pytest

from evertune.data.shapes import fitting_formats, problem_of

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}

GOOD = {
    "messages": [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT], "extra": [1]},
        {"messages": [USER, {**ASSISTANT, "name": "kept and ignored"}]},
        {"messages": [USER, {"role": "tool", "content": "42"}, ASSISTANT, USER, ASSISTANT]},
    ],
    "preference": [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "No."}]},
    ],
    "verifiable": [
        {"prompt": "2+2?", "answer": "4"},
        {"messages": [USER], "answer": {"a": 1}},
        {"messages": [USER], "answer": None},
    ],
    "choice": [
        {"prompt": "p", "choices": ["a", "b"], "answer": 1},
        {"messages": [USER], "choices": ["a", "b"], "answer": "a"},
    ],
    "text": [{"text": "plain", "id": 7}],
}

WRONG: list[tuple[str, Any, str]] = [
    ("messages", {}, "found the fields none, expected 'messages'"),
    ("messages", {"conversations": []}, "found the fields conversations, expected 'messages'"),
    ("messages", {"messages": "Hi"}, "found a text in 'messages', expected a list of turns"),
    ("messages", {"messages": []}, "found no turn in 'messages'"),
    ("messages", {"messages": [USER]}, "found 'user' as the last turn of 'messages', expected assistant"),
    ("messages", {"messages": ["Hi", ASSISTANT]}, "found a text in 'messages[0]', expected an object"),
    ("messages", {"messages": [{"role": "user"}, ASSISTANT]}, "found the fields role in 'messages[0]'"),
    ("messages", {"messages": [USER, {"content": "x"}]}, "in 'messages[1]', expected 'role'"),
    ("messages", {"messages": [{"role": "human", "content": "x"}]}, "found 'human' in 'messages[0].role'"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "found a list in 'messages[0].role'"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "found null in 'messages[0].content'"),
    ("messages", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "found a list in 'messages[0].content'"),
    ("messages", {"messages": [{"role": "user", "content": " \n"}]}, "found nothing in 'messages[0].content'"),
    ("messages", {"messages": [USER, {**ASSISTANT, "content": ""}]}, "found nothing in 'messages[1].content'"),
    (
        "messages",
        {"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]},
        "found a call without a name in 'tool_calls'",
    ),
    ("messages", {"messages": [{**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT]}, "a turn of user"),
    ("text", {"text": ""}, "found nothing in 'text'"),
    ("text", {"text": 3}, "found a number in 'text'"),
    ("text", {"text": ["a"]}, "found a list in 'text'"),
    ("text", {"body": "a"}, "found the fields body, expected 'text'"),
    ("preference", {"prompt": "p", "chosen": "a"}, "expected 'rejected'"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "found the same answer in 'chosen' and 'rejected'"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": 3}, "found a number in 'rejected'"),
    ("preference", {"prompt": "p", "chosen": [USER], "rejected": "b"}, "found 'user' as the last turn of 'chosen'"),
    ("preference", {"prompt": [ASSISTANT], "chosen": "a", "rejected": "b"}, "as the last turn of 'prompt'"),
    ("verifiable", {"prompt": "p"}, "expected 'answer'"),
    ("verifiable", {"answer": "4"}, "expected 'prompt' or 'messages'"),
    ("verifiable", {"messages": [USER, ASSISTANT], "answer": "4"}, "as the last turn of 'messages', expected user or"),
    ("verifiable", {"prompt": {}, "answer": "4"}, "found an object in 'prompt'"),
    ("choice", {"prompt": "p", "choices": ["a"], "answer": 0}, "found 1 choices, expected two or more"),
    ("choice", {"prompt": "p", "choices": "ab", "answer": 0}, "found a text in 'choices'"),
    ("choice", {"prompt": "p", "choices": ["a", ""], "answer": 0}, "found nothing in 'choices[1]'"),
    ("choice", {"prompt": "p", "choices": ["a", "a"], "answer": 0}, "found the same text twice"),
    (
        "choice",
        {"prompt": "p", "choices": ["a", "b"], "answer": 2},
        "found the answer 2, expected an index from 0 to 1",
    ),
    ("choice", {"prompt": "p", "choices": ["a", "b"], "answer": -1}, "found the answer -1"),
    ("choice", {"prompt": "p", "choices": ["a", "b"], "answer": True}, "found true or false in 'answer'"),
    ("choice", {"prompt": "p", "choices": ["a", "b"], "answer": 1.0}, "found a number in 'answer', expected the index"),
    (
        "choice",
        {"prompt": "p", "choices": ["a", "b"], "answer": "c"},
        "found the answer 'c', expected one of the choices",
    ),
]


@pytest.mark.parametrize("format, value", [(name, one) for name, values in GOOD.items() for one in values])
def test_a_row_of_the_format_has_no_problem(format: str, value: dict[str, Any]) -> None:
    assert problem_of(value, format) == ""


@pytest.mark.parametrize("format, value, message", WRONG)
def test_a_problem_says_what_was_found_and_expected(format: str, value: dict[str, Any], message: str) -> None:
    problem = problem_of(value, format)
    assert message in problem
    assert "expected" in problem


def test_a_value_may_fit_another_format() -> None:
    assert fitting_formats({"text": "a"}) == ["text"]
    assert fitting_formats({"messages": [USER, ASSISTANT]}) == ["messages"]
    assert fitting_formats({"words": "a"}) == []
