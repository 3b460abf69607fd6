"""The best adapter of a given rank for a stack of adapters, from their factors alone: no weight matrix is formed."""

# I inputs, O outputs, R rank of the whole stack, K rank asked for

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.model.adapter import Factor, Factors, concatenate


@dataclass(frozen=True)
class Compressed:
    """An adapter, and the share of the squared Frobenius norm of all the stack's updates that it holds."""

    factors: dict[str, Factor]
    held: float


def compress(stack: Sequence[Factors], rank: int) -> Compressed:
    """One adapter that comes as near to the sum of a stack as its rank allows.

    With B = Q_b R_b and A^T = Q_a R_a, the update B A is Q_b (R_b R_a^T) Q_a^T, so the singular values of the small
    (R, R) core are the update's, and its K largest give the nearest matrix of rank K in the Frobenius norm (Eckart and
    Young 1936). Exact where the stack has no more rank than is asked for. Each factor gets the square root of the
    singular values.

    Args:
        stack: adapters over one base, from the bottom up.
        rank: largest rank of a module's update.

    Returns:
        Factors in float32 with scale 1, at most of that rank: a module whose stack has less keeps less.
    """
    found, kept, whole = {}, 0.0, 0.0
    for name, factor in concatenate(stack).items():
        a_KI, b_OK, singular_R = _nearest(factor.a_RI, factor.b_OR * factor.scale, rank)
        found[name] = Factor(a_KI, b_OK, 1.0, factor.transposed)
        squares = singular_R.square()
        kept, whole = kept + float(squares[:rank].sum()), whole + float(squares.sum())
    return Compressed(found, kept / whole if whole > 0.0 else 1.0)


def _nearest(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors A and B of the nearest update of this rank, and all singular values of the whole one, largest first."""
    left_OR, right_RR = torch.linalg.qr(b_OR.double())
    other_IR, below_RR = torch.linalg.qr(a_RI.double().T)
    u_RK, singular_R, vh_KR = torch.linalg.svd(right_RR @ below_RR.T, full_matrices=False)
    count = min(rank, len(singular_R))
    root_K = singular_R[:count].sqrt()
    b_OK = (left_OR @ u_RK[:, :count]) * root_K
    a_KI = (root_K.unsqueeze(1) * vh_KR[:count]) @ other_IR.T
    return a_KI.float().contiguous(), b_OK.float().contiguous(), singular_R


def fill(trained: Mapping[str, Tensor], factors: Factors, *, scale: float) -> None:
    """Begin a new adapter at these factors, in place, whatever it held.

    Ranks that the factors leave free keep the adapter's own A, and B zero, so that they can be learnt.

    Args:
        trained: parameters of the adapter by name, `<module>.lora_A` and `<module>.lora_B`.
        scale: of the adapter, alpha / rank: its update is scale * B @ A.
    """
    root = math.sqrt(scale)
    with torch.no_grad():
        for name, factor in factors.items():
            a_RI, b_OR = trained[f"{name}.lora_A"], trained[f"{name}.lora_B"]
            a_RI[: factor.rank] = (factor.a_RI / root).to(a_RI.dtype)
            b_OR.zero_()
            b_OR[:, : factor.rank] = (factor.b_OR * factor.scale / root).to(b_OR.dtype)
