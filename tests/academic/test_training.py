"""Academic methods in real stages of a tiny model: they hold back what they should, and resume bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evertune.academic.importance import fisher, mas_importance
from evertune.academic.joint import drawn, make_joint
from evertune.academic.projection import Agem, Gem, dot, make_gpm, make_ogd
from evertune.model.checkpoint import describe
from evertune.train.batch import collate, counted_positions
from evertune.train.dpo import run_dpo
from evertune.train.loop import Trainer
from evertune.train.optimizer import Masters
from evertune.train.sft import run_sft
from tests.academic.stage import ALL, bench_of, plugin_spec, spec_with
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits
from tests.train.test_dpo import make_dpo


class Interruption(Exception):
    """What the test throws into a step."""


@pytest.mark.parametrize("name", [name for name, (_, plugin) in ALL.items() if plugin.stages != ("dpo",)])
def test_interrupted_it_ends_with_the_same_bits(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = _start(tmp_path, tiny_model) if name in ("olora", "progressive") else tiny_model
    options = {"progressive": {"lateral": 2}, "psft": {"every": 2}}.get(name)
    spec = spec_with(tmp_path, start, name, options, save_steps=3, batch_rows=2, micro_batch_rows=2, steps=6)
    whole, broken = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    facts = run_sft(spec, whole)["checkpoint"]
    assert ALL[name][1].method in facts["methods"]
    assert facts["standing"] == ("research" if name == "l2sp" else "academic")
    assert facts["plugins"][0]["name"] == name
    update, calls = Masters.update, []

    def break_down(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Interruption
        update(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Masters, "update", break_down)
        with pytest.raises(Interruption):
            run_sft(spec, broken)
    torch.manual_seed(9)
    run_sft(spec, broken)
    manifests = [one.manifest(spec.key) for one in (whole, broken)]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert manifests[0].tree == manifests[1].tree


@pytest.mark.parametrize("name", ["ewc", "online_ewc", "mas", "l2sp", "lwf"])
@pytest.mark.parametrize("tune", [{"lora": {"rank": 4}}, {"full": {}}])
def test_a_stronger_penalty_holds_the_model_nearer_to_its_start(
    name: str, tune: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    workspace = open_workspace(tmp_path / "w")
    drifts, values = [], []
    # At weight 0 it is the plain stage.
    for weight in (0.0, 30.0):
        spec = spec_with(tmp_path, tiny_model, name, {"weight": weight}, tune=tune, lr=1e-2, share=0.0, replay=[])
        found = run_sft(spec, workspace)["checkpoint"]
        drifts.append(found["drift"]["to_start"])
        last = (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()[-1]
        values.append(json.loads(last)[name])
    plain = make_spec(tmp_path, tiny_model, tune=tune, lr=1e-2, share=0.0, replay=[], label="r/plain")
    assert run_sft(plain, workspace)["checkpoint"]["drift"]["to_start"] == pytest.approx(drifts[0], rel=1e-6)
    # What LwF holds is the outputs: its own term, KL to the start, is what must fall.
    assert 0 < values[1] < 0.8 * values[0]
    assert name == "lwf" or drifts[1] < 0.9 * drifts[0]


def test_si_carries_what_it_learnt_to_the_next_stage_and_holds_it(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    first = spec_with(tmp_path, tiny_model, "si", lr=1e-2)
    run_sft(first, workspace)
    carried = workspace.path(first.key) / "carried" / "si.safetensors"
    omega = load_file(carried)
    assert all(bool((one >= 0).all()) for one in omega.values())
    assert sum(float(one.sum()) for one in omega.values()) > 0
    drifts, start = [], describe(workspace.path(first.key))
    for weight in (0.0, 1000.0):
        spec = spec_with(
            tmp_path, start.path, "si", {"weight": weight}, carried=carried, lr=1e-2, share=0.0, replay=[], seed=8
        )
        found = run_sft(spec, workspace)["checkpoint"]
        assert found["plugins"][0]["carried"] == spec.plugins[0].carried_digest
        drifts.append(found["drift"]["to_start"])
        grown = load_file(workspace.path(spec.key) / "carried" / "si.safetensors")
        assert all(bool((grown[one] >= omega[one]).all()) for one in omega)
    assert drifts[1] < 0.9 * drifts[0]


def test_the_fisher_of_a_tiny_model_is_that_of_its_rows_one_by_one(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "ewc", tune={"full": {}}, lr=1e-3))
    rows = [row for each in bench.memory.values() for row in each][:4]
    found = fisher(bench, rows, labels="empirical")
    # The same from transformers' own loss, a row at a time.
    model, expected = bench.policy.model, {}
    for row in rows:
        model.zero_grad()
        batch = collate([row], pad_id=0, device=torch.device("cpu"))
        logits = model(input_ids=batch.ids_BT).logits[batch.predicts_BT]
        torch.nn.functional.cross_entropy(logits.float(), batch.targets_N, reduction="sum").backward()
        for name, one in model.named_parameters():
            if one.grad is not None:
                expected[name] = expected.get(name, 0) + one.grad.square()
    model.zero_grad()
    tokens = sum(counted_positions(row) for row in rows)
    for name, one in expected.items():
        assert torch.allclose(found[name], one / tokens, rtol=1e-3, atol=1e-7), name


def test_the_true_fisher_draws_its_own_labels_the_same_ones_each_time(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "ewc"))
    rows = [row for each in bench.memory.values() for row in each]
    true, again, empirical = (fisher(bench, rows, labels=labels) for labels in ("true", "true", "empirical"))
    assert same_bits(true, again)
    assert not same_bits(true, empirical)
    # The new adapter's B is 0, so nothing depends on A yet.
    assert all(float(one.abs().max()) == 0.0 for name, one in true.items() if name.endswith("lora_A"))
    assert all(float(one.max()) > 0.0 for name, one in true.items() if name.endswith("lora_B"))


def test_mas_importance_is_the_gradient_of_the_logits_norm(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "mas", tune={"full": {}}, lr=1e-3))
    row = next(iter(bench.memory.values()))[0]
    found = mas_importance(bench, [row])
    model = bench.policy.model
    model.zero_grad()
    batch = collate([row], pad_id=0, device=torch.device("cpu"))
    model(input_ids=batch.ids_BT).logits[batch.predicts_BT].square().sum(-1).mean().backward()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(found[name], dict(model.named_parameters())[name].grad.abs(), rtol=1e-3, atol=1e-7)


def test_agem_and_gem_turn_a_gradient_that_opposes_the_memory(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "gem", {"rows": 100, "margin": 0.0}))
    rows = [row for each in bench.memory.values() for row in each]
    for make, groups in ((Agem, [rows]), (Gem, list(bench.memory.values()))):
        memories = [bench.gradient(group) for group in groups]
        opposed = {name: -one.clone() for name, one in bench.gradient(rows).items()}
        assert min(dot(opposed, one) for one in memories) < 0
        told = make(bench).change(opposed, 0)
        assert next(iter(told.values())) > 0
        assert all(dot(opposed, one) >= -1e-6 * dot(one, one) for one in memories)
        agreeing = {name: one.clone() for name, one in memories[0].items()}
        if make is Agem:
            before = {name: one.clone() for name, one in agreeing.items()}
            make(bench).change(agreeing, 0)
            assert same_bits(before, agreeing)


def test_gpm_leaves_the_outputs_on_remembered_inputs_nearly_as_they_were(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "gpm", {"energy": 0.999}))
    (rule,) = make_gpm(bench).rules
    row = next(iter(bench.memory.values()))[0]
    name = "model.layers.0.self_attn.q_proj"
    inputs: list[torch.Tensor] = []
    layer = bench.policy.model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].detach()))
    bench.policy.hidden(collate([row], pad_id=0, device=torch.device("cpu")).ids_BT)
    handle.remove()
    gradients = {f"{name}.weight": torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))}
    before = (inputs[0] @ gradients[f"{name}.weight"].T).norm()
    rule.change(gradients, 0)
    after = (inputs[0] @ gradients[f"{name}.weight"].T).norm()
    assert after < 0.05 * before
    assert gradients[f"{name}.weight"].norm() > 0


def test_ogd_keeps_no_part_along_a_remembered_row(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "ogd", {"memory_rows": 3}))
    (rule,) = make_ogd(bench).rules
    gradients = bench.gradient([row for each in bench.memory.values() for row in each])
    size = dot(gradients, gradients) ** 0.5
    assert rule.change(gradients, 0)["ogd_kept"] < 1
    for each in bench.memory.values():
        for row in each:
            assert abs(dot(gradients, bench.gradient([row]))) < 1e-3 * size**2


def test_olora_keeps_the_new_adapter_off_the_rows_of_the_one_below(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    start = _start(tmp_path, tiny_model)
    below = load_file(start / "adapter_model.safetensors")
    overlaps = []
    for weight in (0.0, 5.0):
        spec = spec_with(tmp_path, start, "olora", {"weight": weight}, steps=20, lr=1e-2)
        run_sft(spec, workspace)
        new = published_weights(workspace, spec)
        pairs = [(below[name], new[name]) for name in below if name.endswith("lora_A.weight")]
        overlaps.append(sum(float((one @ other.T).abs().sum()) for one, other in pairs))
    assert overlaps[1] < 0.5 * overlaps[0]


def test_rules_are_applied_after_everything_that_adds_to_the_gradient(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "agem"))
    seen: list[dict[str, torch.Tensor]] = []

    class Zero:
        name = "zero"

        def change(self, gradients: dict[str, torch.Tensor], step: int) -> dict[str, float]:
            seen.append({name: one.clone() for name, one in gradients.items()})
            for one in gradients.values():
                one.zero_()
            return {"zero_seen": 1.0}

        def see(self, weights: Any) -> None:
            pass

        def state(self) -> dict[str, torch.Tensor]:
            return {}

        def load_state(self, state: Any) -> None:
            pass

        def carried(self) -> dict[str, torch.Tensor]:
            return {}

    trainer: Trainer = bench.trainer
    trainer.add_rule(Zero())
    metrics = trainer.step(0)
    assert metrics["grad_norm"] == 0.0
    assert metrics["zero_seen"] == 1.0
    assert any(float(one.abs().max()) > 0 for one in seen[0].values())


def _start(folder: Path, model: Path) -> Path:
    """A model with one trained adapter over it."""
    workspace = open_workspace(folder / "below")
    spec = make_spec(folder, model, label="r/below", steps=4)
    run_sft(spec, workspace)
    return workspace.path(spec.key)


def test_joint_steps_are_of_the_supervised_loss_as_often_as_asked(tmp_path: Path, tiny_model: Path) -> None:
    share = sum(drawn(3, step) < 0.3 for step in range(4000)) / 4000
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "joint", {"rows": 100, "sft": 0.3}))
    rows = [row for each in bench.memory.values() for row in each]
    memory = bench.gradient(rows)
    (rule,) = make_joint(bench).rules
    for step in range(8):
        own = {name: torch.ones_like(one) for name, one in memory.items()}
        told = rule.change(own, step)
        assert told["joint_sft"] == float(drawn(bench.seed, step) < 0.3)
        expected = memory if told["joint_sft"] else {name: torch.ones_like(one) for name, one in memory.items()}
        for name, one in own.items():
            torch.testing.assert_close(one, expected[name])


@pytest.mark.parametrize(
    ("own_loss", "sft", "is_supervised"),
    # The remembered rows' loss is near log 261 = 5.6: half of it is more than half of 5, and less than half of 9.
    [(5.0, 0.5, 1.0), (9.0, 0.5, 0.0), (5.0, 0.3, 0.0), (9.0, 0.8, 1.0)],
)
def test_joint_steps_can_be_of_the_worse_loss(
    own_loss: float, sft: float, is_supervised: float, tmp_path: Path, tiny_model: Path
) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "joint", {"rows": 100, "sft": sft, "how": "worse"}))
    (rule,) = make_joint(bench).rules
    bench.trainer.losses = {"loss": own_loss}
    told = rule.change({}, 0)
    assert told["joint_sft_loss"] == pytest.approx(5.6, abs=0.5)
    assert told["joint_sft"] == is_supervised


def test_joint_training_in_a_preference_stage_learns_both(tmp_path: Path, tiny_model: Path) -> None:
    ends = {}
    for how in ("alternate", "none"):
        plug = [plugin_spec(tmp_path, "joint", how=how, sft=0.6)] if how != "none" else []
        spec = make_dpo(tmp_path, tiny_model, plugins=plug, steps=12, lr=1e-2, share=0.0, tune={"full": {}})
        workspace = open_workspace(tmp_path / how)
        run_dpo(spec, workspace)
        bench = bench_of(tmp_path, spec_with(tmp_path, workspace.path(spec.key), "joint", {"rows": 100}))
        rows = [row for each in bench.memory.values() for row in each]
        ends[how] = bench.loss_and_gradient(rows)[0]
    assert ends["alternate"] < ends["none"] - 0.3
