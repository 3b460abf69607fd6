"""Aggregation against the mean of the products, formed without any of the code under test."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.errors import MergeError
from evertune.federated.aggregation import aggregate, aggregation_error, robust, shares, truncated
from evertune.federated.validation import check_update, norm_of, shapes_of
from evertune.model.adapter import Factor

SIZES = {"layers.0.q": (24, 16), "layers.1.up": (40, 16)}


def client(
    seed: int, rank: int = 4, *, a_seed: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Factor]:
    found = {}
    for i, (name, (outputs, inputs)) in enumerate(SIZES.items()):
        a = torch.Generator().manual_seed(1000 * (seed if a_seed is None else a_seed) + i)
        b = torch.Generator().manual_seed(77 + 1000 * seed + i)
        a_RI, b_OR = torch.randn(rank, inputs, generator=a), torch.randn(outputs, rank, generator=b)
        found[name] = Factor(a_RI.to(dtype), b_OR.to(dtype), 2.0)
    return found


def true_mean(updates: Sequence[dict[str, Factor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    return {
        name: sum(
            weight * one[name].scale * one[name].b_OR.double() @ one[name].a_RI.double()
            for weight, one in zip(weights, updates, strict=True)
        )
        for name in SIZES
    }


def error(found: dict[str, Factor], truth: dict[str, torch.Tensor]) -> float:
    off = sum(float((found[name].delta().double() - truth[name]).square().sum()) for name in SIZES)
    return (off / sum(float(one.square().sum()) for one in truth.values())) ** 0.5


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.1, 5.0), min_size=2, max_size=5))
@pytest.mark.parametrize("rule", ["fedex", "fed_talora", "flora"])
def test_exact_rules_give_the_mean_of_the_products(rule: str, counts: list[float]) -> None:
    updates, weights = [client(k) for k in range(len(counts))], shares(counts)
    found = aggregate(rule, updates, weights, rank=4).factors
    assert error(found, true_mean(updates, weights)) < 1e-6
    assert aggregation_error(found, updates, weights) < 1e-6


def test_the_mean_of_factors_is_off_by_tens_of_per_cent() -> None:
    updates, weights = [client(k) for k in range(3)], shares([1, 1, 1])
    found = aggregate("fedavg", updates, weights, rank=4).factors
    off = error(found, true_mean(updates, weights))
    assert off > 0.3
    assert aggregation_error(found, updates, weights) == pytest.approx(off, rel=1e-5)


def test_one_a_for_all_makes_the_mean_of_b_exact_and_another_a_is_refused() -> None:
    updates, weights = [client(k, a_seed=9) for k in range(3)], shares([1, 2, 3])
    assert error(aggregate("ffa", updates, weights, rank=4).factors, true_mean(updates, weights)) < 1e-6
    with pytest.raises(MergeError, match=r"layers\.0\.q: a client has trained A"):
        aggregate("ffa", [*updates[:2], client(2)], weights, rank=4)


def test_clients_may_have_different_ranks_where_products_are_averaged() -> None:
    updates, weights = [client(0, 2), client(1, 8), client(2, 4)], shares([1, 1, 2])
    truth = true_mean(updates, weights)
    found = aggregate("flora", updates, weights, rank=4)
    assert error(found.factors, truth) < 1e-6
    assert found.factors["layers.0.q"].rank == 14
    with pytest.raises(MergeError, match=r"ranks \[2, 4, 8\].*flora"):
        aggregate("fedavg", updates, weights, rank=4)


@pytest.mark.parametrize("rank", [1, 4, 14])
def test_flexlora_is_the_nearest_update_of_its_rank(rank: int) -> None:
    # Eckart and Young: numpy's SVD of the dense mean, cut off.
    import numpy as np

    updates, weights = [client(0, 2), client(1, 8), client(2, 4)], shares([1, 1, 2])
    found = aggregate("flexlora", updates, weights, rank=rank)
    kept = whole = 0.0
    for name, truth in true_mean(updates, weights).items():
        u, s, vh = np.linalg.svd(truth.numpy(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert np.allclose(found.factors[name].delta().numpy(), best, atol=1e-4)
        kept, whole = kept + (s[:rank] ** 2).sum(), whole + (s**2).sum()
    assert found.energy == pytest.approx(kept / whole, rel=1e-6)
    assert (found.energy == pytest.approx(1.0)) == (rank == 14)


def test_bfloat16_updates_are_summed_in_float32() -> None:
    updates, weights = [client(k, dtype=torch.bfloat16) for k in range(3)], shares([1, 1, 1])
    assert error(aggregate("flora", updates, weights, rank=4).factors, true_mean(updates, weights)) < 1e-6


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_one_poisoned_client_among_five_moves_the_middle_little_and_the_mean_far(rule: str) -> None:
    honest = client(0)
    near = [
        {name: Factor(one.a_RI, one.b_OR * (1 + 0.01 * k), one.scale) for name, one in honest.items()} for k in range(4)
    ]
    poison = {name: Factor(one.a_RI * 100, -one.b_OR, one.scale) for name, one in honest.items()}
    updates, weights = [*near, poison], shares([1] * 5)
    truth = true_mean(near, shares([1] * 4))
    assert error(aggregate(rule, updates, weights, rank=8, trim=0.2).factors, truth) < 0.03
    assert error(aggregate("flora", updates, weights, rank=8).factors, truth) > 10


def test_a_median_of_even_many_is_the_mean_of_the_middle_two() -> None:
    def of(value: float) -> dict[str, Factor]:
        return {"m": Factor(torch.ones(1, 1), torch.full((1, 1), value), 1.0)}

    found = robust([of(1.0), of(2.0), of(4.0), of(100.0)], 1, trim=None).factors["m"]
    assert float(found.delta()) == pytest.approx(3.0)
    # 0.25 of four is one at each end: mean of 2 and 4.
    assert float(robust([of(1.0), of(2.0), of(4.0), of(100.0)], 1, trim=0.25).factors["m"].delta()) == pytest.approx(
        3.0
    )
    with pytest.raises(MergeError, match="leaves none"):
        robust([of(1.0), of(2.0)], 1, trim=0.5)


def test_cutting_back_to_a_rank_that_suffices_changes_nothing() -> None:
    one = client(3)
    found = truncated(one, 4)
    assert found.energy == pytest.approx(1.0)
    assert error(found.factors, true_mean([one], [1.0])) < 1e-6


def test_no_update_and_no_weight_are_errors() -> None:
    with pytest.raises(MergeError, match="no client has sent an update"):
        aggregate("flora", [], [], rank=4)
    with pytest.raises(MergeError, match="not all 0"):
        shares([0.0, 0.0])


def test_an_update_as_it_should_be_is_taken_as_it_is() -> None:
    one = client(0)
    found = check_update(one, shapes=shapes_of(one), max_rank=4, norm_bound=None)
    assert found.factors is one
    assert found.reason == ""
    dense = sum(float(factor.delta().square().sum()) for factor in one.values()) ** 0.5
    assert found.norm == pytest.approx(dense, rel=1e-5)
    assert norm_of(one) == found.norm


def _with(one: dict[str, Factor], **changes: torch.Tensor) -> dict[str, Factor]:
    from dataclasses import replace

    return {**one, "layers.0.q": replace(one["layers.0.q"], **changes)}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda one: {"layers.0.q": one["layers.0.q"]}, "module layers.1.up is missing"),
        (lambda one: {**one, "embed": one["layers.0.q"]}, "module embed is not to be updated"),
        (lambda one: _with(one, a_RI=torch.zeros(4, 17)), "do not make a (24, 16) update"),
        (lambda one: _with(one, a_RI=torch.zeros(9, 16), b_OR=torch.zeros(24, 9)), "rank 9 is above 4"),
        (lambda one: _with(one, b_OR=torch.full((24, 4), float("nan"))), "layers.0.q: not finite"),
        (lambda one: _with(one, a_RI=one["layers.0.q"].a_RI * 1e6), "is above the bound 1000"),
    ],
)
def test_what_would_spoil_the_mean_is_refused_with_its_reason(spoil, told: str) -> None:  # type: ignore[no-untyped-def]
    good = client(0)
    found = check_update(spoil(good), shapes=shapes_of(good), max_rank=4, norm_bound=1000.0)
    assert found.factors is None
    assert told in found.reason


def test_an_update_cannot_hide_behind_large_factors_that_cancel() -> None:
    # B A is 1e12 in one entry; in the Gram matrices it is lost beside 1e21 squared.
    a_RI = torch.full((2, 16), 1e12)
    a_RI[0, 0], a_RI[1, 0] = 1.0, 0.0
    b_OR = torch.zeros(24, 2)
    b_OR[0, 0], b_OR[0, 1] = 1e12, -1e12
    hidden = {"layers.0.q": Factor(a_RI, b_OR, 1.0)}
    assert norm_of(hidden) == pytest.approx(1e12)
    assert check_update(hidden, shapes=shapes_of(hidden), max_rank=4, norm_bound=1000.0).factors is None


def test_clipping_scales_an_update_down_to_the_bound() -> None:
    one = client(0)
    found = check_update(one, shapes=shapes_of(one), max_rank=4, norm_bound=1.0, clip=True)
    assert found.factors is not None
    assert norm_of(found.factors) == pytest.approx(1.0)
    assert "clipped" in found.reason
