"""Interrupted at any step, a stage ends with the same bits as one that nobody interrupted."""

import json
import os
import shutil
import signal
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evertune.train import loop
from evertune.train.loop import Trainer, dropout_seed
from evertune.train.optimizer import Masters
from evertune.train.sft import run_sft
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace
from tests.tiny import write_tiny_model
from tests.train.stage import make_spec, open_workspace

STEPS = 8
EVERYTHING: dict[str, Any] = {"anchor": {"on": "both"}, "ema_decay": 0.9, "batch_rows": 2, "micro_batch_rows": 2}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"tune": {"lora": {"rank": 2, "dropout": 0.2}}},
    "full": {"tune": {"full": {}}, "lr": 1e-3},
}


class Interruption(Exception):
    """What the test throws into a step."""


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that drops attention weights in training, so that full training has masks too."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return folder


def _tree(workspace: Workspace, spec: SftSpec) -> str:
    """Digest of all files of the published object: weights, settings and metrics."""
    manifest = workspace.manifest(spec.key)
    assert manifest is not None
    return manifest.tree


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, *, after_update: bool) -> None:
    """Throw in step number `step` (from 1), before or after the weights have changed."""
    update = Masters.update
    calls: list[int] = []

    def break_down(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == step and not after_update:
            raise Interruption
        update(self, rate)
        if len(calls) == step:
            raise Interruption

    monkeypatch.setattr(Masters, "update", break_down)


def interrupted_as_whole(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *, steps: Iterable[int], **settings: Any
) -> None:
    """Run a stage, and again interrupted in each of the steps: the same files come out."""
    spec = make_spec(folder, model, steps=STEPS, **{**EVERYTHING, **settings})
    whole = open_workspace(folder / "whole")
    run_sft(spec, whole)
    for step in steps:
        workspace = open_workspace(folder / f"broken-{step}")
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, after_update=step % 2 == 0)
            with pytest.raises(Interruption):
                run_sft(spec, workspace)
        torch.manual_seed(step)
        run_sft(spec, workspace)
        assert _tree(workspace, spec) == _tree(whole, spec), f"interrupted in step {step}"


@pytest.mark.parametrize(("kind", "steps"), [("lora", range(1, STEPS + 1)), ("full", (1, 4, 7))])
def test_interrupted_in_any_step_it_ends_with_the_same_bits(tmp_path, dropout_model, monkeypatch, kind, steps):
    interrupted_as_whole(tmp_path, dropout_model, monkeypatch, steps=steps, save_steps=3, **KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["off", "hidden", "top64"])
@pytest.mark.parametrize("save_steps", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_grid_of_interruptions(tmp_path, dropout_model, monkeypatch, kind, save_steps, cache, dtype):
    settings = {**KINDS[kind], "anchor": {"on": "replay", "cache": cache}}
    everything = {name: value for name, value in EVERYTHING.items() if name != "anchor"}
    monkeypatch.setattr(f"{__name__}.EVERYTHING", everything)
    steps = range(1, STEPS + 1)
    interrupted_as_whole(
        tmp_path, dropout_model, monkeypatch, steps=steps, save_steps=save_steps, dtype=dtype, **settings
    )


def _other_masks(seed: int, device: torch.device, *parts: int) -> Any:
    return dropout_seed(device, seed, *parts)


def test_dropout_masks_do_change_the_result(tmp_path, dropout_model):
    """Otherwise the tests above would not show that masks are drawn again as they were."""
    trees = []
    for seed in (1, 2):
        workspace = open_workspace(tmp_path / str(seed))
        spec = make_spec(tmp_path, dropout_model, steps=1, share=0.0, seed=0, **KINDS["full"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "dropout_seed", partial(_other_masks, seed))
            run_sft(spec, workspace)
        trees.append(_tree(workspace, spec))
    assert trees[0] != trees[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_is_answered_after_the_step_with_a_resume_point(
    tmp_path, tiny_model, monkeypatch, number: signal.Signals
):
    spec = make_spec(tmp_path, tiny_model, save_steps=50)
    whole, workspace = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "stopped")
    run_sft(spec, whole)
    real = Trainer.step

    def step(self: Trainer, index: int) -> dict[str, Any]:
        if index == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return real(self, index)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run_sft(spec, workspace)
    assert signal.getsignal(number) is handler
    assert [one.name for one in (workspace.work / spec.key).glob("step-*")] == ["step-000005"]
    assert workspace.manifest(spec.key) is None
    run_sft(spec, workspace)
    assert _tree(workspace, spec) == _tree(whole, spec)


def _stop_after(steps: int, spec: SftSpec, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train some steps and break off; returns the stage's working folder."""
    with monkeypatch.context() as patch:
        interrupt_at(steps + 1, patch, after_update=False)
        with pytest.raises(Interruption):
            run_sft(spec, workspace)
    return workspace.work / spec.key


def test_two_resume_points_are_kept(tmp_path, tiny_model, monkeypatch):
    workspace = open_workspace(tmp_path / "w")
    folder = _stop_after(6, make_spec(tmp_path, tiny_model, save_steps=1), workspace, monkeypatch)
    assert sorted(one.name for one in folder.glob("step-*")) == ["step-000005", "step-000006"]


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[SftSpec, Path, str]:
    """(order, workspace broken off after step 6, tree of the same stage undisturbed)"""
    folder = tmp_path_factory.mktemp("broken")
    spec = make_spec(folder, tiny_model, save_steps=2, batch_rows=2)
    whole, workspace = open_workspace(folder / "whole"), open_workspace(folder / "workspace")
    run_sft(spec, whole)
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(6, spec, workspace, patch)
    return spec, workspace.root, _tree(whole, spec)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_resume_point_is_passed_over_for_the_one_before(tmp_path, broken_off, monkeypatch, damage):
    spec, broken, tree = broken_off
    shutil.copytree(broken, tmp_path / "damaged")
    workspace = open_workspace(tmp_path / "damaged")
    _damage(workspace.work / spec.key / "step-000006", damage)
    steps: list[int] = []
    real = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, index: (steps.append(index), real(self, index))[1])
    run_sft(spec, workspace)
    assert steps == [4, 5, 6, 7]
    assert _tree(workspace, spec) == tree


def _damage(point: Path, how: str) -> None:
    file = point / ("MANIFEST.json" if how == "manifest" else "weights.safetensors")
    file.chmod(0o644)
    if how == "flip":
        tensors = load_file(file)
        name = next(iter(tensors))
        tensors[name].view(-1)[0] += 1
        save_file(tensors, file)
    elif how == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5])


def test_resume_points_are_gone_when_the_stage_is_done_and_metrics_stay(tmp_path, tiny_model):
    workspace = open_workspace(tmp_path / "w")
    spec = make_spec(tmp_path, tiny_model, save_steps=2)
    run_sft(spec, workspace)
    assert [one.name for one in (workspace.work / spec.key).iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_shows_each_step_once_in_its_metrics(tmp_path, tiny_model, monkeypatch):
    workspace = open_workspace(tmp_path / "w")
    spec = make_spec(tmp_path, tiny_model, save_steps=2)
    folder = _stop_after(5, spec, workspace, monkeypatch)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "lo')
    run_sft(spec, workspace)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_how_often_resume_points_are_made_changes_nothing(tmp_path, tiny_model):
    trees = set()
    for save_steps in (1, 50):
        workspace = open_workspace(tmp_path / str(save_steps))
        spec = make_spec(tmp_path, tiny_model, save_steps=save_steps)
        run_sft(spec, workspace)
        trees.add(_tree(workspace, spec))
    assert len(trees) == 1


def test_checkpoints_kept_inside_a_stage_are_the_weights_of_their_steps(tmp_path, tiny_model, monkeypatch):
    plain, keeping = (open_workspace(tmp_path / name) for name in ("plain", "keeping"))
    spec = make_spec(tmp_path, tiny_model, save_steps=1)
    kept = replace(spec, keep_steps=3)
    run_sft(spec, plain)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, after_update=True)
        with pytest.raises(Interruption):
            run_sft(kept, keeping)
    run_sft(kept, keeping)  # goes on from step 4: what was kept after step 3 stays as it is
    assert _tree(keeping, kept) == _tree(plain, spec)
    found = {one.record["step"]: one for one in keeping.manifests() if one.kind == "kept"}
    assert {step: (one.record["stage"], one.record["steps"]) for step, one in found.items()} == {
        3: (spec.key, 8),
        6: (spec.key, 8),
    }
    assert [one for one in plain.manifests() if one.kind == "kept"] == []
    stopped = open_workspace(tmp_path / "stopped")
    state = load_file(_stop_after(6, spec, stopped, monkeypatch) / "step-000006" / "weights.safetensors")
    written = load_file(keeping.path(found[6].key) / "adapter_model.safetensors")
    assert len(written) == len(state)
    assert sorted(float(one.double().sum()) for one in written.values()) == pytest.approx(
        sorted(float(one.double().sum()) for one in state.values()), rel=0, abs=0
    )


def test_no_pickle_is_written(tmp_path, tiny_model, monkeypatch):
    workspace = open_workspace(tmp_path / "w")
    spec = make_spec(tmp_path, tiny_model, save_steps=1, ema_decay=0.5)
    folder = _stop_after(3, spec, workspace, monkeypatch)
    kinds = {one.suffix for one in folder.rglob("*") if one.is_file()}
    assert kinds == {".safetensors", ".json", ".jsonl"}
