"""Every weight trained in bfloat16 from a float32 master: what is stored is a master again, never a rounded copy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evertune.hashing import digest_json
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.stages.training import training_key
from evertune.train import stage
from evertune.train.sft import run_sft
from tests.train.stage import make_spec, open_workspace, published_weights, write_rounded

FULL: dict[str, Any] = {"tune": {"full": {}}, "dtype": "bfloat16", "replay": [], "share": 0.0}
# So slow that only a weight that was 0 can move: what differs from the start was rounded.
STILL = {"lr": 1e-30, "weight_decay": 0.0}


def _same_numbers(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and bool(((one[name] - other[name]).abs() < 1e-25).all()) for name in one
    )


def test_a_master_that_does_not_move_is_stored_unrounded(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    for ema in (None, 0.5):
        spec = make_spec(tmp_path, tiny_model, **FULL, **STILL, ema_decay=ema, keep_steps=3)
        facts = run_sft(spec, workspace)["checkpoint"]
        start = load_file(tiny_model / "model.safetensors")
        assert any(not torch.equal(one, one.bfloat16().float()) for one in start.values())
        assert _same_numbers(published_weights(workspace, spec), start)
        assert facts["drift"]["to_start"] < 1e-20
        config = json.loads((workspace.path(spec.key) / "config.json").read_text())
        assert config["dtype"] == "float32"
        kept = workspace.path(digest_json({"kind": "kept", "stage": spec.key, "step": 3}))
        assert _same_numbers(load_file(kept / "model.safetensors"), start)


def test_what_training_changes_is_added_to_the_stored_numbers(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(tmp_path, tiny_model, **FULL)
    seen: list[Any] = []
    make = stage.make_trainer

    def made(*given: Any) -> Any:
        trainer = make(*given)
        seen.extend([trainer, given[0].opened])
        return trainer

    monkeypatch.setattr(stage, "make_trainer", made)
    workspace = open_workspace(tmp_path / "w")
    facts = run_sft(spec, workspace)["checkpoint"]
    trainer, opened = seen
    stored = published_weights(workspace, spec)
    for name, master in trainer.masters.weights.items():
        assert torch.equal(stored[name], master.cpu()), name
    # Afterwards, as in every step, the model computes in bfloat16 with the masters rounded once.
    for name, one in opened.model.named_parameters():
        assert torch.equal(one, trainer.masters.weights[name].bfloat16()), name
    assert opened.dtype == torch.bfloat16
    assert 0.0 < facts["drift"]["to_start"] < 1.0


def test_the_first_step_computes_with_what_the_start_is_in_bfloat16(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec(tmp_path, tiny_model, **FULL)
    opened, _ = stage.open_trained(spec, "cpu")
    plain = dict(open_model(spec.start, dtype="bfloat16").model.named_parameters())
    for name, one in opened.model.named_parameters():
        assert torch.equal(one, plain[name]), name


def test_other_starts_and_widths_are_stored_as_before_and_keep_their_keys(tmp_path: Path, tiny_model: Path) -> None:
    narrow = write_rounded(tiny_model, tmp_path / "narrow")
    assert not make_spec(tmp_path, narrow, **FULL).keeps_master  # tests/train/test_sft.py trains such a one
    assert not make_spec(tmp_path, tiny_model, dtype="bfloat16").keeps_master  # an adapter's factors are never rounded
    wide = make_spec(tmp_path, tiny_model, **FULL)
    assert wide.keeps_master
    assert not replace(wide, dtype="float32").keeps_master
    # The same order with a start of the same digest that were narrow: another result, another key.
    assert training_key(1, wide) != training_key(1, replace(wide, start=replace(wide.start, path=narrow)))
    assert training_key(1, wide) == training_key(1, replace(wide, start=describe(tiny_model)))
