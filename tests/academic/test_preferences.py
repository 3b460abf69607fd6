"""COPR and fast-slow DPO in preference stages of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evertune.academic.preferences import choice, moved
from evertune.train.dpo import run_dpo
from evertune.train.optimizer import Masters
from evertune.train.spec import DpoSpec
from evertune.workspace import Workspace
from tests.academic.stage import plugin_spec
from tests.train.stage import open_workspace
from tests.train.test_dpo import make_dpo


def test_the_choice_of_a_pair_and_how_far_it_moved() -> None:
    # Log-likelihoods 0 and -ln 3: chosen with 3 to 1.
    now = choice(torch.tensor([[0.0, -1.0986123]]))
    torch.testing.assert_close(now.exp(), torch.tensor([[0.75, 0.25]]))
    then = choice(torch.tensor([[0.0, 0.0]]))
    # ln(0.75 / 0.5) = 0.4055, ln(0.25 / 0.5) = -0.6931: mean of the squares.
    assert float(moved(now, then)) == pytest.approx((0.4055**2 + 0.6931**2) / 2, rel=1e-3)


def _lines(workspace: Workspace, spec: DpoSpec) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()]


def test_earlier_choices_are_held_by_a_multiplier(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    rest: dict[str, Any] = {"lr": 1e-2, "share": 0.0, "replay": [], "tune": {"full": {}}, "nll": 0.0}
    first = make_dpo(tmp_path, tiny_model, plugins=[plugin_spec(tmp_path, "copr", memory_rows=8)], **rest)
    run_dpo(first, workspace)
    carried = workspace.path(first.key) / "carried" / "copr.safetensors"
    stored = load_file(carried)
    assert stored["stage"].tolist() == [0] * 8
    assert stored["tokens"].shape == (16,)
    torch.testing.assert_close(stored["then"].exp().sum(1), torch.ones(8))
    ends = []
    for rate in (1e-9, 1000.0):
        options: dict[str, Any] = {"rate": rate, "slack": 0.0, "most": 1000.0, "rows": 8, "memory_rows": 8}
        plug = plugin_spec(tmp_path, "copr", carried=carried, **options)
        # The same questions, with the answers' places changed: what it now learns opposes what it held.
        (tmp_path / "turned").mkdir(exist_ok=True)
        other = make_dpo(tmp_path / "turned", workspace.path(first.key), plugins=[plug], steps=10, beta=1.0, **rest)
        _turn(tmp_path / "turned" / "pairs.jsonl")
        run_dpo(other, workspace)
        lines = _lines(workspace, other)
        assert lines[0]["copr_moved"] < 1e-4  # the policy that stored them
        assert lines[0]["copr_multiplier"] == 1.0
        assert (lines[-1]["copr_multiplier"] > 1.5) == (rate > 1)
        ends.append(lines[-1]["copr_moved"])
        assert (
            load_file(workspace.path(other.key) / "carried" / "copr.safetensors")["stage"].tolist() == [0] * 4 + [1] * 4
        )
    assert ends[1] < 0.7 * ends[0]


def _turn(place: Path) -> None:
    rows = [json.loads(one) for one in place.read_text().splitlines()]
    turned = [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in rows]
    place.write_text("".join(f"{json.dumps(one)}\n" for one in turned))


def test_the_fast_module_is_held_to_the_slow_one(tmp_path: Path, tiny_model: Path) -> None:
    workspace, gaps = open_workspace(tmp_path / "w"), []
    for weight in (0.0, 50.0):
        plug = plugin_spec(tmp_path, "fast_slow", weight=weight, every=100)
        spec = make_dpo(
            tmp_path, tiny_model, plugins=[plug], lr=1e-2, share=0.0, replay=[], tune={"full": {}}, beta=1.0, nll=0.0
        )
        run_dpo(spec, workspace)
        lines = _lines(workspace, spec)
        assert lines[0]["fast_slow_gap"] == 0.0
        gaps.append(lines[-1]["fast_slow_gap"])
    # The slow one stands at the start: what is held is the distance from it.
    assert 0.0 < gaps[1] < 0.7 * gaps[0]


@pytest.mark.parametrize("name", ["copr", "fast_slow"])
def test_interrupted_it_ends_with_the_same_bits(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(tmp_path / "w")
    carried, start = None, tiny_model
    if name == "copr":
        first = make_dpo(tmp_path, tiny_model, plugins=[plugin_spec(tmp_path, "copr")], steps=2, tune={"full": {}})
        run_dpo(first, workspace)
        start = workspace.path(first.key)
        carried = start / "carried" / "copr.safetensors"
    plug = plugin_spec(tmp_path, name, carried=carried, **({"every": 2} if name == "fast_slow" else {}))
    spec = make_dpo(
        tmp_path, start, plugins=[plug], steps=6, save_steps=3, batch_rows=2, micro_batch_rows=2, tune={"full": {}}
    )
    whole, broken = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_dpo(spec, whole)
    update, calls = Masters.update, []

    def break_down(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise InterruptedError
        update(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Masters, "update", break_down)
        with pytest.raises(InterruptedError):
            run_dpo(spec, broken)
    run_dpo(spec, broken)
    manifests = [one.manifest(spec.key) for one in (whole, broken)]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert manifests[0].tree == manifests[1].tree
