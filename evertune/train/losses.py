"""Losses as pure functions of tensors: cross-entropy, the divergences of the anchor, preferences. All float32, in nats.

Per-position values come back unreduced or as sums, so that the caller divides once by the count of the whole step:
a mean of micro-batch means would weigh tokens by the size of the micro-batch they fell into.
"""

# N positions, V vocabulary (or buckets of it), K kept words, L = K + 1 buckets, P pairs

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


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


PreferenceLoss = Literal["sigmoid", "sigmoid_norm", "ipo"]


def preference_losses(
    chosen_P: Tensor,
    rejected_P: Tensor,
    *,
    chosen_tokens_P: Tensor,
    rejected_tokens_P: Tensor,
    loss: PreferenceLoss,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, (P,): small where the chosen answer has become likelier, against the rejected one, than
    it was to the reference.

    - `sigmoid`: -log sigmoid(beta * (chosen - rejected)), DPO (Rafailov et al. 2023, arXiv:2305.18290), ln 2 at the
      start. With label smoothing e it is (1 - e) of that plus e of the loss of the pair turned round: the conservative
      DPO of Mitchell 2023, for labels of which a share e is wrong.
    - `sigmoid_norm`: the same on log-ratios per token, so that long answers do not count for more (as in Tulu 3,
      arXiv:2411.15124, there with a beta of 5).
    - `ipo`: (chosen - rejected - 1 / (2 beta))^2 on log-ratios per token (Azar et al. 2023, arXiv:2310.12036, eq. 17),
      which stops pushing at a margin of 1 / (2 beta).

    Args:
        chosen_P, rejected_P: log-ratios log(policy / reference) in nats, summed over the answer's tokens.
        chosen_tokens_P, rejected_tokens_P: numbers of these tokens, at least 1.
        label_smoothing: in [0, 0.5); `ipo` does not read it.
    """
    if loss != "sigmoid":
        chosen_P, rejected_P = chosen_P / chosen_tokens_P, rejected_P / rejected_tokens_P
    margin_P = chosen_P - rejected_P
    if loss == "ipo":
        return (margin_P - 1.0 / (2.0 * beta)).square()
    right_P, wrong_P = -F.logsigmoid(beta * margin_P), -F.logsigmoid(-beta * margin_P)
    return (1.0 - label_smoothing) * right_P + label_smoothing * wrong_P


def group_advantages(rewards_AG: Tensor, *, scale: bool) -> Tensor:
    """How much better each answer is than its group's mean, (A, G): prompts by answers of one prompt.

    With `scale`, divided by the group's standard deviation plus 1e-4, as GRPO (Shao et al. 2024, arXiv:2402.03300)
    does, unbiased as in its common implementations; without, as Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), which
    shows that the division favours groups that nearly all fail or nearly all succeed.

    Args:
        rewards_AG: float32; NaN where a verifier failed: such an answer has the advantage 0 and is in no mean.
    """
    known_AG = ~rewards_AG.isnan()
    counts_A1 = known_AG.sum(dim=1, keepdim=True)
    mean_A1 = rewards_AG.nansum(dim=1, keepdim=True) / counts_A1.clamp(min=1)
    centred_AG = torch.where(known_AG, rewards_AG - mean_A1, 0.0)
    if not scale:
        return centred_AG
    variance_A1 = centred_AG.square().sum(dim=1, keepdim=True) / (counts_A1 - 1).clamp(min=1)
    return centred_AG / (variance_A1.sqrt() + 1e-4)


def clipped_surrogate(log_ratio_N: Tensor, advantages_N: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The policy-gradient loss of each token, (N,): -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(log ratio).

    PPO's objective (Schulman et al. 2017, arXiv:1707.06347); a higher upper bound is DAPO's (arXiv:2503.14476), which
    leaves unlikely words room to grow.

    Args:
        log_ratio_N: log(policy / policy that sampled), with gradient.
        advantages_N: of the answer that a token belongs to.
    """
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)


def sampled_kl(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) at each sampled token, (N,) in nats, never below 0: k3 of Schulman 2020.

    Unbiased where the tokens were sampled from the policy. Its gradient is not; multiplied by the ratio of the policy
    to the one that sampled, with the ratio's own gradient, value and gradient are those of the divergence on average
    (DeepSeek-V3.2, arXiv:2512.02556).
    """
    log_ratio_N = ref_logp_N - logp_N
    return log_ratio_N.exp() - log_ratio_N - 1.0
