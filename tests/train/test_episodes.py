"""Whole episodes as answers: tokens and mask against the whole conversation encoded at once, how episodes end, rewards,
and a stage on a tiny agent that learns from them and ends with the same bits after any interruption."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.agents import Call, render_calls
from evertune.agents.tasks import make_tasks
from evertune.data.encode import EncodedPrompt, encode_prompts
from evertune.data.rows import read_rows
from evertune.errors import CheckpointError
from evertune.hashing import digest_file
from evertune.model.codec import Codec, load_codec
from evertune.train.episodes import Played, play_episodes, turn_seed
from evertune.train.rl import run_rl
from evertune.train.rollout import Checked
from evertune.train.sample import SampledAnswer
from evertune.train.sft import run_sft
from evertune.train.spec import RowsRef
from tests.tiny import write_tiny_model
from tests.train.stage import make_spec, open_workspace
from tests.train.test_resume import Interruption, interrupt_at
from tests.train.test_rl import make_rl

TASK = ("environment", "messages", "state", "goal", "answer")


def write_tasks(path: Path, rows: Sequence[dict[str, Any]]) -> RowsRef:
    values = [{name: row[name] for name in TASK if name in row} for row in rows]
    path.write_text("".join(json.dumps(one) + "\n" for one in values))
    return RowsRef(source=path.stem, path=str(path), format="episode", limit=None, digest=digest_file(path))


def encoded(folder: Path, codec: Codec, rows: Sequence[dict[str, Any]]) -> Sequence[EncodedPrompt]:
    ref = write_tasks(folder / "tasks.jsonl", rows)
    found = read_rows(Path(ref.path), format="episode", source="tasks")
    return encode_prompts(found, codec, max_tokens=1000, too_long="error").rows


def play(codec: Codec, prompts: Sequence[EncodedPrompt], scripts: Sequence[Sequence[str]], **more: Any) -> list[Played]:
    """One episode of each prompt by an agent that says the turns of its script, whatever it reads."""
    left = {prompt.prompt.ids.tobytes(): list(script) for prompt, script in zip(prompts, scripts, strict=True)}

    def answer(asked: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[SampledAnswer]]:
        found = []
        for ids in asked:
            (key,) = [one for one in left if np.array(ids, dtype="<i4").tobytes().startswith(one)]
            text = left[key].pop(0)
            said = [*codec.encode(text), *sorted(codec.stop_ids)[:1]]
            found.append([SampledAnswer(tuple(said), True)])
        return found

    settings = {"max_steps": 4, "max_new_tokens": 8, "context": None, **more}
    seeds = [[i] for i in range(len(prompts))]
    return [one for (one,) in play_episodes(answer, prompts, seeds, codec=codec, **settings)]


@pytest.mark.parametrize("environment", ["calculator", "files", "lookup"])
@pytest.mark.parametrize("template", ["chatml", "generation"])
def test_tokens_and_mask_are_those_of_the_whole_conversation(environment: str, template: str, tmp_path: Path) -> None:
    codec = load_codec(write_tiny_model(tmp_path / "model", template=template))
    rows = make_tasks(environment, 4, seed=1)
    prompts = encoded(tmp_path, codec, rows)
    scripts = [[one["content"] for one in row["trajectory"] if one["role"] == "assistant"] for row in rows]
    for row, prompt, played in zip(rows, prompts, play(codec, prompts, scripts), strict=True):
        whole = codec.encode_chat(row["trajectory"])
        ids = [*prompt.prompt.ids.tolist(), *played.ids]
        counted = [*([False] * len(prompt.prompt.ids)), *played.counted]
        # Behind the last stop token the template may write a line end, which nobody waits for.
        assert ids == whole.ids[: len(ids)]
        assert counted == whole.counted[: len(ids)]
        assert not any(whole.counted[len(ids) :])
        assert played.has_reached_goal and played.episode.messages == row["trajectory"]


def test_how_an_episode_ends(tmp_path: Path, tiny_model: Path) -> None:
    codec = load_codec(tiny_model)
    (row,) = make_tasks("lookup", 1, seed=3)
    (prompt,) = encoded(tmp_path, codec, [row])
    find = render_calls([Call("find", {"name": "nobody"})])
    (mended,) = play(codec, [prompt], [[find, "<tool_call>", "no idea"]])
    assert mended.episode.formed == [False, False, True]
    assert [one["content"] for one in mended.episode.messages if one["role"] == "tool"] == [
        "error: nobody is called 'nobody'",
        "error: the call has not the right form",
    ]
    assert mended.has_answered and mended.is_over
    (acting,) = play(codec, [prompt], [[find] * 4], max_steps=3)
    assert (len(acting.episode.formed), acting.has_answered, acting.has_reached_goal) == (3, False, False)
    context = len(prompt.prompt.ids) + 8 + 20
    (cut,) = play(codec, [prompt], [[find, "late"]], context=context)
    assert (cut.is_over, cut.has_answered) == (True, False)


def test_a_turn_that_is_cut_off_ends_the_episode(tmp_path: Path, tiny_model: Path) -> None:
    codec = load_codec(tiny_model)
    prompts = encoded(tmp_path, codec, make_tasks("lookup", 1, seed=3))

    def cut(asked: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[SampledAnswer]]:
        return [[SampledAnswer((65, 66), False)] for _ in asked]

    ((played,),) = play_episodes(cut, prompts, [[0]], codec=codec, max_steps=4, max_new_tokens=2, context=None)
    assert (played.ids, played.counted) == ([65, 66], [True, True])
    assert played.is_over and not played.has_answered


def test_a_goal_is_part_of_success(tmp_path: Path, tiny_model: Path) -> None:
    codec = load_codec(tiny_model)
    (row,) = [one for one in make_tasks("files", 9, seed=1) if "goal" in one][:1]
    (prompt,) = encoded(tmp_path, codec, [row])
    (idle,) = play(codec, [prompt], [["done"]])
    assert idle.has_answered and not idle.has_reached_goal


def test_each_turn_has_random_numbers_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    codec = load_codec(tiny_model)
    (prompt,) = encoded(tmp_path, codec, make_tasks("lookup", 1, seed=3))
    find, seen = codec.encode(render_calls([Call("find", {"name": "x"})])), []

    def answer(asked: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[SampledAnswer]]:
        seen.extend(one for group in seeds for one in group)
        said = SampledAnswer((*find, *sorted(codec.stop_ids)[:1]), True)
        return [[said for _ in group] for group in seeds]

    play_episodes(answer, [prompt], [[5, 6]], codec=codec, max_steps=3, max_new_tokens=8, context=None)
    assert seen == [5, 6, *(turn_seed(one, turn) for turn in (1, 2) for one in (5, 6))]
    assert len(set(seen)) == 6


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + "{{ messages | length }}")
    codec = load_codec(model)
    (row,) = make_tasks("lookup", 1, seed=3)
    with pytest.raises(CheckpointError, match="can be continued"):
        codec.encode_reply(row["messages"], {"role": "tool", "content": "p1"})


ASK = [{"role": "user", "content": "list"}]
STATE = {"a": "b"}


def _trajectory(answer: str) -> list[dict[str, str]]:
    call = render_calls([Call("list_files", {})])
    turns = [("assistant", call), ("tool", "a"), ("assistant", answer)]
    return [*ASK, *({"role": role, "content": content} for role, content in turns)]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model that calls `list_files` and then says `a`, which is right, about as often as `z`."""
    folder = tmp_path_factory.mktemp("agent")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": _trajectory(one)}) + "\n" for one in ("a", "z")))
    ref = RowsRef(source="rows", path=str(rows), format="messages", limit=None, digest=digest_file(rows))
    pace = {"steps": 120, "lr": 1e-2, "batch_rows": 2, "schedule": "constant", "tune": {"full": {}}}
    spec = make_spec(folder, tiny_model, new=[ref], replay=[], share=0.0, **pace)
    workspace = open_workspace(folder / "w")
    run_sft(spec, workspace)
    return workspace.path(spec.key)


def is_right(source: str, output: str, answer: Any) -> Checked:
    return Checked(float(output == answer))


def tasks(folder: Path) -> RowsRef:
    row = {"environment": "files", "messages": ASK, "state": STATE, "goal": STATE, "answer": "a"}
    (folder / "tasks").mkdir()
    return write_tasks(folder / "tasks" / "asked.jsonl", [row] * 4)


def metrics_of(place: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def test_success_of_whole_episodes_is_learnt(agent: Path, tmp_path: Path) -> None:
    settings = {"new": [tasks(tmp_path)], "steps": 10, "batch_rows": 2, "group": 8, "max_new_tokens": 80, "lr": 2e-3}
    spec = make_rl(tmp_path, agent, tune={"full": {}}, replay=[], share=0.0, kl=0.0, **settings)
    workspace = open_workspace(tmp_path / "w")
    facts = run_rl(spec, workspace, is_right)["checkpoint"]
    metrics = metrics_of(workspace.path(spec.key))
    rewards = [one["reward"] for one in metrics]
    assert 0.2 < np.mean(rewards[:2]) < 0.8
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.15
    assert facts["counted_tokens"] < facts["tokens"]


def test_an_episode_that_may_take_no_second_turn_has_failed(agent: Path, tmp_path: Path) -> None:
    settings = {"new": [tasks(tmp_path)], "steps": 1, "batch_rows": 2, "max_new_tokens": 80, "max_steps": 1}
    spec = make_rl(tmp_path, agent, replay=[], share=0.0, **settings)
    workspace = open_workspace(tmp_path / "w")
    run_rl(spec, workspace, is_right)
    (metrics,) = metrics_of(workspace.path(spec.key))
    assert (metrics["reward"], metrics["stopped"]) == (0.0, 0.0)


def test_interrupted_in_any_step_it_ends_with_the_same_bits(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"new": [tasks(tmp_path)], "steps": 4, "batch_rows": 2, "group": 4, "max_new_tokens": 80, "lr": 2e-3}
    spec = make_rl(tmp_path, agent, iterations=2, save_steps=2, **settings)
    whole = open_workspace(tmp_path / "whole")
    run_rl(spec, whole, is_right)
    assert max(one["length"] for one in metrics_of(whole.path(spec.key)) if "length" in one) > 30
    for step in range(1, 5):
        workspace = open_workspace(tmp_path / f"broken-{step}")
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, after_update=step % 2 == 0)
            with pytest.raises(Interruption):
                run_rl(spec, workspace, is_right)
        torch.manual_seed(step)
        run_rl(spec, workspace, is_right)
        trees = [one.manifest(spec.key) for one in (workspace, whole)]
        assert trees[0] is not None and trees[1] is not None
        assert trees[0].tree == trees[1].tree, f"interrupted in step {step}"
