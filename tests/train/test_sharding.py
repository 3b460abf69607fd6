"""A model in shards: less memory in each process, the same bits after an interruption, and what was asked for or an
error. That it learns what a whole model does is in test_two_processes.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.errors import TrainingError
from evertune.train import sharding, stage
from evertune.train.loop import Trainer
from evertune.train.sft import run_sft
from tests.tiny import write_tiny_model
from tests.train.processes import perform_on, published_curve
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits
from tests.train.test_resume import Interruption, interrupt_at

pytestmark = pytest.mark.usefixtures("gpu_for_each_process")

LORA: dict[str, Any] = {"tune": {"lora": {"rank": 3, "dropout": 0.1}}, "anchor": {"on": "replay", "cache": "hidden"}}
FULL: dict[str, Any] = {"tune": {"full": {}}, "lr": 1e-3, "gradient_checkpointing": True}
KINDS = {"lora": LORA, "full": FULL}


def _break_down_at(step: int) -> None:
    interrupt_at(step, pytest.MonkeyPatch(), after_update=step % 2 == 0)


def _tell_bytes(folder: str) -> None:
    """Let this process write down what it holds when it has trained."""

    def train_and_tell(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        train(trainer, *args, **kwargs)
        state = trainer.masters.state()
        held = [*state["weights"].values(), *state["moments"].values()]
        moments = sum(_local(one).numel() * 4 for one in held)
        told = {"weights": sharding.shard_bytes(trainer.policy.model), "state": moments}
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))

    train = stage.train
    stage.train = train_and_tell  # type: ignore[assignment]


def _local(one: torch.Tensor) -> torch.Tensor:
    return one.to_local() if isinstance(one, torch.distributed.tensor.DTensor) else one


def _shard_nothing() -> None:
    sharding.fully_shard = lambda module, **kwargs: module  # type: ignore[assignment]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_in_shards_goes_on_with_the_same_bits_and_so_does_its_memory(
    kind: str, tmp_path: Path, tiny_model: Path
) -> None:
    spec = make_spec(
        tmp_path, tiny_model, steps=4, save_steps=2, ema_decay=0.9, micro_batch_rows=1, fsdp=True, **KINDS[kind]
    )
    whole, broken = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    told = tmp_path / "told"
    told.mkdir()
    assert "result" in perform_on(2, "sft", spec, whole, tmp_path / "job", before=partial(_tell_bytes, str(told)))
    assert "error" in perform_on(2, "sft", spec, broken, tmp_path / "job", before=partial(_break_down_at, 4))
    (point,) = (broken.work / spec.key).glob("step-000002")
    assert sorted(one.name for one in point.iterdir()) == [
        "MANIFEST.json", "average", "metrics.jsonl", "moments", "weights",
    ]  # fmt: skip
    assert len(list((point / "weights").iterdir())) == 2
    assert "result" in perform_on(2, "sft", spec, broken, tmp_path / "job")
    assert broken.manifest(spec.key).tree == whole.manifest(spec.key).tree  # type: ignore[union-attr]

    held = [json.loads((told / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = open_workspace(tmp_path / "alone")
    at_once = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train", partial(_train_and_count, stage.train, at_once))
        run_sft(replace(spec, fsdp=False), alone)
    for name, bytes_ in at_once.items():
        assert sum(one[name] for one in held) == pytest.approx(bytes_, rel=0.01)
        assert max(one[name] for one in held) < 0.6 * bytes_


def _train_and_count(train: Any, found: dict[str, int], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    train(trainer, *args, **kwargs)
    state = trainer.masters.state()
    found["weights"] = sharding.shard_bytes(trainer.policy.model)
    found["state"] = sum(one.numel() * 4 for group in ("weights", "moments") for one in state[group].values())


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_goes_on_with_shards_or_without(first: bool, tmp_path: Path, tiny_model: Path) -> None:
    settings = {"steps": 6, "save_steps": 2, "tune": {"full": {}}, "lr": 1e-3}
    spec = make_spec(tmp_path, tiny_model, **settings)
    whole, other = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "other")
    run_sft(spec, whole)
    if first:
        answer = perform_on(
            2, "sft", replace(spec, fsdp=True), other, tmp_path / "job", before=partial(_break_down_at, 5)
        )
        assert "error" in answer
        run_sft(spec, other)
    else:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(5, patch, after_update=False)
            with pytest.raises(Interruption):
                run_sft(spec, other)
        assert "result" in perform_on(2, "sft", replace(spec, fsdp=True), other, tmp_path / "job")
    curves = [published_curve(one, spec) for one in (whole, other)]
    for ours, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=2e-5)


def test_bfloat16_shards_compute_what_a_whole_model_does(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "untied", tied=False)
    spec = make_spec(tmp_path, model, steps=3, dtype="bfloat16", micro_batch_rows=4, tune={"full": {}}, lr=1e-3)
    alone, launched = open_workspace(tmp_path / "alone"), open_workspace(tmp_path / "launched")
    run_sft(spec, alone)
    assert "result" in perform_on(2, "sft", replace(spec, fsdp=True), launched, tmp_path / "job")
    for ours, theirs in zip(published_curve(alone, spec), published_curve(launched, spec), strict=True):
        # The last bit of a bfloat16 is worth half a per cent.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=5e-3)
    assert not same_bits(published_weights(launched, spec), {})


def test_one_process_has_nothing_to_shard_over(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(TrainingError, match="launch.fsdp: found one process"):
        run_sft(make_spec(tmp_path, tiny_model, fsdp=True), open_workspace(tmp_path / "run"))


def test_shards_that_are_none_are_an_error_at_the_start(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec(tmp_path, tiny_model, fsdp=True)
    answer = perform_on(2, "sft", spec, open_workspace(tmp_path / "run"), tmp_path / "job", before=_shard_nothing)
    assert answer["error"]["type"] == "TrainingError"
    assert (
        "model.embed_tokens.weight is a whole tensor in each process, expected shards over 2"
        in (answer["error"]["message"])
    )


@pytest.mark.slow
def test_an_accelerate_launch_that_would_make_copies_of_shards_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """The real launcher: on a CPU it takes FSDP2 and gives DDP."""
    spec = make_spec(tmp_path, tiny_model)
    workspace = open_workspace(tmp_path / "run")
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"kind": "sft", "workspace": str(workspace.root), "spec": spec.to_json()}))
    launch = ["accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2"]
    done = subprocess.run([sys.executable, "-m", *launch, "-m", "evertune.worker", str(job)], timeout=300)
    assert done.returncode != 0
    answer = json.loads(job.with_suffix(".result.json").read_text())
    assert "ACCELERATE_USE_FSDP asks for sharded weights" in answer["error"]["message"]
