"""Kernels against torch, published test vectors and plain numpy."""

import numpy as np
import pytest
import torch

from evertune.merge import kernels
from evertune.merge.methods import limits

ALL_WORDS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize(("code", "dtype"), [(kernels.BF16, torch.bfloat16), (kernels.F16, torch.float16)])
def test_all_16_bit_numbers_are_decoded_as_torch_does(code: int, dtype: torch.dtype) -> None:
    values = np.empty(1 << 16, np.float32)
    kernels.decode(ALL_WORDS.view(np.uint8), code, values)
    expected = torch.from_numpy(ALL_WORDS.view(np.int16)).view(dtype).float().numpy()
    finite = np.isfinite(expected)
    assert np.array_equal(values[finite].view(np.uint32), expected[finite].view(np.uint32))
    for word, is_finite in zip(ALL_WORDS, finite, strict=True):
        # In each of the four places of a 64-bit word, and in what is left over behind it.
        for place in range(7):
            words = np.full(7, 0x8001, np.uint16)
            words[place] = word
            assert kernels.is_finite(words.view(np.uint8), code) == is_finite


@pytest.mark.parametrize(("code", "dtype"), [(kernels.BF16, torch.bfloat16), (kernels.F16, torch.float16)])
@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_rounding_to_16_bits_is_torchs_to_the_bit(code: int, dtype: torch.dtype, width: type) -> None:
    rng = np.random.default_rng(0)
    single = (rng.standard_normal(200_000) * 10.0 ** rng.integers(-9, 4, 200_000)).astype(np.float32)
    exact = torch.from_numpy(ALL_WORDS.view(np.int16)).view(dtype).float().numpy()
    exact = exact[np.isfinite(exact)]
    halfway = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    values = np.concatenate([single, exact, halfway, -single]).astype(width)
    raw = np.empty(2 * len(values), np.uint8)
    bad = kernels.encode(values, code, raw)
    expected = torch.from_numpy(values.astype(np.float32)).to(dtype)
    assert np.array_equal(raw.view(np.int16), expected.view(torch.int16).numpy())
    assert bad == int((~torch.isfinite(expected)).sum())


def test_a_float64_is_rounded_once_not_by_way_of_float32() -> None:
    # 1 + 2^-8 lies in the middle between bfloat16's 1 and 1 + 2^-7, and goes to the even one, 1. What lies a little
    # above goes up, though float32 cannot tell it from the middle; below 1 + 3 * 2^-8, whose even neighbour is above,
    # a little less goes down.
    tiny = 2.0**-40
    values = np.array([1 + 2.0**-8, 1 + 2.0**-8 + tiny, 1 + 3 * 2.0**-8, 1 + 3 * 2.0**-8 - tiny])
    raw = np.empty(16, np.uint8)
    assert kernels.encode(np.concatenate([values, -values]), kernels.BF16, raw) == 0
    assert raw.view(np.uint16).tolist() == [0x3F80, 0x3F81, 0x3F82, 0x3F81, 0xBF80, 0xBF81, 0xBF82, 0xBF81]
    halves = np.array([1 + 2.0**-11, 1 + 2.0**-11 + tiny, 1 + 3 * 2.0**-11, 1 + 3 * 2.0**-11 - tiny])
    assert kernels.encode(halves, kernels.F16, raw[:8]) == 0
    assert raw[:8].view(np.uint16).tolist() == [0x3C00, 0x3C01, 0x3C02, 0x3C01]


@pytest.mark.parametrize(("code", "dtype"), [(kernels.F32, np.float32), (kernels.F64, np.float64)])
def test_wider_numbers_pass_through_and_the_bad_ones_are_counted(code: int, dtype: type) -> None:
    values = np.array([1.5, -0.0, np.nan, np.inf, -np.inf, 3e-40], dtype)
    back = np.empty(6, np.float64)
    kernels.decode(values.view(np.uint8), code, back)
    for value in values:
        for place in range(3):
            some = np.full(3, -3e-40, dtype)
            some[place] = value
            assert kernels.is_finite(some.view(np.uint8), code) == np.isfinite(value)
    assert back[0] == 1.5
    assert np.signbit(back[1])
    raw = np.empty(6 * values.itemsize, np.uint8)
    assert kernels.encode(back, code, raw) == 3
    assert np.array_equal(raw.view(dtype)[[0, 1, 5]], values[[0, 1, 5]])


@pytest.mark.parametrize(
    ("counter", "stream", "key", "expected"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_published_vectors(counter: int, stream: int, key: int, expected: tuple[int, ...]) -> None:
    # The three known answers for philox4x32-10 of Random123 (Salmon et al. 2011).
    found = np.empty((4, 1), np.uint32)
    kernels.philox(np.uint64(counter), np.uint64(stream), np.uint64(key), found)
    assert tuple(found[:, 0].tolist()) == expected


def test_a_word_depends_on_its_index_alone() -> None:
    key = np.uint64(99)
    whole = np.empty(5000, np.uint32)
    kernels.words(0, 0, key, whole)
    for begin, count in ((0, 1), (3, 7), (1023, 2), (2050, 2900)):
        part = np.empty(count, np.uint32)
        kernels.words(begin, 0, key, part)
        assert np.array_equal(part, whole[begin : begin + count])
    assert abs(whole.mean() / 2**32 - 0.5) < 0.02


def test_a_sum_where_all_agree_is_the_anchor_even_minus_zero() -> None:
    anchor = np.array([-0.0, 1.5, 3.0e-41], np.float32)
    out = np.empty(3, np.float32)
    kernels.anchored_sum(anchor, np.stack([anchor, anchor]), np.array([0.3, 0.9]), 1.0, out)
    assert np.array_equal(out.view(np.uint32), anchor.view(np.uint32))


def test_a_low_rank_update_is_the_product_at_any_place() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((7, 3)), rng.standard_normal((3, 11))
    whole = left @ right
    for begin, end in ((0, 77), (5, 6), (9, 40), (60, 77)):
        out = np.ones(end - begin)
        kernels.add_low_rank(begin, left, right, out)
        assert np.allclose(out, 1 + whole.ravel()[begin:end], rtol=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_limits_are_those_of_a_sort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # A coarse grid, so that many magnitudes are equal.
    values = (rng.integers(-40, 41, 5000) * 2.0**-12).astype(np.float32)
    bits = np.empty(5000, np.uint32)
    kernels.magnitudes(values, bits)
    dropped, kept = int(rng.integers(0, 100)), int(rng.integers(1, 4000))
    high = np.zeros(kernels.HIGH_BINS, np.int64)
    kernels.count_high(bits, high)
    low = np.zeros((2, kernels.LOW_BINS), np.int64)
    order = np.sort(bits)[::-1]
    kernels.count_low(bits, int(order[dropped + kept - 1]) >> 15, low[0])
    kernels.count_low(bits, int(order[max(dropped, 1) - 1]) >> 15, low[1])
    found = limits(high, low, dropped, kept)
    assert found.low == order[dropped + kept - 1]
    if dropped:
        assert found.high == order[dropped - 1]
    # The share of equal ones that stays makes the number kept right.
    inside = int(((bits > found.low) & (bits < found.high)).sum())
    expected = inside + found.keep_low * int((bits == found.low).sum())
    if dropped and found.high != found.low:
        expected += found.keep_high * int((bits == found.high).sum())
    assert expected == pytest.approx(kept)


def test_the_checksum_sees_a_lost_page_and_two_swapped_ones() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 5).astype(np.uint8)
    lost, swapped, tail = data.copy(), data.copy(), data.copy()
    lost[4096:8192] = 0
    swapped[:4096], swapped[4096:8192] = data[4096:8192], data[:4096]
    tail[-1] ^= 1
    assert len({int(kernels.checksum(one)) for one in (data, lost, swapped, tail)}) == 4
