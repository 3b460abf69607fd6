"""The losses against numbers worked out by hand and against torch's own definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from evertune.train.losses import bucket, cross_entropy_sum, forward_kl, reverse_kl, top_words


def _logp(seed: int, n: int = 7, v: int = 23, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread).log_softmax(-1)


def test_cross_entropy_is_the_summed_surprise_of_the_targets():
    # Words with probability 1/2 and 1/4: ln 2 + ln 4.
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    assert cross_entropy_sum(logp, torch.tensor([0, 1])).item() == pytest.approx(math.log(8))


def test_forward_kl_is_the_reference_against_the_policy():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3.
    reference, policy = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert forward_kl(policy, reference).item() == pytest.approx(expected)


def test_reverse_kl_is_the_policy_against_the_reference():
    # KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln 1/2 + 3/4 ln 3/2.
    reference, policy = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert reverse_kl(policy, reference).item() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_both_directions_equal_torchs_kl_div(seed: int):
    policy, reference = _logp(seed), _logp(seed + 10)
    forward = F.kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(reference, policy, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(forward_kl(policy, reference), forward, atol=1e-12)
    assert torch.allclose(reverse_kl(policy, reference), reverse, atol=1e-12)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence):
    logits = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kl = divergence(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert kl.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_buckets_hold_the_kept_words_and_the_rest_together():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    ids, kept = top_words(logp, 2)
    assert ids.tolist() == [[0, 1]]
    assert kept.exp().tolist()[0] == pytest.approx([0.5, 0.3, 0.2])


def test_a_tail_of_one_part_in_a_billion_keeps_its_digits():
    logits = torch.full((1, 1000), -30.0)
    logits[0, 3] = 0.0
    _, kept = top_words(logits.log_softmax(-1), 1)
    assert kept[0, 1].item() == pytest.approx(math.log(999) - 30.0, rel=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
@pytest.mark.parametrize("k", [1, 4, 22])
def test_the_bucketed_divergence_is_a_lower_bound_and_exact_when_nothing_is_pooled(divergence, k: int):
    policy, reference = _logp(2), _logp(12)
    ids, ref_kept = top_words(reference, k)
    bound = divergence(bucket(policy, ids), ref_kept)
    exact = divergence(policy, reference)
    assert (bound <= exact + 1e-12).all()
    if k == 22:
        assert torch.allclose(bound, exact, atol=1e-9)
    else:
        assert (bound < exact).all()


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_the_gradient_of_the_bound_is_exact(divergence):
    reference = _logp(12, n=3, v=8)
    ids, ref_kept = top_words(reference, 3)
    logits = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(bucket(x.log_softmax(-1), ids), ref_kept), (logits,))


def test_keeping_the_whole_vocabulary_leaves_no_tail_and_is_refused():
    with pytest.raises(ValueError, match="k is 23"):
        top_words(_logp(0), 23)
