"""Every objective on two processes: in every step the losses of one process at the same global batch, and in the end its
weights, up to the order of sums in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.stages import KINDS
from tests.train.processes import perform_on, published_curve
from tests.train.stage import make_spec, open_workspace, published_weights
from tests.train.test_dpo import make_dpo
from tests.train.test_rl import make_rl

# Relative, of every metric of every step; with an absolute part where a metric may be 0.
CURVE = {"rel": 1e-4, "abs": 2e-5}
# Short answers whose first letter decides: some of a group's answers do, some do not.
REWARD = {"asked": {"regex": "(?s)[ -~].*"}}
# Without dropout, whose masks are each process's own.
TUNE = {"lora": {"rank": 4, "targets": "all-linear"}}
ORDERS: dict[str, Any] = {
    # Micro-batches of one row leave some processes without a row of a kind, or without any.
    "sft": ("sft", make_spec, {"anchor": {"on": "replay"}, "micro_batch_rows": 1, "tune": TUNE}),
    "sft, all weights": ("sft", make_spec, {"micro_batch_rows": 3, "tune": {"full": {}}, "lr": 1e-3}),
    "dpo": ("dpo", make_dpo, {"anchor": {"on": "both"}, "micro_batch_rows": 1, "tune": TUNE}),
    "rl": ("rl", make_rl, {"verifiers": REWARD, "micro_batch_rows": 3, "iterations": 2, "tune": TUNE}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_two_processes_have_the_loss_curve_of_one(name: str, tmp_path: Path, tiny_model: Path) -> None:
    kind, make, settings = ORDERS[name]
    spec = make(tmp_path, tiny_model, steps=4, **settings)
    alone, launched = open_workspace(tmp_path / "alone"), open_workspace(tmp_path / "launched")
    KINDS[kind].perform(spec.to_json(), alone)
    answer = perform_on(2, kind, spec, launched, tmp_path / "job")
    assert "result" in answer, answer
    ours, theirs = published_curve(alone, spec), published_curve(launched, spec)
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(one, **CURVE)
    one, other = published_weights(alone, spec), published_weights(launched, spec)
    for tensor in one:
        assert torch.allclose(one[tensor], other[tensor], atol=5e-5), tensor
