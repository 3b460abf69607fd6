"""What happens to the numbers of one chunk: arrays in, arrays out, nothing else known. Compiled, without the GIL.

Every kernel computes the same bits on every machine: no fused multiply-add, no reordering, no thread of its own.
"""

# K experts, N elements of the chunk, R rank of a low-rank update, C columns of the tensor
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
# Weighted sums nearer to zero than this share of their terms are zero: float64 rounding is 2^-53 a term.
SIGN_TIE = 2.0**-40
# A magnitude is a float32 without its sign: 31 bits, found in two passes of counting, 16 bits and 15 bits.
HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15
# Elements worked on at a time where a kernel needs room for partial results.
BLOCK = 1024
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
def decode(raw: Array, code: int, out: Array) -> int:
    """Little-endian bytes to floats. Returns how many are NaN or Inf.

    Args:
        raw: bytes, uint8.
        code: BF16, F16, F32 or F64.
        out: filled; float32, or float64.
    """
    bad = 0
    if code == BF16:
        words = raw.view(np.uint16)
        for i in range(out.shape[0]):
            bad += (words[i] & np.uint16(0x7F80)) == np.uint16(0x7F80)
        wide = np.empty(out.shape[0], np.uint32)
        for i in range(out.shape[0]):
            wide[i] = np.uint32(words[i]) << np.uint32(16)
        floats = wide.view(np.float32)
        for i in range(out.shape[0]):
            out[i] = floats[i]
    elif code == F16:
        halves = raw.view(np.uint16)
        for i in range(out.shape[0]):
            h = np.uint32(halves[i])
            exponent = (h >> np.uint32(10)) & np.uint32(31)
            fraction = np.float64(h & np.uint32(1023))
            if exponent == 31:
                bad += 1
            if exponent == 0:
                value = fraction * 2.0**-24
            else:
                value = (1.0 + fraction / 1024.0) * 2.0 ** (np.float64(exponent) - 15.0)
            out[i] = -value if h >> np.uint32(15) else value
    elif code == F32:
        singles = raw.view(np.float32)
        bits = raw.view(np.uint32)
        for i in range(out.shape[0]):
            bad += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
        for i in range(out.shape[0]):
            out[i] = singles[i]
    else:
        doubles = raw.view(np.float64)
        for i in range(out.shape[0]):
            bad += not math.isfinite(doubles[i])
            out[i] = doubles[i]
    return bad


@compiled
def encode(values: Array, code: int, raw: Array) -> int:
    """Floats to bytes, rounded to nearest, ties to even. Returns how many do not fit (NaN, Inf or too large)."""
    bad = 0
    if code == BF16:
        words = raw.view(np.uint16)
        single = values.astype(np.float32)
        bits = single.view(np.uint32)
        for i in range(values.shape[0]):
            rounded = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            words[i] = np.uint16(rounded)
        for i in range(values.shape[0]):
            bad += (bits[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F7F8000)
    elif code == F16:
        halves = raw.view(np.uint16)
        for i in range(values.shape[0]):
            value = np.float64(values[i])
            magnitude = abs(value)
            sign = np.uint16(0x8000) if math.copysign(1.0, value) < 0.0 else np.uint16(0)
            if not magnitude < 65520.0:
                bad += 1
                halves[i] = sign | np.uint16(0x7C00)
                continue
            exponent = max(math.frexp(magnitude)[1] - 1, -14) if magnitude > 0.0 else -14
            steps = np.rint(magnitude * 2.0 ** (10.0 - exponent))
            # A count that carries into the next power of two carries into the exponent's bits as well.
            lead = np.float64(exponent + 14) * 1024.0
            halves[i] = sign | np.uint16(lead + steps)
    elif code == F32:
        singles = raw.view(np.float32)
        bits = raw.view(np.uint32)
        for i in range(values.shape[0]):
            singles[i] = values[i]
        for i in range(values.shape[0]):
            bad += (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
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
def philox(counter: Any, stream: Any, key: Any, c0: Array, c1: Array, c2: Array, c3: Array) -> None:
    """Random 32-bit words for the counters counter, counter + 1, ...: one in each of four arrays.

    Args:
        counter, stream: the low and the high 64 bits of the 128-bit counter, uint64.
        key: uint64.
        c0, c1, c2, c3: uint64, of one length, filled; below 2^32.
    """
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    one, two = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    add_one, add_two = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
    for j in range(c0.shape[0]):
        place = counter + np.uint64(j)
        c0[j], c1[j], c2[j], c3[j] = place & mask, place >> shift, stream & mask, stream >> shift
    k0, k1 = key & mask, key >> shift
    for _ in range(10):  # rounds outside, counters inside: the inner loop becomes vector instructions
        for j in range(c0.shape[0]):
            first, second = one * c0[j], two * c2[j]
            c0[j] = (second >> shift) ^ c1[j] ^ k0
            c1[j] = second & mask
            c2[j] = (first >> shift) ^ c3[j] ^ k1
            c3[j] = first & mask
        k0, k1 = (k0 + add_one) & mask, (k1 + add_two) & mask


@compiled
def words(begin: int, stream: int, key: Any, out: Array) -> None:
    """The random 32-bit word of elements begin, begin + 1, ... of a tensor: word i mod 4 of counter i div 4."""
    first = begin // 4
    count = (begin + out.shape[0] + 3) // 4 - first
    c0, c1, c2, c3 = (
        np.empty(256, np.uint64),
        np.empty(256, np.uint64),
        np.empty(256, np.uint64),
        np.empty(256, np.uint64),
    )
    ordered = np.empty(1024, np.uint32)
    for block in range(0, count, 256):
        size = min(256, count - block)
        philox(np.uint64(first + block), np.uint64(stream), key, c0, c1, c2, c3)
        for j in range(size):
            ordered[4 * j] = np.uint32(c0[j])
            ordered[4 * j + 1] = np.uint32(c1[j])
            ordered[4 * j + 2] = np.uint32(c2[j])
            ordered[4 * j + 3] = np.uint32(c3[j])
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
    """Add the inner products of all pairs of rows to `out`, a (K, K) float64 matrix. Eight sums a pair, then one."""
    experts, elements = values_KN.shape
    lanes = np.empty(8)
    for a in range(experts):
        for b in range(a, experts):
            one, two = values_KN[a], values_KN[b]
            lanes[:] = 0.0
            whole = elements - elements % 8
            for i in range(0, whole, 8):
                for j in range(8):
                    lanes[j] += np.float64(one[i + j]) * np.float64(two[i + j])
            total = 0.0
            for j in range(8):
                total += lanes[j]
            for i in range(whole, elements):
                total += np.float64(one[i]) * np.float64(two[i])
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
    for i in range(bits.shape[0]):
        if bits[i] >> np.uint32(15) == np.uint32(high):
            counts[bits[i] & np.uint32(0x7FFF)] += 1


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
    for i in range(out.shape[0]):
        total = 0.0
        for k in range(tau_KN.shape[0]):
            total += weights_K[k] * np.float64(tau_KN[k, i])
        out[i] = np.float64(base[i]) + scale * total if total != 0.0 else base[i]


@compiled
def elect(base: Array, tau_KN: Array, weights_K: Array, scale: float, mean: bool, mergekit: bool, out: Array) -> None:
    """base + scale * the weighted mean of those task vectors whose sign won, element by element.

    The sign of the weighted sum wins. Where the sum is zero, the base stays.

    Args:
        mean: divide by the sum of |weight| of the agreeing experts; otherwise the sum is taken.
        mergekit: its conventions instead: a zero sum counts as plus, and the division is by the signed weights.
    """
    sign, total, size, below = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    for begin in range(0, out.shape[0], BLOCK):
        count = min(BLOCK, out.shape[0] - begin)
        total[:count], size[:count], below[:count] = 0.0, 0.0, 0.0
        for k in range(tau_KN.shape[0]):
            tau = tau_KN[k, begin : begin + count]
            for i in range(count):
                term = weights_K[k] * np.float64(tau[i])
                total[i] += term
                size[i] += abs(term)
        for i in range(count):
            tied = 1.0 if mergekit else 0.0
            is_tied = abs(total[i]) <= SIGN_TIE * size[i]
            sign[i] = tied if is_tied else (1.0 if total[i] > 0.0 else -1.0)
            total[i] = 0.0
        for k in range(tau_KN.shape[0]):
            tau = tau_KN[k, begin : begin + count]
            share = weights_K[k] if mergekit else abs(weights_K[k])
            for i in range(count):
                term = weights_K[k] * np.float64(tau[i])
                agrees = term * sign[i] > 0.0
                total[i] += term if agrees else 0.0
                below[i] += share if agrees else 0.0
        if mean:
            for i in range(count):
                total[i] /= below[i] if below[i] != 0.0 else 1.0
        for i in range(count):
            start = base[begin + i]
            out[begin + i] = np.float64(start) + scale * total[i] if total[i] != 0.0 else start


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
