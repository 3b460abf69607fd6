"""Synaptic intelligence (Zenke et al. 2017, arXiv:1703.04200): importance from the path of training itself.

While a task is learnt, omega_i = - sum over steps of g_i * (change of w_i): how much of the loss's fall went through
weight i. After it, Omega_i += max(0, omega_i / ((whole change of w_i)^2 + xi)), and the next stage pays
c sum Omega_i (w_i - w*_i)^2.

Departures:
- g is the gradient of a step's whole objective without SI's own penalty, so replay and anchor count as the task. It is
  a minibatch's, so omega is biased upward by its noise, as the authors note; AdamW makes the path.
- Omega lies beside the checkpoint, in `carried/`, and goes to a stage that starts from exactly it. A rescue's or a
  merge's result carries none: SI then begins anew, which the ledger shows.
- Only with all weights trained: an adapter's weights are new in each stage.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from evertune.academic.importance import Tensors
from evertune.academic.quadratic import WHOLE, Quadratic
from evertune.train.plugins import Bench, Parts


def path_importance(path: Mapping[str, Tensor], moved: Mapping[str, Tensor], damping: float) -> Tensors:
    """max(0, omega / (moved^2 + xi)) of each weight.

    Args:
        path: omega, the loss's fall through each weight.
        moved: the whole change of each weight over the task.
    """
    return {name: (one / (moved[name].square() + damping)).clamp_min(0.0) for name, one in path.items()}


class Si:
    """Follows the path of the weights; the penalty beside it holds them.

    Args:
        penalty: of this stage, from what was carried here.
        before: Omega of the tasks before.
    """

    name = "si"

    def __init__(self, weights: Mapping[str, Tensor], penalty: Quadratic, before: Mapping[str, Tensor], damping: float):
        self._weights = weights
        self._penalty, self._before, self._damping = penalty, before, damping
        self._path = {name: torch.zeros_like(one, requires_grad=False) for name, one in weights.items()}
        self._last = _copies(weights)
        self._gradients: Tensors = {}

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        """Keep the gradient without this penalty's own part, 2 c Omega (w - w*); change nothing."""
        own = 2.0 * self._penalty.weight
        self._gradients = {
            name: one - own * self._penalty.importance[name] * (self._last[name] - self._penalty.centre[name])
            if name in self._penalty.importance
            else one.clone()
            for name, one in gradients.items()
        }
        return {}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        for name, gradient in self._gradients.items():
            self._path[name] -= gradient * (weights[name].detach() - self._last[name])
        self._last = _copies(weights)

    def state(self) -> Tensors:
        return dict(self._path)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._path = {name: one.to(self._last[name].device).clone() for name, one in state.items()}
        self._last = _copies(self._weights)

    def carried(self) -> Tensors:
        """Omega over all tasks, this one included."""
        moved = {name: one - self._penalty.centre[name] for name, one in self._last.items()}
        found = path_importance(self._path, moved, self._damping)
        return {name: one + self._before[name] if name in self._before else one for name, one in found.items()}


def make_si(bench: Bench) -> Parts:
    """The penalty from what the stage before carried here, and the follower that prepares the next one's."""
    device = bench.policy.device
    before = {name: one.to(device) for name, one in bench.carried.items()}
    penalty = Quadratic("si", bench.options["weight"], _copies(bench.trained), before, WHOLE)
    return Parts([penalty], [Si(bench.trained, penalty, before, bench.options["damping"])])


def _copies(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: one.detach().clone() for name, one in weights.items()}
