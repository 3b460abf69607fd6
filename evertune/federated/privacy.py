"""Differential privacy for clients: a bounded share of each in the mean, Gaussian noise, and what that protects.

DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963) on FFA-LoRA's B (arXiv:2403.12313), where noise stays noise: on both
factors it would be multiplied with itself. Neighbours differ in one whole client.

Departures: clients are not sampled at random for each exchange as far as the account goes, so that it claims no
amplification by sampling, and holds whoever is drawn. The divisor is the number asked, whoever returns.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evertune.errors import TrainingError
from evertune.federated.aggregation import Aggregate, mean_of_b
from evertune.model.adapter import Factors


def size_of_b(factors: Factors) -> float:
    """Euclidean norm of all s B together, in float64: what one client can move the sum by."""
    return math.sqrt(sum(float((one.b_OR.double() * one.scale).square().sum()) for one in factors.values()))


def private_mean(
    updates: Sequence[Factors], *, bound: float, multiplier: float, asked: int, generator: torch.Generator | None = None
) -> Aggregate:
    """Sum of the clients' s B, each scaled down to `bound`, plus noise of deviation multiplier * bound, by `asked`.

    Args:
        updates: with one A for all, bit for bit.
        multiplier: deviation of the noise of the sum, in units of the bound.
        generator: of the noise; from the operating system's randomness when not given, which is what protects.

    Raises:
        MergeError: a client's A is not the others'.
    """
    bounded = []
    for one in updates:
        share = min(1.0, bound / max(size_of_b(one), 1e-30))
        bounded.append({name: replace(each, scale=each.scale * share) for name, each in one.items()})
    mean = mean_of_b(bounded, [1.0 / asked] * len(bounded)).factors
    if generator is None:
        generator = torch.Generator().manual_seed(secrets.randbits(63))
    deviation = multiplier * bound / asked

    def noised(b_OR: Tensor) -> Tensor:
        return b_OR + deviation * torch.randn(b_OR.shape, generator=generator)

    return Aggregate({name: replace(one, b_OR=noised(one.b_OR)) for name, one in mean.items()})


def epsilon(multiplier: float, exchanges: int, delta: float) -> float:
    """The epsilon that a client's whole part in all exchanges is protected with, at this delta: tight, by privacy loss
    distributions (Google's dp-accounting, the one door to it).

    Raises:
        TrainingError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise TrainingError(
            "noise: the account of what it protects needs dp-accounting, which is not installed.",
            remedy='pip install "evertune[privacy]"',
        ) from error
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(multiplier), exchanges)
    return float(accountant.get_epsilon(delta))
