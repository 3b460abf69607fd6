"""The distillation losses against numbers worked out by hand, against scipy, and against TRL's GKD."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from evertune.train.distill_losses import at_temperature, divergence_of, generalised_jsd, mixture, pooled_words
from evertune.train.losses import bucket, forward_kl, reverse_kl, top_words

CASES: list[tuple[Any, float]] = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def _logits(seed: int, n: int = 7, v: int = 23, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3.0


def _logp(seed: int, n: int = 7, v: int = 23) -> Tensor:
    return _logits(seed, n, v).log_softmax(-1)


def test_temperature_two_takes_the_square_root_of_the_odds():
    # Odds 9 : 1 become 3 : 1.
    found = at_temperature(torch.tensor([[0.9, 0.1]]).log(), 2.0).exp()
    assert found.tolist()[0] == pytest.approx([0.75, 0.25])


def test_temperature_one_changes_no_bit():
    logp = _logp(0).float()
    assert at_temperature(logp, 1.0) is logp


def test_generalised_jsd_of_two_certain_opposites_is_the_entropy_of_beta():
    # Nothing in common: mix = (beta, 1 - beta), so -beta ln beta - (1 - beta) ln(1 - beta).
    student, teacher = torch.tensor([[1e-30, 1.0]]).log(), torch.tensor([[1.0, 1e-30]]).log()
    expected = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert generalised_jsd(student, teacher, 0.25).item() == pytest.approx(expected, rel=1e-6)


def test_generalised_jsd_by_hand():
    # Teacher (1/2, 1/2), student (1/4, 3/4), beta 1/2: mix (3/8, 5/8).
    # 1/2 [1/2 ln 4/3 + 1/2 ln 4/5] + 1/2 [1/4 ln 2/3 + 3/4 ln 6/5].
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_teacher = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    by_student = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    found = generalised_jsd(student, teacher, 0.5).item()
    assert found == pytest.approx(0.5 * by_teacher + 0.5 * by_student, rel=1e-5)


def test_half_and_half_is_the_square_of_scipys_jensen_shannon_distance():
    student, teacher = _logp(1), _logp(11)
    expected = [jensenshannon(p, q) ** 2 for p, q in zip(student.exp().numpy(), teacher.exp().numpy(), strict=True)]
    assert generalised_jsd(student, teacher, 0.5).numpy() == pytest.approx(np.array(expected))


def test_at_its_ends_the_generalised_jsd_is_the_one_or_the_other_kl():
    student, teacher = _logp(2), _logp(12)
    tiny = 1e-7
    assert torch.allclose(generalised_jsd(student, teacher, tiny) / tiny, forward_kl(student, teacher), rtol=1e-3)
    assert torch.allclose(generalised_jsd(student, teacher, 1 - tiny) / tiny, reverse_kl(student, teacher), rtol=1e-3)


def test_forward_is_the_teacher_against_the_student_and_reverse_the_other_way():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3; KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 ln 1/2 + 3/4 ln 3/2.
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward, reverse = (divergence_of(name, beta=0.5)(student, teacher).item() for name in ("forward_kl", "reverse_kl"))
    assert forward == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


@pytest.mark.parametrize(("name", "beta"), CASES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_loss_and_gradient_equal_trls_in_float32(name, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    student, teacher = (_logits(seed, n=12, v=301, dtype=torch.float32) for seed in (3, 13))
    theirs, ours = (student.clone().requires_grad_() for _ in range(2))
    their_beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(name, beta)
    # TRL sums over (rows, positions, vocabulary) and divides by the rows; ours leaves the division to the loop.
    their_loss = gkd(theirs[None], teacher[None], beta=their_beta, temperature=temperature, reduction="sum")
    logp, teacher_logp = (at_temperature(one.log_softmax(-1), temperature) for one in (ours, teacher))
    our_loss = divergence_of(name, beta=beta)(logp, teacher_logp).sum()
    their_loss.backward()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name, beta):
    logits = _logits(4).requires_grad_()
    loss = divergence_of(name, beta=beta)(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 22),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    case=st.sampled_from(CASES),
)
@settings(max_examples=60, deadline=None)
def test_over_buckets_every_loss_is_a_lower_bound(seed, k, temperature, case):
    divergence = divergence_of(case[0], beta=case[1])
    student, teacher = (at_temperature(_logp(one), temperature) for one in (seed, seed + 50_000))
    ids, kept = top_words(teacher, k)
    bound, exact = divergence(bucket(student, ids), kept), divergence(student, teacher)
    assert (bound >= -1e-12).all()
    assert (bound <= exact + 1e-12).all()
    if k == 22:
        assert torch.allclose(bound, exact, atol=1e-9)


@pytest.mark.parametrize(("name", "beta"), CASES)
def test_the_gradient_of_each_bound_is_exact(name, beta):
    ids, kept = top_words(at_temperature(_logp(15, n=3, v=8), 2.0), 3)
    divergence = divergence_of(name, beta=beta)

    def loss(logits: Tensor) -> Tensor:
        return divergence(bucket(at_temperature(logits.log_softmax(-1), 2.0), ids), kept)

    assert torch.autograd.gradcheck(loss, (_logits(5, n=3, v=8).requires_grad_(),))


def test_an_ensemble_is_the_mean_of_probabilities_not_of_logits():
    # 3/4 of (0.8, 0.2) and 1/4 of (0.4, 0.6): (0.7, 0.3). Weights count relative to their sum.
    members = [torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()]
    assert mixture(members, [3.0, 1.0]).exp().tolist()[0] == pytest.approx([0.7, 0.3])


def test_an_ensemble_of_one_is_its_member():
    logp = _logp(6)
    assert torch.allclose(mixture([logp], [2.0]), logp)


def test_the_buckets_of_an_ensemble_are_the_ensemble_of_the_buckets():
    members, weights = [_logp(seed) for seed in (7, 17, 27)], [1.0, 2.0, 5.0]
    ids = pooled_words([top_words(one, 3)[0] for one in members], 23)
    pooled = mixture([bucket(one, ids) for one in members], weights)
    assert torch.allclose(pooled, bucket(mixture(members, weights), ids))


def test_pooled_words_hold_every_kept_word_once_and_fill_up_with_the_first_others():
    pooled = pooled_words([torch.tensor([[5, 2]]), torch.tensor([[2, 9]])], 12)
    assert sorted(pooled[0].tolist()) == [0, 2, 5, 9]


@given(seed=st.integers(0, 10_000), k=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_pooled_words_are_a_set(seed, k):
    kept = [top_words(_logp(one), k)[0] for one in (seed, seed + 1, seed + 2)]
    pooled = pooled_words(kept, 23)
    for row, *parts in zip(pooled.tolist(), *(one.tolist() for one in kept), strict=True):
        assert len(set(row)) == len(row) == 3 * k
        assert set(row) >= {word for part in parts for word in part}


def test_pooled_words_that_fill_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="8 kept words of a vocabulary of 8"):
        pooled_words([torch.arange(4)[None], torch.arange(4, 8)[None]], 8)


def test_forward_kl_covers_and_reverse_kl_seeks():
    """A student of one hump against a teacher of two: forward spreads over both, reverse chooses one."""
    words = torch.arange(21, dtype=torch.float64)

    def hump(centre: Tensor, log_width: Tensor) -> Tensor:
        return (-(((words - centre) / log_width.exp()) ** 2) / 2).log_softmax(-1)[None]

    two = torch.logaddexp(hump(torch.tensor(4.0), torch.tensor(0.0)), hump(torch.tensor(16.0), torch.tensor(0.0)))
    widths = {name: _fitted_width(divergence_of(name, beta=0.5), hump, two.log_softmax(-1)) for name in _TWO}
    assert widths["forward_kl"] > 4.0
    assert widths["reverse_kl"] < 2.0


_TWO: list[Any] = ["forward_kl", "reverse_kl"]


def _fitted_width(
    divergence: Callable[[Tensor, Tensor], Tensor], hump: Callable[[Tensor, Tensor], Tensor], teacher: Tensor
) -> float:
    centre = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    log_width = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([centre, log_width], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        divergence(hump(centre, log_width), teacher).sum().backward()
        optimizer.step()
    return float(log_width.detach().exp())
