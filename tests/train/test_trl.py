"""TRL's SFT trainer as an oracle: the same rows give the same loss and the same gradient, in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.model.packing import enable_packing
from evertune.train.head import split_model
from evertune.train.loop import Pace, Policy, Trainer, make_accelerator
from evertune.train.optimizer import Masters

# Lengths and shares of counted tokens differ, so a mean of micro-batch means would be another number.
LENGTHS = (24, 9, 17, 31)


def _rows() -> list[EncodedRow]:
    generator = np.random.default_rng(0)
    rows = []
    for i, length in enumerate(LENGTHS):
        counted = np.arange(length) >= length // (i + 2)
        ids = generator.integers(0, 250, length, dtype=np.int32)
        rows.append(EncodedRow("made-up", str(i), ids, counted, is_replay=False, digest=f"{i:064x}"))
    return rows


class _Feed:
    def __init__(self, rows: Sequence[EncodedRow], micro_batch_rows: int) -> None:
        self._rows, self._size = rows, micro_batch_rows

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[EncodedRow]:
        return self._rows[micro_step * self._size : (micro_step + 1) * self._size]

    def step_rows(self, step: int) -> Sequence[EncodedRow]:
        return self._rows


def _ours(model: Path, micro_batch_rows: int, folder: Path, *, is_packed: bool) -> tuple[float, dict[str, Tensor]]:
    opened = open_model(describe(model), dtype="float32")
    opened.model.requires_grad_(True)
    decoder, head = split_model(opened.model)
    masters = Masters(dict(opened.model.named_parameters()))
    pace = Pace(1, len(LENGTHS) // micro_batch_rows, 0.0, schedule="constant", warmup=0, clip=None, seed=0)
    feed = _Feed(_rows(), micro_batch_rows)
    accelerator = make_accelerator(device="cpu", track=[], logging_dir=folder)
    assert not is_packed or enable_packing(opened.model)
    policy = Policy(opened.model, decoder, head, pad_id=256, is_packed=is_packed)
    trainer = Trainer(policy, masters, feed, pace, accelerator)
    counts = trainer.count(0)
    total = sum(trainer.backward(feed.micro_batch(0, micro, 0), counts)[0] for micro in range(pace.micro_steps))
    return float(total) / counts.counted, masters.gradients()


def _theirs(model: Path, micro_batch_rows: int, folder: Path) -> tuple[float, dict[str, Tensor]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    class KeepGradients(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({name: one.grad.clone() for name, one in policy.named_parameters()})

    rows = [{"input_ids": row.ids.tolist(), "labels": np.where(row.counted, row.ids, -100).tolist()} for row in _rows()]
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_rows,
        gradient_accumulation_steps=len(LENGTHS) // micro_batch_rows,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-9,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[KeepGradients()],
    )
    trainer.train()
    return next(one["loss"] for one in trainer.state.log_history if "loss" in one), found


@pytest.mark.parametrize(("micro_batch_rows", "is_packed"), [(4, True), (4, False), (1, True)])
def test_loss_and_gradient_equal_trls(tiny_model, tmp_path, micro_batch_rows, is_packed):
    loss, gradients = _ours(tiny_model, micro_batch_rows, tmp_path, is_packed=is_packed)
    their_loss, their_gradients = _theirs(tiny_model, micro_batch_rows, tmp_path)
    # TRL logs the loss rounded to four digits after the point; the gradients are the sharp comparison.
    assert loss == pytest.approx(their_loss, abs=1e-4)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, their_gradients[name], atol=1e-6, rtol=1e-4), name
