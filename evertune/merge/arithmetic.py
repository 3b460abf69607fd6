"""Sums of checkpoints: state dicts in, a state dict out. Accumulated in float64, rounded once to the tensor's dtype.

Floating tensors are merged. Integer and boolean buffers must be equal in all inputs and are copied. Keys keep the order
of the first input. Nothing is mutated.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evertune.errors import MergeError

StateDict = Mapping[str, Tensor]


def model_soup(state_dicts: Sequence[StateDict]) -> dict[str, Tensor]:
    """Equal-weight mean of checkpoints tuned from one start (Wortsman et al. 2022, arXiv:2203.05482).

    The order of the inputs changes no bit. A soup of one checkpoint, or of copies of one, is that checkpoint.

    Raises:
        MergeError: no input, different keys or shapes, integer buffers that differ, or a value that is not finite.
    """
    if not state_dicts:
        raise MergeError("a soup needs at least one checkpoint; found none.")
    _check_alike(state_dicts)
    return {name: _mean([one[name] for one in state_dicts]) for name in state_dicts[0]}


def task_arithmetic(theta0: StateDict, finetuned: Sequence[StateDict], scales: Sequence[float]) -> dict[str, Tensor]:
    """theta0 + sum_i scale_i (theta_i - theta0); a negative scale forgets (Ilharco et al. 2022, arXiv:2212.04089).

    Raises:
        MergeError: not one finite scale per model, different keys or shapes, integer buffers that differ, or a value
            that is not finite.
    """
    if len(finetuned) != len(scales):
        raise MergeError(f"found {len(finetuned)} models and {len(scales)} scales; each model needs one.")
    if not all(torch.isfinite(torch.tensor(float(scale))) for scale in scales):
        raise MergeError(f"scales are {list(scales)}, expected finite numbers.")
    _check_alike([theta0, *finetuned])
    return {
        name: _add_task_vectors(tensor, [one[name] for one in finetuned], scales) for name, tensor in theta0.items()
    }


def interpolate(theta0: Tensor, theta1: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) theta0 + alpha theta1 in the dtype of theta0 (WiSE-FT, Wortsman et al. 2021, arXiv:2109.01903).

    Bit for bit an end at alpha 0 and 1, and theta0 when both agree. Integer tensors are copied from theta0.
    """
    if not theta0.is_floating_point():
        return theta0.clone()
    return ((1.0 - alpha) * theta0.to(torch.float64) + alpha * theta1.to(torch.float64)).to(theta0.dtype)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    # Sorted by value, the sum does not depend on the order of the inputs, and equal inputs give their value exactly.
    stacked = torch.stack([one.to(torch.float64) for one in tensors]).sort(dim=0).values
    low, rest = stacked[0], stacked - stacked[0]
    return (low + rest.sum(dim=0) / len(tensors)).to(first.dtype)


def _add_task_vectors(start: Tensor, tuned: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    if not start.is_floating_point():
        return start.clone()
    origin = start.to(torch.float64)
    total = origin.clone()
    for one, scale in zip(tuned, scales, strict=True):
        total += float(scale) * (one.to(torch.float64) - origin)
    return total.to(start.dtype)


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
