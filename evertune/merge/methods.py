"""Every merge method on one page: what it computes on one tensor, where it comes from, and what it is worth.

A method turns the settings of a tensor into a `Rule`: passes that gather sums over the whole tensor, and what is then
done to each chunk. Chunks arrive in any order and on any thread; nothing here depends on it. What is used most reads
the models as they are stored, in one kernel; the rest works on a chunk's widened numbers.
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
from evertune.merge.kernels import BINS, MAGNITUDE_BITS, NO_LIMIT, Array

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
    """One reading of a tensor. Sums of chunks add up: integers at once, floats in the order of the tensor.

    shape, dtype: of the array that `gather` adds to; it begins with zeros.
    finish: puts what follows from the total into the state; True asks for the same pass once more.
    of_sample: reads an even sample only, as `Reader.sample` gives it.
    """

    shape: tuple[int, ...]
    dtype: type
    gather: Callable[[Chunk, State, Array], None]
    finish: Callable[[Array, State], bool | None]
    of_sample: bool = False


@dataclass(frozen=True)
class Rule:
    """How one tensor is merged: the passes, in order, then `apply` on every chunk.

    apply: fills an array with the merged numbers of a chunk, in the dtype to compute in, and adds to a (K,) int64
        array how many elements of each task vector stay and are not zero, if the method leaves out a part; an empty
        one asks for no count.
    leaves_out: whether it does.
    whole_rows: chunks are whole rows of the last dimension.
    shows_nan: a NaN or Inf of any model is one in the totals of its passes, and in the result of `apply` at its place.
    """

    apply: Callable[[Chunk, State, Array, Array], None]
    passes: tuple[Pass, ...] = ()
    leaves_out: bool = False
    whole_rows: bool = False
    shows_nan: bool = False


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

    return Rule(lambda chunk, state, out, kept: _sum(chunk, 0, 1, weights[1:], total, out), shows_nan=True)


def ema(settings: Settings) -> Rule:
    """Moving average over checkpoints in order of time: m = t m + (1 - t) theta, m beginning as the first."""
    decay, last = settings.t, settings.experts - 1
    shares = [decay**last, *((1.0 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    weights = np.array(shares)

    return Rule(lambda chunk, state, out, kept: _sum(chunk, 0, 1, weights[1:], 1.0, out), shows_nan=True)


def interpolate(settings: Settings) -> Rule:
    """(1 - t) base + t expert; the ends are the models themselves, to the bit."""
    if settings.t == 1.0:
        return copy_of_first()
    weights = np.array([settings.t])
    return Rule(lambda chunk, state, out, kept: _sum(chunk, 1, 0, weights, 1.0, out), shows_nan=True)


def copy_of_first() -> Rule:
    """The first model as it is."""
    return Rule(lambda chunk, state, out, kept: _sum(chunk, 0, 0, np.empty(0), 1.0, out))


def task_arithmetic(settings: Settings) -> Rule:
    """base + lambda sum_k w_k tau_k."""
    weights, base = settings.scale * _mean_weights(settings), settings.experts
    return Rule(lambda chunk, state, out, kept: _sum(chunk, base, 0, weights, 1.0, out), shows_nan=True)


# ---- sums whose coefficients come from lengths and angles


def slerp(settings: Settings) -> Rule:
    """Along the arc between two models; between two task vectors when a base and two experts are given."""

    def gather(chunk: Chunk, state: State, out: Array) -> None:
        kernels.gram(chunk.models_MN, settings.experts == 2 and chunk.has_base, chunk.like, out)

    def find(total: Array, state: State) -> None:
        # With one expert, the base is the second row and the first end.
        state["arc"] = arc_coefficients(total[::-1, ::-1] if settings.experts == 1 else total, settings)

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        first, second = state["arc"]
        if settings.experts == 2 and chunk.has_base:
            _sum(chunk, 2, 0, np.array([first, second]), 1.0, out)
        else:
            anchor, term = (1, 0) if chunk.has_base else (0, 1)
            _sum(chunk, anchor, term, np.array([second]), first + second, out)

    return Rule(apply, (Pass((2, 2), np.float64, gather, find),), shows_nan=True)


def model_stock(settings: Settings) -> Rule:
    """Between the base and the mean of the experts, by the mean cosine of their task vectors."""

    count = settings.experts

    def gather(chunk: Chunk, state: State, out: Array) -> None:
        kernels.gram(chunk.models_MN, True, chunk.like, out)

    def find(total: Array, state: State) -> None:
        state["weights"] = np.full(count, stock_share(total, mergekit=settings.mergekit) / count)

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        _sum(chunk, count, 0, state["weights"], 1.0, out)

    return Rule(apply, (Pass((count, count), np.float64, gather, find),), shows_nan=True)


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
            stays = kernels.stays(_variances(values.experts), state["limits"][0], chunk.begin, int(settings.keys[0]))
            values.experts[:, ~stays] = 0
        return values

    def energies(chunk: Chunk, state: State, out: Array) -> None:
        matrix = np.zeros((settings.experts, settings.experts))
        kernels.gram(select(chunk, state).experts, False, chunk.like, matrix)
        out += np.diag(matrix)

    def weigh(total: Array, state: State) -> None:
        size = math.fsum(total)
        state["weights"] = total / size if size > 0.0 else np.full(settings.experts, 1.0 / settings.experts)

    passes.append(Pass((settings.experts,), np.float64, energies, weigh))

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        _combine(settings, select(chunk, state), state["weights"], True, out, kept)

    return Rule(apply, tuple(passes), leaves_out=True)


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

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        values, factors = chunk.task_vectors(), state.get("boosts", np.ones(settings.experts))
        kernels.add_unique(values.start, values.experts, UNCHANGED, factors, settings.scale, out)

    return Rule(apply, passes)


def magmax(settings: Settings) -> Rule:
    """Of each element, the change of largest magnitude."""

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        values = chunk.task_vectors()
        kernels.largest(values.start, values.experts, settings.scale, out)

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


class Ranked(NamedTuple):
    """The magnitude of a rank, how many are larger, and how many are equal to it, itself included."""

    bits: int
    above: int
    equal: int


class Band(NamedTuple):
    """Magnitudes [low, low + width), as bit patterns, counted in bins of 2^shift. No width: nothing is counted."""

    low: int
    width: int
    shift: int


def band(low: int, width: int) -> Band:
    """The band with the finest bins that there are enough of."""
    return Band(low, width, max(0, (width - 1).bit_length() - (BINS.bit_length() - 1)))


def find_rank(rank: int, of: Band, counts: Array) -> Ranked | Band:
    """The rank-th largest magnitude from the counts of a band, or a narrower band that it lies in.

    Args:
        rank: counted from 1.
        counts: (2, BINS + 1), as `kernels.count_bits` fills them.
    """
    above, in_bins = int(counts[0, BINS]), counts[0, :BINS]
    if rank <= above:
        return band(of.low + of.width, (1 << MAGNITUDE_BITS) - of.low - of.width)
    place, larger = _bin_of_rank(in_bins, rank - above)
    if place < 0:
        return band(0, of.low)
    low = of.low + (place << of.shift)
    # Where all of a bin have its first pattern, nothing finer can be found in it.
    if of.shift == 0 or counts[1, place] == 0:
        return Ranked(low, above + larger, int(in_bins[place]))
    return band(low, 1 << of.shift)


def limits(last: Ranked, first: Ranked | None, dropped: int, kept: int) -> Limits:
    """What leaves out the `dropped` largest and keeps the next `kept`.

    Args:
        last, first: the magnitudes of the last that is kept, and of the last that is dropped.
    """
    if first is None:
        return Limits(last.bits, (kept - last.above) / last.equal, int(NO_LIMIT), 0.0)
    if last.bits == first.bits:
        return Limits(last.bits, kept / last.equal, first.bits, kept / last.equal)
    keep_high = 1.0 - (dropped - first.above) / first.equal
    return Limits(last.bits, (dropped + kept - last.above) / last.equal, first.bits, keep_high)


def _bin_of_rank(counts: Array, rank: int) -> tuple[int, int]:
    """The bin of the rank-th largest element, counted from 1, and how many lie in bins above; -1 if there are fewer."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


# ---- parts of rules


def _sum(chunk: Chunk, anchor: int, first: int, weights: Array, anchor_scale: float, out: Array) -> None:
    kernels.anchored_sum(chunk.models_MN, anchor, first, weights, anchor_scale, out)


def _combine(settings: Settings, values: Values, weights: Array, elect: bool, out: Array, kept: Array) -> None:
    """`kernels.combine` of what is left of a chunk's task vectors."""
    if len(kept):
        kept += np.count_nonzero(values.experts, axis=1)
    tie = kernels.sign_tie(settings.experts, out)
    kernels.combine(
        values.start,
        values.experts.reshape(-1),
        len(out),
        weights,
        settings.scale,
        elect,
        settings.normalize,
        settings.mergekit,
        tie,
        out,
    )


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
    fixed = _drop_limits(settings) if how == kernels.DROP else np.empty((0, 0))

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        tie = kernels.sign_tie(settings.experts, out)
        kernels.sparse_sum(
            chunk.models_MN, chunk.begin, how, state.get("limits", fixed), settings.keys, weights, settings.scale,
            elect, settings.normalize, settings.mergekit, tie, kept, out,
        )  # fmt: skip

    return Rule(apply, tuple(passes), leaves_out=True)


def _by_rank(settings: Settings, *, elect: bool) -> Rule:
    """Task vectors of which ranks in rows leave a part; then added, or averaged after electing a sign."""
    weights = settings.weights if elect else _mean_weights(settings)

    def apply(chunk: Chunk, state: State, out: Array, kept: Array) -> None:
        values = chunk.task_vectors()
        drawn = chunk.room.take("drawn", (chunk.count,), np.uint16)
        for tau, density, key in zip(values.experts, settings.densities, settings.keys, strict=True):
            if settings.dims >= 2 and density < 1.0:
                kernels.draw(chunk.begin, key, drawn)
                spread = min(settings.epsilon, density, 1.0 - density)
                kernels.drop_by_rank(drawn, float(density), float(spread), settings.columns, tau)
        _combine(settings, values, weights, elect, out, kept)

    return Rule(apply, leaves_out=True, whole_rows=True)


def trim_passes(settings: Settings, top: float = 0.0) -> tuple[Pass, ...]:
    """Passes that find the limits of each expert's kept magnitudes: after the `top` share, a share of its density."""
    if top == 0.0 and all(settings.densities >= 1.0):
        return ()
    shares = [(min(top, 1.0 - float(one)) if top else 0.0, float(one)) for one in settings.densities]

    def bits_of(chunk: Chunk) -> Array:
        return kernels.magnitudes(chunk.task_vectors().experts)

    def count(chunk: Chunk, state: State, out: Array) -> None:
        kernels.count_bands(chunk.models_MN, state["bands"], chunk.like, out)

    return _selection_passes(settings.elements, shares, bits_of, count)


def _variance_passes(settings: Settings, density: float) -> tuple[Pass, ...]:
    def bits_of(chunk: Chunk) -> Array:
        return _variances(chunk.task_vectors().experts)[None]

    def count(chunk: Chunk, state: State, out: Array) -> None:
        low, width, shift = state["bands"][0, 0].tolist()
        kernels.count_bits(bits_of(chunk)[0], low, width, shift, out[0, 0])

    return _selection_passes(settings.elements, [(0.0, density)], bits_of, count)


def _variances(tau: Array) -> Array:
    bits = np.empty(tau.shape[1], np.uint32)
    kernels.variances(tau, bits)
    return bits


# A sample's magnitudes are counted by their upper 15 bits.
_COARSE = MAGNITUDE_BITS - 15


def _selection_passes(
    elements: int,
    shares: Sequence[tuple[float, float]],
    bits_of: Callable[[Chunk], Array],
    count: Callable[[Chunk, State, Array], None],
) -> tuple[Pass, Pass]:
    """Passes that find, by rank, the limits of rows of bit patterns: `limits` in the state, (rows, 4).

    A sample says about where a rank's magnitude lies; then a whole reading counts that band. It is exact: where the
    sample was wrong, or the band's bins too coarse, another band is counted in another reading.

    Args:
        shares: (left out at the top, kept after that) of each row.
        bits_of: a chunk's patterns, (rows, N).
        count: `kernels.count_bits` of a chunk in the bands of the state, (rows, 2, 3), into (rows, 2, 2, BINS + 1).
    """
    rows = len(shares)
    dropped = [round(top * elements) for top, _ in shares]
    kept = [
        min(max(1, round(density * elements)), elements - out)
        for (_, density), out in zip(shares, dropped, strict=True)
    ]
    # Of each row, the ranks of the last that is kept and of the last that is dropped; 0 for none.
    ranks = [(out + into, out) for out, into in zip(dropped, kept, strict=True)]
    per_row = 2 if any(dropped) else 1

    def sample(chunk: Chunk, state: State, out: Array) -> None:
        for row, bits in zip(out, bits_of(chunk), strict=True):
            row += np.bincount(bits >> np.uint32(_COARSE), minlength=len(row))

    def guess(total: Array, state: State) -> None:
        state["found"] = {}
        bands = np.zeros((rows, per_row, 3), np.int64)
        for k, j in _wanted(ranks, per_row):
            bands[k, j] = _band_of_sample(ranks[k][j] / elements, total[k])
        state["bands"] = bands

    def find(total: Array, state: State) -> bool:
        bands, found = state["bands"], state["found"]
        for k, j in _wanted(ranks, per_row):
            if (k, j) not in found:
                next_one = find_rank(ranks[k][j], Band(*bands[k, j].tolist()), total[k, j])
                bands[k, j] = next_one if isinstance(next_one, Band) else (0, 0, 0)
                if isinstance(next_one, Ranked):
                    found[k, j] = next_one
        if any(bands[k, j, 1] for k, j in _wanted(ranks, per_row)):
            return True
        state["limits"] = np.array([limits(found[k, 0], found.get((k, 1)), dropped[k], kept[k]) for k in range(rows)])
        return False

    shape = (rows, per_row, 2, BINS + 1)
    return (
        Pass((rows, 1 << (MAGNITUDE_BITS - _COARSE)), np.int64, sample, guess, of_sample=True),
        Pass(shape, np.int64, count, find),
    )


def _wanted(ranks: Sequence[tuple[int, int]], per_row: int) -> list[tuple[int, int]]:
    return [(k, j) for k in range(len(ranks)) for j in range(per_row) if ranks[k][j]]


def _band_of_sample(share: float, counts: Array) -> Band:
    """Where the magnitude lies that a share of all elements are not below, with a margin of three roots of the sample:
    of elements that are independent, six standard deviations or more."""
    size = int(counts.sum())
    margin = 3.0 * math.sqrt(size)
    upper = max(1, math.floor(share * size - margin))
    lower = min(size, math.ceil(share * size + margin))
    top, bottom = _bin_of_rank(counts, upper)[0], _bin_of_rank(counts, lower)[0]
    # The ends of what is possible, where the margin reaches beyond the sample.
    high = 1 << MAGNITUDE_BITS if share * size <= margin else (top + 1) << _COARSE
    low = 0 if share * size + margin >= size else bottom << _COARSE
    return band(low, high - low)


def _drop_limits(settings: Settings) -> Array:
    """(K, 2): of 65536 numbers the first that drops an element, and the factor of what stays: the inverse of the share
    that the bound keeps."""
    bounds = np.maximum(1.0, np.rint(settings.densities * 65536.0))
    return np.column_stack([bounds, 65536.0 / bounds])


def _drop_passes(settings: Settings) -> tuple[Pass, ...]:
    """mergekit scales what is left to the task vector's L1 norm, which takes a pass; the paper divides by density."""
    if not settings.mergekit:
        return ()
    bounds = _drop_limits(settings)[:, 0]

    def norms(chunk: Chunk, state: State, out: Array) -> None:
        drawn = chunk.room.take("drawn", (chunk.count,), np.uint16)
        for k, tau in enumerate(np.abs(chunk.task_vectors().experts)):
            kernels.draw(chunk.begin, settings.keys[k], drawn)
            out[0, k] += tau.sum(dtype=np.float64)
            out[1, k] += tau[drawn < bounds[k]].sum(dtype=np.float64)

    def scales(total: Array, state: State) -> None:
        before, after = total
        factors = np.divide(before, after, out=np.ones_like(before), where=after > 0.0)
        state["limits"] = np.column_stack([bounds, factors])

    return (Pass((2, settings.experts), np.float64, norms, scales),)
