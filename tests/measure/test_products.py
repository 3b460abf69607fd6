"""Inner products in float64, by pieces: what one sum over all elements gives."""

import math

import pytest
import torch
from torch import Tensor

from evertune.measure.products import PIECE, inner_product, squared_norm


def _exact(one: Tensor, other: Tensor) -> float:
    return math.fsum(a * b for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, PIECE - 1), (PIECE,)])
def test_it_is_the_exact_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    found = inner_product(one, other)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(_exact(one, other), rel=1e-11, abs=1e-11)
    assert squared_norm(one).item() == pytest.approx(_exact(one, one), rel=1e-13)


def test_elements_are_paired_by_their_index_however_they_lie() -> None:
    one = torch.arange(12.0).reshape(3, 4)
    other = torch.arange(12.0).reshape(4, 3).T
    assert inner_product(one, other).item() == (one * other).sum().item()
