"""What happens to the numbers of one chunk: arrays in, arrays out, nothing else known. Compiled, without the GIL.

Every kernel computes the same bits on every machine: no fused multiply-add, no reordering, no thread of its own.
"""

# M models (K experts, then the base if there is one), N elements of the chunk
# R rank of a low-rank update, C columns of the tensor
# tau_KN: task vectors, expert minus base

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])
Array = NDArray[Any]

BF16, F16, F32, F64 = 0, 1, 2, 3
# Bytes of each.
WIDTHS = (2, 2, 4, 8)
# Weighted sums nearer to zero than this share of their terms are zero: float64 rounding is 2^-53 a term.
SIGN_TIE = 2.0**-40
# A magnitude is a float32 without its sign: 31 bits, found in two passes of counting, 16 bits and 15 bits.
HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15
# Elements worked on at a time where a kernel needs room for partial results.
BLOCK = 256
# Sums that an inner product is divided into, so that it becomes vector instructions.
LANES = 64
# And of a chunk worked through from bytes to bytes: five models in float32 fill 40 KiB.
CHUNK_BLOCK = 2048
# What `sparsify` does with task vectors.
WHOLE, TRIM, DROP = 0, 1, 2
NO_LIMIT = np.uint32(0x7FFFFFFF)


def compiled(function: F) -> F:
    """Compile a kernel at its first call for the types it gets, and keep the machine code on disk."""
    try:
        made: Any = njit(function, nogil=True, cache=True)
    except RuntimeError:  # no folder for the cache can be written: compile in every process
        made = njit(function, nogil=True)
    return cast(F, made)


# ---- bytes to numbers and back


@compiled
def is_finite(raw: Array, code: int) -> bool:
    """Whether floats in little-endian bytes hold no NaN and no Inf: none has an exponent of all ones.

    Adding the exponent's lowest bit carries into the sign's place only from an exponent of all ones, and never into the
    next number, so that a 64-bit word tests four, two or one at a time.

    Args:
        raw: bytes, uint8.
        code: BF16, F16, F32 or F64.
    """
    exponents, lowest, signs = np.uint64(0x7F807F807F807F80), np.uint64(0x0080008000800080), np.uint64(1 << 15)
    if code == F16:
        exponents, lowest = np.uint64(0x7C007C007C007C00), np.uint64(0x0400040004000400)
    elif code == F32:
        exponents, lowest, signs = np.uint64(0x7F8000007F800000), np.uint64(0x0080000000800000), np.uint64(1 << 31)
    elif code == F64:
        exponents, lowest, signs = np.uint64(0x7FF0 << 48), np.uint64(0x0010 << 48), np.uint64(0)
    signs |= signs << np.uint64(32)
    signs |= (signs << np.uint64(16)) if code in (BF16, F16) else np.uint64(1 << 63)
    whole = raw.shape[0] // 8
    found = np.uint64(0)
    lanes = raw[: 8 * whole].view(np.uint64)
    for i in range(whole):
        found |= (lanes[i] & exponents) + lowest
    last = np.uint64(0)
    for i in range(8 * whole, raw.shape[0]):
        last |= np.uint64(raw[i]) << np.uint64(8 * (i - 8 * whole))
    found |= (last & exponents) + lowest
    return (found & signs) == 0


@compiled
def decode(raw: Array, code: int, out: Array) -> None:
    """Little-endian bytes to floats; what becomes of NaN and Inf is not said.

    Args:
        raw: bytes, uint8.
        code: BF16, F16, F32 or F64.
        out: filled; float32, or float64.
    """
    if code == BF16:
        words = raw.view(np.uint16)
        for i in range(out.shape[0]):
            out[i] = np.uint32(np.uint32(words[i]) << np.uint32(16)).view(np.float32)
    elif code == F16:
        halves = raw.view(np.uint16)
        for i in range(out.shape[0]):
            # The bits in float32's places; its exponent counts from 127, a half's from 15. Exact below the normal ones.
            sign = np.uint32(np.uint32(halves[i] & np.uint16(0x8000)) << np.uint32(16))
            rest = np.uint32(np.uint32(halves[i] & np.uint16(0x7FFF)) << np.uint32(13))
            out[i] = np.uint32(sign | rest).view(np.float32) * np.float32(2.0**112)
    elif code == F32:
        singles = raw.view(np.float32)
        for i in range(out.shape[0]):
            out[i] = singles[i]
    else:
        doubles = raw.view(np.float64)
        for i in range(out.shape[0]):
            out[i] = doubles[i]


@compiled
def encode(values: Array, code: int, raw: Array) -> int:
    """Floats to bytes, rounded once, to nearest, ties to even. Returns how many do not fit (NaN, Inf or too large)."""
    bad: Any = 0
    if code == BF16:
        words = raw.view(np.uint16)
        for i in range(values.shape[0]):
            single = np.float32(values[i])
            bits = single.view(np.uint32)
            # A float64 that float32 rounds to the middle between two results is above or below it, not in the middle.
            middle = (bits & np.uint32(0xFFFF)) == np.uint32(0x8000)
            above = middle & (abs(np.float64(values[i])) > abs(np.float64(single)))
            below = middle & (abs(np.float64(values[i])) < abs(np.float64(single)))
            even = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
            up = np.uint32(1) if above else np.uint32(0) if below else even
            words[i] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + up) >> np.uint32(16))
            bad += (bits & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F7F8000)
    elif code == F16:
        halves = raw.view(np.uint16)
        for i in range(values.shape[0]):
            magnitude = abs(np.float64(values[i]))
            fits = magnitude < 65520.0
            bad += not fits
            limited = np.float64(magnitude if fits else 65536.0)
            power: Any = limited.view(np.uint64) >> np.uint64(52)
            exponent = max(int(power) - 1023, -14)
            scale = np.uint64(np.uint64(1033 - exponent) << np.uint64(52)).view(np.float64)
            # A count that carries into the next power of two carries into the exponent's bits as well.
            counted = int(np.rint(limited * scale)) + 1024 * (exponent + 14)
            halves[i] = np.uint16(counted + (0x8000 if math.copysign(1.0, values[i]) < 0.0 else 0))
    elif code == F32:
        singles = raw.view(np.float32)
        bits32 = raw.view(np.uint32)
        for i in range(values.shape[0]):
            singles[i] = values[i]
        for i in range(values.shape[0]):
            bad += (bits32[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    else:
        doubles = raw.view(np.float64)
        for i in range(values.shape[0]):
            doubles[i] = values[i]
            bad += not math.isfinite(values[i])
    return bad


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


@compiled
def checksum(raw: Array) -> Any:
    """A sum of 64-bit words weighted by their place: what a torn or lost write changes. Not a digest."""
    words = raw[: raw.shape[0] - raw.shape[0] % 8].view(np.uint64)
    total = np.uint64(raw.shape[0])
    for i in range(words.shape[0]):
        total += words[i] * (np.uint64(2) * np.uint64(i) + np.uint64(1))
    for i in range(words.shape[0] * 8, raw.shape[0]):
        total += np.uint64(raw[i]) * (np.uint64(2) * np.uint64(i) + np.uint64(1))
    return total


# ---- random numbers: Philox4x32-10 (Salmon et al. 2011), a function of key and counter


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
        for _ in range(10):
            # The mask tells the compiler that 32 bits are multiplied, for which there is a vector instruction.
            first, second = np.uint64(0xD2511F53) * (c0 & mask), np.uint64(0xCD9E8D57) * (c2 & mask)
            c0, c1 = (second >> shift) ^ c1 ^ k0, second & mask
            c2, c3 = (first >> shift) ^ c3 ^ k1, first & mask
            k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
        out_4J[0, j], out_4J[1, j] = np.uint32(c0), np.uint32(c1)
        out_4J[2, j], out_4J[3, j] = np.uint32(c2), np.uint32(c3)


@compiled
def words(begin: int, stream: int, key: Any, out: Array) -> None:
    """The random 32-bit word of elements begin, begin + 1, ... of a tensor: word i mod 4 of counter i div 4."""
    first = begin // 4
    count = (begin + out.shape[0] + 3) // 4 - first
    columns, ordered = np.empty((4, BLOCK), np.uint32), np.empty(4 * BLOCK, np.uint32)
    for block in range(0, count, BLOCK):
        size = min(BLOCK, count - block)
        philox(np.uint64(first + block), np.uint64(stream), key, columns)
        for j in range(size):
            for c in range(4):
                ordered[4 * j + c] = columns[c, j]
        at = 4 * (first + block)
        low, high = max(at, begin), min(at + 4 * size, begin + out.shape[0])
        for i in range(low, high):
            out[i - begin] = ordered[i - at]


# ---- sums


@compiled
def anchored_sum(anchor: Array, terms_KN: Array, weights_K: Array, anchor_scale: float, out: Array) -> None:
    """anchor_scale * anchor + sum_k weights_k (terms_k - anchor), in the dtype of `out`.

    The anchor times its scale, to the bit, where the weighted differences cancel.
    """
    for i in range(out.shape[0]):
        out[i] = 0
    for k in range(terms_KN.shape[0]):
        term = terms_KN[k]
        weight = out.dtype.type(weights_K[k])
        for i in range(out.shape[0]):
            out[i] += weight * (term[i] - anchor[i])
    scale = out.dtype.type(anchor_scale)
    for i in range(out.shape[0]):
        start = scale * anchor[i]
        total = start + out[i]
        out[i] = total if out[i] != 0 else start


@compiled
def subtract(base: Array, values_KN: Array) -> None:
    """Turn experts into task vectors, in place."""
    for k in range(values_KN.shape[0]):
        for i in range(base.shape[0]):
            values_KN[k, i] -= base[i]


@compiled
def gram(values_KN: Array, out: Array) -> None:
    """Add the inner products of all pairs of rows to `out`, a (K, K) float64 matrix. `LANES` sums a pair, then one."""
    experts, elements = values_KN.shape
    whole = elements - elements % LANES
    sums = np.empty(LANES)
    for a in range(experts):
        for b in range(a, experts):
            sums[:] = 0.0
            for begin in range(0, whole, LANES):
                one, two = values_KN[a, begin : begin + LANES], values_KN[b, begin : begin + LANES]
                for j in range(LANES):
                    sums[j] += np.float64(one[j]) * np.float64(two[j])
            total = 0.0
            for j in range(LANES):
                total += sums[j]
            for i in range(whole, elements):
                total += np.float64(values_KN[a, i]) * np.float64(values_KN[b, i])
            out[a, b] += total
            if a != b:
                out[b, a] += total


@compiled
def count_conflicts(tau_KN: Array, counts: Array) -> None:
    """Add to counts[0] the elements that two or more experts change, to counts[1] those pushed in both directions."""
    for i in range(tau_KN.shape[1]):
        plus, minus = 0, 0
        for k in range(tau_KN.shape[0]):
            plus += tau_KN[k, i] > 0
            minus += tau_KN[k, i] < 0
        counts[0] += plus + minus > 1
        counts[1] += (plus > 0) & (minus > 0)


# ---- which elements of a task vector stay


@compiled
def magnitudes(values: Array, out: Array) -> None:
    """Absolute values as float32 bit patterns: their order as integers is their order as numbers."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    for i in range(values.shape[0]):
        out[i] = bits[i] & np.uint32(0x7FFFFFFF)


@compiled
def count_high(bits: Array, counts: Array) -> None:
    """Count magnitudes by their upper 16 bits."""
    for i in range(bits.shape[0]):
        counts[bits[i] >> np.uint32(15)] += 1


@compiled
def count_low(bits: Array, high: int, counts: Array) -> None:
    """Count the magnitudes whose upper 16 bits are `high` by their lower 15 bits."""
    # Gathered first: a place that is moved on costs less than a branch that is taken now and then.
    wanted, found = np.uint32(high), np.empty(BLOCK, np.uint32)
    for begin in range(0, bits.shape[0], BLOCK):
        count = 0
        for i in range(begin, min(begin + BLOCK, bits.shape[0])):
            found[count] = bits[i]
            count += bits[i] >> np.uint32(15) == wanted
        for i in range(count):
            counts[found[i] & np.uint32(0x7FFF)] += 1


@compiled
def keep_between(
    bits: Array, low: int, keep_low: float, high: int, keep_high: float, begin: int, key: int, tau: Array
) -> None:
    """Set elements of a task vector to zero unless low < magnitude < high; of those equal to a limit keep a share.

    Which of the equal ones stay is drawn from (key, index), so that no end of the tensor is favoured.

    Args:
        low, high: bit patterns as `magnitudes` gives them. With low == high, `keep_low` counts.
        keep_low, keep_high: shares in [0, 1] of the elements equal to a limit.
        begin: index of the chunk's first element in its tensor.
    """
    lowest, highest = np.uint32(low), np.uint32(high)
    equal = 0
    for i in range(tau.shape[0]):
        equal += (bits[i] == lowest) | (bits[i] == highest)
        tau[i] = tau[i] if (bits[i] >= lowest) & (bits[i] <= highest) else 0
    if equal == 0:
        return
    # Half a word for each element: shares to 1.5e-5 at half the cost.
    first = begin // 2
    drawn = np.empty((begin + tau.shape[0] + 1) // 2 - first, np.uint32)
    words(first, 1, key, drawn)
    halves = drawn.view(np.uint16)[begin - 2 * first :]
    low_bound, high_bound = np.uint32(keep_low * 65536.0), np.uint32(keep_high * 65536.0)
    for i in range(tau.shape[0]):
        bound = low_bound if bits[i] == lowest else high_bound
        leave = ((bits[i] == lowest) | (bits[i] == highest)) & (np.uint32(halves[i]) >= bound)
        tau[i] = 0 if leave else tau[i]


@compiled
def drop(drawn: Array, keep: float, scale: float, tau: Array) -> None:
    """Keep an element where its word is below keep * 2^32, times `scale`; the others become zero."""
    bound = np.uint64(keep * 2.0**32)
    factor = tau.dtype.type(scale)
    for i in range(tau.shape[0]):
        tau[i] = tau[i] * factor if np.uint64(drawn[i]) < bound else 0


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
            if drawn[row * columns + i] < keep * 2.0**32:
                line[i] /= keep
            else:
                line[i] = 0


# ---- how task vectors become one


@compiled
def add_up(base: Array, tau_KN: Array, weights_K: Array, scale: float, out: Array) -> None:
    """base + scale * sum_k weights_k tau_k, summed in float64. The base, to the bit, where that sum is zero."""
    total = np.empty(BLOCK)
    for begin in range(0, out.shape[0], BLOCK):
        count = min(BLOCK, out.shape[0] - begin)
        total[:count] = 0.0
        for k in range(tau_KN.shape[0]):
            tau = tau_KN[k, begin : begin + count]
            for i in range(count):
                total[i] += weights_K[k] * np.float64(tau[i])
        for i in range(count):
            start = base[begin + i]
            out[begin + i] = np.float64(start) + scale * total[i] if total[i] != 0.0 else start


@compiled
def elect(base: Array, tau_KN: Array, weights_K: Array, scale: float, mean: bool, mergekit: bool, out: Array) -> None:
    """base + scale * the weighted mean of those task vectors whose sign won, element by element.

    The sign of the weighted sum wins. Where the sum is zero, the base stays.

    Args:
        mean: divide by the sum of |weight| of the agreeing experts; otherwise the sum is taken.
        mergekit: its conventions instead: a zero sum counts as plus, and the division is by the signed weights.
    """
    # In rows of one array, whose distance the compiler knows: the sum of the terms that push up, of those that push
    # down, and what either is divided by.
    sums = np.empty(4 * BLOCK)
    for begin in range(0, out.shape[0], BLOCK):
        count = min(BLOCK, out.shape[0] - begin)
        sums[:] = 0.0
        for k in range(tau_KN.shape[0]):
            tau, weight = tau_KN[k, begin : begin + count], weights_K[k]
            share = weight if mergekit else abs(weight)
            for i in range(count):
                term = weight * np.float64(tau[i])
                up = max(term, 0.0)
                sums[i] += up
                sums[BLOCK + i] += term - up
                sums[2 * BLOCK + i] += share if term > 0.0 else 0.0
                sums[3 * BLOCK + i] += share if term < 0.0 else 0.0
        starts, merged = base[begin : begin + count], out[begin : begin + count]
        for i in range(count):
            total = sums[i] + sums[BLOCK + i]
            is_tied = abs(total) <= SIGN_TIE * (sums[i] - sums[BLOCK + i])
            up_wins = (total > 0.0) | (is_tied & mergekit)
            elected = sums[i] if up_wins else sums[BLOCK + i]
            elected = 0.0 if is_tied & (not mergekit) else elected
            size = sums[2 * BLOCK + i] if up_wins else sums[3 * BLOCK + i]
            elected /= size if mean & (size != 0.0) else 1.0
            merged[i] = np.float64(starts[i]) + scale * elected if elected != 0.0 else starts[i]


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


# ---- chunks, from the bytes of all models to the bytes of one: decoded, computed and encoded block by block, so that
# what lies between never leaves the core. Kept in this file: the cache of machine code knows changes of one file only.


@compiled
def decode_block(raw: Array, places_M: Array, codes_M: Array, begin: int, values_MN: Array) -> None:
    """Elements begin, begin + 1, ... of all models as floats.

    Args:
        raw: bytes of a chunk.
        places_M: where in `raw` each model begins.
        codes_M: of each model's numbers.
    """
    for m in range(values_MN.shape[0]):
        width = WIDTHS[codes_M[m]]
        first = places_M[m] + begin * width
        decode(raw[first : first + values_MN.shape[1] * width], codes_M[m], values_MN[m])


@compiled
def sum_chunk(
    raw: Array, places_M: Array, codes_M: Array, like: Array, anchor: int, first: int, weights_K: Array,
    anchor_scale: float, code: int, out: Array,
) -> int:  # fmt: skip
    """`anchored_sum` of a chunk. Returns how many results do not fit.

    Args:
        like: its dtype is that of the arithmetic.
        anchor: row of the anchor; the terms are rows first, first + 1, ...
        code: of the bytes `out`.
    """
    models, width = places_M.shape[0], WIDTHS[code]
    count = out.shape[0] // width
    room, total = np.empty(models * CHUNK_BLOCK, like.dtype), np.empty(CHUNK_BLOCK, like.dtype)
    bad = 0
    for begin in range(0, count, CHUNK_BLOCK):
        size = min(CHUNK_BLOCK, count - begin)
        values = room[: models * size].reshape(models, size)
        decode_block(raw, places_M, codes_M, begin, values)
        terms = values[first : first + weights_K.shape[0]]
        anchored_sum(values[anchor], terms, weights_K, anchor_scale, total[:size])
        bad += encode(total[:size], code, out[begin * width : (begin + size) * width])
    return bad


@compiled
def gram_chunk(
    raw: Array, places_M: Array, codes_M: Array, like: Array, count: int, has_base: bool, out: Array
) -> None:
    """Add the inner products of all pairs of task vectors, or without a base of models, to a float64 matrix."""
    models = places_M.shape[0]
    room = np.empty(models * CHUNK_BLOCK, like.dtype)
    for begin in range(0, count, CHUNK_BLOCK):
        size = min(CHUNK_BLOCK, count - begin)
        values = room[: models * size].reshape(models, size)
        decode_block(raw, places_M, codes_M, begin, values)
        if has_base:
            subtract(values[models - 1], values[: models - 1])
            gram(values[: models - 1], out)
        else:
            gram(values, out)


@compiled
def count_high_chunk(raw: Array, places_M: Array, codes_M: Array, like: Array, count: int, counts_K: Array) -> None:
    """`count_high` of each task vector's magnitudes."""
    models = places_M.shape[0]
    room, bits = np.empty(models * CHUNK_BLOCK, like.dtype), np.empty(CHUNK_BLOCK, np.uint32)
    for begin in range(0, count, CHUNK_BLOCK):
        size = min(CHUNK_BLOCK, count - begin)
        values = room[: models * size].reshape(models, size)
        decode_block(raw, places_M, codes_M, begin, values)
        subtract(values[models - 1], values[: models - 1])
        for k in range(models - 1):
            magnitudes(values[k], bits[:size])
            count_high(bits[:size], counts_K[k])


@compiled
def count_low_chunk(
    raw: Array, places_M: Array, codes_M: Array, like: Array, count: int, bins_K2: Array, counts_K2: Array
) -> None:
    """`count_low` of each task vector's magnitudes, in two bins; a bin of -1 is not counted."""
    models = places_M.shape[0]
    room, bits = np.empty(models * CHUNK_BLOCK, like.dtype), np.empty(CHUNK_BLOCK, np.uint32)
    for begin in range(0, count, CHUNK_BLOCK):
        size = min(CHUNK_BLOCK, count - begin)
        values = room[: models * size].reshape(models, size)
        decode_block(raw, places_M, codes_M, begin, values)
        subtract(values[models - 1], values[: models - 1])
        for k in range(models - 1):
            magnitudes(values[k], bits[:size])
            for j in range(2):
                if bins_K2[k, j] >= 0:
                    count_low(bits[:size], bins_K2[k, j], counts_K2[k, j])


@compiled
def sparsify(tau_KN: Array, begin: int, how: int, limits_KP: Array, keys_K: Array) -> None:
    """Leave a part of each task vector in place, and zero elsewhere.

    Args:
        begin: index in the tensor of the first element.
        how: WHOLE: all stays. TRIM: by magnitude, a row of limits is (low, keep_low, high, keep_high) of
            `keep_between`. DROP: at random, a row is (density, scale) of `drop`.
        keys_K: seeds of what is drawn.
    """
    if how == TRIM:
        bits = np.empty(tau_KN.shape[1], np.uint32)
        for k in range(tau_KN.shape[0]):
            magnitudes(tau_KN[k], bits)
            low, keep_low, high, keep_high = limits_KP[k, 0], limits_KP[k, 1], limits_KP[k, 2], limits_KP[k, 3]
            keep_between(bits, int(low), keep_low, int(high), keep_high, begin, keys_K[k], tau_KN[k])
    elif how == DROP:
        drawn = np.empty(tau_KN.shape[1], np.uint32)
        for k in range(tau_KN.shape[0]):
            if limits_KP[k, 0] < 1.0:
                words(begin, 0, keys_K[k], drawn)
                drop(drawn, limits_KP[k, 0], limits_KP[k, 1], tau_KN[k])


@compiled
def sparse_chunk(
    raw: Array, places_M: Array, codes_M: Array, like: Array, first: int, how: int, limits_KP: Array,
    keys_K: Array, weights_K: Array, scale: float, elects: bool, mean: bool, mergekit: bool, code: int, out: Array,
) -> int:  # fmt: skip
    """`sparsify`, then `elect` or `add_up`, of a chunk. Returns how many results do not fit.

    Args:
        first: index in the tensor of the chunk's first element.
        elects: elect a sign; otherwise add.
    """
    models, width = places_M.shape[0], WIDTHS[code]
    count = out.shape[0] // width
    room, total = np.empty(models * CHUNK_BLOCK, like.dtype), np.empty(CHUNK_BLOCK, like.dtype)
    bad = 0
    for begin in range(0, count, CHUNK_BLOCK):
        size = min(CHUNK_BLOCK, count - begin)
        values = room[: models * size].reshape(models, size)
        decode_block(raw, places_M, codes_M, begin, values)
        base, tau = values[models - 1], values[: models - 1]
        subtract(base, tau)
        sparsify(tau, first + begin, how, limits_KP, keys_K)
        if elects:
            elect(base, tau, weights_K, scale, mean, mergekit, total[:size])
        else:
            add_up(base, tau, weights_K, scale, total[:size])
        bad += encode(total[:size], code, out[begin * width : (begin + size) * width])
    return bad
