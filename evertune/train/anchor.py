"""The KL anchor: a penalty on divergence from a frozen reference, at the counted positions of the anchored rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.train.penalty import PositionValues
from evertune.train.reference import Direction, Reference

On = Literal["replay", "new", "both"]


@dataclass(frozen=True)
class Anchor:
    """A penalty of `weight` nats per nat of divergence, averaged over the anchored positions of a step.

    Attributes:
        on: which rows are anchored: replayed ones, new ones, or both.
        direction: `forward` is KL(reference || policy), `reverse` KL(policy || reference).
    """

    weight: float
    on: On
    direction: Direction
    reference: Reference
    name: str = "kl"

    def applies_to(self, row: EncodedRow) -> bool:
        return anchors(self.on, row)

    def at_positions(self, rows: Sequence[EncodedRow]) -> PositionValues:
        return self.reference.values(rows, self.direction)

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        return None


def anchors(on: On, row: EncodedRow) -> bool:
    """Whether a row is anchored under this setting."""
    return on == "both" or row.is_replay == (on == "replay")
