"""Each statistic against statsmodels, scipy, a closed form or a table; error rates by seeded simulation."""

from collections.abc import Callable

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from evertune.measure import stats

Z95 = 1.6448536269514722


def _alone(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def _in_groups(groups: int, size: int) -> list[str]:
    return [f"g{i // size}" for i in range(groups * size)]


def _score_test_by_likelihood(b: int, c: int, n: int, D: float) -> float:
    """Tango's score with q found by maximising the multinomial likelihood, not by his quadratic."""

    def loss(q: float) -> float:
        shares = np.array([q, q + D, 1 - 2 * q - D])
        counts = np.array([b, c, n - b - c])
        return -float(np.sum(counts * np.log(np.maximum(shares, 1e-300))))

    low, high = max(0.0, -D), (1 - D) / 2
    q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (c - b - n * D) / np.sqrt(n * (2 * q + D - D * D))


@pytest.mark.parametrize(("b", "c", "n"), [(3, 1, 40), (12, 5, 200), (0, 4, 60), (7, 0, 60), (30, 31, 100), (1, 0, 20)])
def test_tango_bound_inverts_the_score_test_with_the_likelihood_maximised_numerically(b: int, c: int, n: int) -> None:
    bound = stats.tango_lower_bound(b, c, n, 0.05)
    assert _score_test_by_likelihood(b, c, n, bound) == pytest.approx(Z95, abs=2e-3)


def test_tango_interval_is_the_published_one() -> None:
    # Airway responsiveness of 21 children, 7 against 1 discordant: Fagerland, Lydersen & Laake 2014 give the 95 %
    # asymptotic score interval -0.517 to -0.026.
    assert stats.tango_interval(7, 1, 21, 0.025) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("n", [20, 268, 1000])
def test_tango_bound_without_flips_has_a_closed_form(n: int) -> None:
    assert stats.tango_lower_bound(0, 0, n, 0.05) == pytest.approx(-(Z95**2) / (n + Z95**2), rel=1e-9)


def test_tango_bound_at_the_ends() -> None:
    assert stats.tango_lower_bound(10, 0, 10, 0.05) == -1.0
    assert -1 < stats.tango_lower_bound(9, 0, 10, 0.05) < -0.9
    assert 0 < stats.tango_lower_bound(0, 10, 10, 0.05) < 1


def test_least_numbers_of_items_are_where_the_bound_without_flips_crosses_the_margin() -> None:
    assert [stats.minimum_items(margin, 0.05) for margin in (0.01, 0.02, 0.03, 0.05, 0.1)] == [268, 133, 88, 52, 25]
    for margin in (0.01, 0.03, 0.1, 0.5):
        n = stats.minimum_items(margin, 0.05)
        assert stats.tango_lower_bound(0, 0, n, 0.05) > -margin >= stats.tango_lower_bound(0, 0, n - 1, 0.05)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 2), (9, 9), (14, 3), (60, 41)])
def test_exact_mcnemar_agrees_with_scipy_and_statsmodels(b: int, c: int) -> None:
    exact = stats.mcnemar_exact(b, c)
    if b + c:
        assert exact == pytest.approx(scipy_stats.binomtest(b, b + c, 0.5, alternative="greater").pvalue)
    if b >= c:
        table = [[10, b], [c, 10]]
        assert min(1.0, 2 * exact) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)


def test_midp_mcnemar_is_the_exact_one_less_half_of_what_was_seen() -> None:
    # b = 2, c = 1: P(X >= 2) = 4/8, P(X = 2) = 3/8.
    assert stats.mcnemar_midp(2, 1) == pytest.approx(4 / 8 - 3 / 16)
    assert stats.mcnemar(2, 1) == pytest.approx(4 / 8)
    assert stats.mcnemar(8, 2) == pytest.approx(stats.mcnemar_midp(8, 2))
    assert stats.mcnemar(0, 0) == 1.0


def test_cluster_mean_of_lone_items_is_the_ordinary_t() -> None:
    x = np.random.default_rng(0).normal(-0.1, 1.0, 40)
    found = stats.cluster_mean(x, _alone(40))
    test = scipy_stats.ttest_1samp(x, 0, alternative="less")
    assert found.p_harm() == pytest.approx(test.pvalue)
    interval = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.90)
    assert found.interval(0.05) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("weighted", [False, True])
def test_cluster_mean_agrees_with_statsmodels_cluster_covariance(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    groups = np.sort(rng.integers(25, size=150))
    x = rng.normal(size=25)[groups] + rng.normal(size=150)
    w = rng.uniform(1, 9, size=150) if weighted else np.ones(150)
    fit = sm.WLS(x, np.ones(150), weights=w).fit(cov_type="cluster", cov_kwds={"groups": groups})
    found = stats.cluster_mean(x, [str(g) for g in groups], w if weighted else None)
    assert found.mean == pytest.approx(fit.params[0])
    assert found.standard_error == pytest.approx(fit.bse[0])
    assert found.degrees == len(set(groups)) - 1


def test_one_cluster_shows_nothing() -> None:
    assert stats.cluster_mean([0.1, 0.2], ["a", "a"]).standard_error == np.inf
    found = stats.compare_paired([0.5, 0.5], ["a", "a"], level=0.05, bounded=True)
    assert (found.lower_bound, found.p_harm) == (-1.0, 1.0)


def test_sign_flips_agree_with_scipy() -> None:
    x = np.random.default_rng(2).normal(-0.4, 1.0, 11)
    test = scipy_stats.permutation_test(
        (x,), lambda v: v.sum(), permutation_type="samples", alternative="less", n_resamples=np.inf
    )
    assert stats.sign_flip(x) == pytest.approx(test.pvalue)
    # All eight clusters fell: of 2^8 signs only one is as bad.
    assert stats.sign_flip([-1.0] * 8) == pytest.approx(1 / 256)
    assert stats.sign_flip(np.zeros(5)) == 1.0


def test_many_clusters_are_flipped_by_a_fixed_draw() -> None:
    x = np.random.default_rng(3).normal(-0.3, 1.0, 25)
    assert stats.sign_flip(x) == stats.sign_flip(x)
    assert stats.sign_flip(x) == pytest.approx(scipy_stats.ttest_1samp(x, 0, alternative="less").pvalue, abs=0.02)


def test_few_clusters_are_tested_by_signs_and_many_by_t() -> None:
    # Six of eight clusters fall, one of them far: t does not trust the outlier, signs count it once.
    d = np.repeat([-9.0, -1, -1, -1, -1, -1, 0.5, 0.5], 3)
    few = stats.compare_paired(d, _in_groups(8, 3), level=0.05, bounded=False)
    assert few.p_harm == stats.sign_flip(d.reshape(8, 3).sum(axis=1))
    # By hand: of 2^8 signs, those with a sum of at most -13: every cluster down (-15), one small one up (-14, twice),
    # both small ones up (-13), or one of the five up (-13).
    assert few.p_harm == pytest.approx(9 / 256)
    many = np.tile(d, 4)
    found = stats.compare_paired(many, _in_groups(32, 3), level=0.05, bounded=False)
    assert found.p_harm == stats.cluster_mean(many, _in_groups(32, 3)).p_harm()


def test_holm_agrees_with_statsmodels() -> None:
    p = np.random.default_rng(4).uniform(0, 0.2, 12)
    assert stats.holm(list(p)) == pytest.approx(multipletests(p, method="holm")[1])
    # By hand: 0.01 * 3, then 0.02 * 2, then 0.04, each at least the one before.
    assert stats.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert stats.holm([]) == []


def test_interval_of_a_score_is_wilsons_or_the_cluster_t() -> None:
    x = np.array([1.0] * 30 + [0.0] * 10)
    assert stats.mean_interval(x, _alone(40)) == pytest.approx(proportion_confint(30, 40, alpha=0.1, method="wilson"))
    low, high = stats.mean_interval(np.ones(40), _in_groups(10, 4))
    assert (low, high) == pytest.approx(proportion_confint(10, 10, alpha=0.1, method="wilson"))
    low, high = stats.mean_interval(x, _in_groups(10, 4))
    assert (low, high) == pytest.approx(np.clip(stats.cluster_mean(x, _in_groups(10, 4)).interval(0.05), 0, 1))
    assert stats.mean_interval([0.0, 1.0], ["a", "a"]) == (0.0, 1.0)
    assert stats.mean_interval([1.5, 1.7], ["a", "a"]) == (1.5, 1.7)


def test_sample_sizes_are_those_of_the_closed_form() -> None:
    # (1.645 + 0.842)^2 = 6.1826 times psi over the square of the margin.
    assert stats.items_needed(0.05, 0.03, 0.05) == 344
    assert stats.items_needed(0.10, 0.01, 0.05) == 6183
    assert stats.items_needed(0.10, 0.0, 0.05) is None
    assert stats.smallest_visible_drop(0.10, 200, 0.05) == pytest.approx(0.0556, abs=1e-4)
    assert stats.items_needed(0.1, stats.smallest_visible_drop(0.1, 500, 0.05), 0.05) in (500, 501)


def test_nothing_flipped_in_few_clusters_rules_out_no_rare_loss() -> None:
    still = stats.compare_paired(np.zeros(120), _in_groups(30, 4), level=0.05, bounded=True)
    assert still.lower_bound == pytest.approx(-(Z95**2) / (30 + Z95**2))
    moved = np.zeros(120)
    moved[0] = -1
    # One flip must not make the bound better than none.
    one = stats.compare_paired(moved, _in_groups(30, 4), level=0.05, bounded=True)
    assert one.lower_bound < still.lower_bound
    assert one.variance > 0


def test_a_loss_that_moved_nowhere_is_bounded_by_zero() -> None:
    found = stats.compare_paired(np.zeros(40), _alone(40), level=0.05, bounded=False)
    assert (found.lower_bound, found.ci90, found.p_harm) == (0.0, (0.0, 0.0), 1.0)
    fell = stats.compare_paired(np.full(40, -0.25), _alone(40), level=0.05, bounded=False)
    assert (fell.lower_bound, fell.p_harm) == (-0.25, 0.0)


def _rate(n: int, psi: float, truth: float, happens: Callable[[int, int], bool]) -> float:
    """Chance of an event over the flips (b, c) of n items: an exact sum, no draws."""
    flips = np.arange(int(n * psi) + 5 * int(np.sqrt(n * psi)) + 5)
    b, c = (one.ravel() for one in np.meshgrid(flips, flips))
    shares = [(psi - truth) / 2, (psi + truth) / 2, 1 - psi]
    kept = b + c <= n
    chances = scipy_stats.multinomial.pmf(np.stack([b, c, n - b - c], axis=1)[kept], n, shares)
    rows = zip(b[kept], c[kept], chances, strict=True)
    return float(sum(chance for x, y, chance in rows if chance > 1e-7 and happens(int(x), int(y))))


@pytest.mark.parametrize(("n", "psi"), [(80, 0.1), (200, 0.05), (300, 0.1)])
@pytest.mark.parametrize("truth", [-0.03, 0.0])
def test_tango_bound_is_above_the_truth_about_once_in_twenty(n: int, psi: float, truth: float) -> None:
    # Flips are whole numbers, so the rate jumps round 5 % and is not below it everywhere.
    missed = _rate(n, psi, truth, lambda b, c: stats.tango_lower_bound(b, c, n, 0.05) > truth)
    assert 0.03 < missed < 0.06


@pytest.mark.parametrize(("n", "psi"), [(80, 0.1), (200, 0.05), (300, 0.1)])
def test_mcnemar_raises_a_false_alarm_about_once_in_twenty(n: int, psi: float) -> None:
    assert 0.02 < _rate(n, psi, 0.0, lambda b, c: stats.mcnemar(b, c) <= 0.05) < 0.055


@pytest.mark.parametrize("groups", [10, 20, 60])
def test_clustered_items_keep_the_level_that_items_taken_alone_would_break(groups: int) -> None:
    rng = np.random.default_rng(10)
    clusters, robust, naive = _in_groups(groups, 5), 0, 0
    for _ in range(600):
        d = np.repeat(rng.normal(size=groups), 5) + 0.5 * rng.normal(size=groups * 5)
        robust += stats.compare_paired(d, clusters, level=0.05, bounded=False).p_harm <= 0.05
        naive += stats.compare_paired(d, _alone(len(d)), level=0.05, bounded=False).p_harm <= 0.05
    assert robust / 600 < 0.08
    assert naive / 600 > 0.15


def test_the_bootstrap_bound_is_scipys() -> None:
    x = np.random.default_rng(0).exponential(size=120) - 1
    ours = stats.bca_lower_bound(x, [str(i) for i in range(120)], 0.05)
    theirs = scipy_stats.bootstrap((x,), np.mean, confidence_level=0.90, method="BCa", n_resamples=20_000, rng=1)
    assert ours == pytest.approx(theirs.confidence_interval.low, abs=0.006)


def test_the_bootstrap_draws_clusters_whole() -> None:
    # Each value four times in a cluster is the same evidence as once; four times alone would be too much.
    x = np.random.default_rng(1).exponential(size=60) - 1
    clusters = [f"g{i}" for i in range(60)]
    once = stats.bca_lower_bound(x, clusters, 0.05)
    assert stats.bca_lower_bound(np.repeat(x, 4), np.repeat(clusters, 4).tolist(), 0.05) == pytest.approx(once)
    alone = stats.bca_lower_bound(np.repeat(x, 4), [str(i) for i in range(240)], 0.05)
    assert alone is not None and once is not None
    assert alone > once + 0.05


def test_the_bootstrap_says_nothing_of_few_clusters_or_extreme_levels() -> None:
    x = np.random.default_rng(2).normal(size=40)
    ids = [str(i) for i in range(40)]
    assert stats.bca_lower_bound(x[:29], ids[:29], 0.05) is None
    assert stats.bca_lower_bound(x, ids, 1e-4) is None
    assert stats.bca_lower_bound(np.ones(40), ids, 0.05) is None


def test_a_rare_large_loss_is_seen_by_the_bootstrap_before_the_t_bound() -> None:
    # 300 documents a little better, three of them much worse: the t bound is nearer to the mean than it should be.
    x = np.full(300, 0.002) + np.random.default_rng(3).normal(scale=0.002, size=300)
    x[[10, 100, 200]] = -0.4
    ids = [str(i) for i in range(300)]
    t_bound = stats.cluster_mean(x, ids).lower_bound(0.05)
    check = stats.bca_lower_bound(x, ids, 0.05)
    assert check is not None
    assert check < t_bound
