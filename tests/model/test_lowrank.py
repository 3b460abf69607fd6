"""Compressing stacks of adapters: against the singular values of the full matrices, and exact where rank allows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from evertune.model.adapter import Factor, add_adapter, concatenate, read_factors
from evertune.model.checkpoint import describe
from evertune.model.lowrank import compress, fill
from evertune.model.open import open_model
from tests.model.folders import write_adapter_folder


def _factor(seed: int, outputs: int, inputs: int, rank: int, scale: float = 1.0) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    return Factor(
        torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator), scale
    )


STACK = [{"m": _factor(1, 20, 30, 3, 0.5)}, {"m": _factor(2, 20, 30, 4, 2.0), "n": _factor(3, 8, 6, 2)}]


def _delta(stack: list[dict[str, Factor]], name: str) -> torch.Tensor:
    return sum((one[name].delta() for one in stack if name in one), torch.zeros(()))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_singular_values_that_are_left_out(rank):
    # Eckart and Young: the squared error of the nearest matrix is the sum of the squared singular values left out.
    found = compress(STACK, rank)
    for name in ("m", "n"):
        singular = np.linalg.svd(_delta(STACK, name).numpy(), compute_uv=False)
        error = (found.factors[name].delta() - _delta(STACK, name)).square().sum().item()
        assert error == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-3)
        assert found.factors[name].rank == min(rank, {"m": 7, "n": 2}[name])


def test_held_is_the_share_of_the_squared_norm():
    singular = [np.linalg.svd(_delta(STACK, name).numpy(), compute_uv=False) ** 2 for name in ("m", "n")]
    expected = sum(one[:2].sum() for one in singular) / sum(one.sum() for one in singular)
    assert compress(STACK, 2).held == pytest.approx(expected)


@pytest.mark.parametrize("rank", [7, 50])
def test_with_rank_enough_the_stack_is_kept_whole(rank):
    found = compress(STACK, rank)
    assert found.held == pytest.approx(1.0)
    for name in ("m", "n"):
        torch.testing.assert_close(found.factors[name].delta(), _delta(STACK, name), rtol=1e-4, atol=1e-4)


def test_a_stack_of_nothing_is_held_whole():
    zero = {"m": Factor(torch.ones(2, 5), torch.zeros(4, 2), 1.0)}
    found = compress([zero], 1)
    assert found.held == 1.0
    assert torch.equal(found.factors["m"].delta(), torch.zeros(4, 5))


def test_an_update_wider_than_its_matrix_is_no_problem():
    wide = [{"m": _factor(seed, 4, 3, 5)} for seed in (1, 2)]
    torch.testing.assert_close(compress(wide, 3).factors["m"].delta(), _delta(wide, "m"), rtol=1e-4, atol=1e-4)


def test_a_new_adapter_begun_at_a_stack_says_what_the_stack_says(tiny_model: Path, tmp_path: Path):
    base = describe(tiny_model)
    first = write_adapter_folder(base, tmp_path / "first", seed=1, rank=2)
    top = write_adapter_folder(first, tmp_path / "second", seed=2, rank=3)
    stack = [read_factors(one.path) for one in top.stack[1:]]
    opened = open_model(base, dtype="float32")
    names = sorted(concatenate(stack))
    # More rank than the stack has: what is free begins at zero.
    trained = add_adapter(opened, rank=8, alpha=12, dropout=0.0, targets=names, seed=3)
    fill(trained, compress(stack, 8).factors, scale=12 / 8)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        found, expected = opened.model(ids).logits, open_model(top, dtype="float32").model(ids).logits
        plain = open_model(base, dtype="float32").model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 100 * (found - expected).abs().max()
