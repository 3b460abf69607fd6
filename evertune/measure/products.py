"""Inner products of weights and gradients, summed in float64."""

import torch
from torch import Tensor

# Elements that are widened at once on a CPU: a copy as large as a weight costs ten times what is computed from it.
PIECE = 1 << 17


def inner_product(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products of the elements of two tensors of one shape: a float64 scalar, on their device."""
    size = PIECE if one.device.type == "cpu" else max(one.numel(), 1)
    pairs = zip(*(each.detach().reshape(-1).split(size) for each in (one, other)), strict=True)
    return torch.stack([a.double().dot(b.double()) for a, b in pairs]).sum()


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of the squares of a tensor's elements: a float64 scalar, on its device."""
    return inner_product(tensor, tensor)
