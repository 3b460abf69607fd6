"""Liger's kernels give what the chunks of `head.py` give; where they cannot run, asking for them is an error.

They need a GPU, or Triton's interpreter: TRITON_INTERPRET=1 with triton and liger-kernel installed.
"""

import importlib.util
import os

import pytest
import torch

from evertune.errors import TrainingError
from evertune.train import kernels
from evertune.train.head import Head, head_loss
from evertune.train.sft import run_sft
from tests.train.stage import make_spec, open_workspace

CAN_RUN = importlib.util.find_spec("liger_kernel") is not None and (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(not CAN_RUN, reason="liger-kernel needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("has_bias", [False, True])
def test_liger_forms_the_same_loss_and_gradients(has_bias: bool) -> None:
    made = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(13, 16, generator=made), torch.randn(37, 16, generator=made)
    bias, targets = torch.randn(37, generator=made), torch.randint(0, 37, (13,), generator=made)
    found = {}
    for has_liger in (False, True):
        parts = [one.to(DEVICE).requires_grad_(True) for one in (hidden.clone(), weight.clone(), bias.clone())]
        head = Head(parts[1], parts[2] if has_bias else None, has_liger=has_liger)
        loss = head_loss(parts[0], targets.to(DEVICE), head=head, ce_weight=0.25)
        loss.loss.backward()
        found[has_liger] = [loss.loss.detach(), loss.ce_sum, *(one.grad for one in parts if one.grad is not None)]
    assert len(found[True]) == len(found[False]) == (5 if has_bias else 4)
    for ours, theirs in zip(found[False], found[True], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_the_package_it_is_an_error_that_says_how_to_get_it(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="liger-kernel is not installed"):
        run_sft(make_spec(tmp_path, tiny_model, kernels="liger", device="cpu"), open_workspace(tmp_path / "run"))


def test_without_a_gpu_it_is_an_error_and_not_another_kernel(tmp_path, tiny_model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(TrainingError, match="needs a GPU; the stage runs on cpu"):
        run_sft(make_spec(tmp_path, tiny_model, kernels="liger", device="cpu"), open_workspace(tmp_path / "run"))
