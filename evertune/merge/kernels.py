"""What happens to the numbers of one chunk: arrays in, arrays out, nothing else known. Compiled, without the GIL.

Every kernel computes the same bits on every machine: no fused multiply-add, no reordering, no thread of its own.

Models are rows of one array: bfloat16 as it is stored, its 16 bits in a uint16, or float32 or float64. A kernel widens
bfloat16 where it uses it, so that a model is read from memory once; it is compiled for the types it meets.
"""

# M models (K experts, then the base if there is one), N elements of the chunk
# R rank of a low-rank update, C columns of the tensor
# tau_KN: task vectors, expert minus base

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Array = NDArray[Any]

BF16, F16, F32, F64 = 0, 1, 2, 3
# Bytes of each.
WIDTHS = (2, 2, 4, 8)
# Their types, where numpy has one.
_NUMPY: dict[int, np.dtype[Any]] = {F16: np.dtype("f2"), F32: np.dtype("f4"), F64: np.dtype("f8")}
# Their exponents of all ones in each 64-bit word, the exponents' lowest bits, and the places that these carry into.
_FULL = tuple(
    (np.uint64(exponents), np.uint64(lowest), np.uint64(signs))
    for exponents, lowest, signs in (
        (0x7F807F807F807F80, 0x0080008000800080, 0x8000800080008000),
        (0x7C007C007C007C00, 0x0400040004000400, 0x8000800080008000),
        (0x7F8000007F800000, 0x0080000000800000, 0x8000000080000000),
        (0x7FF0000000000000, 0x0010000000000000, 0x8000000000000000),
    )
)
_NO_WORDS = np.empty(0, np.uint64)
# A magnitude is a float32 without its sign: 31 bits, whose order as integers is their order as numbers.
MAGNITUDE_BITS = 31
# Of a band of magnitudes.
BINS = 1 << 14
# Elements worked on at a time: what lies between reading and writing them stays near the core.
BLOCK = 2048
# Of rows of such: at multiples of 4096 bytes they would share the same few lines of the nearest cache.
ROW = BLOCK + 80
# An inner product is as many sums, so that it becomes vector instructions, and so many products are added to each at a
# time.
LANES, PRODUCTS = 64, 8
GRAM_BLOCK = LANES * PRODUCTS
# Counters of Philox that are worked on at a time; each gives eight numbers of 16 bits.
COUNTERS = 256
DRAWN = 8 * COUNTERS
# Of Philox: the fewest with which its authors found no test of BigCrush to fail.
ROUNDS = 7
# What is left of task vectors.
WHOLE, TRIM, DROP = 0, 1, 2
NO_LIMIT = np.uint32(0x7FFFFFFF)
# 2^32 over the golden ratio, to an odd number: multiples of it are spread evenly over 32 bits.
GOLDEN = 0x9E3779B9


def compiled(function: F) -> F:
    """Compile a kernel at its first call for the types it gets, and keep the machine code on disk."""
    try:
        # Division by zero gives Inf: to ask before each division would cost the vector instructions.
        made: Any = njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # no folder for the cache can be written: compile in every process
        made = njit(function, nogil=True, error_model="numpy")
    return cast(F, made)


# ---- bytes to numbers and back


def widen(number: Any) -> Any:
    """In a kernel: the float32 of a bfloat16's bits; a float as it is."""
    raise AssertionError("for kernels")


@overload(widen, strict=False)
def _widen(number: Any) -> Any:
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@compiled
def has_full_exponent(words: Array, exponents: Any, lowest: Any, signs: Any) -> bool:
    """Whether a float in 64-bit words is NaN or Inf.

    Adding the exponent's lowest bit carries into the sign's place only from an exponent of all ones, and never into the
    next number, so that a word tests four, two or one at a time.
    """
    found = np.uint64(0)
    for i in range(words.shape[0]):
        found |= (words[i] & exponents) + lowest
    return (found & signs) != 0


def is_finite(raw: Array, code: int) -> bool:
    """Whether floats in little-endian bytes hold no NaN and no Inf.

    Args:
        raw: bytes, uint8.
        code: BF16, F16, F32 or F64.
    """
    return not any(len(words) and has_full_exponent(words, *_FULL[code]) for words in words_of(raw))


def words_of(raw: Array) -> tuple[Array, Array]:
    """Bytes as 64-bit words, and what is left over as one word, or none."""
    whole = len(raw) & ~7
    words, rest = raw[:whole].view(np.uint64), _NO_WORDS
    if whole < len(raw):
        rest = np.zeros(1, np.uint64)
        rest.view(np.uint8)[: len(raw) - whole] = raw[whole:]
    return words if words.flags.aligned else words.copy(), rest


def decode(raw: Array, code: int, out: Array) -> None:
    """Little-endian bytes to floats; what becomes of NaN and Inf is not said.

    Args:
        raw: bytes, uint8.
        code: BF16, F16, F32 or F64.
        out: filled; float32, or float64.
    """
    if code == BF16:
        out[...] = np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    else:
        out[...] = raw.view(_NUMPY[code])


def encode(values: Array, code: int, raw: Array) -> int:
    """Floats to bytes, rounded once, to nearest, ties to even. Returns how many do not fit (NaN, Inf or too large)."""
    if code == BF16 and values.dtype == np.float32:
        if round_to_bf16(values, raw.view(np.uint16)):
            return 0
    elif code == BF16:
        round_twice_as_wide_to_bf16(values, raw.view(np.uint16))
    elif code == F16:
        round_to_f16(values, raw.view(np.uint16))
    else:
        with np.errstate(over="ignore"):
            raw.view(np.float32 if code == F32 else np.float64)[...] = values
    if is_finite(raw, code):
        return 0
    back = np.empty(len(values))
    decode(raw, code, back)
    return int(np.count_nonzero(~np.isfinite(back)))


@compiled
def carried(bits: Any, up: Any) -> Any:
    """float32's bits, their upper half rounded; `up` is 1 where the middle between two results goes up."""
    # The carry would turn a NaN of all ones into a zero.
    is_full = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return bits if is_full else np.uint32(bits + np.uint32(0x7FFF) + up)


@compiled
def round_to_bf16(values: Array, words: Array) -> bool:
    """float32 to bfloat16's bits; whether all are finite. What is too large becomes Inf, as does a NaN or stays one."""
    found = np.uint32(0)
    for i in range(values.shape[0]):
        bits = np.float32(values[i]).view(np.uint32)
        rounded = carried(bits, (bits >> np.uint32(16)) & np.uint32(1))
        words[i] = np.uint16(rounded >> np.uint32(16))
        # As in `has_full_exponent`.
        found |= np.uint32(rounded & np.uint32(0x7F800000)) + np.uint32(0x00800000)
    return np.uint32(found & np.uint32(0x80000000)) == 0


@compiled
def round_twice_as_wide_to_bf16(values: Array, words: Array) -> None:
    """float64 to bfloat16's bits, without rounding to float32 on the way."""
    for i in range(values.shape[0]):
        single = np.float32(values[i])
        bits = single.view(np.uint32)
        # A float64 that float32 rounds to the middle between two results is above or below it, not in the middle.
        middle = (bits & np.uint32(0xFFFF)) == np.uint32(0x8000)
        above = middle & (abs(values[i]) > abs(np.float64(single)))
        below = middle & (abs(values[i]) < abs(np.float64(single)))
        even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        up = np.uint32(1) if above else np.uint32(0) if below else even
        words[i] = np.uint16(carried(bits, up) >> np.uint32(16))


@compiled
def round_to_f16(values: Array, words: Array) -> None:
    """Floats to float16's bits. What is too large becomes Inf, as does a NaN."""
    for i in range(values.shape[0]):
        magnitude = abs(np.float64(values[i]))
        limited = np.float64(magnitude if magnitude < 65520.0 else 65536.0)
        power: Any = limited.view(np.uint64) >> np.uint64(52)
        exponent = max(int(power) - 1023, -14)
        scale = np.uint64(np.uint64(1033 - exponent) << np.uint64(52)).view(np.float64)
        # A count that carries into the next power of two carries into the exponent's bits as well.
        counted = int(np.rint(limited * scale)) + 1024 * (exponent + 14)
        words[i] = np.uint16(counted + (0x8000 if math.copysign(1.0, values[i]) < 0.0 else 0))


@compiled
def add_low_rank(begin: int, left_OR: Array, right_RC: Array, out: Array) -> None:
    """Add elements [begin, begin + N) of left @ right, counted along rows, to `out`. Summed in float64, in order.

    Args:
        left_OR: (rows, R) float64, the adapter's scale included.
        right_RC: (R, C) float64.
    """
    columns = right_RC.shape[1]
    place = 0
    while place < out.shape[0]:
        row, column = divmod(begin + place, columns)
        count = min(columns - column, out.shape[0] - place)
        total = np.zeros(count)
        for r in range(right_RC.shape[0]):
            factor = left_OR[row, r]
            line = right_RC[r]
            for i in range(count):
                total[i] += factor * line[column + i]
        for i in range(count):
            out[place + i] += total[i]
        place += count


def checksum(raw: Array) -> int:
    """A sum of 64-bit words weighted by their place: what a torn or lost write changes. Not a digest."""
    words, rest = words_of(raw)
    tail = int(rest[0]) * (2 * len(words) + 1) if len(rest) else 0
    return (int(weighted_words(words)) + tail + len(raw)) % 2**64


@compiled
def weighted_words(words: Array) -> Any:
    """The sum of words times 1, 3, 5, ..., modulo 2^64."""
    total = np.uint64(0)
    for i in range(words.shape[0]):
        total += words[i] * (np.uint64(2) * np.uint64(i) + np.uint64(1))
    return total


# ---- random numbers: Philox4x32-7 (Salmon et al. 2011), a function of key and counter


@compiled
def philox(counter: Any, stream: Any, key: Any, out_4J: Array) -> None:
    """Random 32-bit words for the counters counter, counter + 1, ...: a column of four for each.

    Args:
        counter, stream: the low and the high 64 bits of the 128-bit counter, uint64.
        key: uint64.
        out_4J: uint32, filled.
    """
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for j in range(out_4J.shape[1]):
        place = counter + np.uint64(j)
        c0, c1, c2, c3 = place & mask, place >> shift, stream & mask, stream >> shift
        k0, k1 = key & mask, key >> shift
        for _ in range(ROUNDS):
            # The mask tells the compiler that 32 bits are multiplied, for which there is a vector instruction.
            first, second = np.uint64(0xD2511F53) * (c0 & mask), np.uint64(0xCD9E8D57) * (c2 & mask)
            c0, c1 = (second >> shift) ^ c1 ^ k0, second & mask
            c2, c3 = (first >> shift) ^ c3 ^ k1, first & mask
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
        out_4J[0, j], out_4J[1, j] = np.uint32(c0), np.uint32(c1)
        out_4J[2, j], out_4J[3, j] = np.uint32(c2), np.uint32(c3)


@compiled
def draw(begin: int, key: Any, out: Array) -> None:
    """The random 16-bit numbers of elements begin, begin + 1, ... of a tensor.

    Elements are taken 2048 at a time: with g = i div 2048 and r = i mod 2048, the number of element i is half r mod 2,
    the lower one first, of word r div 512 of counter 256 g + (r mod 512) div 2. That is what Philox writes, in its
    order in memory.
    """
    words = np.empty((4, COUNTERS), np.uint32)
    group = words.reshape(-1).view(np.uint16)
    place = 0
    while place < out.shape[0]:
        number, skipped = divmod(begin + place, DRAWN)
        philox(np.uint64(number * COUNTERS), np.uint64(0), key, words)
        count = min(DRAWN - skipped, out.shape[0] - place)
        into, some = out[place : place + count], group[skipped : skipped + count]
        for i in range(count):
            into[i] = some[i]
        place += count


# ---- sums


@compiled
def anchored_sum(models_MN: Array, anchor: int, first: int, weights_K: Array, anchor_scale: float, out: Array) -> None:
    """anchor_scale * anchor + sum_k weights_k (terms_k - anchor), in the dtype of `out`.

    The anchor times its scale, to the bit, where the weighted differences cancel.

    Args:
        anchor: row of the anchor; the terms are rows first, first + 1, ...
        out: float32, or float64.
    """
    scale = out.dtype.type(anchor_scale)
    for begin in range(0, out.shape[0], BLOCK):
        total = out[begin : begin + BLOCK]
        start = models_MN[anchor, begin : begin + BLOCK]
        for i in range(total.shape[0]):
            total[i] = 0
        for k in range(weights_K.shape[0]):
            term = models_MN[first + k, begin : begin + BLOCK]
            weight = out.dtype.type(weights_K[k])
            for i in range(total.shape[0]):
                total[i] += weight * (widen(term[i]) - widen(start[i]))
        for i in range(total.shape[0]):
            begun = scale * widen(start[i])
            summed = begun + total[i]
            total[i] = summed if total[i] != 0 else begun


@compiled
def gram(models_MN: Array, has_base: bool, like: Array, out: Array) -> None:
    """Add the inner products of all pairs of models, or of task vectors, to `out`, (K, K) float64.

    Args:
        has_base: the last row is subtracted from the others.
        like: an empty array of the dtype in which differences are taken.
    """
    experts = models_MN.shape[0] - (1 if has_base else 0)
    rows = np.empty((experts, GRAM_BLOCK + 40))  # as ROW
    sums = np.zeros((experts * experts, LANES))
    for begin in range(0, models_MN.shape[1], GRAM_BLOCK):
        count = min(GRAM_BLOCK, models_MN.shape[1] - begin)
        for k in range(experts):
            row, model = rows[k], models_MN[k, begin : begin + count]
            if has_base:
                base = models_MN[experts, begin : begin + count]
                for i in range(count):
                    row[i] = like.dtype.type(widen(model[i]) - widen(base[i]))
            else:
                for i in range(count):
                    row[i] = widen(model[i])
            row[count:GRAM_BLOCK] = 0.0
        for a in range(experts):
            for b in range(a, experts):
                add_products(rows[a], rows[b], sums[a * experts + b])
    for a in range(experts):
        for b in range(a, experts):
            total = sums[a * experts + b].sum()
            out[a, b] += total
            if a != b:
                out[b, a] += total


@compiled
def add_products(one: Array, two: Array, sums: Array) -> None:
    """Add the products of `GRAM_BLOCK` numbers each to `LANES` sums, eight to each."""
    for j in range(LANES):
        first = one[j] * two[j] + one[LANES + j] * two[LANES + j]
        second = one[2 * LANES + j] * two[2 * LANES + j] + one[3 * LANES + j] * two[3 * LANES + j]
        third = one[4 * LANES + j] * two[4 * LANES + j] + one[5 * LANES + j] * two[5 * LANES + j]
        fourth = one[6 * LANES + j] * two[6 * LANES + j] + one[7 * LANES + j] * two[7 * LANES + j]
        sums[j] += (first + second) + (third + fourth)


@compiled
def compare(models_MN: Array, has_base: bool, merged: Array, rounded: Array, parts_LN: Array) -> Any:
    """Differences of the models, and counts of what they are like.

    Args:
        has_base: differences are taken from the last row; otherwise from the mean of the rows.
        merged, rounded: a result before and after rounding; empty where there is none.
        parts_LN: filled, in the dtype to compute in: a row for each difference, then what they are taken from.

    Returns:
        Four counts of elements: that at least two differences change, of these that they push in opposite directions,
        where the result is not the base's value, of these where the rounded one is.
    """
    experts, count = parts_LN.shape[0] - 1, parts_LN.shape[1]
    origin = parts_LN[experts]
    if has_base:
        for i in range(count):
            origin[i] = widen(models_MN[experts, i])
    else:
        for i in range(count):
            origin[i] = widen(models_MN[0, i])
        for k in range(1, experts):
            for i in range(count):
                origin[i] += widen(models_MN[k, i])
        for i in range(count):
            origin[i] /= parts_LN.dtype.type(experts)
    plus_N, minus_N = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for k in range(experts):
        model, difference = models_MN[k], parts_LN[k]
        for i in range(count):
            difference[i] = widen(model[i]) - origin[i]
            plus_N[i] += difference[i] > 0
            minus_N[i] += difference[i] < 0
    shared = conflicts = moved = unmoved = 0
    for i in range(count):
        shared += plus_N[i] + minus_N[i] > 1
        conflicts += (plus_N[i] > 0) & (minus_N[i] > 0)
    for i in range(merged.shape[0]):
        is_moved = merged[i] != origin[i]
        moved += is_moved
        unmoved += is_moved & (rounded[i] == origin[i])
    return shared, conflicts, moved, unmoved


# ---- which elements of a task vector stay


def magnitudes(values: Array) -> Array:
    """Absolute values as float32 bit patterns: their order as integers is their order as numbers."""
    return np.abs(values).astype(np.float32).view(np.uint32)


@compiled
def count_bits(bits: Array, low: int, width: int, shift: int, counts: Array) -> None:
    """Add to counts[0, b] the magnitudes of bin b of a band, to counts[0, BINS] those above the band.

    A bin is 2^shift bit patterns. counts[1, b] are those that are not the bin's first pattern.

    Args:
        low, width: the band, [low, low + width); width is at most BINS * 2^shift.
    """
    start, size, last = np.uint32(low), np.uint32(width), np.uint32(low + width - 1)
    step, rest = np.uint32(shift), np.uint32((1 << shift) - 1)
    found = np.empty(BLOCK, np.uint32)
    for begin in range(0, bits.shape[0], BLOCK):
        some = bits[begin : begin + BLOCK]
        above = np.uint32(0)
        for i in range(some.shape[0]):
            above += np.uint32(some[i] > last)
        # Gathered first: a place that is moved on costs less than a branch that is taken now and then.
        count: Any = 0
        for i in range(some.shape[0]):
            place = np.uint32(some[i] - start)
            found[count] = place
            count += place < size
        for i in range(count):
            counts[0, found[i] >> step] += 1
            counts[1, found[i] >> step] += (found[i] & rest) != 0
        counts[0, BINS] += above


@compiled
def count_bands(models_MN: Array, bands_KJ3: Array, like: Array, counts_KJ2B: Array) -> None:
    """`count_bits` of each task vector's magnitudes in J bands: (low, width, shift), of width 0 for none."""
    experts = models_MN.shape[0] - 1
    bits = np.empty(BLOCK, np.uint32)
    for begin in range(0, models_MN.shape[1], BLOCK):
        base = models_MN[experts, begin : begin + BLOCK]
        some = bits[: base.shape[0]]
        for k in range(experts):
            model = models_MN[k, begin : begin + BLOCK]
            for i in range(some.shape[0]):
                tau = np.float32(like.dtype.type(widen(model[i]) - widen(base[i])))
                some[i] = tau.view(np.uint32) & np.uint32(0x7FFFFFFF)
            for j in range(bands_KJ3.shape[1]):
                low, width, shift = bands_KJ3[k, j, 0], bands_KJ3[k, j, 1], bands_KJ3[k, j, 2]
                if width > 0:
                    count_bits(some, low, width, shift, counts_KJ2B[k, j])


def stays(bits: Array, limits: Array, begin: int, key: int) -> Array:
    """Which elements have a magnitude between two limits, and of those equal to a limit a share, spread evenly.

    Element i of equal ones stays where the upper 24 bits of i * GOLDEN + key are below its share of 2^24: a sequence
    that favours no part of a tensor and comes nearer to the share than anything drawn at random.

    Args:
        bits: as `magnitudes` gives them.
        limits: (low, keep_low, high, keep_high), bit patterns and shares; with low == high, keep_low counts.
        begin: index of the first element in its tensor.
    """
    low, keep_low, high, keep_high = limits
    places = np.arange(begin, begin + len(bits), dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key % 2**32)
    places = (places & np.uint64(0xFFFFFFFF)) >> np.uint64(8)
    at_low, at_high = places < round(keep_low * 2**24), places < round(keep_high * 2**24)
    inside = (bits > int(low)) & (bits < int(high))
    kept: Array = np.where(bits == int(low), at_low, np.where(bits == int(high), at_high, inside))
    return kept


@compiled
def drop_by_rank(drawn: Array, density: float, spread: float, columns: int, tau: Array) -> None:
    """Keep elements with a probability that rises with the rank of their magnitude in their row, divided by it.

    From density - spread for the smallest to density + spread for the largest; equal ones rank by their place.
    N is a whole number of rows.
    """
    for row in range(tau.shape[0] // columns):
        line = tau[row * columns : (row + 1) * columns]
        order = np.argsort(np.abs(line), kind="mergesort")
        for rank in range(columns):
            i = order[rank]
            place = 0.5 if columns == 1 else rank / (columns - 1)
            keep = density - spread + 2.0 * spread * place
            if drawn[row * columns + i] < keep * 2.0**16:
                line[i] /= keep
            else:
                line[i] = 0


# ---- how task vectors become one


def sign_tie(experts: int, like: Array) -> float:
    """Weighted sums nearer to zero than this share of their terms are zero: what rounding alone may leave of one."""
    return 4.0 * experts * float(np.finfo(like.dtype).eps)


@compiled
def combine(
    base: Array, taus: Array, stride: int, weights_K: Array, scale: float, elects: bool, mean: bool, mergekit: bool,
    tie: float, out: Array,
) -> None:  # fmt: skip
    """base + scale * what the task vectors add up to, element by element; the base, to the bit, where that is zero.

    Args:
        taus: the task vectors, one beginning `stride` elements after the other.
        elects: of the terms weight * tau, only those count whose sign the sum of all has. Where that is zero, within
            `tie` of the terms' sizes, the base stays. Otherwise all are added.
        mean: divide what was elected by the sum of |weight| of the agreeing experts.
        mergekit: its conventions instead: a zero sum counts as plus, and the division is by the signed weights.
        out: float32, or float64, in which all is computed.
    """
    number = out.dtype.type
    # In rows of one array, whose distance the compiler knows: the sum of the terms that push up, of those that push
    # down, and what either is divided by.
    sums = np.empty(4 * ROW, out.dtype)
    nothing, one, factor, nearly = number(0), number(1), number(scale), number(tie)
    for begin in range(0, out.shape[0], BLOCK):
        merged, starts = out[begin : begin + BLOCK], base[begin : begin + BLOCK]
        count = merged.shape[0]
        sums[:] = nothing
        if not elects:
            for k in range(weights_K.shape[0]):
                tau, weight = taus[k * stride + begin : k * stride + begin + count], number(weights_K[k])
                for i in range(count):
                    sums[i] += weight * tau[i]
            for i in range(count):
                start = widen(starts[i])
                merged[i] = start + factor * sums[i] if sums[i] != nothing else start
            continue
        for k in range(weights_K.shape[0]):
            tau, weight = taus[k * stride + begin : k * stride + begin + count], number(weights_K[k])
            share = weight if mergekit else abs(weight)
            for i in range(count):
                term = weight * tau[i]
                up = term if term > nothing else nothing
                sums[i] += up
                sums[ROW + i] += term - up
                sums[2 * ROW + i] += share if term > nothing else nothing
                sums[3 * ROW + i] += share if term < nothing else nothing
        for i in range(count):
            start = widen(starts[i])
            total = sums[i] + sums[ROW + i]
            is_tied = abs(total) <= nearly * (sums[i] - sums[ROW + i])
            up_wins = (total > nothing) | (is_tied & mergekit)
            elected = sums[i] if up_wins else sums[ROW + i]
            elected = nothing if is_tied & (not mergekit) else elected
            # Not a choice of one: from two places in memory that would become a gather.
            size = number(up_wins) * sums[2 * ROW + i] + number(not up_wins) * sums[3 * ROW + i]
            elected /= size if mean & (size != nothing) else one
            merged[i] = start + factor * elected if elected != nothing else start


@compiled
def sparse_sum(
    models_MN: Array, begin: int, how: int, limits_KP: Array, keys_K: Array, weights_K: Array, scale: float,
    elects: bool, mean: bool, mergekit: bool, tie: float, kept_K: Array, out: Array,
) -> None:  # fmt: skip
    """`combine` of what is left of task vectors; what is left is computed block by block and kept nowhere.

    Args:
        begin: index in the tensor of the first element.
        how: WHOLE: all is left. TRIM: what `stays` says, a row of limits is its limits. DROP: elements whose number is
            below a bound, times a scale; a row is (bound, scale).
        keys_K: seeds.
        kept_K: int64, to which is added how many elements are left and not zero; without elements nothing is counted.
    """
    experts, elements = models_MN.shape[0] - 1, models_MN.shape[1]
    number = out.dtype.type
    taus = np.empty(experts * ROW, out.dtype)
    drawn = np.empty(BLOCK, np.uint16)
    zero = number(0)
    for at in range(0, elements, BLOCK):
        size = min(BLOCK, elements - at)
        base = models_MN[experts, at : at + size]
        for k in range(experts):
            tau, model = taus[k * ROW : k * ROW + size], models_MN[k, at : at + size]
            for i in range(size):
                tau[i] = widen(model[i]) - widen(base[i])
            if how == TRIM:
                low, high = np.uint32(limits_KP[k, 0]), np.uint32(limits_KP[k, 2])
                keep_low = np.uint32(np.rint(limits_KP[k, 1] * 16777216.0))
                keep_high = np.uint32(np.rint(limits_KP[k, 3] * 16777216.0))
                first = np.uint32(np.uint64(begin + at) * np.uint64(GOLDEN) + keys_K[k])
                for i in range(size):
                    bits = np.float32(tau[i]).view(np.uint32) & np.uint32(0x7FFFFFFF)
                    place = np.uint32(first + np.uint32(np.uint32(i) * np.uint32(GOLDEN))) >> np.uint32(8)
                    bound = keep_low if bits == low else keep_high
                    on_limit = (bits == low) | (bits == high)
                    leave = (bits < low) | (bits > high) | (on_limit & (np.uint32(place) >= bound))
                    tau[i] = zero if leave else tau[i]
            elif how == DROP and limits_KP[k, 0] < 65536.0:
                limit, factor = np.uint32(limits_KP[k, 0]), number(limits_KP[k, 1])
                draw(begin + at, keys_K[k], drawn[:size])
                for i in range(size):
                    tau[i] = factor * tau[i] if np.uint32(drawn[i]) < limit else zero
            if kept_K.shape[0]:
                left = np.uint32(0)
                for i in range(size):
                    left += np.uint32(tau[i] != zero)
                kept_K[k] += left
        combine(base, taus, ROW, weights_K, scale, elects, mean, mergekit, tie, out[at : at + size])


@compiled
def largest(base: Array, tau_KN: Array, scale: float, out: Array) -> None:
    """base + scale * the task vector of largest magnitude, element by element; the base where two opposite ones tie."""
    best, opposed = np.empty(BLOCK), np.empty(BLOCK)
    for begin in range(0, out.shape[0], BLOCK):
        count = min(BLOCK, out.shape[0] - begin)
        best[:count], opposed[:count] = 0.0, 0.0
        for k in range(tau_KN.shape[0]):
            tau = tau_KN[k, begin : begin + count]
            for i in range(count):
                value = np.float64(tau[i])
                larger, opposite = abs(value) > abs(best[i]), value == -best[i]
                opposed[i] = 0.0 if larger else 1.0 if opposite else opposed[i]
                best[i] = value if larger else best[i]
        for i in range(count):
            start = base[begin + i]
            keeps = (best[i] != 0.0) & (opposed[i] == 0.0)
            out[begin + i] = np.float64(start) + scale * best[i] if keeps else start


@compiled
def touched(tau_KN: Array, threshold: float, counts_K2: Array) -> None:
    """Count, for each expert, the elements that it alone changes, and those that others change too."""
    for i in range(tau_KN.shape[1]):
        active = 0
        for k in range(tau_KN.shape[0]):
            active += 1 if abs(np.float64(tau_KN[k, i])) > threshold else 0
        for k in range(tau_KN.shape[0]):
            if abs(np.float64(tau_KN[k, i])) > threshold:
                counts_K2[k, 1 if active > 1 else 0] += 1


@compiled
def add_unique(base: Array, tau_KN: Array, threshold: float, boosts_K: Array, scale: float, out: Array) -> None:
    """base + scale * (a change of one expert whole, times its boost; the mean of changes that several make)."""
    for i in range(out.shape[0]):
        active, total, boost = 0, 0.0, 1.0
        for k in range(tau_KN.shape[0]):
            value = np.float64(tau_KN[k, i])
            if abs(value) > threshold:
                active += 1
                total += value
                boost = boosts_K[k]
        if active == 0 or total == 0.0:
            out[i] = base[i]
        else:
            out[i] = np.float64(base[i]) + scale * (total * boost if active == 1 else total / active)


@compiled
def variances(tau_KN: Array, out: Array) -> None:
    """Variance over the experts of each element, in float64, as float32 bit patterns."""
    experts = tau_KN.shape[0]
    mean, total = np.empty(BLOCK), np.empty(BLOCK)
    single = np.empty(tau_KN.shape[1], np.float32)
    for begin in range(0, tau_KN.shape[1], BLOCK):
        count = min(BLOCK, tau_KN.shape[1] - begin)
        mean[:count], total[:count] = 0.0, 0.0
        for k in range(experts):
            tau = tau_KN[k, begin : begin + count]
            for i in range(count):
                mean[i] += np.float64(tau[i])
        for i in range(count):
            mean[i] /= experts
        for k in range(experts):
            tau = tau_KN[k, begin : begin + count]
            for i in range(count):
                total[i] += (np.float64(tau[i]) - mean[i]) ** 2
        for i in range(count):
            single[begin + i] = total[i] / experts
    bits = single.view(np.uint32)
    for i in range(bits.shape[0]):
        out[i] = bits[i]
