"""Calls, environments and episodes: forms by hand, and every generated task solved by its own trajectory."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.agents import ENVIRONMENTS, Call, Episode, calls_in, check_task, render_calls, with_calls
from evertune.agents.environments import ToolError
from evertune.agents.tasks import make_tasks, steps_of
from evertune.verifiers import check, validate
from tests.command import evertune

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=5), JSON, max_size=3)), max_size=3))
def test_what_is_written_as_a_call_is_read_as_one(given: list[tuple[str, dict[str, object]]]) -> None:
    calls = [Call(name, arguments) for name, arguments in given]
    if any(
        mark in json.dumps([one.to_json() for one in calls], ensure_ascii=False) for mark in ("<tool_call>", "</tool")
    ):
        return
    assert calls_in(render_calls(calls)) == calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": []}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call> and so it is 4',
        '<tool_call>{"name": "f", "arguments": {}}',
        "<tool_call>f()</tool_call>",
    ],
)
def test_a_broken_form_is_no_call(text: str) -> None:
    assert calls_in(text) is None


def test_calls_beside_the_words_become_words() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"id": "p7"}'}}
    text = with_calls({"role": "assistant", "content": None, "tool_calls": [call]})
    assert text == '<tool_call>{"name": "get", "arguments": {"id": "p7"}}</tool_call>'
    assert with_calls({"content": "I look.", "tool_calls": [call]}) == f"I look.\n{text}"
    assert with_calls({"content": "no call"}) == "no call"
    with pytest.raises(ValueError, match="arguments of 'get' that are no JSON object"):
        with_calls({"tool_calls": [{"function": {"name": "get", "arguments": "p7"}}]})


@pytest.mark.parametrize(
    ("environment", "state", "name", "arguments", "told"),
    [
        ("calculator", {}, "calculate", {"expression": "(2 + 3) * 4 - 7 // 2"}, "17"),
        ("calculator", {}, "calculate", {"expression": "-3 % 5"}, "2"),
        ("files", {"a.txt": "one"}, "read_file", {"path": "a.txt"}, "one"),
        ("files", {"b": "", "a": ""}, "list_files", {}, "a\nb"),
        ("lookup", {"ids": {"Ada": "p1"}, "records": {"p1": {"city": "Oslo"}}}, "find", {"name": "Ada"}, "p1"),
        ("lookup", {"ids": {}, "records": {"p1": {"city": "Oslo"}}}, "get", {"id": "p1", "field": "city"}, "Oslo"),
    ],
)
def test_a_tool_does_what_it_says(environment: str, state: object, name: str, arguments: object, told: str) -> None:
    before = json.dumps(state, sort_keys=True)
    assert ENVIRONMENTS[environment].call(state, name, arguments)[1] == told  # type: ignore[arg-type]
    assert json.dumps(state, sort_keys=True) == before


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "2 ** 9", "1 / 2", "9 * 'a'", "1 // 0", "9" * 40, "(" * 500, "True + 1", "[1]"]
)
def test_the_calculator_calculates_and_nothing_else(expression: str) -> None:
    with pytest.raises(ToolError, match="cannot calculate"):
        ENVIRONMENTS["calculator"].call({}, "calculate", {"expression": expression})


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_generated_task_is_solved_by_its_trajectory(name: str) -> None:
    tasks = make_tasks(name, 25, seed=4)
    assert tasks == make_tasks(name, 25, seed=4)
    asked = frozenset(one["messages"][1]["content"] for one in tasks)
    others = make_tasks(name, 10, seed=5, apart_from=asked)
    assert not asked & {one["messages"][1]["content"] for one in others}
    for one in tasks:
        assert check_task(one) == ""
        episode = Episode(name, list(one["messages"]), one["state"])
        for turn in one["trajectory"][2:]:
            if turn["role"] == "assistant":
                episode.hear(turn["content"])
        assert episode.messages == one["trajectory"]
        assert episode.final == one["answer"]
        assert all(episode.formed)
        assert episode.reached(one.get("goal"))
        if one.get("goal"):
            assert not Episode(name, [], one["state"]).reached(one["goal"])
        steps = steps_of(one["trajectory"])
        assert len(steps) == len(episode.formed)
        for step in steps:
            validate({"tool_call": {}}, step["answer"], place="here")
            assert check({"tool_call": {}}, output=step["answer"], answer=step["answer"]).score == 1.0


def test_an_agent_is_told_what_it_did_wrong_and_may_go_on() -> None:
    episode = Episode("files", [{"role": "user", "content": "?"}], {"a.txt": "one"})
    episode.hear(render_calls([Call("read_file", {"path": "b.txt"})]))
    episode.hear(render_calls([Call("open", {})]))
    episode.hear("<tool_call>oops</tool_call>")
    episode.hear(render_calls([Call("read_file", {"path": "a.txt"}), Call("list_files", {})]))
    episode.hear("one")
    told = [one["content"] for one in episode.messages if one["role"] == "tool"]
    assert told[0] == "error: no file 'b.txt'"
    assert told[1].startswith("error: no tool 'open'")
    assert told[2] == "error: the call has not the right form"
    assert told[3] == "one\na.txt"
    assert episode.formed == [False, False, False, True, True]
    assert episode.final == "one"


def test_calls_are_compared_by_value_and_their_form_is_judged_apart() -> None:
    answer = '<tool_call>{"name": "get", "arguments": {"id": "p7", "field": "city"}}</tool_call>'
    turned = '<tool_call> {"arguments": {"field": "city", "id": "p7"}, "name": "get"} </tool_call>'
    found = check({"tool_call": {}}, output=turned, answer=answer)
    assert (found.score, found.valid) == (1.0, True)
    found = check({"tool_call": {}}, output=answer.replace("p7", "p8"), answer=answer)
    assert (found.score, found.valid) == (0.0, True)
    assert not check({"tool_call": {}}, output="Oslo", answer=answer).valid
    assert not check({"tool_call": {}}, output=answer, answer="Oslo").valid
    assert check({"tool_call": {}}, output=" Oslo\n", answer="Oslo").score == 1.0
    assert check({"tool_call": {}}, output="Turin", answer="Oslo").score == 0.0


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"environment": "shell"}, "found the environment 'shell', expected one of calculator"),
        ({"environment": "files", "state": []}, "found a 'state' that is no object"),
        ({"environment": "files", "state": {"a": 1}}, "expected a text for each path"),
        ({"environment": "lookup", "state": {"ids": {"a": "p1"}, "records": {}}}, "a record for each id"),
        ({"environment": "calculator", "state": {"a": "b"}}, "expected none"),
        ({"environment": "files", "goal": "done"}, "found a 'goal' that is no object"),
    ],
)
def test_what_is_no_task_is_named(task: dict[str, object], told: str) -> None:
    assert told in check_task(task)


def test_the_command_splits_trajectories_into_steps(tmp_path: Path) -> None:
    (task,) = make_tasks("lookup", 1, seed=1)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "r", "messages": task["trajectory"]}) + "\n")
    printed = evertune("data", "steps", tmp_path / "rows.jsonl", tmp_path / "steps.jsonl")
    assert "wrote 3 steps of 1 trajectories" in printed
    rows = [json.loads(one) for one in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [one["id"] for one in rows] == ["r/1", "r/2", "r/3"]
    assert [len(one["messages"]) for one in rows] == [2, 4, 6]
    assert rows[2]["answer"] == task["answer"]
