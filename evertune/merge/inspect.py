"""Look before merging: what the theory asks of models that are to be averaged, measured, with a plain recommendation.

Averages work where models share a start, have moved little, and no ridge of loss lies between them (linear mode
connectivity: Frankle et al. 2020, arXiv:1912.05671). Task vectors that are long, or that point in opposite directions,
interfere (Yadav et al. 2023, arXiv:2306.01708). The bounds that the words below change at are rules of thumb.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evertune.merge.plan import MergePlan
from evertune.merge.reader import Reader, open_inputs
from evertune.merge.sources import Files
from evertune.merge.starts import SAME_START_COSINE, Likeness, likeness
from evertune.merge.statistics import measure
from evertune.model.checkpoint import Checkpoint

LONG = 0.2
OPPOSED, PARALLEL = -0.1, 0.5
# Above what signs drawn by a coin would give.
CONFLICTING = 0.1
# Of the mean loss of the two ends.
BARRIER = 0.01
_LAYER = re.compile(r"\.(\d+)\.")


class Curve(NamedTuple):
    """Loss along the straight line from one model to another.

    shares: of the second model, from 0 to 1.
    barrier: the largest rise above the straight line between the losses of the two ends.
    """

    first: str
    second: str
    shares: tuple[float, ...]
    losses: tuple[float, ...]
    barrier: float


@dataclass(frozen=True)
class Layer:
    """Task vectors in one layer, averaged over its tensors by size; layer -1 is what lies outside of layers.

    The least cosine of two of them, and the share of elements that differ in sign, are None without a base.
    """

    layer: int
    of_reference: dict[str, float]
    cosine: float | None
    sign_conflict: float | None


@dataclass(frozen=True)
class Inspection:
    """What was found, and what follows.

    `cosines` are empty and `sign_conflict` is None without a base: differences from a mean point away from each other
    whatever the models have learnt (those of two models have the cosine -1, those of n on average -1 / (n - 1)).
    """

    starts: tuple[Likeness, ...]
    relative_to: str
    of_reference: dict[str, float]
    cosines: dict[str, float]
    sign_conflict: float | None
    layers: tuple[Layer, ...]
    curves: tuple[Curve, ...]
    unit: str
    recommendation: tuple[str, ...]

    def body(self) -> dict[str, Any]:
        return {
            "starts": [vars(one) for one in self.starts],
            "relative_to": self.relative_to,
            "of_reference": self.of_reference,
            "cosines": self.cosines,
            "sign_conflict": self.sign_conflict,
            "layers": [vars(one) for one in self.layers],
            "curves": [one._asdict() for one in self.curves],
            "unit": self.unit,
            "recommendation": list(self.recommendation),
        }

    def lines(self) -> list[str]:
        lines = ["cosine between weights"]
        lines += [f"  {one.first} - {one.second}: {one.cosine:.4f}" for one in self.starts]
        lines.append(f"length of differences from the {self.relative_to}, as a share of it")
        lines += [f"  {name}: {value:.2%}" for name, value in self.of_reference.items()]
        if self.sign_conflict is not None and self.cosines:
            lines.append("cosine between differences")
            lines += [f"  {pair}: {value:+.3f}" for pair, value in self.cosines.items()]
            chance = chance_of_conflict(len(self.of_reference))
            lines.append(
                f"sign conflicts: {self.sign_conflict:.0%} of the elements that two models change "
                f"(unrelated changes: up to {chance:.0%})"
            )
            lines.append("layer   length   cosine   conflicts")
            lines += [_layer_line(one) for one in self.layers]
        for curve in self.curves:
            lines.append(f"loss from {curve.first} to {curve.second} ({self.unit}); barrier {curve.barrier:+.4f}")
            for share, loss in zip(curve.shares, curve.losses, strict=True):
                lines.append(f"  {share:4.2f}  {loss:.4f}")
        return [*lines, *(f"-> {one}" for one in self.recommendation)]


Loss = Callable[[Checkpoint, Checkpoint, Sequence[float]], Sequence[float]]


def inspect_models(plan: MergePlan, *, loss: Loss | None = None, unit: str = "", points: int = 7) -> Inspection:
    """Measure the inputs of a planned merge.

    Args:
        loss: the losses at shares of the second model on the line from a first one; without it, or with one model and
            no base, there are no curves.
        unit: of the loss.
        points: on each line, ends included.
    """
    starts = tuple(likeness(plan))
    facts = _facts(plan)
    names = [one.name for one in plan.sources if one is not plan.base]
    has_base = plan.base is not None
    lengths = {name: _pooled(facts, name) for name in names}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    cosines = {f"{a} - {b}": _mean(facts, (a, b)) for a, b in pairs} if has_base else {}
    conflict = _conflict(facts) if has_base else None
    layers = tuple(_layers(facts, names, pairs if has_base else None))
    shares = tuple(i / (points - 1) for i in range(points))
    curves: tuple[Curve, ...] = ()
    if loss is not None:
        checkpoints = {one.name: one.checkpoint for one in plan.sources}
        between = pairs or ([("base", names[0])] if has_base else [])
        curves = tuple(_curve(a, b, shares, tuple(loss(checkpoints[a], checkpoints[b], shares))) for a, b in between)
    said = tuple(recommend(starts, lengths, cosines, conflict, curves))
    return Inspection(starts, "base" if has_base else "mean", lengths, cosines, conflict, layers, curves, unit, said)


def recommend(
    starts: Sequence[Likeness],
    lengths: dict[str, float],
    cosines: dict[str, float],
    conflict: float | None,
    curves: Sequence[Curve],
) -> list[str]:
    """Plain words; the first is the verdict. `conflict` is None where there is no base."""
    apart = [one for one in starts if one.cosine < SAME_START_COSINE]
    if apart:
        return [
            f"Do not merge: {apart[0].first} and {apart[0].second} do not have the same start. "
            "Distil one into the other."
        ]
    said = []
    ridges = [one for one in curves if one.barrier > BARRIER * (one.losses[0] + one.losses[-1]) / 2]
    if ridges:
        worst = max(ridges, key=lambda one: one.barrier)
        said.append(
            f"Do not average {worst.first} and {worst.second} half and half: the loss rises by {worst.barrier:.4f} "
            "between them. Stay near one end, or train them again with a lower learning rate."
        )
    long = [name for name, value in lengths.items() if value > LONG]
    if long:
        said.append(
            f"{', '.join(long)} moved far ({max(lengths.values()):.0%} of the weights): merge with small weights."
        )
    opposed = [pair for pair, value in cosines.items() if value < OPPOSED]
    parallel = [pair for pair, value in cosines.items() if value > PARALLEL]
    if opposed:
        said.append(f"{opposed[0]} pull in opposite directions: one will cost the other.")
    if parallel:
        said.append(f"{parallel[0]} learnt much the same: a mean loses little, a sum counts it twice.")
    chance = chance_of_conflict(len(lengths))
    if conflict is not None and conflict > chance + CONFLICTING and not opposed:
        said.append(
            f"{conflict:.0%} of the shared changes differ in sign, {chance:.0%} would by chance: try ties, and compare "
            "it with linear."
        )
    if not said:
        said.append("Fit to merge: start with linear (equal weights); let probes decide on anything else.")
    if conflict is None:
        said.append("Name the base that they come from ('base:') to see whether their changes agree.")
    return said


def chance_of_conflict(models: int) -> float:
    """Share of the elements that all of some models change which they do not all push one way, were each sign a coin.

    1 - 2^(1 - n), so half for two. Task vectors that have nothing to do with each other, which averages suit best,
    come to this.
    """
    return 1.0 - 0.5 ** max(models - 1, 0)


def _facts(plan: MergePlan) -> dict[str, dict[str, Any]]:
    found = {}
    files = Files()
    reader = Reader(files)
    try:
        for tensor in plan.tensors:
            if tensor.settings is None or not tensor.experts or not tensor.elements:
                continue
            inputs = open_inputs(plan, tensor, files)
            facts = measure(inputs, None, {}, reader)
            order = [one.name for one in inputs.experts]
            pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
            facts["pairs"] = {frozenset(pair): value for pair, value in zip(pairs, facts["cosines"], strict=True)}
            found[tensor.name] = facts
    finally:
        files.close()
    return found


def _pooled(facts: dict[str, dict[str, Any]], name: str) -> float:
    """Length of a whole task vector over the length of the whole reference."""
    moved = size = 0.0
    for one in facts.values():
        norm, share = one["norms"].get(name, 0.0), one["of_reference"].get(name, 0.0)
        moved += norm**2
        size += (norm / share) ** 2 if share > 0.0 else 0.0
    return float((moved / size) ** 0.5) if size else 0.0


def _mean(facts: dict[str, dict[str, Any]], pair: tuple[str, str]) -> float:
    """Cosine of two whole task vectors, from those of their tensors."""
    dot = one = two = 0.0
    for each in facts.values():
        a, b = each["norms"].get(pair[0], 0.0), each["norms"].get(pair[1], 0.0)
        dot += each["pairs"].get(frozenset(pair), 0.0) * a * b
        one, two = one + a**2, two + b**2
    return float(dot / (one * two) ** 0.5) if one and two else 0.0


def _layers(
    facts: dict[str, dict[str, Any]], names: Sequence[str], pairs: Sequence[tuple[str, str]] | None
) -> Sequence[Layer]:
    by_layer: dict[int, dict[str, dict[str, Any]]] = {}
    for name, one in facts.items():
        found = _LAYER.search(name)
        by_layer.setdefault(int(found[1]) if found else -1, {})[name] = one
    return [
        Layer(
            layer=layer,
            of_reference={name: _pooled(part, name) for name in names},
            cosine=None if pairs is None else min((_mean(part, pair) for pair in pairs), default=0.0),
            sign_conflict=None if pairs is None else _conflict(part),
        )
        for layer, part in sorted(by_layer.items())
    ]


def _curve(first: str, second: str, shares: tuple[float, ...], losses: tuple[float, ...]) -> Curve:
    line = [(1 - share) * losses[0] + share * losses[-1] for share in shares]
    barrier = max(loss - straight for loss, straight in zip(losses, line, strict=True))
    return Curve(first, second, shares, losses, barrier)


def _conflict(facts: dict[str, dict[str, Any]]) -> float:
    """Share of the elements that two models change which they change in opposite directions."""
    size = sum(one["elements"] for one in facts.values())
    return sum(one["sign_conflict"] * one["elements"] for one in facts.values()) / size if size else 0.0


def _layer_line(one: Layer) -> str:
    name = "other" if one.layer < 0 else str(one.layer)
    longest = max(one.of_reference.values(), default=0.0)
    return f"{name:>5}   {longest:6.2%}   {one.cosine:+.3f}   {one.sign_conflict:9.0%}"
