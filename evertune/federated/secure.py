"""A client's part of a secure sum, and what is made of the sum: plain functions, whatever protocol adds up between.

With FFA-LoRA (arXiv:2403.12313) all clients have one A, drawn from a seed that the server knows, so that the mean of
their s B is all that need be known. SecAgg+ (Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead") shows the server that mean alone. What the server would have checked of each update, the client checks of its
own: an honest client's mistake is caught, a dishonest one's is not.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evertune.errors import TrainingError
from evertune.federated.validation import Shapes, check_update
from evertune.model.adapter import Factor, Factors, draw_a
from evertune.model.open import DTYPES

MOST_CLIENTS = 1000
"""Sums are taken modulo 2^32 of numbers below 2^22, Flower's own setting."""


def summand(
    factors: Factors, *, shapes: Shapes, rank: int, entries: float, norm_bound: float | None, clip: bool
) -> list[NDArray[np.float64]]:
    """The client's s B, one array per module in the order of their names, as it goes into the sum.

    Args:
        entries: the range of B's entries in the sum; numbers beyond it could not be told from small ones.
        norm_bound, clip: of the whole update, as the server would have it.

    Raises:
        TrainingError: the update may not be sent.
    """
    checked = check_update(factors, shapes=shapes, max_rank=rank, norm_bound=norm_bound, clip=clip)
    if checked.factors is None:
        raise TrainingError(f"the own update may not be sent: {checked.reason}.")
    arrays = [(one.b_OR.double() * one.scale).numpy() for _, one in sorted(checked.factors.items())]
    largest = max(float(np.abs(one).max(initial=0.0)) for one in arrays)
    if largest > entries:
        raise TrainingError(
            f"the own update has entries of B up to {largest:.3g}, and the secure sum's range ends at {entries:g}.",
            remedy="Raise 'secure' in the server's file, or lower the clients' rate or steps.",
        )
    return arrays


def initial_a(shapes: Shapes, *, rank: int, seed: int, dtype: str) -> dict[str, Tensor]:
    """The A of every module that all clients of an exchange begin with, and with FFA-LoRA keep, as they round it.

    Args:
        dtype: `bfloat16` or `float32`, of the clients' model.
    """
    return {name: draw_a(rank, inputs, seed, name).to(DTYPES[dtype]) for name, (_, inputs) in shapes.items()}


def mean_update(arrays: Sequence[NDArray[np.float64]], a: Mapping[str, Tensor]) -> dict[str, Factor]:
    """The update whose s B are these means, in the order of the modules' names.

    Raises:
        TrainingError: not one array for each module.
    """
    if len(arrays) != len(a):
        raise TrainingError(f"the secure sum has {len(arrays)} arrays, expected {len(a)}, one for each module.")
    return {
        name: Factor(a[name].float(), torch.from_numpy(np.asarray(one)).float(), 1.0, False)
        for name, one in zip(sorted(a), arrays, strict=True)
    }
