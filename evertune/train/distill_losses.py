"""Distillation losses as pure functions: how far the student's distribution is from the teachers', per position.

All in nats, all float32, unreduced. A "word" is an entry of the vocabulary. Each loss also takes distributions over
buckets of words (`losses.bucket`): merging words never raises an f-divergence, so it is then a lower bound of the loss
over the full vocabulary, and its gradient is exact for that bound.
"""

# N positions, V vocabulary, L words or buckets, E teachers, K kept words of one teacher, J kept words of all (E * K)

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from evertune.train.losses import forward_kl, reverse_kl

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def at_temperature(logp_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the same logits divided by a temperature: above 1 flatter, 1 unchanged.

    Log-probabilities differ from logits by a constant of the row, which the softmax takes out again.

    Args:
        temperature: above 0.
    """
    return logp_NV if temperature == 1.0 else (logp_NV / temperature).log_softmax(dim=-1)


def generalised_jsd(logp_NL: Tensor, teacher_logp_NL: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence at each position, (N,) in nats: between forward and reverse KL.

    beta KL(teacher || mix) + (1 - beta) KL(student || mix) with mix = beta teacher + (1 - beta) student: equation 1 of
    Agarwal et al. 2023 (GKD, arXiv:2306.13649). Bounded by the entropy of beta; divided by beta it tends to
    KL(teacher || student) as beta goes to 0, divided by 1 - beta to KL(student || teacher) as beta goes to 1.

    Args:
        logp_NL: the student's log-probabilities, float32, each row normalised.
        teacher_logp_NL: the teacher's, the same shape, without gradient.
        beta: weight of the teacher in the mixture, above 0 and below 1.
    """
    mix_NL = torch.logaddexp(teacher_logp_NL + math.log(beta), logp_NL + math.log1p(-beta))
    return beta * forward_kl(mix_NL, teacher_logp_NL) + (1.0 - beta) * reverse_kl(logp_NL, mix_NL)


def divergence_of(name: Divergence, *, beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of a name, as a function of (student's, teacher's) log-probabilities.

    `forward_kl` is KL(teacher || student) (Hinton et al. 2015, arXiv:1503.02531): the student covers all that the
    teacher says. `reverse_kl` is KL(student || teacher) (MiniLLM, arXiv:2306.08543, here over the whole distribution):
    the student says only what the teacher would. `jsd` is between the two, and the only one that reads `beta`.
    """
    if name == "jsd":
        return lambda logp_NL, teacher_logp_NL: generalised_jsd(logp_NL, teacher_logp_NL, beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[name]


def mixture(logp_ENL: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Log-probabilities (N, L) of an ensemble: the weighted mean of its members' probabilities.

    Args:
        logp_ENL: each member's log-probabilities (N, L) over the same words or buckets.
        weights: one of each member, above 0; their sum counts as 1.
    """
    total = math.fsum(weights)
    shifted = [logp_NL + math.log(one / total) for logp_NL, one in zip(logp_ENL, weights, strict=True)]
    return torch.stack(shifted).logsumexp(dim=0)


def pooled_words(ids_ENK: Sequence[Tensor], vocabulary: int) -> Tensor:
    """The kept words of several teachers together, (N, J) int64, each word once a row.

    Teachers that keep the same word would leave a row short: it is filled up with the first words that none keeps. Any
    set of words is a sound bucketing, so the fill costs room and changes nothing.

    Args:
        ids_ENK: each teacher's kept words.

    Raises:
        ValueError: they fill the vocabulary, so nothing would be left for the tail.
    """
    count = sum(ids_NK.shape[1] for ids_NK in ids_ENK)
    if count >= vocabulary:
        raise ValueError(f"{count} kept words of a vocabulary of {vocabulary}; expected fewer")
    ids_NJ = torch.cat(list(ids_ENK), dim=1)
    kept_NV = torch.zeros((len(ids_NJ), vocabulary), dtype=torch.int64, device=ids_NJ.device)
    kept_NV.scatter_(1, ids_NJ, vocabulary)
    # Kept words first, then by id: no two ranks are equal, so the choice does not hang on how ties are broken.
    rank_NV = kept_NV - torch.arange(vocabulary, device=ids_NJ.device)
    return rank_NV.topk(count, dim=1).indices
