"""The role of a penalty: a term that holds the policy near something while it learns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from evertune.data.encode import EncodedRow

PositionValues = Callable[[Tensor, slice], Tensor]
"""(log-probabilities (m, V) at some of the penalty's positions, which of them) -> (m,) penalties in nats."""


class Penalty(Protocol):
    """Adds `weight * (mean over its positions of the step + value on the weights)` to the objective.

    A penalty on outputs (the KL anchor) answers `applies_to` and `at_positions`; one on weights answers `on_weights`,
    and False or None to the rest.
    """

    @property
    def name(self) -> str:
        """Its key in the metrics."""

    @property
    def weight(self) -> float:
        """Factor in the objective."""

    def applies_to(self, row: EncodedRow) -> bool:
        """Whether the row's counted positions are penalised. A pure function of the row."""

    def at_positions(self, rows: Sequence[EncodedRow]) -> PositionValues:
        """Penalties at the counted positions of these rows, numbered row by row. Called once a micro-batch."""

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """A scalar with gradient to the trained float32 weights, or None. Called once a step."""
