"""What the tests of training need on a machine with a GPU (EVERTUNE_TEST_DEVICE=cuda)."""

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def own_accelerator() -> None:
    """accelerate remembers the first device of a process; tests here use more than one."""
    if torch.cuda.is_available():
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes share no GPU: with fewer than two, both train on the CPU."""
    if torch.cuda.device_count() < 2:
        monkeypatch.setenv("EVERTUNE_TEST_DEVICE", "cpu")
