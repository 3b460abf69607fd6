"""TRL's GRPO trainer as an oracle: the same answers, advantages and log-probabilities of old policy and reference give
the same loss and the same gradient, in float32."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.train.head import split_model
from evertune.train.loop import count_items
from evertune.train.losses import group_advantages
from evertune.train.objective import Policy
from evertune.train.optimizer import Masters
from evertune.train.rl import PolicyGradient
from evertune.train.rollout import EncodedAnswer
from tests.train.test_rl import make_rl

# (prompt, answer) lengths of two groups of two.
LENGTHS = ((5, 7), (5, 3), (9, 4), (9, 8))
REWARDS = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
LONGEST = 8


def _answers(*, scale: bool) -> list[EncodedAnswer]:
    generator = np.random.default_rng(0)
    advantages = group_advantages(REWARDS, scale=scale).flatten().tolist()
    answers = []
    for i, (prompt, length) in enumerate(LENGTHS):
        ids = generator.integers(0, 250, prompt + length).astype(np.int32)
        row = EncodedRow("asked", str(i), ids, np.arange(len(ids)) >= prompt, is_replay=False, digest=f"{i:064x}")
        # Ratios on both sides of the bounds, and a reference that is another distribution.
        drift, gap = (torch.from_numpy(generator.normal(0, size, length)).float() for size in (0.4, 0.5))
        plain = -np.log(261) * torch.ones(length)
        answers.append(
            EncodedAnswer(
                source="asked", id=str(i), row=row, reward=float(REWARDS.flatten()[i]), advantage=advantages[i],
                is_flat=False, stopped=True, repeats=0.0, old_logp_N=plain + drift, ref_logp_N=plain + gap,
            )
        )  # fmt: skip
    return answers


def _ours(folder: Path, model: Path, micro: int, *, scale: bool, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    opened = open_model(describe(model), dtype="float32")
    opened.model.requires_grad_(True)
    masters = Masters(dict(opened.model.named_parameters()))
    objective = PolicyGradient(make_rl(folder, model, max_new_tokens=LONGEST, **settings))
    answers = _answers(scale=scale)
    counts = count_items(answers, objective, ())
    policy = Policy(opened.model, *split_model(opened.model), pad_id=256)
    total = sum(
        objective.backward(policy, answers[i : i + micro], counts, ())[0] for i in range(0, len(answers), micro)
    )
    return float(total) / counts.divisors["loss"], masters.gradients()


def _theirs(folder: Path, model: Path, *, scale: bool, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=LONGEST,
        max_steps=1,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        scale_rewards="group" if scale else "none",
        **settings,
    )
    trainer = GRPOTrainer(
        model=policy,
        args=config,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    answers = _answers(scale=scale)
    longest = max(prompt for prompt, _ in LENGTHS)
    inputs: dict[str, Any] = {
        name: torch.zeros(len(answers), width, dtype=torch.long)
        for name, width in (
            ("prompt_ids", longest), ("prompt_mask", longest),
            ("completion_ids", LONGEST), ("completion_mask", LONGEST),
        )
    }  # fmt: skip
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = torch.zeros(len(answers), LONGEST)
    for b, (answer, (prompt, length)) in enumerate(zip(answers, LENGTHS, strict=True)):
        ids = torch.from_numpy(answer.row.ids).long()
        inputs["prompt_ids"][b, longest - prompt :], inputs["prompt_mask"][b, longest - prompt :] = ids[:prompt], 1
        inputs["completion_ids"][b, :length], inputs["completion_mask"][b, :length] = ids[prompt:], 1
        inputs["old_per_token_logps"][b, :length] = answer.old_logp_N
        inputs["ref_per_token_logps"][b, :length] = answer.ref_logp_N
    inputs["advantages"] = torch.tensor([answer.advantage for answer in answers])
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {name: one.grad for name, one in policy.named_parameters()}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"average": "answers", "kl": 0.05}, {"loss_type": "grpo", "beta": 0.05}),
    "tokens, clip higher": (
        {"average": "tokens", "kl": 0.0, "clip_high": 0.4},
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.4},
    ),
    "dr_grpo": (
        {"average": "constant", "kl": 0.02, "scale": False},
        {"loss_type": "dr_grpo", "beta": 0.02, "scale": False},
    ),
    "sequence": (
        {"average": "answers", "ratio": "sequence", "kl": 0.0},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.0},
    ),
    "warm": (
        {"average": "tokens", "kl": 0.03, "temperature": 0.7},
        {"loss_type": "bnpo", "beta": 0.03, "temperature": 0.7},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_trls(case: str, tiny_model: Path, tmp_path: Path) -> None:
    ours, theirs = ({"scale": True, **one} for one in CASES[case])
    ours = {"clip_high": 0.2, **ours}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their_loss, their_gradients = _theirs(tmp_path, tiny_model, **theirs)
    for micro in (4, 1):
        loss, gradients = _ours(tmp_path, tiny_model, micro, **ours)
        assert loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], atol=1e-6, rtol=1e-4, msg=name)
