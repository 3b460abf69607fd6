"""A model's own answers as rows: what it says itself, filtered, and never a guess of what it did not finish."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from evertune.cli import app
from evertune.data.rows import Row, read_rows
from evertune.model.codec import load_codec
from evertune.probe import recordings
from evertune.probe.generate import Answer
from evertune.probe.recordings import record_answers
from evertune.train.sft import run_sft
from tests.tiny import write_tiny_model
from tests.train.stage import make_spec, open_workspace, write_rows


def asked(count: int) -> list[Row]:
    return [
        Row("s", f"r{i}", i, Path("r"), {"prompt": f"Say {i}", "answer": f"{i}"}, "verifiable") for i in range(count)
    ]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny_model(tmp_path / "m"))


def say(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], stopped: Sequence[bool] | None = None) -> None:
    """Let the model say these texts: a random one says nothing that ends."""

    def answers(forward: object, prompts: Sequence[Sequence[int]], **_: object) -> list[Answer]:
        codec = recordings_codec[0]
        ends = stopped or [True] * len(texts)
        return [Answer(tuple(codec.encode(text)), end, True) for text, end in zip(texts, ends, strict=True)]

    recordings_codec: list = []
    whole = recordings.open_model

    def opened(*arguments: object, **named: object) -> object:
        found = whole(*arguments, **named)  # type: ignore[arg-type]
        recordings_codec.append(found.codec)
        return found

    monkeypatch.setattr(recordings, "open_model", opened)
    monkeypatch.setattr(recordings, "generate_answers", answers)


def test_an_answer_becomes_the_last_turn(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["zero", "one"])
    found = record_answers(model, asked(2), max_new_tokens=8)
    assert found.rows[1]["messages"] == [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "one"}]
    assert (found.rows[1]["id"], found.rows[1]["recorded_from"]) == ("recorded-r1", model)


def test_what_did_not_end_or_is_empty_or_wrong_is_dropped(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["0", "1", " ", "7"], [True, False, True, True])
    found = record_answers(model, asked(4), max_new_tokens=8, verifier={"exact": {}})
    assert [one["id"] for one in found.rows] == ["recorded-r0"]
    assert found.dropped == {"not ended within the limit": 1, "empty": 1, "not verified": 1}


def test_the_likeliest_are_kept(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["aaaa", "bbbb", "cccc", "dddd"])
    monkeypatch.setattr(recordings, "score_rows", lambda _, rows: [[-3.0], [-1.0], [-2.0], [-4.0]])
    found = record_answers(model, asked(4), max_new_tokens=8, keep_likely=0.5)
    assert [one["id"] for one in found.rows] == ["recorded-r1", "recorded-r2"]


def test_a_real_model_is_asked_and_its_unfinished_answers_are_told(model: str) -> None:
    found = record_answers(model, asked(3), max_new_tokens=4)
    assert len(found.rows) + sum(found.dropped.values()) == 3
    long = [Row("s", "r", 1, Path("r"), {"prompt": "x" * 600, "answer": ""}, "verifiable")]
    assert record_answers(model, long, max_new_tokens=4).dropped == {"longer than the model's context": 1}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was really trained, until it answers three questions and ends."""
    folder = tmp_path_factory.mktemp("taught")
    start = write_tiny_model(folder / "m")
    rows = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in SAID.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    new = replace(write_rows(folder / "none.jsonl", 1), path=str(folder / "rows.jsonl"), digest="d")
    spec = make_spec(folder, start, new=[new], replay=[], share=0.0, tune={"full": {}}, lr=0.02, steps=60, batch_rows=6)
    workspace = open_workspace(folder / "w")
    run_sft(spec, workspace)
    return workspace.path(spec.key)


SAID = {"Which colour?": "blue", "Which town?": "Rome", "Which tree?": "oak"}


def test_a_trained_model_is_recorded_from_the_command_line_as_transformers_hears_it(
    taught: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [{"id": ask, "prompt": ask, "answer": answer} for ask, answer in SAID.items()]
    prompts[2]["answer"] = "elm"
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in prompts) + '{"prompt": 3}\n')

    def record(name: str, *options: object) -> tuple[list[dict[str, Any]], str]:
        out = tmp_path / f"{name}.jsonl"
        arguments = ["data", "record", source, "--model", taught, "--out", out, *options]
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in out.read_text().splitlines()], result.output

    rows, told = record("all", "--max-new-tokens", 16)
    codec = load_codec(taught)
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.bfloat16)
    for row, ask in zip(rows, SAID, strict=True):
        ids = codec.encode_prompt([{"role": "user", "content": ask}])
        heard = model.generate(
            torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=list(codec.stop_ids)
        )
        assert row["messages"][-1]["content"] == codec.decode(heard[0, len(ids) :].tolist()[:-1]) == SAID[ask]
    assert "3 of 3 prompts answered" in told
    assert "1 rows could not be read" in told
    assert [one.value for one in read_rows(tmp_path / "all.jsonl", format="messages", source="s")] == rows
    verified, told = record("verified", "--max-new-tokens", 16, "--verifier", "exact")
    assert [one["id"] for one in verified] == ["recorded-Which colour?", "recorded-Which town?"]
    assert "1  not verified" in told
    # Half of three is two: those whose tokens transformers finds likeliest, too.
    likely, told = record("likely", "--max-new-tokens", 16, "--keep-likely", 0.5)
    means = {}
    for row in rows:
        ask = codec.encode_prompt(row["messages"][:-1])
        answer = [*codec.encode(row["messages"][-1]["content"]), *codec.stop_ids]
        logits = model(torch.tensor([[*ask, *answer]])).logits[0, len(ask) - 1 : -1].float()
        picked = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        means[row["id"]] = float(picked.mean())
    expected = sorted(means, key=lambda name: -means[name])[:2]
    assert sorted(one["id"] for one in likely) == sorted(expected)
    assert "1  less likely than the others" in told
    _, told = record("short", "--max-new-tokens", 1)
    assert "3  not ended within the limit" in told
