"""Episodes as a probe: a model that is made to say the right things succeeds, and one that is not does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from evertune.agents.tasks import make_tasks
from evertune.data.encode import encode_rows
from evertune.data.rows import read_rows
from evertune.errors import ProbeError
from evertune.model.checkpoint import describe
from evertune.model.codec import load_codec
from evertune.model.open import open_model
from evertune.probe import score
from evertune.probe.generate import Answer
from evertune.probe.score import score_probe
from evertune.probe.suite import load_probe


def _probe(folder: Path, tasks: list[dict[str, Any]], **settings: Any) -> Any:
    (folder / "items.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in tasks))
    values = {"kind": "episode", "path": "items.jsonl", "verifier": {"exact": {}}, "max_new_tokens": 4, **settings}
    return load_probe("agent", settings=values, root=folder)


def test_a_tiny_random_model_does_not_succeed_and_is_scored_all_the_same(tmp_path: Path, tiny_model: Path) -> None:
    probe = _probe(tmp_path, make_tasks("calculator", 3, seed=1), max_steps=2)
    found = score_probe(open_model(describe(tiny_model), dtype="float32"), probe)
    assert found.kind == "episode"
    assert found.value == 0.0
    assert found.valid is not None
    assert len(found.valid) == 3


def test_an_episode_goes_on_until_an_answer_and_counts_where_the_goal_is_reached(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = make_tasks("files", 8, seed=2)
    goals = [one for one in tasks if one.get("goal")]
    assert goals
    probe = _probe(tmp_path, tasks, max_steps=3)
    opened = open_model(describe(tiny_model), dtype="float32")
    codec = opened.codec
    # What the model says is put into its mouth by the prompt it is given; the first task with a goal is not acted on.
    lines: dict[tuple[int, ...], str] = {}
    for one in tasks:
        for i, turn in enumerate(one["trajectory"]):
            if turn["role"] == "assistant":
                lines[tuple(codec.encode_prompt(one["trajectory"][:i]))] = turn["content"]
    lines[tuple(codec.encode_prompt(goals[0]["messages"]))] = "done"
    asked = []

    def say(forward: Any, prompts: Any, **rest: Any) -> list[Answer]:
        asked.append(len(prompts))
        return [Answer(tuple(codec.encode(lines[tuple(prompt)])), True, True) for prompt in prompts]

    monkeypatch.setattr(score, "generate_answers", say)
    found = score_probe(opened, probe)
    assert asked == [8, 7]
    assert [one["id"] for one, value in zip(tasks, found.score, strict=True) if value < 1] == [goals[0]["id"]]
    assert found.valid is not None
    assert all(found.valid)
    # One step is not enough to act and to answer.
    asked.clear()
    short = score_probe(opened, _probe(tmp_path, tasks, max_steps=1))
    assert short.value == 0.0
    assert asked == [8]


def test_the_settings_of_an_episode_are_part_of_its_identity(tmp_path: Path) -> None:
    tasks = make_tasks("lookup", 2, seed=3)
    digests = {_probe(tmp_path, tasks).digest, _probe(tmp_path, tasks, max_steps=5).digest}
    other = [{**one, "state": {"ids": {}, "records": {}}} for one in tasks]
    digests.add(_probe(tmp_path, other).digest)
    assert len(digests) == 3
    with pytest.raises(ProbeError, match=r"items.jsonl:1: found the environment 'shop'"):
        _probe(tmp_path, [{**tasks[0], "environment": "shop"}])


def test_a_trajectory_counts_the_agents_own_tokens_and_no_others(tmp_path: Path, tiny_model: Path) -> None:
    (task,) = make_tasks("lookup", 1, seed=6)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": task["trajectory"]}) + "\n")
    codec = load_codec(tiny_model)
    rows = read_rows(tmp_path / "rows.jsonl", format="messages", source="rows")
    (row,) = encode_rows(rows, codec, max_tokens=4000, too_long="error").rows
    counted = codec.decode([int(i) for i, one in zip(row.ids, row.counted, strict=True) if one])
    assert counted == "".join(one["content"] for one in task["trajectory"] if one["role"] == "assistant")
