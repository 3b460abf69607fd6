"""Preference stages: losses by hand, the stage on a tiny model, what is logged, what holds it back."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.errors import DataError
from evertune.hashing import canonical_json, digest_file, digest_json
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.train import dpo
from evertune.train.dpo import run_dpo
from evertune.train.head import split_model, target_log_probabilities
from evertune.train.losses import preference_losses
from evertune.train.optimizer import Masters
from evertune.train.reference import LiveReference
from evertune.train.spec import DpoSpec, RowsRef
from evertune.workspace import Workspace
from tests.train.stage import anchor, make_spec, open_workspace
from tests.train.test_resume import Interruption, interrupt_at

ONE = torch.ones(1)


def _loss(chosen: float, rejected: float, *, tokens: tuple[float, float] = (1, 1), **settings: Any) -> float:
    return float(
        preference_losses(
            torch.tensor([chosen]),
            torch.tensor([rejected]),
            chosen_tokens_P=tokens[0] * ONE,
            rejected_tokens_P=tokens[1] * ONE,
            **{"loss": "sigmoid", "beta": 0.5, **settings},
        )
    )


def test_the_loss_of_an_untouched_pair_is_ln_2() -> None:
    assert _loss(0.0, 0.0) == pytest.approx(math.log(2))
    assert _loss(0.0, 0.0, loss="sigmoid_norm") == pytest.approx(math.log(2))


def test_the_sigmoid_loss_by_hand() -> None:
    # Margin 2 - (-1) = 3, beta 0.5: -log sigmoid(1.5) = log(1 + e^-1.5).
    assert _loss(2.0, -1.0) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert _loss(-1.0, 2.0) == pytest.approx(math.log(1 + math.exp(1.5)))


def test_label_smoothing_mixes_in_the_pair_turned_round() -> None:
    right, wrong = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert _loss(2.0, -1.0, label_smoothing=0.1) == pytest.approx(0.9 * right + 0.1 * wrong)


def test_smoothing_stops_pushing_where_the_margin_says_what_the_labels_are_worth() -> None:
    # The minimum lies at sigmoid(beta * margin) = 1 - e: at log(9) / 0.5 for e = 0.1.
    best = math.log(9) / 0.5
    values = [_loss(best + step, 0.0, label_smoothing=0.1) for step in (-0.5, 0.0, 0.5)]
    assert values[1] < min(values[0], values[2])


def test_the_normalised_loss_counts_per_token() -> None:
    # 8 nats over 4 tokens against 6 over 2: 2 - 3 = -1.
    assert _loss(8.0, 6.0, tokens=(4, 2), loss="sigmoid_norm") == pytest.approx(math.log(1 + math.exp(0.5)))


def test_ipo_by_hand() -> None:
    # (2 - 3 - 1 / (2 * 0.25))^2 = 9; nothing to gain at a margin of 2.
    assert _loss(8.0, 6.0, tokens=(4, 2), loss="ipo", beta=0.25) == pytest.approx(9.0)
    assert _loss(8.0, 0.0, tokens=(4, 2), loss="ipo", beta=0.25) == pytest.approx(0.0)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_target_log_probabilities_are_those_of_the_plain_formula_with_its_gradients(
    trained: bool, chunk: int, tiny_model: Path
) -> None:
    opened = open_model(describe(tiny_model), dtype="float32")
    opened.model.requires_grad_(trained)
    _, head = split_model(opened.model)
    torch.manual_seed(0)
    hidden = torch.randn(7, 32, requires_grad=True)
    targets, weights = torch.randint(0, 261, (7,)), torch.randn(7)
    inputs = [hidden, *([head.weight_VH] if trained else [])]

    def gradients(values: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((values * weights).square().sum(), inputs))

    plain = (hidden @ head.weight_VH.T).log_softmax(dim=-1)[torch.arange(7), targets]
    ours = target_log_probabilities(hidden, targets, head=head, chunk_positions=chunk)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(gradients(ours), gradients(plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def write_pairs(path: Path, count: int, *, seed: int = 0) -> RowsRef:
    """Pairs that differ in how they answer: one way is always preferred."""
    lines = []
    for i in range(count):
        ask = f"{'please ' * ((i + seed) % 3)}{i} plus {seed}?"
        lines.append(json.dumps({"prompt": ask, "chosen": f"It is {i + seed}.", "rejected": f"No idea{'!' * (i % 4)}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return RowsRef(source=path.stem, path=str(path), format="preference", limit=None, digest=digest_file(path))


def make_dpo(folder: Path, model: Path, **changes: Any) -> DpoSpec:
    """An 8-step preference stage with replay."""
    own: dict[str, Any] = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "nll": 0.2, "replay_weight": 1.0,
           "replay_ratio": None}  # fmt: skip
    own = {name: changes.pop(name, value) for name, value in own.items()}
    sft = make_spec(folder, model, **{"new": [write_pairs(folder / "pairs.jsonl", 18)], "label": "r/2-dpo", **changes})
    spec = DpoSpec(**{**vars(sft), **own, "reference": sft.start})
    return replace(spec, key=digest_json(spec.to_json()))


def test_the_reference_is_asked_of_the_pairs_that_the_stage_sees(tmp_path: Path, tiny_model: Path) -> None:
    spec, workspace = make_dpo(tmp_path, tiny_model, steps=2, share=0.0), open_workspace(tmp_path / "run")
    run_dpo(spec, workspace)
    (index,) = workspace.cache.rglob("index.json")
    assert len(json.loads(index.read_text())["rows"]) == 2 * 8


def _metrics(workspace: Workspace, spec: DpoSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()]


def test_the_order_survives_json(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_dpo(tmp_path, tiny_model)
    assert DpoSpec.from_json(json.loads(canonical_json(spec.to_json()))) == spec


def test_replayed_rows_can_be_weighed_by_the_norm_of_their_gradient(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Tensor]] = []
    clip = Masters.clip

    def keep(self: Masters, largest_norm: float | None, *, step: int) -> float:
        found.append({name: one.clone() for name, one in self.gradients().items()})
        return clip(self, largest_norm, step=step)

    monkeypatch.setattr(Masters, "clip", keep)
    # No row is new alone or old alone in a micro-batch; the anchor on the replayed rows belongs to their part.
    same = {
        "tune": {"full": {}},
        "steps": 1,
        "share": 0.5,
        "micro_batch_rows": 4,
        "anchor": {"on": "replay", "kl": 0.5},
    }
    weights = ({"replay_weight": 0.0, "anchor": None}, {"replay_weight": 1.0}, {"replay_ratio": 0.2})
    told = []
    for i, one in enumerate(weights):
        spec = make_dpo(tmp_path, tiny_model, **{**same, **one})
        workspace = open_workspace(tmp_path / f"w{i}")
        run_dpo(spec, workspace)
        told.append(_metrics(workspace, spec)[0])
    pairs, both, weighed = found
    replayed = {name: both[name] - pairs[name] for name in both}
    norm, old_norm = (
        math.sqrt(sum(float(one.double().square().sum()) for one in each.values())) for each in (pairs, replayed)
    )
    assert told[2]["replay_weight"] == pytest.approx(0.2 * norm / old_norm, rel=1e-4)
    for name in both:
        wanted = pairs[name] + told[2]["replay_weight"] * replayed[name]
        torch.testing.assert_close(weighed[name], wanted, rtol=1e-3, atol=1e-6)
    assert told[2]["loss"] == pytest.approx(told[1]["loss"], rel=1e-5)
    assert told[2]["replay_loss"] == pytest.approx(told[1]["replay_loss"], rel=1e-5)
    assert "replay_weight" not in told[1]


def test_a_step_of_replayed_rows_alone_has_no_pair_to_tell_of(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_dpo(tmp_path, tiny_model, batch_rows=1, micro_batch_rows=1, share=0.5, steps=4)
    workspace = open_workspace(tmp_path / "w")
    facts = run_dpo(spec, workspace)["checkpoint"]
    metrics = _metrics(workspace, spec)
    assert ["loss" in one for one in metrics] == [one["new_rows"] == 1 for one in metrics]
    assert facts["replay_rows"] > 0
    assert [step for step, _ in facts["losses"]] == [one["step"] for one in metrics if one["new_rows"]]
    assert facts["final"]["loss"] == pytest.approx(sum(loss for _, loss in facts["losses"]) / len(facts["losses"]))
    assert "replay_loss" in facts["final"]


@pytest.mark.parametrize("tune", [{"lora": {"rank": 4, "targets": "all-linear"}}, {"full": {}}])
def test_the_chosen_answers_gain_and_the_record_says_so(tune: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    spec = make_dpo(tmp_path, tiny_model, tune=tune, steps=12, lr=1e-2, anchor={"on": "both"})
    workspace = open_workspace(tmp_path / "w")
    facts = run_dpo(spec, workspace)["checkpoint"]
    metrics = _metrics(workspace, spec)
    # Nothing is learnt yet in the first step: the policy is the reference.
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.05
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["chosen_reward"] > metrics[-1]["rejected_reward"]
    assert metrics[-1]["margin"] == pytest.approx(metrics[-1]["chosen_reward"] - metrics[-1]["rejected_reward"])
    assert facts["stage"] == "dpo"
    assert facts["methods"][0] == "kl_dpo"
    assert {"loss", "accuracy", "margin", "chosen_shift", "rejected_shift", "replay_loss", "kl"} <= facts[
        "final"
    ].keys()
    assert facts["replay"]["share_done"] == pytest.approx(0.25)
    assert facts["interference"].keys() == {"start", "end", "layers"}


def test_how_a_step_is_cut_up_does_not_change_the_result(tmp_path: Path, tiny_model: Path) -> None:
    tune = {"lora": {"rank": 4, "targets": "all-linear"}}
    weights = []
    for rows in (1, 2, 4):
        spec = make_dpo(tmp_path, tiny_model, micro_batch_rows=rows, tune=tune, anchor={"on": "both"}, steps=3)
        workspace = open_workspace(tmp_path / str(rows))
        run_dpo(spec, workspace)
        weights.append(_metrics(workspace, spec))
    # Before the first update policy and reference are one: which of the two answers is ahead is a matter of rounding.
    for one, other in zip(weights[0], weights[2], strict=True):
        for name, value in one.items():
            if name == "accuracy" and one["step"] == 1:
                continue
            assert value == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert weights[1][-1]["margin"] == pytest.approx(weights[0][-1]["margin"], rel=1e-3)


def test_the_reference_runs_once_over_each_conversation_and_not_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    hidden = LiveReference.hidden
    monkeypatch.setattr(
        LiveReference, "hidden", lambda self, rows, **way: calls.append(len(rows)) or hidden(self, rows, **way)
    )
    workspace = open_workspace(tmp_path / "w")
    # Three of four rows of a step are pairs; a step more needs three pairs more, and another rate none.
    for steps, pairs in ((3, 9), (4, 12), (3, 12), (20, 18)):
        run_dpo(make_dpo(tmp_path, tiny_model, steps=steps), workspace)
        assert sum(calls) == 2 * pairs
    run_dpo(make_dpo(tmp_path, tiny_model, steps=20, lr=1e-4), workspace)
    assert sum(calls) == 2 * 18


def test_another_reference_is_compared_with(tmp_path: Path, tiny_model: Path) -> None:
    from tests.tiny import write_tiny_model

    spec = make_dpo(tmp_path, tiny_model, steps=1)
    other = replace(spec, reference=describe(write_tiny_model(tmp_path / "other", seed=5)), key="1" * 64)
    workspace = open_workspace(tmp_path / "w")
    run_dpo(other, workspace)
    assert abs(_metrics(workspace, other)[0]["margin"]) > 1e-3


@pytest.mark.parametrize(
    ("change", "name", "is_higher"),
    [({"nll": 5.0}, "nll", False), ({"replay_weight": 20.0}, "replay_loss", False), ({"beta": 5.0}, "margin", True)],
)
def test_each_weight_moves_what_it_weighs(
    change: dict[str, float], name: str, is_higher: bool, tmp_path: Path, tiny_model: Path
) -> None:
    ends = []
    for settings in ({}, change):
        spec = make_dpo(tmp_path, tiny_model, steps=10, lr=3e-3, tune={"full": {}}, **settings)
        workspace = open_workspace(tmp_path / str(len(ends)))
        ends.append(run_dpo(spec, workspace)["checkpoint"]["final"][name])
    assert (ends[1] > ends[0]) == is_higher


def test_an_anchor_on_replayed_rows_holds_them(tmp_path: Path, tiny_model: Path) -> None:
    drifts = []
    for weight in (0.001, 10.0):
        spec = make_dpo(tmp_path, tiny_model, steps=10, lr=3e-3, tune={"full": {}}, replay_weight=0.0)
        spec = replace(spec, anchor=anchor(spec.start, kl=weight, on="replay"), key=digest_json([weight]))
        workspace = open_workspace(tmp_path / str(weight))
        drifts.append(run_dpo(spec, workspace)["checkpoint"]["final"]["kl"])
    assert drifts[1] < 0.5 * drifts[0]


def test_both_answers_falling_is_a_warning_by_name(tmp_path: Path, tiny_model: Path) -> None:
    last = [{"chosen_shift": -0.05, "rejected_shift": -0.4}] * 3
    lesson = dpo._Preferring(make_dpo(tmp_path, tiny_model))
    [warning] = lesson.warnings(last, last)
    assert warning["name"] == "likelihood_displacement"
    assert "0.050 (chosen) and 0.400 (rejected)" in warning["text"]
    assert not lesson.warnings(last, [{"chosen_shift": -0.005, "rejected_shift": -0.4}])
    assert not lesson.warnings(last, [{"chosen_shift": 0.2, "rejected_shift": -0.4}])


def test_the_warning_is_in_the_record_of_a_stage_that_earns_it(tmp_path: Path, tiny_model: Path) -> None:
    # Two answers that share all but their end, and no likelihood term: what is shared falls with the rejected one.
    lines = [
        json.dumps({"prompt": f"say {i}", "chosen": f"zzzz {i}zzzzzzzzzz a", "rejected": f"zzzz {i}zzzzzzzzzz b b"})
        for i in range(8)
    ]
    path = tmp_path / "alike.jsonl"
    path.write_text("\n".join(lines) + "\n")
    alike = RowsRef(source="alike", path=str(path), format="preference", limit=None, digest=digest_file(path))
    spec = make_dpo(
        tmp_path, tiny_model, new=[alike], nll=0.0, share=0.0, replay=[], steps=30, lr=5e-3, beta=1.0, tune={"full": {}}
    )
    facts = run_dpo(spec, open_workspace(tmp_path / "w"))["checkpoint"]
    assert facts["final"]["rejected_shift"] < facts["final"]["chosen_shift"]
    falls = max(facts["final"]["chosen_shift"], facts["final"]["rejected_shift"]) < -0.01
    assert bool(facts.get("warnings")) == falls


def test_a_pair_of_equal_tokens_and_a_long_pair_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    bad = RowsRef(source="bad", path=str(path), format="preference", limit=None, digest="0" * 64)
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        run_dpo(make_dpo(tmp_path, tiny_model, new=[bad]), open_workspace(tmp_path / "w"))
    with pytest.raises(DataError, match="max_tokens is 20"):
        run_dpo(make_dpo(tmp_path, tiny_model, max_tokens=20), open_workspace(tmp_path / "x"))


@pytest.mark.parametrize(
    ("tune", "steps"), [({"lora": {"rank": 2, "dropout": 0.2}}, range(1, 9)), ({"full": {}}, (4,))]
)
def test_interrupted_in_any_step_it_ends_with_the_same_bits(
    tune: dict[str, Any], steps: Any, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "tune": tune,
        "anchor": {"on": "both", "cache": "hidden"},
        "ema_decay": 0.9,
        "save_steps": 3,
        "replay_ratio": 0.2,
    }
    spec = make_dpo(tmp_path, tiny_model, batch_rows=2, lr=3e-3, **settings)
    whole = open_workspace(tmp_path / "whole")
    run_dpo(spec, whole)
    for step in steps:
        workspace = open_workspace(tmp_path / f"broken-{step}")
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, after_update=step % 2 == 0)
            with pytest.raises(Interruption):
                run_dpo(spec, workspace)
        torch.manual_seed(step)
        run_dpo(spec, workspace)
        trees = [one.manifest(spec.key) for one in (workspace, whole)]
        assert trees[0] is not None and trees[1] is not None
        assert trees[0].tree == trees[1].tree, f"interrupted in step {step}"
