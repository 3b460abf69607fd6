"""Every objective on two processes: in every step the losses of one process at the same global batch, and in the end
its weights, up to the order of sums in float32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.model.checkpoint import describe
from evertune.stages import KINDS
from evertune.train.distill_spec import DistillSpec, OnPolicySpec
from tests.tiny import write_tiny_model
from tests.train.distilled import make_distill_spec
from tests.train.processes import perform_on, published_curve
from tests.train.stage import make_spec, open_workspace, published_weights
from tests.train.test_dpo import make_dpo
from tests.train.test_rl import make_rl

pytestmark = pytest.mark.usefixtures("gpu_for_each_process")

# Relative, of every metric of every step; with an absolute part where a metric may be 0.
CURVE = {"rel": 1e-4, "abs": 2e-5}
# Short answers whose first letter decides: some of a group's answers do, some do not.
REWARD = {"asked": {"regex": "(?s)[ -~].*"}}
# Without dropout, whose masks are each process's own.
TUNE = {"lora": {"rank": 4, "targets": "all-linear"}}


def _make_distill(folder: Path, model: Path, **changes: Any) -> DistillSpec:
    """Half of the rows are answered by the student."""
    teacher = describe(write_tiny_model(folder / "teacher", seed=5))
    on_policy = OnPolicySpec(share=0.5, max_new_tokens=6, temperature=1.0, steps=2)
    return make_distill_spec(folder, model, [teacher], on_policy=on_policy, **changes)


ORDERS: dict[str, Any] = {
    # Micro-batches of one row leave some processes without a row of a kind, or without any.
    "sft": ("sft", make_spec, {"anchor": {"on": "replay"}, "micro_batch_rows": 1, "tune": TUNE}),
    "sft, all weights": ("sft", make_spec, {"micro_batch_rows": 3, "tune": {"full": {}}, "lr": 1e-3}),
    "dpo": ("dpo", make_dpo, {"anchor": {"on": "both"}, "micro_batch_rows": 1, "tune": TUNE, "replay_ratio": 0.2}),
    "rl": ("rl", make_rl, {"verifiers": REWARD, "micro_batch_rows": 3, "iterations": 2, "tune": TUNE}),
    "distill": ("distill", _make_distill, {"micro_batch_rows": 1, "tune": TUNE}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_two_processes_have_the_loss_curve_of_one(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """With whole models, and with one in shards, which leaves the same files too."""
    kind, make, settings = ORDERS[name]
    spec = make(tmp_path, tiny_model, steps=4, **settings)
    alone = open_workspace(tmp_path / "alone")
    KINDS[kind].perform(spec.to_json(), alone)
    ours = published_curve(alone, spec)
    assert len(ours) == 4
    for fsdp in (False, True):
        launched = open_workspace(tmp_path / f"fsdp-{fsdp}")
        answer = perform_on(2, kind, replace(spec, fsdp=fsdp), launched, tmp_path / "job")
        assert "result" in answer, answer
        for one, other in zip(ours, published_curve(launched, spec), strict=True):
            assert other == pytest.approx(one, **CURVE)
        one, other = published_weights(alone, spec), published_weights(launched, spec)
        assert one.keys() == other.keys()
        for tensor in one:
            assert torch.allclose(one[tensor], other[tensor], atol=5e-5), tensor
        assert _texts(launched.path(spec.key)) == _texts(alone.path(spec.key))


def _texts(folder: Path) -> dict[str, str | None]:
    """Names of all files, with what lies in the small ones that are not numbers."""
    is_text = ("adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json", "evertune.json")
    return {
        one.name: one.read_text() if one.name in is_text else None for one in sorted(folder.iterdir()) if one.is_file()
    }
