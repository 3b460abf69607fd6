"""Output drift against closed forms, numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from evertune.measure.habits import largest_share
from evertune.measure.outputs import calibration_error, kl_sum, linear_cka, spectral_norm


def test_kl_is_that_of_scipy_summed_over_positions() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(7), size=3) for _ in range(2))
    expected = sum(stats.entropy(a, b) for a, b in zip(p, q, strict=True))
    assert kl_sum(torch.tensor(np.log(p)), torch.tensor(np.log(q))) == pytest.approx(expected)
    assert kl_sum(torch.tensor(np.log(p)), torch.tensor(np.log(p))) == 0.0


def test_cka_knows_a_rotation_and_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert linear_cka(X, 3 * X @ rotation + 1) == pytest.approx(1.0, abs=1e-5)
    # Two independent sets: about H / N.
    assert linear_cka(X, torch.randn(200, 8, generator=generator)) < 0.1
    assert linear_cka(X, torch.ones(200, 8)) == 0.0


def test_cka_is_the_hsic_ratio_of_its_paper() -> None:
    rng = np.random.default_rng(1)
    X, Y = rng.normal(size=(2, 30, 4))
    H = np.eye(30) - 1 / 30
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    expected = np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L))
    assert linear_cka(torch.tensor(X), torch.tensor(Y)) == pytest.approx(expected)


def test_the_spectral_norm_is_the_largest_singular_value() -> None:
    rng = np.random.default_rng(2)
    A = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 15))
    expected = np.linalg.svd(A)[1][0]
    assert spectral_norm(torch.tensor(A)) == pytest.approx(expected, rel=0.02)
    assert spectral_norm(torch.zeros(4, 5)) == 0.0
    assert spectral_norm(torch.diag(torch.tensor([1.0, 5.0, 2.0]))) == pytest.approx(5.0, rel=1e-3)


def test_calibration_error_by_hand() -> None:
    # Two bins: 0.95 sure and right every other time (off by 0.45), 0.25 sure and never right (off by 0.25).
    assert calibration_error([0.95, 0.95, 0.25, 0.25], [1, 0, 0, 0]) == pytest.approx(0.35)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0.0


def test_a_model_that_always_says_the_same_has_a_share_of_one() -> None:
    assert largest_share(["yes"] * 4) == ("yes", 1.0)
    assert largest_share(["yes", "no", "yes", "maybe"]) == ("yes", 0.5)
