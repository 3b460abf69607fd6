"""Masters, schedule, clipping and averaging against numbers worked out by hand and against plain torch."""

import math

import pytest
import torch
from torch import nn

from evertune.errors import TrainingError
from evertune.train.optimizer import Incoming, Masters, rate_factor, warmup_steps


def _factors(steps: int, warmup: int, schedule: str) -> list[float]:
    return [rate_factor(k, steps=steps, warmup=warmup, schedule=schedule) for k in range(steps)]


def test_the_rate_rises_in_equal_parts_and_falls_to_one_step_above_zero():
    assert _factors(6, 2, "linear") == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])
    assert _factors(6, 2, "constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_the_cosine_is_halfway_down_at_half_time():
    factors = _factors(9, 1, "cosine")
    assert factors[1] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors == sorted(factors[:2]) + sorted(factors[2:], reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_no_step_is_spent_at_rate_zero(schedule: str, warmup: int):
    assert all(0 < factor <= 1 for factor in _factors(5, warmup, schedule))


def test_warm_up_is_rounded_up_and_leaves_one_step():
    assert warmup_steps(0.03, 100) == 3
    assert warmup_steps(0.03, 10) == 1
    assert warmup_steps(0.0, 10) == 0
    assert warmup_steps(0.99, 1) == 0


def _parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)),
        "vector": nn.Parameter(torch.randn(4, generator=generator).to(dtype)),
    }


def test_float32_weights_follow_torchs_adamw_with_decay_on_matrices_only():
    ours, theirs = _parameters(torch.float32), _parameters(torch.float32)
    masters = Masters(ours, weight_decay=0.1)
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["vector"]], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.01)
    for step in range(4):
        for name in ours:
            gradient = torch.full_like(ours[name], 0.1 * (step + 1))
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        masters.update(0.01)
        adam.step()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-7)


def test_a_float32_parameter_is_its_own_master():
    parameters = _parameters(torch.float32)
    assert Masters(parameters).weights["matrix"] is parameters["matrix"]


def test_steps_below_bfloat16s_resolution_add_up_in_the_master():
    """1 + 0.001 is 1 in bfloat16, so without a master eight such steps would leave the weight where it was."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    for _ in range(8):
        (-weight.sum()).backward()
        masters.update(0.001)
    assert masters.weights["w"].item() == pytest.approx(1.008, abs=1e-5)
    assert weight.item() == torch.tensor(1.008).bfloat16().item() > 1.0


def test_micro_batch_gradients_add_up_in_float32():
    """256 + 1 is 256 in bfloat16; eight micro-batches of 1 after one of 256 must give 264."""
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    for scale in (256.0, *[1.0] * 8):
        (weight * scale).sum().backward()
        assert weight.grad is None
    assert masters.gradients()["w"].item() == 264.0


@pytest.mark.parametrize("limit", [0, 5, 10**6])
def test_gradients_that_wait_for_others_arrive_by_the_end_of_each_pass(limit: int):
    """As each would at once: bfloat16 could not add 1 to 256."""
    narrow = [torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)) for _ in range(3)]
    masters = [torch.zeros(4, requires_grad=True) for _ in narrow]
    Incoming(list(zip(narrow, masters, strict=True)), limit=limit)
    for size in (256.0, 1.0):
        (size * torch.cat(narrow[:2]).sum()).backward()
        assert all(one.grad is None for one in narrow)
    assert [None if one.grad is None else one.grad.tolist() for one in masters] == [[257.0] * 4, [257.0] * 4, None]


def test_a_pass_that_breaks_off_leaves_nothing_to_the_next():
    def fail(gradient):
        raise ValueError

    parameters = {name: torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)) for name in "ab"}
    masters = Masters(parameters)
    masters._incoming._limit = 10**6  # as on a GPU
    broken = parameters["b"] * 1.0
    broken.register_hook(fail)
    with pytest.raises(ValueError):
        (broken.sum() + (parameters["a"] * 1.0).sum()).backward()  # the last is gone through first
    masters.zero_gradients()
    (parameters["a"] + parameters["b"]).sum().backward()
    assert {name: one.tolist() for name, one in masters.gradients().items()} == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_clipping_scales_the_joint_norm():
    parameters = _parameters(torch.float32)
    masters = Masters(parameters)
    parameters["matrix"].grad = torch.full((3, 4), 3.0 / math.sqrt(12))
    parameters["vector"].grad = torch.full((4,), 2.0)
    assert masters.clip(1.0, step=1) == pytest.approx(5.0)
    assert parameters["matrix"].grad.norm().item() == pytest.approx(0.6, rel=1e-4)
    assert parameters["vector"].grad.norm().item() == pytest.approx(0.8, rel=1e-4)
    assert masters.clip(None, step=1) == pytest.approx(1.0, rel=1e-4)
    assert masters.clip(7.0, step=1) == pytest.approx(1.0, rel=1e-4)


def test_a_gradient_that_is_not_finite_is_named_with_its_step():
    parameters = _parameters(torch.float32)
    masters = Masters(parameters)
    parameters["matrix"].grad = torch.zeros(3, 4)
    parameters["vector"].grad = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    with pytest.raises(TrainingError, match="step 7: gradient of vector"):
        masters.clip(1.0, step=7)


def test_a_weight_that_is_not_finite_is_named_with_its_step():
    parameters = _parameters(torch.float32)
    masters = Masters(parameters)
    masters.check_finite(step=1)
    with torch.no_grad():
        parameters["matrix"][0, 0] = float("inf")
    with pytest.raises(TrainingError, match="step 3: weight matrix"):
        masters.check_finite(step=3)


def test_the_average_keeps_its_share_of_the_past():
    # Constant gradient: AdamW moves by the rate each step: 1, 0.9, 0.8; the average with decay 1/2: 0.95, 0.875.
    weight = nn.Parameter(torch.ones(1, 1))
    masters = Masters({"w": weight}, ema_decay=0.5)
    for _ in range(2):
        weight.grad = torch.ones(1, 1)
        masters.update(0.1)
    assert weight.item() == pytest.approx(0.8, abs=1e-5)
    masters.use_average()
    assert weight.item() == pytest.approx(0.875, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_state_goes_back_bit_for_bit(dtype: torch.dtype, ema_decay: float | None):
    def run(masters: Masters, parameters: dict[str, nn.Parameter], steps: range) -> None:
        for step in steps:
            sum((one.float() * (step + 1)).square().sum() for one in parameters.values()).backward()
            masters.clip(1.0, step=step)
            masters.update(0.01)

    whole = _parameters(dtype)
    run(Masters(whole, ema_decay=ema_decay), whole, range(6))
    first = _parameters(dtype)
    before = Masters(first, ema_decay=ema_decay)
    run(before, first, range(3))
    state = {group: {name: one.clone() for name, one in tensors.items()} for group, tensors in before.state().items()}
    second = _parameters(dtype)
    resumed = Masters(second, ema_decay=ema_decay)
    resumed.load_state(state)
    run(resumed, second, range(3, 6))
    for name in whole:
        assert torch.equal(whole[name], second[name])
