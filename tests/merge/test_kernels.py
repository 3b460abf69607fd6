"""Kernels against torch, published test vectors and plain numpy."""

import numpy as np
import pytest
import torch

from evertune.merge import kernels
from evertune.merge.methods import Band, Ranked, band, find_rank, limits

ALL_WORDS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize(("code", "dtype"), [(kernels.BF16, torch.bfloat16), (kernels.F16, torch.float16)])
def test_all_16_bit_numbers_are_decoded_as_torch_does(code: int, dtype: torch.dtype) -> None:
    values = np.empty(1 << 16, np.float32)
    kernels.decode(ALL_WORDS.view(np.uint8), code, values)
    expected = torch.from_numpy(ALL_WORDS.view(np.int16)).view(dtype).float().numpy()
    finite = np.isfinite(expected)
    assert np.array_equal(values[finite].view(np.uint32), expected[finite].view(np.uint32))
    for word, is_finite in zip(ALL_WORDS.tolist(), finite.tolist(), strict=True):
        # In each of the four places of a 64-bit word, and in what is left over behind it: all of the words that matter.
        for place in range(7) if word % 1024 < 3 else (word % 7,):
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


@pytest.mark.parametrize("bits", [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF])
def test_no_number_that_does_not_fit_bfloat16_is_written_as_one_that_does(bits: int) -> None:
    values = np.array([1.0, 0.0, 2.0], np.float32)
    values.view(np.uint32)[1] = bits
    with np.errstate(invalid="ignore"):
        wider = values.astype(np.float64)
    for wide in (values, wider):
        assert kernels.encode(wide, kernels.BF16, np.empty(6, np.uint8)) == 1


@pytest.mark.parametrize(
    ("counter", "stream", "key", "expected"),
    [
        (0, 0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (0x85A308D3243F6A88, 0x0370734413198A2E, 0x299F31D0A4093822, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_philox_gives_the_published_vectors(counter: int, stream: int, key: int, expected: tuple[int, ...]) -> None:
    # The three known answers for philox4x32-7 of Random123 (Salmon et al. 2011).
    found = np.empty((4, 1), np.uint32)
    kernels.philox(np.uint64(counter), np.uint64(stream), np.uint64(key), found)
    assert tuple(found[:, 0].tolist()) == expected


def test_a_number_depends_on_its_index_alone_and_is_philoxs() -> None:
    key = np.uint64(99)
    whole = np.empty(5000, np.uint16)
    kernels.draw(0, key, whole)
    for begin, count in ((0, 1), (3, 7), (1023, 2), (2047, 2), (2050, 2900)):
        part = np.empty(count, np.uint16)
        kernels.draw(begin, key, part)
        assert np.array_equal(part, whole[begin : begin + count])
    # Element 2048 + 700: of the second group, word 1, counter 256 + 94, lower half.
    words = np.empty((4, 1), np.uint32)
    kernels.philox(np.uint64(256 + 94), np.uint64(0), key, words)
    assert whole[2048 + 700] == words[1, 0] & 0xFFFF
    assert whole[2048 + 701] == words[1, 0] >> 16
    assert abs(whole.mean() / 2**16 - 0.5) < 0.02


def test_numbers_are_even_and_independent_of_neighbours_and_of_other_keys() -> None:
    count = 1 << 20
    drawn = np.empty((3, count), np.uint16)
    for row, key in zip(drawn, (0, 1, 2**63), strict=True):  # keys that differ in one bit
        kernels.draw(0, np.uint64(key), row)
    for row in drawn:
        for byte in (row & 0xFF, row >> 8):
            seen = np.bincount(byte, minlength=256)
            # Chi-squared with 255 degrees of freedom: above 361 once in 100,000.
            assert ((seen - count / 256) ** 2).sum() / (count / 256) < 361
        bits = np.unpackbits(row.view(np.uint8))
        assert abs(int(bits.sum()) - 8 * count) < 5 * np.sqrt(4 * count)
    kept = (drawn < 0.3 * 2**16).astype(float) - 0.3
    # Products of independent ones have the mean 0 and a standard deviation of 0.21 / sqrt(count).
    for distance in (1, 2, 16, 512, 2048):
        for row in kept:
            assert abs((row[:-distance] * row[distance:]).mean()) < 5 * 0.21 / np.sqrt(count)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert abs((kept[one] * kept[two]).mean()) < 5 * 0.21 / np.sqrt(count)


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("count", [1, 63, 512, 1300])
def test_inner_products_are_those_of_float64(count: int, has_base: bool) -> None:
    rng = np.random.default_rng(count)
    models = (rng.standard_normal((4, count), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    values = (models.astype(np.uint32) << 16).view(np.float32)
    rows = (values[:3] - values[3] if has_base else values).astype(np.float64)
    found = np.full((len(rows), len(rows)), 2.0)
    kernels.gram(models, has_base, np.empty(0, np.float32), found)
    assert np.allclose(found, 2.0 + rows @ rows.T, rtol=1e-13, atol=1e-12)


def test_a_sum_where_all_agree_is_the_anchor_even_minus_zero() -> None:
    anchor = np.array([-0.0, 1.5, 3.0e-41], np.float32)
    out = np.empty(3, np.float32)
    kernels.anchored_sum(np.stack([anchor] * 3), 0, 1, np.array([0.3, 0.9]), 1.0, out)
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
@pytest.mark.parametrize("grid", [2.0**-12, 0.0])
def test_ranks_and_limits_are_those_of_a_sort_from_any_first_band(seed: int, grid: float) -> None:
    rng = np.random.default_rng(seed)
    # On a coarse grid many magnitudes are equal; without one nearly none are, and no bin is fine enough at first.
    values = (rng.integers(-40, 41, 5000) * grid if grid else rng.standard_normal(5000)).astype(np.float32)
    bits = kernels.magnitudes(values)
    order = np.sort(bits)[::-1]
    dropped, kept = int(rng.integers(0, 100)), int(rng.integers(1, 4000))
    found = []
    for rank in (dropped + kept, dropped):
        # A guess that may be right, too high or too low: what it finds is the same.
        low = int(order[rng.integers(0, 5000)])
        search: Band | Ranked = band(low, int(rng.integers(1, 1 << 20)))
        for _ in range(5):
            if isinstance(search, Band):
                counts = np.zeros((2, kernels.BINS + 1), np.int64)
                kernels.count_bits(bits, *search, counts)
                search = find_rank(max(rank, 1), search, counts)
        assert isinstance(search, Ranked)
        at = int(order[max(rank, 1) - 1])
        assert search == (at, int((bits > at).sum()), int((bits == at).sum()))
        found.append(search)
    ends = limits(found[0], found[1] if dropped else None, dropped, kept)
    # The share of equal ones that stays makes the number kept right.
    inside = int(((bits > ends.low) & (bits < ends.high)).sum())
    expected = inside + ends.keep_low * int((bits == ends.low).sum())
    if dropped and ends.high != ends.low:
        expected += ends.keep_high * int((bits == ends.high).sum())
    assert expected == pytest.approx(kept)


def test_bands_of_models_are_counted_as_their_differences_are() -> None:
    rng = np.random.default_rng(2)
    words = (rng.standard_normal((3, 5001)) * 0.02).astype(np.float32).view(np.uint32) >> 16
    models = words.astype(np.uint16)
    wide = (words.astype(np.uint32) << 16).view(np.float32)
    bits = kernels.magnitudes(wide[:2] - wide[2])
    bands = np.array([[band(0x3C000000, 1 << 24), (0, 0, 0)], [band(0x3C800000, 1 << 20), band(0, 1 << 31)]])
    for given in (models, wide):
        counts = np.zeros((2, 2, 2, kernels.BINS + 1), np.int64)
        kernels.count_bands(given, bands, np.empty(0, np.float32), counts)
        for k, j in ((0, 0), (1, 0), (1, 1)):
            low, width, shift = bands[k, j].tolist()
            inside = bits[k][(bits[k] >= low) & (bits[k] < low + width)] - np.uint32(low)
            expected = np.bincount(inside >> shift, minlength=kernels.BINS)
            odd = np.bincount(inside >> shift, inside % (1 << shift) != 0, minlength=kernels.BINS)
            assert np.array_equal(counts[k, j, 0, :-1], expected)
            assert np.array_equal(counts[k, j, 1, :-1], odd)
            assert counts[k, j, 0, -1] == np.count_nonzero(bits[k] >= low + width)
        assert not counts[0, 1].any()


def test_what_is_trimmed_is_what_stays_says() -> None:
    rng = np.random.default_rng(3)
    tau = rng.integers(-9, 10, (2, 6000)).astype(np.float32)
    models = np.vstack([tau, np.zeros((1, 6000), np.float32)])
    bits, at = kernels.magnitudes(tau), kernels.magnitudes(np.arange(10, dtype=np.float32))
    rows = np.array([[at[3], 0.25, kernels.NO_LIMIT, 0.0], [at[2], 0.4, at[7], 0.9]])
    keys = np.array([5, 2**63 + 11], np.uint64)
    out, kept = np.empty(6000, np.float32), np.zeros(2, np.int64)
    for k in range(2):
        stays = kernels.stays(bits[k], rows[k], 777, int(keys[k]))
        one = models[[k, 2]]
        kernels.sparse_sum(
            one, 777, kernels.TRIM, rows[k : k + 1], keys[k : k + 1], np.ones(1), 1.0, False, False, False, 0.0,
            kept[k : k + 1], out,
        )  # fmt: skip
        assert np.array_equal(out, np.where(stays, tau[k], 0))
        assert kept[k] == np.count_nonzero(stays & (tau[k] != 0))
        equal = bits[k] == int(rows[k, 0])
        assert stays[equal].mean() == pytest.approx(rows[k, 1], abs=0.03)


def test_the_checksum_sees_a_lost_page_and_two_swapped_ones() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * 4096 + 5).astype(np.uint8)
    lost, swapped, tail = data.copy(), data.copy(), data.copy()
    lost[4096:8192] = 0
    swapped[:4096], swapped[4096:8192] = data[4096:8192], data[:4096]
    tail[-1] ^= 1
    assert len({kernels.checksum(one) for one in (data, lost, swapped, tail)}) == 4
