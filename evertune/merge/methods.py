"""Every merge method on one page: what it computes on one tensor, where it comes from, and what it is worth.

A method turns the settings of a tensor into a `Rule`: passes that gather sums over the whole tensor, and what is then
done to each chunk. Chunks arrive in any order and on any thread; nothing here depends on it.
"""

# K experts, N elements of a chunk

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.kernels import HIGH_BINS, LOW_BINS, NO_LIMIT, Array

Standing = Literal["production", "research", "academic"]
State = dict[str, Any]
# Below this angle, in radians, an arc is a straight line to float32's precision.
STRAIGHT = 1e-3
# mergekit takes the straight line above this cosine.
STRAIGHT_COSINE_MERGEKIT = 0.9995
# RAM: a change counts when it is larger than this.
UNCHANGED = 1e-5


class Chunk(NamedTuple):
    """A run of elements of one tensor, in all models. The arrays are the worker's own and may be overwritten.

    base: (N,), or None for a merge without one.
    experts: (K, N), in canonical order.
    begin: index of the first element in the tensor.
    """

    base: Array | None
    experts: Array
    begin: int


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
    """How one tensor is merged: the passes, in order, then `apply` on every chunk, which fills `out`.

    part: turns a chunk's experts into what is left of their task vectors, for methods that leave out a part.
    whole_rows: chunks are whole rows of the last dimension.
    """

    apply: Callable[[Chunk, State, Array], None]
    passes: tuple[Pass, ...] = ()
    part: Callable[[Chunk, State], None] | None = None
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

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        kernels.anchored_sum(chunk.experts[0], chunk.experts[1:], weights[1:], total, out)

    return Rule(apply)


def ema(settings: Settings) -> Rule:
    """Moving average over checkpoints in order of time: m = t m + (1 - t) theta, m beginning as the first."""
    decay, last = settings.t, settings.experts - 1
    shares = [decay**last, *((1.0 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    weights = np.array(shares)

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        kernels.anchored_sum(chunk.experts[0], chunk.experts[1:], weights[1:], 1.0, out)

    return Rule(apply)


def interpolate(settings: Settings) -> Rule:
    """(1 - t) base + t expert; the ends are the models themselves, to the bit."""
    weights = np.array([settings.t])

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        if settings.t == 1.0:
            out[:] = chunk.experts[0]
        else:
            kernels.anchored_sum(_base(chunk), chunk.experts, weights, 1.0, out)

    return Rule(apply)


def task_arithmetic(settings: Settings) -> Rule:
    """base + lambda sum_k w_k tau_k."""
    weights = settings.scale * _mean_weights(settings)

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        kernels.anchored_sum(_base(chunk), chunk.experts, weights, 1.0, out)

    return Rule(apply)


# ---- sums whose coefficients come from lengths and angles


def slerp(settings: Settings) -> Rule:
    """Along the arc between two models; between two task vectors when a base and two experts are given."""
    return Rule(_apply_arc, (_gram_pass(_arc_vectors, 2, lambda gram: {"arc": arc_coefficients(gram, settings)}),))


def model_stock(settings: Settings) -> Rule:
    """Between the base and the mean of the experts, by the mean cosine of their task vectors."""

    def share(gram: Array) -> State:
        return {"share": stock_share(gram, mergekit=settings.mergekit)}

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        weights = np.full(settings.experts, state["share"] / settings.experts)
        kernels.anchored_sum(_base(chunk), chunk.experts, weights, 1.0, out)

    return Rule(apply, (_gram_pass(_task_vectors, settings.experts, share),))


# ---- task vectors of which a part stays


def ties(settings: Settings) -> Rule:
    """Keep the largest, elect a sign, average those that agree."""
    return _sparse(settings, trim_passes(settings), _trim, elect=True)


def dare_linear(settings: Settings) -> Rule:
    """Drop elements at random, scale the rest up, add."""
    return _sparse(settings, _drop_passes(settings), _drop, elect=False)


def dare_ties(settings: Settings) -> Rule:
    """Drop elements at random, scale the rest up, elect a sign, average those that agree."""
    return _sparse(settings, _drop_passes(settings), _drop, elect=True)


def della_linear(settings: Settings) -> Rule:
    """Drop elements at random, small ones more often, scale the rest up, add."""
    return _sparse(settings, (), _drop_by_rank, elect=False)


def della(settings: Settings) -> Rule:
    """Drop elements at random, small ones more often, scale the rest up, elect a sign, average those that agree."""
    return _sparse(settings, (), _drop_by_rank, elect=True)


def breadcrumbs(settings: Settings) -> Rule:
    """Drop the very largest and the smallest, add."""
    return _sparse(settings, trim_passes(settings, top=settings.gamma), _trim, elect=False)


def breadcrumbs_ties(settings: Settings) -> Rule:
    """Drop the very largest and the smallest, elect a sign, average those that agree."""
    return _sparse(settings, trim_passes(settings, top=settings.gamma), _trim, elect=True)


def sce(settings: Settings) -> Rule:
    """Select the elements that differ most between experts, weigh experts by their energy there, elect a sign."""
    density = float(settings.densities[0])
    passes: list[Pass] = []
    if density < 1.0:
        passes += _selection_passes(1, settings.elements, [(0.0, density)], _variance_rows)

    def select(chunk: Chunk, state: State) -> None:
        (bits,) = _variance_rows(chunk)  # before the first expert is cut
        for tau in chunk.experts if density < 1.0 else ():
            _keep(state["limits"][0], bits, chunk.begin, settings.keys[0], tau)

    def energies(chunk: Chunk, state: State, out: Array) -> None:
        select(chunk, state)
        matrix = np.zeros((settings.experts, settings.experts))
        kernels.gram(chunk.experts, matrix)
        out += np.diag(matrix)

    def weigh(total: Array, state: State) -> None:
        size = math.fsum(total)
        state["weights"] = total / size if size > 0.0 else np.full(settings.experts, 1.0 / settings.experts)

    passes.append(Pass((settings.experts,), np.float64, energies, weigh))

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        select(chunk, state)
        kernels.elect(_base(chunk), chunk.experts, state["weights"], settings.scale, True, settings.mergekit, out)

    return Rule(apply, tuple(passes), part=select)


def ram(settings: Settings) -> Rule:
    """A change that one expert makes is added whole, one that several make is averaged.

    With `boost` r, an expert's own changes count 1 + r min(shared / own, `boost_limit`) times (RAM+).
    """
    passes: tuple[Pass, ...] = ()
    if settings.boost > 0.0:

        def count(chunk: Chunk, state: State, out: Array) -> None:
            _to_task_vectors(chunk)
            kernels.touched(chunk.experts, UNCHANGED, out)

        def boosts(total: Array, state: State) -> None:
            own, shared = np.maximum(total[:, 0], 1), total[:, 1]
            state["boosts"] = 1.0 + settings.boost * np.minimum(shared / own, settings.boost_limit)

        passes = (Pass((settings.experts, 2), np.int64, count, boosts),)

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        _to_task_vectors(chunk)
        factors = state.get("boosts", np.ones(settings.experts))
        kernels.add_unique(_base(chunk), chunk.experts, UNCHANGED, factors, settings.scale, out)

    return Rule(apply, passes)


def magmax(settings: Settings) -> Rule:
    """Of each element, the change of largest magnitude."""

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        _to_task_vectors(chunk)
        kernels.largest(_base(chunk), chunk.experts, settings.scale, out)

    return Rule(apply)


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


def _base(chunk: Chunk) -> Array:
    assert chunk.base is not None, "planned without the base that the method needs"
    return chunk.base


def _to_task_vectors(chunk: Chunk) -> None:
    kernels.subtract(_base(chunk), chunk.experts)


def _mean_weights(settings: Settings) -> Array:
    if not settings.normalize:
        return settings.weights
    check_weight_sum(settings.weights)
    return settings.weights / math.fsum(settings.weights)


def _gram_pass(vectors: Callable[[Chunk], Array], size: int, finish: Callable[[Array], State]) -> Pass:
    def gather(chunk: Chunk, state: State, out: Array) -> None:
        kernels.gram(vectors(chunk), out)

    return Pass((size, size), np.float64, gather, lambda total, state: state.update(finish(total)))


def _task_vectors(chunk: Chunk) -> Array:
    _to_task_vectors(chunk)
    return chunk.experts


def _arc_vectors(chunk: Chunk) -> Array:
    """The two vectors of an arc: two task vectors, or two models (of which the base, if given, is the first)."""
    if chunk.base is None:
        return chunk.experts
    return np.stack([chunk.base, chunk.experts[0]]) if len(chunk.experts) == 1 else _task_vectors(chunk)


def _apply_arc(chunk: Chunk, state: State, out: Array) -> None:
    first, second = state["arc"]
    if chunk.base is not None and len(chunk.experts) == 2:
        kernels.anchored_sum(chunk.base, chunk.experts, np.array([first, second]), 1.0, out)
        return
    anchor = chunk.experts[0] if chunk.base is None else chunk.base
    kernels.anchored_sum(anchor, chunk.experts[-1:], np.array([second]), first + second, out)


Sparsify = Callable[[Settings, Chunk, State], None]


def _sparse(settings: Settings, passes: Sequence[Pass], sparsify: Sparsify, *, elect: bool) -> Rule:
    """Task vectors, of which `sparsify` leaves a part in place; then added, or averaged after electing a sign."""
    weights = settings.weights if elect else _mean_weights(settings)

    def part(chunk: Chunk, state: State) -> None:
        _to_task_vectors(chunk)
        sparsify(settings, chunk, state)

    def apply(chunk: Chunk, state: State, out: Array) -> None:
        part(chunk, state)
        if elect:
            mean = settings.normalize
            kernels.elect(_base(chunk), chunk.experts, weights, settings.scale, mean, settings.mergekit, out)
        else:
            kernels.add_up(_base(chunk), chunk.experts, weights, settings.scale, out)

    return Rule(apply, tuple(passes), part=part, whole_rows=sparsify is _drop_by_rank)


def trim_passes(settings: Settings, top: float = 0.0) -> tuple[Pass, ...]:
    """Passes that find the limits of each expert's kept magnitudes: after the `top` share, a share of its density."""
    if top == 0.0 and all(settings.densities >= 1.0):
        return ()
    shares = [(min(top, 1.0 - float(one)) if top else 0.0, float(one)) for one in settings.densities]

    def bits(chunk: Chunk) -> list[Array]:
        _to_task_vectors(chunk)
        return [_magnitudes(tau) for tau in chunk.experts]

    return tuple(_selection_passes(settings.experts, settings.elements, shares, bits))


def _selection_passes(
    count: int, elements: int, shares: Sequence[tuple[float, float]], bits: Callable[[Chunk], list[Array]]
) -> list[Pass]:
    """Two passes of counting that find the limits, by rank, of `count` rows of bit patterns.

    shares: (left out at the top, kept after that) of each row.
    """
    dropped = [round(top * elements) for top, _ in shares]
    kept = [
        min(max(1, round(density * elements)), elements - out)
        for (_, density), out in zip(shares, dropped, strict=True)
    ]

    def high(chunk: Chunk, state: State, out: Array) -> None:
        for row, counts in zip(bits(chunk), out, strict=True):
            kernels.count_high(row, counts)

    def bins(total: Array, state: State) -> None:
        state["high"] = total
        state["bins"] = [
            (_bin_of_rank(total[k], dropped[k] + kept[k])[0], _bin_of_rank(total[k], max(1, dropped[k]))[0])
            for k in range(count)
        ]

    def low(chunk: Chunk, state: State, out: Array) -> None:
        for row, counts, (last, first) in zip(bits(chunk), out, state["bins"], strict=True):
            kernels.count_low(row, last, counts[0])
            if any(dropped):
                kernels.count_low(row, first, counts[1])

    def find(total: Array, state: State) -> None:
        high_counts = state.pop("high")
        state["limits"] = [limits(high_counts[k], total[k], dropped[k], kept[k]) for k in range(count)]

    return [Pass((count, HIGH_BINS), np.int64, high, bins), Pass((count, 2, LOW_BINS), np.int64, low, find)]


def _trim(settings: Settings, chunk: Chunk, state: State) -> None:
    if "limits" not in state:
        return
    for tau, key, limit in zip(chunk.experts, settings.keys, state["limits"], strict=True):
        _keep(limit, _magnitudes(tau), chunk.begin, key, tau)


def _keep(limit: Limits, bits: Array, begin: int, key: Any, tau: Array) -> None:
    kernels.keep_between(bits, limit.low, limit.keep_low, limit.high, limit.keep_high, begin, key, tau)


def _magnitudes(tau: Array) -> Array:
    bits = np.empty(len(tau), np.uint32)
    kernels.magnitudes(tau, bits)
    return bits


def _variance_rows(chunk: Chunk) -> list[Array]:
    """One row of bit patterns; leaves task vectors in the chunk."""
    _to_task_vectors(chunk)
    bits = np.empty(chunk.experts.shape[1], np.uint32)
    kernels.variances(chunk.experts, bits)
    return [bits]


def _drop_passes(settings: Settings) -> tuple[Pass, ...]:
    """mergekit scales what is left to the task vector's L1 norm, which takes a pass; the paper divides by density."""
    if not settings.mergekit:
        return ()

    def norms(chunk: Chunk, state: State, out: Array) -> None:
        _to_task_vectors(chunk)
        before = np.abs(chunk.experts).sum(axis=1, dtype=np.float64)
        _drop(settings, chunk, {"scales": np.ones(settings.experts)})
        out += np.stack([before, np.abs(chunk.experts).sum(axis=1, dtype=np.float64)])

    def scales(total: Array, state: State) -> None:
        before, after = total
        state["scales"] = np.divide(before, after, out=np.ones_like(before), where=after > 0.0)

    return (Pass((2, settings.experts), np.float64, norms, scales),)


def _drop(settings: Settings, chunk: Chunk, state: State) -> None:
    for k, tau in enumerate(chunk.experts):
        density = float(settings.densities[k])
        if settings.dims < 2 or density >= 1.0:
            continue
        scale = float(state["scales"][k]) if "scales" in state else 1.0 / density
        kernels.drop(_drawn(settings, chunk, k), density, scale, tau)


def _drop_by_rank(settings: Settings, chunk: Chunk, state: State) -> None:
    for k, tau in enumerate(chunk.experts):
        density = float(settings.densities[k])
        if settings.dims < 2 or density >= 1.0:
            continue
        spread = min(settings.epsilon, density, 1.0 - density)
        kernels.drop_by_rank(_drawn(settings, chunk, k), density, spread, settings.columns, tau)


def _drawn(settings: Settings, chunk: Chunk, k: int) -> Array:
    drawn = np.empty(chunk.experts.shape[1], np.uint32)
    kernels.words(chunk.begin, 0, settings.keys[k], drawn)
    return drawn
