"""Losses as pure functions of tensors: cross-entropy, and the divergences of the anchor. All in nats, all float32.

Per-position values come back unreduced or as sums, so that the caller divides once by the count of the whole step:
a mean of micro-batch means would weigh tokens by the size of the micro-batch they fell into.
"""

# N positions, V vocabulary (or buckets of it), K kept words, L = K + 1 buckets

import torch
from torch import Tensor


def cross_entropy_sum(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Summed negative log-likelihood of the target words, a scalar in nats.

    Args:
        logp_NV: log-probabilities, float32.
        targets_N: word ids in [0, V).
    """
    return -logp_NV.gather(1, targets_N.unsqueeze(1)).sum()


def forward_kl(logp_NV: Tensor, ref_logp_NV: Tensor) -> Tensor:
    """KL(reference || policy) at each position, (N,) in nats: 0 when the two agree, large where the policy has lost
    what the reference could say.

    Args:
        logp_NV: the policy's log-probabilities, float32, finite, each row normalised.
        ref_logp_NV: the frozen reference's, the same shape, without gradient.
    """
    return (ref_logp_NV.exp() * (ref_logp_NV - logp_NV)).sum(dim=-1)


def reverse_kl(logp_NV: Tensor, ref_logp_NV: Tensor) -> Tensor:
    """KL(policy || reference) at each position, (N,) in nats: large where the policy says what the reference would not.

    The penalty of Ziegler et al. 2019 (arXiv:1909.08593), over the full vocabulary instead of sampled words.
    Arguments as for `forward_kl`.
    """
    return (logp_NV.exp() * (logp_NV - ref_logp_NV)).sum(dim=-1)


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl}


def top_words(ref_logp_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely words of each position and their log-probabilities, with all others in one tail bucket.

    Returns:
        ids (N, k) int64 and log-probabilities (N, k + 1) float32, the tail's in the last column.

    Raises:
        ValueError: k is not below V, so nothing would be left for the tail.
    """
    if not 0 < k < ref_logp_NV.shape[1]:
        raise ValueError(f"k is {k}; expected 1 to {ref_logp_NV.shape[1] - 1}, one below the vocabulary")
    ids_NK = ref_logp_NV.topk(k, dim=1).indices
    return ids_NK, bucket(ref_logp_NV, ids_NK)


def bucket(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities (N, K + 1) of the named words and of all others together, the latter in the last column.

    A divergence between two bucketed distributions is a lower bound of the divergence between the full ones, in both
    directions (log-sum inequality), and its gradient is exact for that bound. The tail is summed over its own words:
    one minus the mass of the kept words would cancel to nothing where these hold almost all of it.
    """
    tail_N = logp_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1)
    return torch.cat([logp_NV.gather(1, ids_NK), tail_N.unsqueeze(1)], dim=1)
