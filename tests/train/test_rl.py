"""Stages with verifiable rewards: the mathematics by hand, sampling against its distribution, the stage on a tiny
model, and the same bits after any interruption."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.hashing import canonical_json, digest_file, digest_json
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward
from evertune.model.open import open_model
from evertune.train.losses import clipped_surrogate, group_advantages, sampled_kl
from evertune.train.optimizer import Masters
from evertune.train.rl import Multipliers, reward_alarms, run_rl
from evertune.train.rollout import Checked, answer_seed, repeated_share
from evertune.train.sample import draw_tokens, sample_answers
from evertune.train.spec import RlSpec, RowsRef
from evertune.workspace import Workspace
from tests.tiny import write_tiny_model
from tests.train.stage import make_spec, open_workspace
from tests.train.test_resume import Interruption, interrupt_at


def test_advantages_by_hand() -> None:
    # Mean 0.5, unbiased deviation sqrt(4 * 0.25 / 3).
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    plain = group_advantages(rewards, scale=False)
    assert plain.tolist() == [[0.5, -0.5, 0.5, -0.5], [0.0] * 4]
    scaled = group_advantages(rewards, scale=True)
    assert scaled[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert scaled[1].tolist() == [0.0] * 4


def test_an_answer_whose_verifier_failed_is_in_no_mean_and_moves_nothing() -> None:
    nan = float("nan")
    found = group_advantages(torch.tensor([[1.0, 0.0, nan], [nan, nan, nan]]), scale=False)
    assert found.tolist() == [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_the_surrogate_stops_at_its_bounds_on_the_side_of_the_advantage() -> None:
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = clipped_surrogate(ratios, advantages, clip_low=0.2, clip_high=0.28)
    assert loss.tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8])
    (slope,) = torch.autograd.grad(loss.sum(), ratios)
    # Gone where the ratio has left the bounds in the direction of the advantage: the first and the last.
    assert slope.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_the_sampled_kl_is_k3_and_unbiased() -> None:
    assert sampled_kl(torch.tensor([-1.0]), torch.tensor([-2.0])).item() == pytest.approx(math.exp(-1) + 1 - 1)
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 5).log_softmax(dim=-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    values = sampled_kl(policy[drawn], reference[drawn])
    assert values.min() >= 0
    assert values.mean().item() == pytest.approx(exact, abs=5 * values.std().item() / math.sqrt(len(drawn)))


def test_the_sampled_kl_times_the_ratio_has_the_gradient_of_the_divergence() -> None:
    torch.manual_seed(1)
    logits, reference = torch.randn(4, requires_grad=True), torch.randn(4).log_softmax(dim=-1)
    policy = logits.log_softmax(dim=-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    # The mean over samples, taken exactly: each word weighs as much as it is likely.
    ratio = (policy - policy.detach()).exp()
    mean = (policy.detach().exp() * ratio * sampled_kl(policy, reference)).sum()
    (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(found, exact)
    (biased,) = torch.autograd.grad((policy.detach().exp() * sampled_kl(policy, reference)).sum(), logits)
    assert not torch.allclose(biased, exact, atol=1e-2)


def test_words_are_drawn_in_their_proportions() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0, -40.0]])
    drawn = (torch.arange(20_000) + 0.5).double() / 20_000
    counts = Counter(draw_tokens(logits.expand(20_000, -1), drawn).tolist())
    shares = logits[0].double().softmax(dim=0)
    for token, share in enumerate(shares.tolist()):
        assert counts[token] / 20_000 == pytest.approx(share, abs=1e-4)
    ends = draw_tokens(logits.expand(2, -1), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


def test_an_answer_does_not_depend_on_the_company_it_was_in(tiny_model: Path) -> None:
    forward = Forward(open_model(describe(tiny_model), dtype="float32"))
    prompts = [[257, 40, 41], [257, 60], [257, 70, 71, 72, 73, 74]]
    seeds = [[answer_seed(1, 0, i, g) for g in range(3)] for i in range(3)]
    rules: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": frozenset({258})}
    together = sample_answers(forward, prompts, seeds=seeds, **rules)
    alone = [sample_answers(forward, [one], seeds=[ours], **rules)[0] for one, ours in zip(prompts, seeds, strict=True)]
    assert together == alone
    # One prompt at a time; two, whom the third joins when half of their answers have ended.
    for tokens in (1, 2 * 3 * 18):
        assert sample_answers(forward, prompts, seeds=seeds, batch_tokens=tokens, **rules) == together
    assert len({answer.ids for group in together for answer in group}) == 9
    for answer in (one for group in together for one in group):
        assert answer.stopped == (answer.ids[-1] == 258)
        assert 258 not in answer.ids[:-1]
        assert len(answer.ids) == 12 or answer.stopped


def test_answers_follow_the_models_own_distribution(tiny_model: Path) -> None:
    """First tokens against transformers' logits, at a temperature."""
    opened = open_model(describe(tiny_model), dtype="float32")
    prompt = [257, 40, 41, 42]
    logits = opened.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    # Sharpened, so that few words hold most of the mass.
    shares = (logits / 0.05).softmax(dim=-1)
    seeds = [[answer_seed(5, 0, 0, g) for g in range(2000)]]
    said = sample_answers(
        Forward(opened), [prompt], seeds=seeds, max_new_tokens=1, temperature=0.05, stop_ids=frozenset()
    )
    counts = Counter(answer.ids[0] for answer in said[0])
    for token in shares.topk(3).indices.tolist():
        share = shares[token].item()
        assert counts[token] / 2000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 2000))


def test_repetition_is_a_share_of_runs() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    # Seven runs of four in ten equal tokens, one of them new.
    assert repeated_share([1] * 10) == pytest.approx(6 / 7)
    assert repeated_share([1, 2, 3]) == 0.0


def plain_letters(source: str, output: str, answer: Any) -> Checked:
    """A reward that a tiny random model can learn within a few steps: the share of the answer that is ASCII."""
    return Checked(sum(" " <= char <= "~" for char in output) / max(1, len(output)))


def write_questions(path: Path, count: int) -> RowsRef:
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": "a"}) + "\n" for i in range(count)))
    return RowsRef(source=path.stem, path=str(path), format="verifiable", limit=None, digest=digest_file(path))


def make_rl(folder: Path, model: Path, **changes: Any) -> RlSpec:
    """An 8-step stage of 2 or 3 questions a step, with replay."""
    own: dict[str, Any] = {
        "verifiers": {"asked": {"exact": {}}},
        "group": 4,
        "max_new_tokens": 8,
        "max_steps": 6,
        "temperature": 1.0,
        "rollout_steps": 1,
        "iterations": 1,
        "scale": True,
        "average": "tokens",
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl": 0.01,
        "replay_weight": 1.0,
        "replay_ratio": None,
        "protect": {},
        "max_kl": None,
        "min_entropy": None,
        "server": None,
    }
    own = {name: changes.pop(name, value) for name, value in own.items()}
    plain = {"new": [write_questions(folder / "asked.jsonl", 10)], "label": "r/3-rl", "micro_batch_rows": 4}
    sft = make_spec(folder, model, **{**plain, "lr": 3e-3, **changes})
    spec = RlSpec(**{**vars(sft), **own, "kl_to": sft.start})
    return replace(spec, key=digest_json(spec.to_json()))


def _metrics(workspace: Workspace, spec: RlSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()]


def test_the_order_survives_json(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_rl(tmp_path, tiny_model)
    assert RlSpec.from_json(json.loads(canonical_json(spec.to_json()))) == spec


@pytest.mark.parametrize("tune", [{"lora": {"rank": 4, "targets": "all-linear"}}, {"full": {}}])
def test_the_reward_rises_and_the_record_says_so(tune: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    # The head is frozen under an adapter, and a random one says nothing loudly: a low temperature makes it heard.
    heat = 0.05 if "lora" in tune else 1.0
    settings = {"steps": 12, "lr": 2e-2, "group": 8, "kl": 0.001, "replay_weight": 0.05, "temperature": heat}
    spec = make_rl(tmp_path, tiny_model, tune=tune, **settings)
    workspace = open_workspace(tmp_path / "w")
    facts = run_rl(spec, workspace, plain_letters)["checkpoint"]
    metrics = _metrics(workspace, spec)
    rewards = [one["reward"] for one in metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2
    assert metrics[0]["policy_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["policy_kl"] > 0.0
    assert metrics[-1]["entropy"] < metrics[0]["entropy"] < math.log(261)
    assert metrics[-1]["reward/asked"] == metrics[-1]["reward"]
    assert (facts["stage"], facts["methods"][0]) == ("rl", "rlvr")
    assert {"reward", "policy_kl", "entropy", "length", "replay_loss"} <= facts["final"].keys()
    assert facts["replay"]["share_done"] == pytest.approx(0.23, abs=0.03)
    assert facts["tokens"] == sum(one["tokens"] for one in metrics)


@pytest.mark.parametrize(("average", "ratio"), [("answers", "token"), ("constant", "sequence"), ("tokens", "token")])
def test_how_a_step_is_cut_up_does_not_change_the_result(
    average: str, ratio: str, tmp_path: Path, tiny_model: Path
) -> None:
    found = []
    for rows in (3, 100):
        spec = make_rl(
            tmp_path, tiny_model, micro_batch_rows=rows, steps=1, tune={"full": {}}, average=average, ratio=ratio,
            anchor={"on": "both"},
        )  # fmt: skip
        workspace = open_workspace(tmp_path / str(rows))
        run_rl(spec, workspace, plain_letters)
        found.append(_metrics(workspace, spec)[0])
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-3, abs=1e-5), name


def test_a_stronger_hold_keeps_the_policy_nearer(tmp_path: Path, tiny_model: Path) -> None:
    ends = []
    for kl in (0.0001, 50.0):
        spec = make_rl(tmp_path, tiny_model, tune={"full": {}}, steps=12, lr=5e-3, kl=kl, replay_weight=0.0)
        ends.append(run_rl(spec, open_workspace(tmp_path / str(kl)), plain_letters)["checkpoint"]["final"]["policy_kl"])
    assert ends[1] < 0.7 * ends[0]


def test_replayed_rows_are_learnt_in_the_same_steps(tmp_path: Path, tiny_model: Path) -> None:
    ends = []
    for weight in (0.0, 1.0):
        spec = make_rl(tmp_path, tiny_model, tune={"full": {}}, steps=10, replay_weight=weight)
        facts = run_rl(spec, open_workspace(tmp_path / str(weight)), plain_letters)["checkpoint"]
        ends.append(facts["final"]["replay_loss"])
    assert ends[1] < ends[0] - 0.1


@pytest.mark.parametrize(
    ("brake", "words"), [({"max_kl": 1e-5}, "above max_kl 1e-05"), ({"min_entropy": 9.0}, "below min_entropy 9")]
)
def test_a_brake_ends_the_stage_and_is_named(
    brake: dict[str, float], words: str, tmp_path: Path, tiny_model: Path
) -> None:
    facts = run_rl(make_rl(tmp_path, tiny_model, **brake), open_workspace(tmp_path / "w"), plain_letters)["checkpoint"]
    assert facts["steps"] < 8
    assert len(facts["losses"]) == facts["steps"]
    [warning] = [one for one in facts["warnings"] if one["name"] == "stopped_early"]
    assert words in warning["text"]


def test_a_step_of_replayed_rows_alone_has_no_answer_and_no_brake(tmp_path: Path, tiny_model: Path) -> None:
    alone = {"batch_rows": 1, "micro_batch_rows": 1, "share": 0.5, "steps": 4}
    spec = make_rl(tmp_path, tiny_model, **alone, max_kl=100.0, min_entropy=1e-9)
    facts = run_rl(spec, open_workspace(tmp_path / "w"), plain_letters)["checkpoint"]
    assert (facts["steps"], len(facts["losses"])) == (4, 4 - facts["replay_rows"])
    assert facts["replay_rows"] > 0


def test_multipliers_by_hand() -> None:
    multipliers = Multipliers({"cards": {"at_least": 0.9, "rate": 2.0, "most": 3.0}})
    told = [
        multipliers.observe({} if reward is None else {"reward/cards": reward, "reward/sums": 0.0})["multiplier/cards"]
        for reward in (0.4, None, 0.1, 1.0, 1.0)
    ]
    # 1 + 2 (0.9 - 0.4) = 2; stays; 2 + 1.6 is cut to 3; then twice down by 0.2.
    assert told == pytest.approx([2.0, 2.0, 3.0, 2.8, 2.6])
    assert multipliers.of("sums") == 1.0
    for _ in range(20):
        multipliers.observe({"reward/cards": 1.0})
    assert multipliers.of("cards") == 0.0


def test_a_protected_skill_weighs_more_the_farther_it_is_below_its_floor(tmp_path: Path, tiny_model: Path) -> None:
    def run(name: str, rate: float) -> list[dict[str, Any]]:
        # The reward of these letters stays near 0.4, far below the floor.
        protect = {"asked": {"at_least": 1.0, "rate": rate, "most": 4.0}}
        spec = make_rl(
            tmp_path, tiny_model, tune={"full": {}}, steps=3, kl=0.0, lr=1e-6, replay_weight=0.0, protect=protect
        )
        workspace = open_workspace(tmp_path / name)
        facts = run_rl(spec, workspace, plain_letters)["checkpoint"]
        assert "verifier_constraint" in facts["methods"]
        return _metrics(workspace, spec)

    still, pulled = run("still", 1e-6), run("pulled", 10.0)
    assert [one["multiplier/asked"] for one in pulled] == [4.0] * 3
    assert pulled[0]["grad_norm"] == still[0]["grad_norm"]
    assert pulled[1]["grad_norm"] == pytest.approx(4.0 * still[1]["grad_norm"], rel=0.02)


def test_a_verifier_that_fails_rewards_nothing_and_is_counted(tmp_path: Path, tiny_model: Path) -> None:
    def fails_on_odd(source: str, output: str, answer: Any) -> Checked:
        return Checked(0.0, "it broke") if len(output) % 2 else Checked(0.5)

    spec = make_rl(tmp_path, tiny_model, steps=2)
    workspace = open_workspace(tmp_path / "w")
    facts = run_rl(spec, workspace, fails_on_odd)["checkpoint"]
    for one in _metrics(workspace, spec):
        assert one["reward"] == 0.5, "a failure counted as 0 would lower the mean"
        assert 0.0 < one["verifier_errors"] < 1.0
    assert [one["name"] for one in facts["warnings"]] == ["verifier_errors"]


def test_alarms_compare_the_end_with_the_beginning() -> None:
    fine = {"length": 20.0, "repeats": 0.05, "stopped": 0.9, "verifier_errors": 0.0}

    def names(**changes: float) -> list[str]:
        return [one["name"] for one in reward_alarms([fine], [{**fine, **changes}])]

    assert names() == []
    assert names(length=41.0) == ["answer_length"]
    assert names(length=9.0) == ["answer_length"]
    assert names(repeats=0.4) == ["answer_repetition"]
    assert names(stopped=0.6) == ["answer_end"]
    assert names(verifier_errors=0.01) == ["verifier_errors"]


MODES: dict[str, dict[str, Any]] = {
    "on policy": {},
    "several passes": {"iterations": 2},
    "several steps": {"rollout_steps": 4},
    "both, no scale": {"iterations": 2, "rollout_steps": 2, "scale": False, "average": "constant", "ratio": "sequence"},
    "protected, by norm": {
        "replay_ratio": 0.2,
        "protect": {"asked": {"at_least": 0.9, "rate": 1.0, "most": 2.0}},
        "iterations": 2,
    },
    "full, anchored": {"tune": {"full": {}}, "anchor": {"on": "both", "direction": "reverse"}, "ema_decay": 0.9},
}


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_in_any_step_it_ends_with_the_same_bits(
    mode: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"lora": {"rank": 2, "dropout": 0.2, "targets": "all-linear"}}
    settings = {"tune": tune, "batch_rows": 2, "group": 2, "max_new_tokens": 4, "save_steps": 2, **MODES[mode]}
    spec = make_rl(tmp_path, tiny_model, **settings)
    whole = open_workspace(tmp_path / "whole")
    run_rl(spec, whole, plain_letters)
    assert len(_metrics(whole, spec)) == 8
    for step in range(1, 9):
        workspace = open_workspace(tmp_path / f"broken-{step}")
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, after_update=step % 2 == 0)
            with pytest.raises(Interruption):
                run_rl(spec, workspace, plain_letters)
        torch.manual_seed(step)
        run_rl(spec, workspace, plain_letters)
        trees = [one.manifest(spec.key) for one in (workspace, whole)]
        assert trees[0] is not None and trees[1] is not None
        assert trees[0].tree == trees[1].tree, f"interrupted in step {step}"


def test_a_request_to_stop_is_answered_between_rollouts(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    spec = make_rl(tmp_path, tiny_model, iterations=4)
    update = Masters.update
    calls: list[int] = []

    def stop_in_second(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, rate)

    workspace = open_workspace(tmp_path / "w")
    with monkeypatch.context() as patch:
        patch.setattr(Masters, "update", stop_in_second)
        with pytest.raises(KeyboardInterrupt):
            run_rl(spec, workspace, plain_letters)
    assert [one.name for one in (workspace.work / spec.key).glob("step-*")] == ["step-000004"]
    run_rl(spec, workspace, plain_letters)
    assert len(_metrics(workspace, spec)) == 8


def test_the_reference_may_be_another_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_rl(tmp_path, tiny_model, steps=1)
    other = replace(spec, kl_to=describe(write_tiny_model(tmp_path / "other", seed=5)), key="1" * 64)
    workspace = open_workspace(tmp_path / "w")
    run_rl(other, workspace, plain_letters)
    assert _metrics(workspace, other)[0]["policy_kl"] > 1e-3
