"""Sums of checkpoints: the three numbers of the reference, identities to the bit, and inputs that are refused."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

import evertune
from evertune.errors import MergeError
from evertune.merge import arithmetic
from evertune.merge.arithmetic import interpolate, model_soup, task_arithmetic

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _random(dtype: torch.dtype, count: int, *, size: int = 500) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = [{"w": torch.randn(size, generator=generator).to(dtype)} for _ in range(count)]
    for one in found:
        one["w"][0], one["w"][1] = -0.0, 1e-7
    return found


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right) and torch.equal(left.signbit(), right.signbit())


def test_the_three_numbers_of_the_reference() -> None:
    zero, a, b = ({"w": torch.tensor(one)} for one in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]))
    assert evertune.model_soup([a, b])["w"].tolist() == [0.5, 1.0, 0.0]
    assert evertune.task_arithmetic(zero, [a, b], [1, 1])["w"].tolist() == [1.0, 2.0, 0.0]
    assert evertune.task_arithmetic(zero, [b], [-1])["w"].tolist() == [0.0, -2.0, 0.0]
    assert evertune.task_arithmetic(zero, [a, b], [1, -1])["w"].tolist() == [1.0, -2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_a_soup_of_copies_is_the_checkpoint_to_the_bit(dtype: torch.dtype, copies: int) -> None:
    (one,) = _random(dtype, 1)
    assert _same_bits(model_soup([one] * copies)["w"], one["w"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_that_did_not_move_leave_the_start_to_the_bit(dtype: torch.dtype) -> None:
    start, other = _random(dtype, 2)
    assert _same_bits(task_arithmetic(start, [start, start, start], [0.3, -1.0, 2.0])["w"], start["w"])
    assert _same_bits(task_arithmetic(start, [other], [0.0])["w"], start["w"])
    assert _same_bits(task_arithmetic(start, [], [])["w"], start["w"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_experts_changes_no_bit(dtype: torch.dtype) -> None:
    start, *experts = _random(dtype, 5)
    experts[2]["w"] *= 1000
    scales = [0.3, -0.7, 1.1, 0.2]
    soups, sums = set(), set()
    for order in permutations(range(4)):
        picked = [experts[i] for i in order]
        soup, total = model_soup(picked)["w"], task_arithmetic(start, picked, [scales[i] for i in order])["w"]
        soups.add(bytes(soup.view(torch.uint8).numpy()))
        sums.add(bytes(total.view(torch.uint8).numpy()))
    assert len(soups) == len(sums) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    start, *experts = _random(dtype, 6)
    exact = sum(one["w"].double() for one in experts) / 5
    assert torch.equal(model_soup(experts)["w"], exact.to(dtype))
    # A quarter is exact in binary, so float64 holds the whole sum and any order gives the same.
    moved = start["w"].double() + sum(0.25 * (one["w"].double() - start["w"].double()) for one in experts)
    assert torch.equal(task_arithmetic(start, experts, [0.25] * 5)["w"], moved.to(dtype))
    if dtype == torch.bfloat16:
        naive = sum(one["w"] for one in experts) / 5
        assert (naive != model_soup(experts)["w"]).float().mean() > 0.2


def test_a_tensor_larger_than_a_chunk_is_merged_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    start, *experts = _random(torch.float32, 3, size=1000)
    for one in (start, *experts):
        one["w"] = one["w"].reshape(40, 25).T  # not contiguous
    whole = model_soup(experts)["w"], task_arithmetic(start, experts, [1.0, 0.5])["w"]
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", 64)
    assert torch.equal(model_soup(experts)["w"], whole[0])
    assert torch.equal(task_arithmetic(start, experts, [1.0, 0.5])["w"], whole[1])
    assert whole[0].shape == (25, 40)
    assert whole[0].is_contiguous()


def test_scalars_and_empty_tensors_keep_their_shape() -> None:
    soup = model_soup(
        [{"s": torch.tensor(1.0), "e": torch.zeros(0, 3)}, {"s": torch.tensor(2.0), "e": torch.zeros(0, 3)}]
    )
    assert soup["s"].shape == ()
    assert soup["s"].item() == 1.5
    assert soup["e"].shape == (0, 3)


def test_equal_integer_buffers_are_copied_and_inputs_stay_untouched() -> None:
    one = {"n": torch.tensor([3]), "w": torch.tensor([1.0]), "b": torch.tensor([True])}
    two = {"n": torch.tensor([3]), "w": torch.tensor([2.0]), "b": torch.tensor([True])}
    for merged in (model_soup([one, two]), task_arithmetic(one, [two], [0.5])):
        assert merged["n"].tolist() == [3]
        assert merged["b"].tolist() == [True]
        merged["n"][0], merged["w"][0] = 9, 9.0
    assert (one["n"].tolist(), one["w"].tolist(), two["w"].tolist()) == ([3], [1.0], [2.0])
    assert list(model_soup([one, two])) == ["n", "w", "b"]


def _one(value: object, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.tensor(value, dtype=dtype)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "checkpoint 1 lacks 'w', which checkpoint 0 has"),
        ({**_one([1.0]), "bias": torch.zeros(1)}, "checkpoint 1 has 'bias', which checkpoint 0 lacks"),
        (_one([1.0, 2.0]), r"w is \(2,\) in checkpoint 1 and \(1,\) in checkpoint 0"),
        (_one([float("nan")]), "w holds NaN or Inf in checkpoint 1"),
        (_one([float("-inf")]), "w holds NaN or Inf in checkpoint 1"),
        (_one([1], torch.int64), "w is torch.int64 in checkpoint 1 and torch.float32 in checkpoint 0"),
        (_one([1], torch.complex64), "torch.complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(other: dict[str, Tensor], message: str) -> None:
    for merge in (lambda: model_soup([_one([1.0]), other]), lambda: task_arithmetic(_one([1.0]), [other], [1.0])):
        with pytest.raises(MergeError, match=message):
            merge()


def test_integer_buffers_that_differ_are_refused() -> None:
    with pytest.raises(MergeError, match="integer buffer w differs"):
        model_soup([_one([1], torch.int64), _one([2], torch.int64)])


def test_nothing_to_merge_and_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MergeError, match="at least one"):
        model_soup([])
    with pytest.raises(MergeError, match="1 models and 2 scales"):
        task_arithmetic(_one([1.0]), [_one([1.0])], [1.0, 2.0])
    with pytest.raises(MergeError, match="finite"):
        task_arithmetic(_one([1.0]), [_one([1.0])], [float("nan")])


def test_a_result_too_large_for_its_dtype_is_refused() -> None:
    start, moved = _one([0.0], torch.float16), _one([60000.0], torch.float16)
    with pytest.raises(MergeError, match=r"w does not fit into torch\.float16"):
        task_arithmetic(start, [moved], [2.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolation_meets_both_ends_to_the_bit(dtype: torch.dtype) -> None:
    start, end = (one["w"] for one in _random(dtype, 2))
    end[2] = -0.0
    assert _same_bits(interpolate(start, end, 0.0), start)
    assert _same_bits(interpolate(start, end, 1.0), end)
    assert _same_bits(interpolate(start, start, 0.37), start)
    middle = (0.63 * start.double() + 0.37 * end.double()).to(dtype)
    assert torch.allclose(interpolate(start, end, 0.37), middle, rtol=0, atol=0)
    assert interpolate(start, end, 1.0).data_ptr() != end.data_ptr()
    assert interpolate(torch.tensor([3]), torch.tensor([5]), 0.5).tolist() == [3]
