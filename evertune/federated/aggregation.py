"""One low-rank update out of many clients', as plain functions of factors and weights.

A client's update of a module is s B A. The mean that federated averaging means is the mean of these *products*;
averaging A and B apart gives another matrix, off by tens of per cent where clients differ. Here: the naive mean, the
ways to the exact one, and the two that bound what a poisoned client can do.
"""

# K clients, R rank, I inputs, O outputs

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from evertune.errors import MergeError
from evertune.model.adapter import Factor, Factors, concatenate

Rule = Literal["fedavg", "fedex", "fed_talora", "ffa", "flora", "flexlora", "median", "trimmed_mean"]


@dataclass(frozen=True)
class Aggregate:
    """The update of all clients together.

    Attributes:
        factors: the update, by module.
        energy: share of the squared norm of what it approximates that it holds; 1 where nothing is cut off.
    """

    factors: Factors
    energy: float = 1.0


def shares(counts: Sequence[float]) -> list[float]:
    """Weights that sum to 1, in proportion to these counts.

    Raises:
        MergeError: none is above 0, or one is negative.
    """
    total = sum(counts)
    if total <= 0 or min(counts) < 0:
        raise MergeError(f"client weights {list(counts)}: expected numbers from 0 on, not all 0.")
    return [one / total for one in counts]


def mean_of_factors(updates: Sequence[Factors], weights: Sequence[float]) -> Aggregate:
    """FedAvg on LoRA factors (FedIT, arXiv:2305.05644): mean of A, mean of s B. Not the mean of the products.

    Raises:
        MergeError: clients differ in ranks, which have no mean.
    """
    found = {}
    for module, parts in _by_module(updates).items():
        if len({one.rank for one in parts}) > 1:
            ranks = sorted({one.rank for one in parts})
            raise MergeError(
                f"{module}: clients have the ranks {ranks}; factors of different ranks have no mean.",
                remedy="Use flora or flexlora.",
            )
        a_RI = sum(weight * one.a_RI.float() for weight, one in zip(weights, parts, strict=True))
        b_OR = sum(weight * one.scale * one.b_OR.float() for weight, one in zip(weights, parts, strict=True))
        assert isinstance(a_RI, Tensor)
        assert isinstance(b_OR, Tensor)
        found[module] = Factor(a_RI, b_OR, 1.0, parts[0].transposed)
    return Aggregate(found)


def stacked(updates: Sequence[Factors], weights: Sequence[float]) -> Aggregate:
    """FLoRA (arXiv:2409.05976): the exact mean of the products as one adapter, [p_1 B_1 .. p_K B_K] [A_1; ..; A_K].

    Clients may have different ranks; ranks add up.
    """
    return Aggregate(concatenate([_in_float32(one) for one in updates], list(weights)))


def with_residual(updates: Sequence[Factors], weights: Sequence[float]) -> Aggregate:
    """FedEx-LoRA (arXiv:2410.09432): the mean of the factors, and beside it what the exact mean has more.

    W += sum p_k B_k A_k - B A with B, A the means. The residual is itself low-rank: the clients' products less the
    naive one. Both together are one adapter, and exact. Fed-TaLoRA (arXiv:2505.12318) corrects one shared adapter by a
    residual after aggregation in the same way, as far as its abstract says.
    """
    naive = mean_of_factors(updates, weights).factors
    residual = concatenate([*map(_in_float32, updates), naive], [*weights, -1.0])
    return Aggregate(concatenate([naive, residual]))


def mean_of_b(updates: Sequence[Factors], weights: Sequence[float]) -> Aggregate:
    """FFA-LoRA (arXiv:2403.12313): all clients kept one A, so the mean of B is the exact mean, at half the traffic.

    Raises:
        MergeError: a client's A is not the others', bit for bit.
    """
    found = {}
    for module, parts in _by_module(updates).items():
        if any(not torch.equal(one.a_RI, parts[0].a_RI) for one in parts):
            raise MergeError(f"{module}: a client has trained A; FFA-LoRA keeps it as it was.")
        b_OR = sum(weight * one.scale * one.b_OR.float() for weight, one in zip(weights, parts, strict=True))
        assert isinstance(b_OR, Tensor)
        found[module] = Factor(parts[0].a_RI.float(), b_OR, 1.0, parts[0].transposed)
    return Aggregate(found)


def truncated(factors: Factors, rank: int) -> Aggregate:
    """The nearest update of at most this rank: a truncated SVD, from the factors alone.

    B = Q_b R_b and A' = Q_a R_a, so that B A has the singular values of the small R_b R_a'.
    """
    found, kept, whole = {}, 0.0, 0.0
    for module, one in factors.items():
        q_b, r_b = torch.linalg.qr(one.b_OR.double() * one.scale)
        q_a, r_a = torch.linalg.qr(one.a_RI.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        k = min(rank, len(s))
        kept, whole = kept + float(s[:k].square().sum()), whole + float(s.square().sum())
        root = s[:k].sqrt()
        b_OR, a_RI = (q_b @ u[:, :k]) * root, root[:, None] * (vh[:k] @ q_a.T)
        found[module] = Factor(a_RI.float(), b_OR.float(), 1.0, one.transposed)
    return Aggregate(found, kept / whole if whole > 0 else 1.0)


def flexlora(updates: Sequence[Factors], weights: Sequence[float], rank: int) -> Aggregate:
    """FlexLoRA (arXiv:2402.11505): the mean of the products, cut back to a rank by SVD; clients' ranks may differ."""
    return truncated(stacked(updates, weights).factors, rank)


def robust(updates: Sequence[Factors], rank: int, *, trim: float | None) -> Aggregate:
    """Entry by entry the median of the clients' products, or their mean without the extremes, cut back to a rank.

    Every client counts alike: a weight is what a poisoned client would lie about. Forms one (O, I) matrix per client
    and module, a module at a time.

    Args:
        trim: share of the clients left out at each end (Yin et al. 2018, arXiv:1803.01498); None for the median.

    Raises:
        MergeError: nothing would be left.
    """
    found: dict[str, Factor] = {}
    energies = []
    for module, parts in _by_module(updates).items():
        products_KOI = torch.stack([one.b_OR.double() @ one.a_RI.double() * one.scale for one in parts])
        middle_OI = _median(products_KOI) if trim is None else _trimmed_mean(products_KOI, trim)
        u, s, vh = torch.linalg.svd(middle_OI, full_matrices=False)
        k = min(rank, len(s))
        root = s[:k].sqrt()
        found[module] = Factor((root[:, None] * vh[:k]).float(), (u[:, :k] * root).float(), 1.0, parts[0].transposed)
        energies.append((float(s[:k].square().sum()), float(s.square().sum())))
    whole = sum(one for _, one in energies)
    return Aggregate(found, sum(one for one, _ in energies) / whole if whole > 0 else 1.0)


def aggregate(
    rule: Rule, updates: Sequence[Factors], weights: Sequence[float], *, rank: int, trim: float = 0.2
) -> Aggregate:
    """All clients' updates as one, under a rule.

    Args:
        weights: sum to 1; `median` and `trimmed_mean` do not read them.
        rank: of the result, where the rule cuts back.
        trim: of `trimmed_mean`.

    Raises:
        MergeError: no update, or updates that do not fit the rule.
    """
    if not updates:
        raise MergeError("no client has sent an update that may be used.", remedy="See what was refused, and why.")
    rules: Mapping[Rule, Callable[[], Aggregate]] = {
        "fedavg": lambda: mean_of_factors(updates, weights),
        "fedex": lambda: with_residual(updates, weights),
        "fed_talora": lambda: with_residual(updates, weights),
        "ffa": lambda: mean_of_b(updates, weights),
        "flora": lambda: stacked(updates, weights),
        "flexlora": lambda: flexlora(updates, weights, rank),
        "median": lambda: robust(updates, rank, trim=None),
        "trimmed_mean": lambda: robust(updates, rank, trim=trim),
    }
    return rules[rule]()


def aggregation_error(found: Factors, updates: Sequence[Factors], weights: Sequence[float]) -> float:
    """Distance of an aggregate from the true mean of the products, relative to that mean's norm, over all modules.

    Computed from inner products of factors, in float64: |X - Y| of two low-rank matrices needs neither.
    """
    exact = stacked(updates, weights).factors
    difference = concatenate([found, exact], [1.0, -1.0])
    square = sum(squared_norm(one) for one in difference.values())
    whole = sum(squared_norm(one) for one in exact.values())
    return (square / whole) ** 0.5 if whole > 0 else 0.0


def squared_norm(factor: Factor) -> float:
    """Squared Frobenius norm of s B A, in float64, without forming it.

    From B = Q R as |R A|: from Gram matrices a small product of large factors, whose parts cancel, would come out as 0.
    """
    r = torch.linalg.qr(factor.b_OR.double()).R
    return float((r @ factor.a_RI.double() * factor.scale).square().sum())


def _by_module(updates: Sequence[Factors]) -> dict[str, list[Factor]]:
    return {module: [one[module] for one in updates] for module in sorted(updates[0])}


def _in_float32(factors: Factors) -> dict[str, Factor]:
    return {name: replace(one, a_RI=one.a_RI.float(), b_OR=one.b_OR.float()) for name, one in factors.items()}


def _median(values_KOI: Tensor) -> Tensor:
    """The middle value; of an even number the mean of the two in the middle."""
    ordered = values_KOI.sort(dim=0).values
    clients = len(ordered)
    return (ordered[(clients - 1) // 2] + ordered[clients // 2]) / 2


def _trimmed_mean(values_KOI: Tensor, trim: float) -> Tensor:
    clients = len(values_KOI)
    out = int(trim * clients + 1e-9)
    if 2 * out >= clients:
        raise MergeError(f"trim {trim:g} of {clients} clients leaves none.", remedy="Lower trim.")
    return values_KOI.sort(dim=0).values[out : clients - out].mean(dim=0)
