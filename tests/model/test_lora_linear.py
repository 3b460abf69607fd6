"""The low-rank layer in one autograd step, against the formula written out."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.model.lora_linear import Update, add_updates, lora_linear

M, INPUTS, OUTPUTS, RANK = 5, 7, 6, 3


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "x": (2, M, INPUTS), "weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,), "frozen_a": (RANK, INPUTS),
        "frozen_b": (OUTPUTS, RANK), "a": (2, INPUTS), "b": (OUTPUTS, 2), "slope": (2, M, OUTPUTS),
    }  # fmt: skip
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


LEARNS = [("x", "a", "b"), ("a", "b"), ("x",), ("b",), ("x", "weight", "bias", "a"), ("weight",)]


@pytest.mark.parametrize("learns", LEARNS)
def test_outputs_and_gradients_are_those_of_the_formula(learns: tuple[str, ...]) -> None:
    one = _tensors()
    for name in learns:
        one[name].requires_grad_()
    updates = [Update(one["frozen_a"], one["frozen_b"], 0.5), Update(one["a"], one["b"], 2.0)]
    ours = lora_linear(one["x"], one["weight"], one["bias"], updates)
    weight = one["weight"] + 0.5 * one["frozen_b"] @ one["frozen_a"] + 2.0 * one["b"] @ one["a"]
    formula = F.linear(one["x"], weight, one["bias"])
    assert torch.allclose(ours, formula, atol=1e-12)
    wanted = [one[name] for name in learns]
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, one["slope"]), torch.autograd.grad(formula, wanted, one["slope"]), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-12)


def test_without_gradients_the_bits_are_the_same() -> None:
    one = {name: tensor.bfloat16() for name, tensor in _tensors().items()}
    updates = [Update(one["frozen_a"], one["frozen_b"], 0.5), Update(one["a"], one["b"], 2.0)]
    plain = F.linear(one["x"].reshape(-1, INPUTS), one["weight"], one["bias"])
    found = add_updates(plain, one["x"], updates)
    assert torch.equal(found, lora_linear(one["x"], one["weight"], one["bias"], updates))


def test_an_update_of_zero_leaves_every_bit_of_a_bfloat16() -> None:
    one = {name: value.bfloat16() for name, value in _tensors().items()}
    plain = F.linear(one["x"], one["weight"], one["bias"])
    update = Update(one["a"], torch.zeros_like(one["b"]), 2.0)
    assert torch.equal(lora_linear(one["x"], one["weight"], one["bias"], [update]), plain)
    assert torch.equal(lora_linear(one["x"], one["weight"], one["bias"], []), plain)
