"""DFT, ASFT and proximal SFT: the papers' slopes, and stages of a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.academic.objectives import Proximal, dft_losses, make_dft, proximal_losses
from evertune.train.loop import gradient_of
from evertune.train.optimizer import Masters
from evertune.train.plugins import plug_in
from evertune.train.sft import run_sft
from tests.academic.stage import bench_of, spec_with
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits


def test_the_slope_of_dft_is_that_of_minus_the_probability() -> None:
    z_V = torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(dft_losses(z_V.log_softmax(1)[:, 2]).sum(), z_V)
    p_V = z_V.detach().softmax(1)
    onehot = torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    # Cross-entropy's slope is p - onehot; DFT's is that times p of the target.
    torch.testing.assert_close(slope, p_V[0, 2] * (p_V - onehot))
    (of_minus_p,) = torch.autograd.grad(-z_V.softmax(1)[:, 2].sum(), z_V)
    torch.testing.assert_close(slope, of_minus_p)


def test_a_token_that_has_risen_beyond_the_clip_teaches_nothing() -> None:
    old_N = torch.tensor([0.5, 0.5, 0.5, 0.5]).log()
    p_N = torch.tensor([0.3, 0.5, 0.63, 0.65])  # ratios 0.6, 1.0, 1.26, 1.3
    logp_N = p_N.log().requires_grad_(True)
    losses_N = proximal_losses(logp_N, old_N, low=0.2, high=0.28)
    torch.testing.assert_close(losses_N.detach(), torch.tensor([-0.6, -1.0, -1.26, -1.28]))
    (slope_N,) = torch.autograd.grad(losses_N.sum(), logp_N)
    # d(-r) / d log p = -r, where it is not clipped: the lower bound never holds a token back.
    torch.testing.assert_close(slope_N, torch.tensor([-0.6, -1.0, -1.26, 0.0]))


def test_a_stage_weighs_new_tokens_by_their_probability_and_replayed_ones_not(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "dft", tune={"full": {}}, lr=1e-3))
    rows = [row for step in range(4) for item in bench.trainer.feed.step_rows(step) for row in item.rows]
    old, new = next(row for row in rows if row.is_replay), next(row for row in rows if not row.is_replay)
    bench.trainer.objective = make_dft(bench).objective  # type: ignore[assignment]
    found = gradient_of(bench.trainer, [old, new])
    # The same by transformers' own logits.
    model, total, count = bench.policy.model, torch.zeros(()), 0
    for row in (old, new):
        ids = torch.tensor(row.ids, dtype=torch.int64)[None]
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logp = logp[torch.from_numpy(row.counted[1:])]
        total = total - (logp if row.is_replay else logp.detach().exp() * logp).sum()
        count += len(logp)
    model.zero_grad()
    (total / count).backward()
    assert len(found) > 10
    for name, one in model.named_parameters():
        torch.testing.assert_close(found[name], one.grad, rtol=1e-4, atol=1e-7)


def test_asft_holds_the_model_nearer_to_its_start_than_dft(tmp_path: Path, tiny_model: Path) -> None:
    workspace, ends = open_workspace(tmp_path / "w"), {}
    for kl in (0.0, 5.0):
        spec = spec_with(tmp_path, tiny_model, "asft", {"kl": kl}, tune={"full": {}}, lr=1e-2, share=0.0, replay=[])
        run_sft(spec, workspace)
        last = (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()[-1]
        ends[kl] = json.loads(last)
    assert 0.0 < ends[5.0]["asft_kl"] < 0.7 * ends[0.0]["asft_kl"]
    assert ends[0.0]["nll"] < ends[5.0]["nll"]
    plain = spec_with(tmp_path, tiny_model, "dft", tune={"full": {}}, lr=1e-2, share=0.0, replay=[], label="r/dft")
    run_sft(plain, workspace)
    dft = json.loads((workspace.path(plain.key) / "metrics.jsonl").read_text().splitlines()[-1])
    assert dft["loss"] == pytest.approx(ends[0.0]["loss"], rel=1e-5)


def test_the_old_policy_is_the_one_of_some_steps_ago(tmp_path: Path, tiny_model: Path) -> None:
    options: dict[str, Any] = {"every": 2, "clip_high": 1e-6}
    spec = spec_with(tmp_path, tiny_model, "psft", options, tune={"full": {}}, lr=1e-2, share=0.0, replay=[])
    bench = bench_of(tmp_path, spec)
    plugged = plug_in(spec, bench.trainer, bench.opened, bench.workspace)
    (rule,) = plugged.rules
    assert isinstance(rule, Proximal)
    shares = []
    for step in range(4):
        held = {name: one.clone() for name, one in rule.state().items()}
        before = {name: one.detach().clone() for name, one in bench.trained.items()}
        told = bench.trainer.step(step)
        shares.append(told["psft_clipped"])
        if step % 2 == 0:
            # Just renewed: every ratio is 1, and the loss is minus 1.
            assert same_bits(held, before)
            assert told["loss"] == pytest.approx(-1.0, abs=1e-5)
        else:
            assert not same_bits(held, before)
    # After a step on the data, some tokens are likelier than they were, and clipped at once by so narrow a bound.
    assert max(shares[0], shares[2]) < 0.6
    assert min(shares[1], shares[3]) > 0.3


def test_other_weights_are_held_for_a_while_only(tmp_path: Path, tiny_model: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        spec = make_spec(tmp_path, tiny_model, tune={"full": {}}, dtype=dtype)
        bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "dft", tune={"full": {}}, dtype=dtype))
        masters: Masters = bench.trainer.masters
        name = "model.layers.0.mlp.up_proj.weight"
        parameter = dict(bench.policy.model.named_parameters())[name]
        before = parameter.detach().clone()
        with masters.holding({each: one * 0.5 for each, one in masters.weights.items()}):
            torch.testing.assert_close(parameter.detach().float(), 0.5 * before.float(), rtol=1e-2, atol=1e-4)
        assert torch.equal(parameter.detach(), before), spec.dtype


def test_a_wrong_stage_for_an_objective_is_no_silent_choice(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    spec = spec_with(tmp_path, tiny_model, "dft", lr=1e-2, steps=2)
    facts = run_sft(spec, workspace)["checkpoint"]
    assert facts["methods"][-1] == "dft"
    assert facts["standing"] == "academic"
    assert facts["plugins"][0]["kind"] == "objective"
    assert all(math.isfinite(float(one.abs().max())) for one in published_weights(workspace, spec).values())
