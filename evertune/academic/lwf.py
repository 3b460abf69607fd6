"""Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282): distil the start's outputs on the new rows.

L_new + lambda KL(p_old^(1/T) || p^(1/T)), both normalised after the power, at the counted positions of the new rows.
The paper's cross-entropy differs from this by the entropy of p_old, which has no gradient.

Departures: one head and one vocabulary, so no "old task" outputs apart; the new rows' answers are taught, so teacher
and label meet at the same positions. The core's anchor with `on: new` is this with T = 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.train.losses import forward_kl
from evertune.train.penalty import PositionValues
from evertune.train.plugins import Bench, Parts
from evertune.train.reference import LiveReference


def softened(logp_NV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of p^(1/T), normalised."""
    return (logp_NV / temperature).log_softmax(dim=-1)


@dataclass(frozen=True)
class Lwf:
    """The distillation term over the new rows."""

    weight: float
    temperature: float
    reference: LiveReference
    name: str = "lwf"

    def applies_to(self, row: EncodedRow) -> bool:
        return not row.is_replay

    def at_positions(self, rows: Sequence[EncodedRow]) -> PositionValues:
        hidden_MH = self.reference.hidden(rows)

        def values(logp_MV: Tensor, chosen: slice) -> Tensor:
            with torch.no_grad():
                old_MV = softened(self.reference.head.log_probabilities(hidden_MH[chosen]), self.temperature)
            return forward_kl(softened(logp_MV, self.temperature), old_MV)

        return values

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        return None


def make_lwf(bench: Bench) -> Parts:
    """The frozen start beside the policy: the policy itself with its new adapter off, or a second model."""
    return Parts([Lwf(bench.options["weight"], bench.options["temperature"], bench.reference().live())])
