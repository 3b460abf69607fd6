"""Sums of checkpoints: state dicts in, a state dict out, on the CPU or wherever the tensors are.

Floating tensors are summed in float64 and rounded once, to the dtype of the first input. Terms are added in order of
their value, so the order of the inputs changes no bit. Integer and boolean buffers must be equal in all inputs and are
copied. Keys keep the order of the first input; nothing is mutated. A large tensor is worked through in chunks.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evertune.errors import MergeError

StateDict = Mapping[str, Tensor]

CHUNK_ELEMENTS = 1 << 22


def model_soup(state_dicts: Sequence[StateDict]) -> dict[str, Tensor]:
    """Equal-weight mean of checkpoints tuned from one start (Wortsman et al. 2022, arXiv:2203.05482).

    A soup of one checkpoint, or of copies of one, is that checkpoint bit for bit.

    Args:
        state_dicts: one or more, with the same keys and shapes.

    Raises:
        MergeError: no input, different keys or shapes, integer buffers that differ, or a value that is not finite.
    """
    if not state_dicts:
        raise MergeError("a soup needs at least one checkpoint; found none.")
    _check_alike(state_dicts)
    return {name: _merged([one[name] for one in state_dicts], _mean, name) for name in state_dicts[0]}


def task_arithmetic(theta0: StateDict, finetuned: Sequence[StateDict], scales: Sequence[float]) -> dict[str, Tensor]:
    """theta0 + sum_i scale_i (theta_i - theta0); a negative scale forgets (Ilharco et al. 2022, arXiv:2212.04089).

    Where no model differs from theta0, or all scales are 0, the result is theta0 bit for bit.

    Args:
        theta0: the start of all models.
        finetuned: models with theta0's keys and shapes.
        scales: one per model.

    Raises:
        MergeError: not one finite scale per model, different keys or shapes, integer buffers that differ, or a value
            that is not finite, in an input or in the result.
    """
    if len(finetuned) != len(scales):
        raise MergeError(f"found {len(finetuned)} models and {len(scales)} scales; each model needs one.")
    weights = [float(scale) for scale in scales]
    if not all(math.isfinite(weight) for weight in weights):
        raise MergeError(f"scales are {weights}, expected finite numbers.")
    _check_alike([theta0, *finetuned])

    def moved(parts: Sequence[Tensor]) -> Tensor:
        origin, *tuned = parts
        if not tuned:
            return origin
        terms = torch.stack([weight * (one - origin) for weight, one in zip(weights, tuned, strict=True)])
        total = origin + _ordered_sum(terms)
        # x + 0 is x but for -0.0, which would lose its sign.
        return torch.where(total == origin, origin, total)

    return {name: _merged([theta0[name], *(one[name] for one in finetuned)], moved, name) for name in theta0}


def interpolate(theta0: Tensor, theta1: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) theta0 + alpha theta1 in the dtype of theta0 (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903).

    Bit for bit theta0 at alpha 0 and wherever both agree, theta1 at alpha 1. Integer tensors are copied from theta0.
    """
    if alpha == 0 or not theta0.is_floating_point():
        return theta0.clone()
    if alpha == 1:
        return theta1.to(theta0.dtype, copy=True)
    line = (1.0 - alpha) * theta0.to(torch.float64) + alpha * theta1.to(torch.float64)
    return torch.where(theta0 == theta1, theta0, line.to(theta0.dtype))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(parts))
    low, high = stacked.amin(dim=0), stacked.amax(dim=0)
    mean = _ordered_sum(stacked) / len(parts)
    # n x / n is x in float64 for every narrower dtype; for float64 itself it may be off by one digit.
    return torch.where((low == high) & (low != 0), low, mean)


def _ordered_sum(stacked: Tensor) -> Tensor:
    """Sum over the first dimension in order of value: the same whatever the order given; -0.0 only from all -0.0."""
    # Two terms give one sum in either order.
    first, *rest = stacked if len(stacked) < 3 else stacked.sort(dim=0).values
    total = first.clone()
    for term in rest:
        total += term
    return total


def _merged(tensors: Sequence[Tensor], rule: Callable[[Sequence[Tensor]], Tensor], name: str) -> Tensor:
    """Apply a rule of float64 tensors to corresponding chunks, and round once."""
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    result = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    flat, sources = result.view(-1), [one.reshape(-1) for one in tensors]
    for begin in range(0, flat.numel(), CHUNK_ELEMENTS):
        chunk = slice(begin, begin + CHUNK_ELEMENTS)
        flat[chunk] = rule([one[chunk].to(torch.float64) for one in sources]).to(first.dtype)
    if not bool(torch.isfinite(result).all()):
        raise MergeError(f"{name} does not fit into {first.dtype} after merging.", remedy="Use smaller scales.")
    return result


def _check_alike(state_dicts: Sequence[StateDict]) -> None:
    first = state_dicts[0]
    for i, other in enumerate(state_dicts):
        missing, extra = sorted(first.keys() - other.keys()), sorted(other.keys() - first.keys())
        if missing or extra:
            raise MergeError(
                f"checkpoint {i} {'lacks' if missing else 'has'} {(missing or extra)[0]!r}, "
                f"which checkpoint 0 {'has' if missing else 'lacks'}.",
                remedy="Merging needs one architecture.",
            )
        for name, tensor in other.items():
            _check_tensor(name, first[name], tensor, i)


def _check_tensor(name: str, first: Tensor, tensor: Tensor, i: int) -> None:
    if tensor.shape != first.shape:
        raise MergeError(
            f"{name} is {tuple(tensor.shape)} in checkpoint {i} and {tuple(first.shape)} in checkpoint 0.",
            remedy="Merging needs one architecture; distil the model instead.",
        )
    if tensor.is_floating_point() != first.is_floating_point() or tensor.is_complex():
        raise MergeError(f"{name} is {tensor.dtype} in checkpoint {i} and {first.dtype} in checkpoint 0.")
    if tensor.is_floating_point():
        if not bool(torch.isfinite(tensor).all()):
            raise MergeError(f"{name} holds NaN or Inf in checkpoint {i}.", remedy="Leave that checkpoint out.")
    elif not torch.equal(tensor, first):
        raise MergeError(f"the integer buffer {name} differs between checkpoint 0 and {i}, and cannot be averaged.")
