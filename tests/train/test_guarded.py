"""A stage that ends when a guard has fallen: where it ends, what it says, and the same after an interruption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evertune.hashing import canonical_json, digest_json
from evertune.model.open import OpenModel
from evertune.train.guarded import guard_brake
from evertune.train.rl import run_rl
from evertune.train.sft import run_sft
from evertune.train.spec import GuardStopSpec, SftSpec, TrainingSpec
from evertune.workspace import Workspace
from tests.train.stage import make_spec, open_workspace
from tests.train.test_resume import Interruption, interrupt_at
from tests.train.test_rl import make_rl, plain_letters

GUARDS = {
    "math": {"margin": 0.05, "lower": False, "digest": "d"},
    "prose": {"margin": 0.1, "lower": True, "digest": "d"},
}


def stopping(spec: Any, every: int = 2) -> Any:
    stop = GuardStopSpec(every=every, guards=GUARDS, probes=[])
    spec = replace(spec, guard_stop=stop, key="")
    return replace(spec, key=digest_json(spec.to_json()))


class Falling:
    """Answers for each asking in turn."""

    def __init__(self, *math: float, prose: float = 1.0) -> None:
        self.answers, self.prose, self.asked = list(math), prose, 0

    def __call__(self, opened: OpenModel) -> dict[str, float]:
        assert not opened.model.training
        self.asked += 1
        return {"math": self.answers[self.asked - 1], "prose": self.prose}


def metrics(workspace: Workspace, spec: TrainingSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()]


def test_the_stage_ends_after_the_step_before_which_a_guard_stood_too_low(tmp_path: Path, tiny_model: Path) -> None:
    spec = stopping(make_spec(tmp_path, tiny_model))
    assert SftSpec.from_json(json.loads(canonical_json(spec.to_json()))) == spec
    workspace, ask = open_workspace(tmp_path / "w"), Falling(0.62, 0.58, 0.56, 0.9)
    facts = run_sft(spec, workspace, ask=ask)["checkpoint"]
    # Asked before steps 1, 3 and 5; 0.58 is within 0.05 of the start, 0.56 is not.
    assert (facts["steps"], ask.asked) == (5, 3)
    told = metrics(workspace, spec)
    assert [one.get("guard/math") for one in told] == [0.62, None, 0.58, None, 0.56]
    assert told[-1]["fallen/math"] == pytest.approx(0.06)
    [warning] = [one for one in facts["warnings"] if one["name"] == "stopped_early"]
    assert "guard 'math' has fallen by 0.06 since the stage began (margin 0.05)" in warning["text"]


def test_guards_that_hold_change_nothing(tmp_path: Path, tiny_model: Path) -> None:
    plain = make_spec(tmp_path, tiny_model)
    spec = stopping(plain)
    guarded, free = open_workspace(tmp_path / "guarded"), open_workspace(tmp_path / "free")
    run_sft(spec, guarded, ask=Falling(0.6, 0.6, 0.58, 0.7))
    run_sft(plain, free)
    losses = [[one["loss"] for one in metrics(*each)] for each in ((guarded, spec), (free, plain))]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


@pytest.mark.parametrize("step", range(1, 6))
def test_broken_off_it_ends_in_the_same_place(
    step: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = stopping(make_spec(tmp_path, tiny_model, save_steps=1))
    whole, broken = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_sft(spec, whole, ask=Falling(0.62, 0.58, 0.56))

    def by_step(opened: OpenModel) -> dict[str, float]:
        # What is asked depends on the weights alone: how far they are from the start tells the step.
        done = len(list((broken.root / "work" / spec.key).glob("metrics.jsonl"))) and sum(
            1 for _ in (broken.root / "work" / spec.key / "metrics.jsonl").open()
        )
        return {"math": {0: 0.62, 2: 0.58, 4: 0.56}[done], "prose": 1.0}

    with monkeypatch.context() as patch:
        interrupt_at(step, patch, after_update=False)
        with pytest.raises(Interruption):
            run_sft(spec, broken, ask=by_step)
    run_sft(spec, broken, ask=by_step)
    trees = [one.manifest(spec.key) for one in (whole, broken)]
    assert trees[0] is not None and trees[1] is not None
    assert trees[0].tree == trees[1].tree


def test_rollouts_are_guarded_too(tmp_path: Path, tiny_model: Path) -> None:
    spec = stopping(make_rl(tmp_path, tiny_model, rollout_steps=2), every=3)
    workspace = open_workspace(tmp_path / "w")
    facts = run_rl(spec, workspace, plain_letters, ask=Falling(0.62, 0.5))["checkpoint"]
    assert facts["steps"] == 4


def test_a_loss_falls_when_it_rises() -> None:
    stop = GuardStopSpec(every=1, guards=GUARDS, probes=[])
    assert guard_brake({"guard/prose": 1.2}, stop) is None
    told = guard_brake({"fallen/prose": 0.2, "fallen/math": 0.07}, stop)
    assert told is not None
    assert "'prose' has fallen by 0.2" in told
    assert "'math' has fallen by 0.07" in told
