"""Rollouts by a server, against one that answers with transformers and PEFT over the real protocol."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.errors import TrainingError
from evertune.hashing import digest_json
from evertune.train.rl import run_rl
from evertune.train.spec import RlSpec
from tests.train.rollout_server import SmallServer, serving
from tests.train.stage import open_workspace
from tests.train.test_resume import Interruption, interrupt_at
from tests.train.test_rl import make_rl, plain_letters


def served(folder: Path, model: Path, server: SmallServer, **changes: Any) -> RlSpec:
    where = {"url": server.url, "model": "base", "key_env": None, "seconds": 30.0, "requests": 4}
    tune = {"lora": {"rank": 2, "targets": "all-linear"}}
    small = {"steps": 3, "batch_rows": 2, "group": 2, "max_new_tokens": 4, "tune": tune, "iterations": 1}
    spec = replace(make_rl(folder, model, **{**small, **changes}), server={**where, **changes.pop("server", {})})
    # Ports differ from run to run; the place of a server is no part of a stage's key.
    return replace(spec, key=digest_json({**spec.to_json(), "key": "", "server": "base"}))


def test_the_policy_is_served_as_it_is_in_each_rollout(tmp_path: Path, tiny_model: Path) -> None:
    with serving(tiny_model) as server:
        # Two passes over each rollout need the policy's own log-probabilities; here they tell what was served.
        first = served(tmp_path, tiny_model, server, steps=4, iterations=2, lr=0.05)
        workspace = open_workspace(tmp_path / "w")
        facts = run_rl(first, workspace, plain_letters)["checkpoint"]
        assert facts["steps"] == 4
        loads = [body["lora_name"] for path, body in server.seen if path == "/load_lora_adapter"]
        assert len(loads) == len(set(loads)) == 2
        assert server.loaded == {}
        assert list(workspace.tmp.iterdir()) == []
        asked = [body for path, body in server.seen if path == "/completions"]
        assert {(one["top_p"], one["top_k"], one["temperature"], one["return_token_ids"]) for one in asked} == {
            (1.0, -1, 1.0, True)
        }
        lines = (workspace.path(first.key) / "metrics.jsonl").read_text().splitlines()
        entropies = [json.loads(line)["entropy"] for line in lines]
    # On the first pass the policy is the one that was served: minus its mean log-probability of what the server said.
    size = len(server.told) // 2
    for rollout, said in enumerate((server.told[:size], server.told[size:])):
        logps = torch.tensor([one for answer in said for one in answer["logps"]])
        assert entropies[2 * rollout] == pytest.approx(-logps.mean().item(), rel=1e-4)
    assert entropies[2] != pytest.approx(entropies[0], rel=1e-4), "the second rollout is of a trained policy"


def test_interrupted_it_ends_with_the_same_bits_where_the_server_answers_alike(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_model) as server:
        spec = served(tmp_path, tiny_model, server, save_steps=1)
        whole, broken = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
        run_rl(spec, whole, plain_letters)
        with monkeypatch.context() as patch:
            interrupt_at(2, patch, after_update=False)
            with pytest.raises(Interruption):
                run_rl(spec, broken, plain_letters)
        # A run that was killed may have left its adapter there.
        [name] = [body["lora_name"] for path, body in server.seen if path == "/load_lora_adapter"][:1]
        server.loaded[name] = "left behind"
        run_rl(spec, broken, plain_letters)
        trees = [one.manifest(spec.key) for one in (whole, broken)]
        assert trees[0] is not None and trees[1] is not None
        assert trees[0].tree == trees[1].tree


@pytest.mark.parametrize(
    ("path", "reply", "told"),
    [
        ("/models", (200, '{"data": [{"id": "another"}]}'), "holds 'another', expected 'base'"),
        ("/models", (401, "no key"), "refused /models: 401 no key"),
        ("/load_lora_adapter", (400, "LoRA is off"), "refused /load_lora_adapter: 400 LoRA is off"),
        ("/completions", (500, "out of memory"), "refused /completions: 500 out of memory"),
        ("/completions", (200, '{"choices": [{"text": "yes", "finish_reason": "stop"}]}'), "expected one choice with"),
        (
            "/completions",
            (200, '{"choices": [{"token_ids": [], "finish_reason": "stop"}]}'),
            "answered with the ids []",
        ),
        ("/completions", (200, '{"choices": [{"token_ids": [5], "finish_reason": "abort"}]}'), "the reason 'abort'"),
        ("/completions", (200, "<html>"), "expected one choice with"),
    ],
)
def test_a_server_that_is_not_what_it_should_be_is_named(
    path: str, reply: tuple[int, str], told: str, tmp_path: Path, tiny_model: Path
) -> None:
    with serving(tiny_model) as server:
        server.broken[path] = reply
        with pytest.raises(TrainingError) as caught:
            run_rl(served(tmp_path, tiny_model, server), open_workspace(tmp_path / "w"), plain_letters)
    assert told in str(caught.value)
    assert server.url in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_before_training(tmp_path: Path, tiny_model: Path) -> None:
    with serving(tiny_model) as server:
        spec = served(tmp_path, tiny_model, server)
    with pytest.raises(TrainingError, match="cannot be reached"):
        run_rl(spec, open_workspace(tmp_path / "w"), plain_letters)


def test_a_stop_token_that_the_server_leaves_out_is_put_back(tmp_path: Path, tiny_model: Path) -> None:
    with serving(tiny_model) as server:
        server.broken["/completions"] = (200, json.dumps({"choices": [{"token_ids": [40], "finish_reason": "stop"}]}))
        spec = served(tmp_path, tiny_model, server, steps=1)
        workspace = open_workspace(tmp_path / "w")
        run_rl(spec, workspace, plain_letters)
        line = json.loads((workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()[0])
    assert (line["length"], line["stopped"]) == (2.0, 1.0)


def test_a_key_that_is_not_set_is_an_error_before_training(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_model) as server:
        spec = served(tmp_path, tiny_model, server, steps=1)
        spec = replace(spec, server={**(spec.server or {}), "key_env": "ROLLOUT_KEY"})
        monkeypatch.delenv("ROLLOUT_KEY", raising=False)
        with pytest.raises(TrainingError, match="the environment variable ROLLOUT_KEY is empty"):
            run_rl(spec, open_workspace(tmp_path / "w"), plain_letters)
        monkeypatch.setenv("ROLLOUT_KEY", "secret")
        run_rl(spec, open_workspace(tmp_path / "w"), plain_letters)
        assert {one["Authorization"] for one in server.heads} == {"Bearer secret"}
