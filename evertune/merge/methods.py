"""Every merge method on one page: what it computes on one tensor, where it comes from, and what it is worth.

A method turns the settings of a tensor into a `Rule`: passes that gather sums over the whole tensor, and what is then
done to each chunk. Chunks arrive in any order and on any thread; nothing here depends on it. What is used most goes
from bytes to bytes in one kernel (`kernels.sum_chunk` and its kin); the rest works on a chunk's numbers.
"""

# K experts, N elements of a chunk, P numbers that say what stays of a task vector

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.chunk import Chunk, Values
from evertune.merge.kernels import HIGH_BINS, LOW_BINS, NO_LIMIT, Array

Standing = Literal["production", "research", "academic"]
State = dict[str, Any]
# Below this angle, in radians, an arc is a straight line to float32's precision.
STRAIGHT = 1e-3
# mergekit takes the straight line above this cosine.
STRAIGHT_COSINE_MERGEKIT = 0.9995
# RAM: a change counts when it is larger than this.
UNCHANGED = 1e-5


@dataclass(frozen=True)
class Settings:
    """What a method is told about one tensor, every value already resolved for it.

    weights, densities: (K,) float64.
    scale: the merged task vector counts this many times (lambda).
    t: share of the second model, for methods between two.
    keys: (K,) uint64: seeds of what is drawn for this tensor, one for each expert.
    elements, columns, dims: size of the tensor, of its last dimension, and number of dimensions.
    mergekit: follow its conventions where they differ.
    """

    weights: Array
    densities: Array
    keys: Array
    elements: int
    columns: int
    dims: int
    scale: float = 1.0
    t: float = 0.5
    normalize: bool = True
    epsilon: float = 0.15
    gamma: float = 0.01
    boost: float = 0.0
    boost_limit: float = 0.2
    mergekit: bool = False

    @property
    def experts(self) -> int:
        return len(self.weights)


@dataclass(frozen=True)
class Pass:
    """One reading of a whole tensor. Sums of chunks add up: integers at once, floats in the order of the tensor.

    shape, dtype: of the array that `gather` adds to; it begins with zeros.
    finish: puts what follows from the total into the state.
    """

    shape: tuple[int, ...]
    dtype: type
    gather: Callable[[Chunk, State, Array], None]
    finish: Callable[[Array, State], None]


@dataclass(frozen=True)
class Rule:
    """How one tensor is merged: the passes, in order, then `apply` on every chunk.

    apply: fills bytes with numbers of a type (BF16, F16, F32 or F64) and returns how many do not fit into it.
    part: what is left of a chunk's task vectors, (K, N), for methods that leave out a part.
    whole_rows: chunks are whole rows of the last dimension.
    """

    apply: Callable[[Chunk, State, int, Array], int]
    passes: tuple[Pass, ...] = ()
    part: Callable[[Chunk, State], Array] | None = None
    whole_rows: bool = False


@dataclass(frozen=True)
class Method:
    """A line of the table.

    base: whether a base model is needed, refused or optional.
    parameters: settings it reads beside the models, by their name in a configuration.
    per_model: settings that each expert may have.
    ordered: the order of the experts has a meaning; otherwise it changes no bit.
    """

    name: str
    rule: Callable[[Settings], Rule]
    paper: str
    standing: Standing
    summary: str
    base: Literal["needed", "optional", "none"] = "needed"
    parameters: tuple[str, ...] = ()
    per_model: tuple[str, ...] = ()
    experts: tuple[int, int] = (1, 1000)
    ordered: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    linear: bool = False


# ---- sums: one multiplication and addition for each expert


def linear(settings: Settings) -> Rule:
    """Weighted mean; the weighted sum without `normalize`."""
    weights, total = settings.weights, math.fsum(settings.weights)
    if settings.normalize:
        check_weight_sum(weights)
        weights, total = weights / total, 1.0

    return Rule(lambda chunk, state, code, out: _sum(chunk, 0, 1, weights[1:], total, code, out))


def ema(settings: Settings) -> Rule:
    """Moving average over checkpoints in order of time: m = t m + (1 - t) theta, m beginning as the first."""
    decay, last = settings.t, settings.experts - 1
    shares = [decay**last, *((1.0 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    weights = np.array(shares)

    return Rule(lambda chunk, state, code, out: _sum(chunk, 0, 1, weights[1:], 1.0, code, out))


def interpolate(settings: Settings) -> Rule:
    """(1 - t) base + t expert; the ends are the models themselves, to the bit."""
    if settings.t == 1.0:
        return copy_of_first()
    weights = np.array([settings.t])
    return Rule(lambda chunk, state, code, out: _sum(chunk, 1, 0, weights, 1.0, code, out))


def copy_of_first() -> Rule:
    """The first model as it is."""
    return Rule(lambda chunk, state, code, out: _sum(chunk, 0, 0, np.empty(0), 1.0, code, out))


def task_arithmetic(settings: Settings) -> Rule:
    """base + lambda sum_k w_k tau_k."""
    weights, base = settings.scale * _mean_weights(settings), settings.experts
    return Rule(lambda chunk, state, code, out: _sum(chunk, base, 0, weights, 1.0, code, out))


# ---- sums whose coefficients come from lengths and angles


def slerp(settings: Settings) -> Rule:
    """Along the arc between two models; between two task vectors when a base and two experts are given."""

    def gather(chunk: Chunk, state: State, out: Array) -> None:
        _gram(chunk, settings.experts == 2 and chunk.has_base, out)

    def find(total: Array, state: State) -> None:
        # With one expert, the base is the second row and the first end.
        state["arc"] = arc_coefficients(total[::-1, ::-1] if settings.experts == 1 else total, settings)

    def apply(chunk: Chunk, state: State, code: int, out: Array) -> int:
        first, second = state["arc"]
        if settings.experts == 2 and chunk.has_base:
            return _sum(chunk, 2, 0, np.array([first, second]), 1.0, code, out)
        anchor, term = (1, 0) if chunk.has_base else (0, 1)
        return _sum(chunk, anchor, term, np.array([second]), first + second, code, out)

    return Rule(apply, (Pass((2, 2), np.float64, gather, find),))


def model_stock(settings: Settings) -> Rule:
    """Between the base and the mean of the experts, by the mean cosine of their task vectors."""

    count = settings.experts

    def gather(chunk: Chunk, state: State, out: Array) -> None:
        _gram(chunk, True, out)

    def find(total: Array, state: State) -> None:
        state["weights"] = np.full(count, stock_share(total, mergekit=settings.mergekit) / count)

    def apply(chunk: Chunk, state: State, code: int, out: Array) -> int:
        return _sum(chunk, count, 0, state["weights"], 1.0, code, out)

    return Rule(apply, (Pass((count, count), np.float64, gather, find),))


# ---- task vectors of which a part stays


def ties(settings: Settings) -> Rule:
    """Keep the largest, elect a sign, average those that agree."""
    return _sparse(settings, trim_passes(settings), kernels.TRIM, elect=True)


def dare_linear(settings: Settings) -> Rule:
    """Drop elements at random, scale the rest up, add."""
    return _sparse(settings, _drop_passes(settings), kernels.DROP, elect=False)


def dare_ties(settings: Settings) -> Rule:
    """Drop elements at random, scale the rest up, elect a sign, average those that agree."""
    return _sparse(settings, _drop_passes(settings), kernels.DROP, elect=True)


def della_linear(settings: Settings) -> Rule:
    """Drop elements at random, small ones more often, scale the rest up, add."""
    return _by_rank(settings, elect=False)


def della(settings: Settings) -> Rule:
    """Drop elements at random, small ones more often, scale the rest up, elect a sign, average those that agree."""
    return _by_rank(settings, elect=True)


def breadcrumbs(settings: Settings) -> Rule:
    """Drop the very largest and the smallest, add."""
    return _sparse(settings, trim_passes(settings, top=settings.gamma), kernels.TRIM, elect=False)


def breadcrumbs_ties(settings: Settings) -> Rule:
    """Drop the very largest and the smallest, elect a sign, average those that agree."""
    return _sparse(settings, trim_passes(settings, top=settings.gamma), kernels.TRIM, elect=True)


def sce(settings: Settings) -> Rule:
    """Select the elements that differ most between experts, weigh experts by their energy there, elect a sign."""
    density = float(settings.densities[0])
    passes = list(_variance_passes(settings, density)) if density < 1.0 else []

    def select(chunk: Chunk, state: State) -> Values:
        values = chunk.task_vectors()
        if density < 1.0:
            bits = _variances(values.experts)  # before the first expert is cut
            low, keep_low, high, keep_high = state["limits"][0]
            for tau in values.experts:
                kernels.keep_between(bits, int(low), keep_low, int(high), keep_high, chunk.begin, settings.keys[0], tau)
        return values

    def energies(chunk: Chunk, state: State, out: Array) -> None:
        matrix = np.zeros((settings.experts, settings.experts))
        kernels.gram(select(chunk, state).experts, matrix)
        out += np.diag(matrix)

    def weigh(total: Array, state: State) -> None:
        size = math.fsum(total)
        state["weights"] = total / size if size > 0.0 else np.full(settings.experts, 1.0 / settings.experts)

    passes.append(Pass((settings.experts,), np.float64, energies, weigh))

    def fill(chunk: Chunk, state: State, out: Array) -> None:
        values = select(chunk, state)
        weights, mean = state["weights"], True
        kernels.elect(values.start, values.experts, weights, settings.scale, mean, settings.mergekit, out)

    return Rule(_by_numbers(fill), tuple(passes), part=lambda chunk, state: select(chunk, state).experts)


def ram(settings: Settings) -> Rule:
    """A change that one expert makes is added whole, one that several make is averaged.

    With `boost` r, an expert's own changes count 1 + r min(shared / own, `boost_limit`) times (RAM+).
    """
    passes: tuple[Pass, ...] = ()
    if settings.boost > 0.0:

        def count(chunk: Chunk, state: State, out: Array) -> None:
            kernels.touched(chunk.task_vectors().experts, UNCHANGED, out)

        def boosts(total: Array, state: State) -> None:
            own, shared = np.maximum(total[:, 0], 1), total[:, 1]
            state["boosts"] = 1.0 + settings.boost * np.minimum(shared / own, settings.boost_limit)

        passes = (Pass((settings.experts, 2), np.int64, count, boosts),)

    def fill(chunk: Chunk, state: State, out: Array) -> None:
        values, factors = chunk.task_vectors(), state.get("boosts", np.ones(settings.experts))
        kernels.add_unique(values.start, values.experts, UNCHANGED, factors, settings.scale, out)

    return Rule(_by_numbers(fill), passes)


def magmax(settings: Settings) -> Rule:
    """Of each element, the change of largest magnitude."""

    def fill(chunk: Chunk, state: State, out: Array) -> None:
        values = chunk.task_vectors()
        kernels.largest(values.start, values.experts, settings.scale, out)

    return Rule(_by_numbers(fill))


METHODS = {
    one.name: one
    for one in (
        Method("linear", linear, "arXiv:2203.05482", "production", "weighted mean of checkpoints (soup)",
               base="none", per_model=("weight",), parameters=("normalize",), linear=True),
        Method("ema", ema, "Polyak and Juditsky 1992; arXiv:2203.02155", "production",
               "moving average over checkpoints or rounds, oldest first",
               base="none", parameters=("decay",), defaults={"t": 0.5}, ordered=True, linear=True),
        Method("interpolate", interpolate, "arXiv:2109.01903; by block: arXiv:2309.06256", "production",
               "from the base towards one model (WiSE-FT, LITI; by block of layers: HMA)",
               parameters=("t",), experts=(1, 1), linear=True),
        Method("task_arithmetic", task_arithmetic, "arXiv:2212.04089", "research",
               "add task vectors; a negative weight forgets",
               per_model=("weight",), parameters=("lambda", "normalize"), defaults={"normalize": False}, linear=True),
        Method("slerp", slerp, "Shoemake 1985; arXiv:2406.16768", "production",
               "along the arc between two models, or between two task vectors",
               base="optional", parameters=("t",), experts=(1, 2), ordered=True),
        Method("model_stock", model_stock, "arXiv:2403.19522", "academic",
               "between base and mean, by the angle between task vectors", experts=(2, 1000)),
        Method("ties", ties, "arXiv:2306.01708", "research", "trim, elect a sign, average the agreeing",
               per_model=("weight", "density"), parameters=("lambda", "normalize"), defaults={"density": 0.2}),
        Method("dare_linear", dare_linear, "arXiv:2311.03099", "research", "drop at random, rescale, add",
               per_model=("weight", "density"), parameters=("lambda", "normalize"),
               defaults={"density": 0.5, "normalize": False}),
        Method("dare_ties", dare_ties, "arXiv:2311.03099; arXiv:2306.01708", "research",
               "drop at random, rescale, elect a sign, average the agreeing",
               per_model=("weight", "density"), parameters=("lambda", "normalize"), defaults={"density": 0.5}),
        Method("della_linear", della_linear, "arXiv:2406.11617", "academic", "drop small changes more often, add",
               per_model=("weight", "density"), parameters=("lambda", "normalize", "epsilon"),
               defaults={"density": 0.5, "normalize": False}),
        Method("della", della, "arXiv:2406.11617", "academic",
               "drop small changes more often, elect a sign, average the agreeing",
               per_model=("weight", "density"), parameters=("lambda", "normalize", "epsilon"),
               defaults={"density": 0.5}),
        Method("breadcrumbs", breadcrumbs, "arXiv:2312.06795", "academic", "drop the largest and the smallest, add",
               per_model=("weight", "density"), parameters=("lambda", "normalize", "gamma"),
               defaults={"density": 0.9, "normalize": False}),
        Method("breadcrumbs_ties", breadcrumbs_ties, "arXiv:2312.06795; arXiv:2306.01708", "academic",
               "drop the largest and the smallest, elect a sign, average the agreeing",
               per_model=("weight", "density"), parameters=("lambda", "normalize", "gamma"),
               defaults={"density": 0.9}),
        Method("sce", sce, "arXiv:2408.07990", "academic", "select by variance, weigh by energy, elect a sign",
               parameters=("lambda", "density"), experts=(2, 1000), defaults={"density": 1.0}),
        Method("ram", ram, "arXiv:2601.13572", "academic", "own changes whole, shared changes averaged",
               parameters=("lambda", "boost", "boost_limit"), experts=(2, 1000)),
        Method("magmax", magmax, "arXiv:2407.06322", "academic", "the change of largest magnitude wins",
               parameters=("lambda",)),
    )
}  # fmt: skip


# ---- numbers from sums


def check_weight_sum(weights: Array) -> None:
    """Raise MergeError where a weighted mean would divide by nothing."""
    total, size = math.fsum(weights), math.fsum(abs(weights))
    if abs(total) <= 1e-9 * size or size == 0.0:
        raise MergeError(
            f"the weights {[float(one) for one in weights]} add up to {total:g}; a mean divides by their sum.",
            remedy="Change the weights, or set normalize: false, or use task_arithmetic with a base.",
        )


def arc_coefficients(gram: Array, settings: Settings) -> tuple[float, float]:
    """Shares of the two vectors of a (2, 2) Gram matrix at `t` of the arc between them; of the line if it is straight.

    sin((1-t) a) / sin a and sin(t a) / sin a with the angle a.
    """
    t, size = settings.t, math.sqrt(gram[0, 0] * gram[1, 1])
    if size == 0.0:
        return 1.0 - t, t
    cosine = min(1.0, max(-1.0, gram[0, 1] / size))
    angle = math.acos(cosine)
    straight = abs(cosine) > STRAIGHT_COSINE_MERGEKIT if settings.mergekit else math.sin(angle) < STRAIGHT
    if straight:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def stock_share(gram: Array, *, mergekit: bool = False) -> float:
    """N c / (1 + (N - 1) c) of the mean of N experts, c the mean cosine of their task vectors; within [0, 1].

    Pairs of which one did not move count as parallel. mergekit does not hold the share within [0, 1].
    """
    lengths = np.sqrt(np.diag(gram))
    cosines = []
    for a, b in itertools.combinations(range(len(gram)), 2):
        size = lengths[a] * lengths[b]
        cosines.append(min(1.0, max(-1.0, gram[a, b] / size)) if size > 0.0 else 1.0)
    cosine, count = math.fsum(cosines) / len(cosines), len(gram)
    below = 1.0 + (count - 1) * cosine
    share = count * cosine / below if below != 0.0 else 0.0
    return share if mergekit else min(1.0, max(0.0, share))


class Limits(NamedTuple):
    """Magnitudes that stay: between two bit patterns, with a share of those that equal one."""

    low: int
    keep_low: float
    high: int
    keep_high: float


def limits(high_counts: Array, low_counts: Sequence[Array], dropped: int, kept: int) -> Limits:
    """What leaves out the `dropped` largest and keeps the next `kept`, from the counts of both passes.

    Args:
        high_counts: elements by the upper 16 bits of their magnitude.
        low_counts: elements by the lower 15 bits, in the bins of the last kept and of the last dropped element.
    """
    low, above_low, equal_low = _at_rank(high_counts, low_counts[0], dropped + kept)
    if dropped == 0:
        return Limits(low, (kept - above_low) / equal_low, int(NO_LIMIT), 0.0)
    high, above_high, equal_high = _at_rank(high_counts, low_counts[1], dropped)
    if low == high:
        return Limits(low, kept / equal_low, high, kept / equal_low)
    return Limits(low, (dropped + kept - above_low) / equal_low, high, 1.0 - (dropped - above_high) / equal_high)


def _bin_of_rank(counts: Array, rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest element, counted from 1, and how many lie in bins above."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


def _at_rank(high_counts: Array, low_counts: Array, rank: int) -> tuple[int, int, int]:
    """Bit pattern of the rank-th largest magnitude, how many are larger, how many are equal."""
    high, above = _bin_of_rank(high_counts, rank)
    low, inside = _bin_of_rank(low_counts, rank - above)
    return (high << 15) | low, above + inside, int(low_counts[low])


# ---- parts of rules


def _sum(chunk: Chunk, anchor: int, first: int, weights: Array, anchor_scale: float, code: int, out: Array) -> int:
    return int(kernels.sum_chunk(*chunk.models, anchor, first, weights, anchor_scale, code, out))


def _gram(chunk: Chunk, of_task_vectors: bool, out: Array) -> None:
    kernels.gram_chunk(*chunk.models, chunk.count, of_task_vectors, out)


def _by_numbers(fill: Callable[[Chunk, State, Array], None]) -> Callable[[Chunk, State, int, Array], int]:
    """A rule's `apply` of a function that fills an array of floats."""

    def apply(chunk: Chunk, state: State, code: int, out: Array) -> int:
        numbers = chunk.room.take("merged", (chunk.count,), chunk.like.dtype)
        fill(chunk, state, numbers)
        return int(kernels.encode(numbers, code, out))

    return apply


def _mean_weights(settings: Settings) -> Array:
    if not settings.normalize:
        return settings.weights
    check_weight_sum(settings.weights)
    return settings.weights / math.fsum(settings.weights)


def _sparse(settings: Settings, passes: Sequence[Pass], how: int, *, elect: bool) -> Rule:
    """Task vectors of which `kernels.sparsify` leaves a part; then added, or averaged after electing a sign."""
    weights = settings.weights if elect else _mean_weights(settings)
    if not passes and (how == kernels.TRIM or (settings.dims < 2 and not settings.mergekit)):
        how = kernels.WHOLE  # all is kept; or a vector, whose few elements would be scaled up by luck

    def limits_KP(state: State) -> Array:
        return _drop_limits(settings, state) if how == kernels.DROP else state.get("limits", np.empty((0, 0)))

    def part(chunk: Chunk, state: State) -> Array:
        tau = chunk.task_vectors().experts
        kernels.sparsify(tau, chunk.begin, how, limits_KP(state), settings.keys)
        return tau

    def apply(chunk: Chunk, state: State, code: int, out: Array) -> int:
        bad = kernels.sparse_chunk(
            *chunk.models, chunk.begin, how, limits_KP(state), settings.keys, weights, settings.scale, elect,
            settings.normalize, settings.mergekit, code, out,
        )  # fmt: skip
        return int(bad)

    return Rule(apply, tuple(passes), part=part)


def _by_rank(settings: Settings, *, elect: bool) -> Rule:
    """Task vectors of which ranks in rows leave a part; then added, or averaged after electing a sign."""
    weights = settings.weights if elect else _mean_weights(settings)

    def part(chunk: Chunk, state: State) -> Values:
        values = chunk.task_vectors()
        drawn = chunk.room.take("drawn", (chunk.count,), np.uint32)
        for tau, density, key in zip(values.experts, settings.densities, settings.keys, strict=True):
            if settings.dims >= 2 and density < 1.0:
                kernels.words(chunk.begin, 0, key, drawn)
                spread = min(settings.epsilon, density, 1.0 - density)
                kernels.drop_by_rank(drawn, float(density), float(spread), settings.columns, tau)
        return values

    def fill(chunk: Chunk, state: State, out: Array) -> None:
        values, mean = part(chunk, state), settings.normalize
        if elect:
            kernels.elect(values.start, values.experts, weights, settings.scale, mean, settings.mergekit, out)
        else:
            kernels.add_up(values.start, values.experts, weights, settings.scale, out)

    return Rule(_by_numbers(fill), part=lambda chunk, state: part(chunk, state).experts, whole_rows=True)


def trim_passes(settings: Settings, top: float = 0.0) -> tuple[Pass, ...]:
    """Passes that find the limits of each expert's kept magnitudes: after the `top` share, a share of its density."""
    if top == 0.0 and all(settings.densities >= 1.0):
        return ()
    shares = [(min(top, 1.0 - float(one)) if top else 0.0, float(one)) for one in settings.densities]

    def high(chunk: Chunk, state: State, out: Array) -> None:
        kernels.count_high_chunk(*chunk.models, chunk.count, out)

    def low(chunk: Chunk, state: State, out: Array) -> None:
        kernels.count_low_chunk(*chunk.models, chunk.count, state["bins"], out)

    return _selection_passes(settings.elements, shares, high, low)


def _variance_passes(settings: Settings, density: float) -> tuple[Pass, ...]:
    def high(chunk: Chunk, state: State, out: Array) -> None:
        kernels.count_high(_variances(chunk.task_vectors().experts), out[0])

    def low(chunk: Chunk, state: State, out: Array) -> None:
        kernels.count_low(_variances(chunk.task_vectors().experts), state["bins"][0, 0], out[0, 0])

    return _selection_passes(settings.elements, [(0.0, density)], high, low)


def _variances(tau: Array) -> Array:
    bits = np.empty(tau.shape[1], np.uint32)
    kernels.variances(tau, bits)
    return bits


Gather = Callable[[Chunk, State, Array], None]


def _selection_passes(
    elements: int, shares: Sequence[tuple[float, float]], high: Gather, low: Gather
) -> tuple[Pass, Pass]:
    """Two passes of counting that find, by rank, the limits of rows of bit patterns: `limits` in the state, (rows, 4).

    Args:
        shares: (left out at the top, kept after that) of each row.
        high: counts a chunk's patterns by their upper 16 bits, (rows, HIGH_BINS).
        low: counts those in the two bins of each row of `bins`, -1 for none, by their lower 15, (rows, 2, LOW_BINS).
    """
    rows = len(shares)
    dropped = [round(top * elements) for top, _ in shares]
    kept = [
        min(max(1, round(density * elements)), elements - out)
        for (_, density), out in zip(shares, dropped, strict=True)
    ]

    def bins(total: Array, state: State) -> None:
        state["high"] = total
        last = [_bin_of_rank(total[k], dropped[k] + kept[k])[0] for k in range(rows)]
        first = [_bin_of_rank(total[k], dropped[k])[0] if dropped[k] else -1 for k in range(rows)]
        state["bins"] = np.column_stack([last, first])

    def find(total: Array, state: State) -> None:
        counts = state.pop("high")
        state["limits"] = np.array([limits(counts[k], total[k], dropped[k], kept[k]) for k in range(rows)])

    return Pass((rows, HIGH_BINS), np.int64, high, bins), Pass((rows, 2, LOW_BINS), np.int64, low, find)


def _drop_limits(settings: Settings, state: State) -> Array:
    """(K, 2): density and the factor of what stays: 1 / density, or what mergekit's pass found."""
    scales = state.get("scales", 1.0 / settings.densities)
    return np.column_stack([settings.densities, scales])


def _drop_passes(settings: Settings) -> tuple[Pass, ...]:
    """mergekit scales what is left to the task vector's L1 norm, which takes a pass; the paper divides by density."""
    if not settings.mergekit:
        return ()

    def norms(chunk: Chunk, state: State, out: Array) -> None:
        tau = chunk.task_vectors().experts
        before = np.abs(tau).sum(axis=1, dtype=np.float64)
        whole = np.column_stack([settings.densities, np.ones(settings.experts)])
        kernels.sparsify(tau, chunk.begin, kernels.DROP, whole, settings.keys)
        out += np.stack([before, np.abs(tau).sum(axis=1, dtype=np.float64)])

    def scales(total: Array, state: State) -> None:
        before, after = total
        state["scales"] = np.divide(before, after, out=np.ones_like(before), where=after > 0.0)

    return (Pass((2, settings.experts), np.float64, norms, scales),)
