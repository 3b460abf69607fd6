"""Penalties that pull each weight toward where it was, as strongly as it matters: EWC, online EWC, MAS, L2-SP.

EWC (Kirkpatrick et al. 2016, arXiv:1612.00796): lambda / 2 sum F_i (w_i - w*_i)^2. Online EWC (Schwarz et al. 2018,
arXiv:1805.06370): one F, of which each newer task leaves the share gamma. MAS (Aljundi et al. 2017, arXiv:1711.09601):
lambda sum Omega_i (w_i - w*_i)^2. L2-SP (Li et al. 2018, arXiv:1802.01483): alpha / 2 sum (w_i - w*_i)^2.

Departures, for all four:
- Importance is measured at the start of the stage, on the kept rows of each earlier task, and every task's term is
  centred there. The papers measure once, after each task, and EWC keeps a centre for each: that needs no old rows, but
  counts old tasks where the weights no longer are. Here old rows are kept anyway, for replay.
- In adapter space the centre is the new adapter's own start, B = 0, where the gradient of A is 0: only B is held.
  Importance is then that of the update, not of the weights below it, which do not move.
- AdamW follows, not plain gradient descent: the penalty's gradient is scaled as the loss's is.

State is recomputed when a stage goes on from a resume point: it is a function of the start and the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.academic.importance import Tensors, fisher, mas_importance, normalised
from evertune.data.encode import EncodedRow
from evertune.train.penalty import PositionValues
from evertune.train.plugins import Bench, Parts

HALF, WHOLE = 0.5, 1.0


def quadratic(weights: Mapping[str, Tensor], centre: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> Tensor:
    """Sum of importance * (weight - centre)^2 over all weights: a scalar with gradient to the weights."""
    parts = [(importance[name] * (weights[name] - centre[name]).square()).sum() for name in importance]
    return torch.stack(parts).sum()


def decayed_sum(by_task: Sequence[Mapping[str, Tensor]], decay: float) -> Tensors:
    """Importance over tasks, oldest first: F <- decay * F + F_t. Decay 1 is the plain sum."""
    total: Tensors = {}
    for task in by_task:
        total = {name: decay * total[name] + one if name in total else one.clone() for name, one in task.items()}
    return total


class OnWeights:
    """What every penalty on weights answers about outputs: that it does not look at them."""

    def applies_to(self, row: EncodedRow) -> bool:
        return False

    def at_positions(self, rows: Sequence[EncodedRow]) -> PositionValues:
        raise AssertionError("a penalty on weights applies to no row")


@dataclass(frozen=True)
class Quadratic(OnWeights):
    """`weight * factor * sum importance (w - centre)^2`; nothing where nothing is important yet.

    centre: the weights at the start, copies.
    importance: non-negative, the weights' shapes; empty where there is no earlier task.
    factor: 1/2 where the paper has it.
    """

    name: str
    weight: float
    centre: Tensors
    importance: Tensors
    factor: float

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        if not self.importance:
            return None
        return self.factor * quadratic(weights, self.centre, self.importance)


@dataclass(frozen=True)
class LowRankDistance(OnWeights):
    """Half the squared distance of an adapter's update from 0 in weight space: 1/2 sum over modules of |s B A|^2.

    From the two Gram matrices, (rank, rank) each, without forming the update.
    """

    name: str
    weight: float
    scale: float

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        modules = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
        parts = [_low_rank_square(weights[f"{one}.lora_A"], weights[f"{one}.lora_B"]) for one in modules]
        return HALF * self.scale**2 * torch.stack(parts).sum()


def make_ewc(bench: Bench) -> Parts:
    """EWC, and online EWC where the options have a decay."""
    options = bench.options
    by_task = [fisher(bench, rows, labels=options["fisher"]) for rows in bench.memory.values()]
    importance = decayed_sum(by_task, options.get("decay", 1.0))
    return _penalty(bench, importance, HALF)


def make_mas(bench: Bench) -> Parts:
    """MAS; importance is of the logits' squared norm, summed over tasks."""
    importance = decayed_sum([mas_importance(bench, rows) for rows in bench.memory.values()], 1.0)
    return _penalty(bench, importance, WHOLE)


def make_l2sp(bench: Bench) -> Parts:
    """L2-SP: the distance in weight space, whether all weights are trained or an adapter."""
    name, weight = bench.plugin.name, bench.options["weight"]
    if bench.is_lora:
        lora = bench.spec.tune["lora"]
        scale = (lora.get("alpha") or 2.0 * lora["rank"]) / lora["rank"]
        return Parts([LowRankDistance(name, weight, scale)])
    ones = {one: torch.ones((), device=weights.device) for one, weights in bench.trained.items()}
    return Parts([Quadratic(name, weight, _centre(bench), ones, HALF)])


def _penalty(bench: Bench, importance: Tensors, factor: float) -> Parts:
    if importance and bench.options["normalise"]:
        importance = normalised(importance)
    return Parts([Quadratic(bench.plugin.name, bench.options["weight"], _centre(bench), importance, factor)])


def _centre(bench: Bench) -> Tensors:
    return {name: one.detach().clone() for name, one in bench.trained.items()}


def _low_rank_square(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    return ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum()
