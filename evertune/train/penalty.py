"""The roles of a penalty, a term that holds the policy near something, and of a rule that changes gradients."""

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


class GradientRule(Protocol):
    """Sees the gradient of every step, penalties included, and may change it before it is clipped; then the weights.

    Its state, if it has one, is part of every resume point; what it carries goes with the checkpoint to the next stage.
    """

    @property
    def name(self) -> str:
        """Its key in resume points and checkpoints; `<name>_...` in the metrics."""

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        """Change the float32 gradients in place; returns metrics of the step. Called once a step, on every process."""

    def see(self, weights: Mapping[str, Tensor]) -> None:
        """Look at, or set back, the trained float32 weights after the optimizer's step."""

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` returned, bit for bit."""

    def carried(self) -> dict[str, Tensor]:
        """What the rule of this name in the next stage begins with. Called after the last step."""
