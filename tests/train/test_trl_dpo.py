"""TRL's DPO trainer as an oracle: the same pairs give the same loss and the same gradient, in float32."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evertune.data.encode import EncodedPair, EncodedRow
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.train.cache import ReferenceCache
from evertune.train.dpo import Preference
from evertune.train.head import split_model
from evertune.train.loop import count_items
from evertune.train.objective import Policy
from evertune.train.optimizer import Masters
from evertune.train.reference import ReferenceSource
from tests.tiny import write_tiny_model
from tests.train.test_dpo import make_dpo

# (prompt, chosen, rejected) lengths in tokens, all different.
LENGTHS = ((5, 9, 3), (12, 2, 17), (3, 6, 6), (8, 14, 5))


def _pairs() -> list[EncodedPair]:
    generator = np.random.default_rng(0)
    pairs = []
    for i, (prompt, *answers) in enumerate(LENGTHS):
        head = generator.integers(0, 250, prompt)
        rows = []
        for k, length in enumerate(answers):
            ids = np.concatenate([head, generator.integers(0, 250, length)]).astype(np.int32)
            counted = np.arange(len(ids)) >= prompt
            rows.append(EncodedRow("made-up", f"{i}", ids, counted, is_replay=False, digest=f"{2 * i + k:064x}"))
        pairs.append(EncodedPair("made-up", f"{i}", *rows))
    return pairs


def _ours(folder: Path, model: Path, reference: Path, micro: int, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    opened = open_model(describe(model), dtype="float32")
    opened.model.requires_grad_(True)
    masters = Masters(dict(opened.model.named_parameters()))
    source = ReferenceSource(describe(reference), opened, False, folder / "cache", folder / "tmp")
    pairs = _pairs()
    source.complete("target", [row for pair in pairs for row in pair.rows])
    stored: ReferenceCache = source.stored("target")
    objective = Preference(make_dpo(folder, model, **settings), stored)
    counts = count_items(pairs, objective, ())
    policy = Policy(opened.model, *split_model(opened.model), pad_id=256)
    sums = sum(objective.backward(policy, pairs[i : i + micro], counts, ()) for i in range(0, len(pairs), micro))
    means = dict(zip(counts.divisors, sums.tolist(), strict=True))  # type: ignore[union-attr]
    found = {name: value / counts.divisors[name] for name, value in means.items() if counts.divisors[name]}
    return found, masters.gradients()


def _theirs(folder: Path, model: Path, reference: Path, **settings: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    class KeepGradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: one.grad.clone() for name, one in policy.named_parameters()})

    class AsGiven(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    rows = []
    for pair, (prompt, _, _) in zip(_pairs(), LENGTHS, strict=True):
        ids = {name: getattr(pair, name).ids.tolist() for name in ("chosen", "rejected")}
        rows.append(
            {"prompt_ids": ids["chosen"][:prompt], **{f"{name}_ids": one[prompt:] for name, one in ids.items()}}
        )
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = AsGiven(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[KeepGradients()],
    )
    trainer.train()
    return next(one for one in trainer.state.log_history if "loss" in one), found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"nll": 0.0, "beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
    "with likelihood": (
        {"nll": 0.2, "beta": 0.1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], "beta": 0.1},
    ),
    "per token": ({"loss": "sigmoid_norm", "nll": 0.0, "beta": 5.0}, {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    "ipo": ({"loss": "ipo", "nll": 0.0, "beta": 0.4}, {"loss_type": ["ipo"], "beta": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trls(case: str, tiny_model: Path, tmp_path: Path) -> None:
    ours, theirs = CASES[case]
    reference = write_tiny_model(tmp_path / "reference", seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged, their_gradients = _theirs(tmp_path, tiny_model, reference, **theirs)
    for micro in (4, 1):
        found, gradients = _ours(tmp_path, tiny_model, reference, micro, **ours)
        # What TRL logs is rounded; the gradients are the sharp comparison.
        assert found["loss"] + ours["nll"] * found["nll"] == pytest.approx(logged["loss"], abs=2e-4)
        for name, key in (
            ("accuracy", "rewards/accuracies"),
            ("margin", "rewards/margins"),
            ("chosen_reward", "rewards/chosen"),
            ("rejected_reward", "rewards/rejected"),
        ):
            assert found[name] == pytest.approx(logged[key], rel=1e-3, abs=1e-4), name
        assert gradients.keys() == their_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, their_gradients[name], atol=1e-6, rtol=1e-4, msg=name)
