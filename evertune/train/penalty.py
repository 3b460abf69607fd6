"""The roles of a penalty, a term that holds the policy near something, and of a rule that changes gradients."""

# n positions of a chunk of logits, m of them penalised, V vocabulary, K words

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from evertune.data.encode import EncodedRow

PositionValues = Callable[[Tensor, slice], Tensor]
"""(log-probabilities (m, V) at some of the penalty's positions, which of them) -> (m,) penalties in nats."""


@dataclass(frozen=True)
class Slope:
    """Penalties and their slope in the logits: factor * p, plus values at a few words, minus a whole distribution.

    Attributes:
        values_m: the penalties, in nats.
        factor_m: of the policy's own probabilities.
        words_mK, at_words_mK: what is added at some words, where there are such.
        minus_mV: what is subtracted everywhere, where there is such.
    """

    values_m: Tensor
    factor_m: Tensor
    words_mK: Tensor | None = None
    at_words_mK: Tensor | None = None
    minus_mV: Tensor | None = None

    def correct(self, slope_nV: Tensor, rows_m: Tensor, weight: float) -> None:
        """Add everything but the factor's part, times the weight, to these rows, in place."""
        if self.words_mK is not None and self.at_words_mK is not None:
            slope_nV.index_put_((rows_m.unsqueeze(1), self.words_mK), weight * self.at_words_mK, accumulate=True)
        if self.minus_mV is not None:
            slope_nV.index_add_(0, rows_m, self.minus_mV, alpha=-weight)


@runtime_checkable
class ClosedForm(Protocol):
    """Position values that know their slope, so that they need no autograd on a matrix of logits.

    They are called as others are, too: that is what their slope is tested against.

    Attributes:
        is_narrow: no second matrix as wide as the vocabulary is made beside the logits.
    """

    is_narrow: bool

    def __call__(self, logp_mV: Tensor, chosen: slice) -> Tensor: ...

    def begin(self, logp_nV: Tensor, rows_m: Tensor, chosen: slice) -> Callable[[Tensor], Slope]:
        """Read what is needed of the log-probabilities; what is returned is called once with these turned, in place,
        into probabilities, which it leaves as they are.

        Args:
            logp_nV: of a whole chunk.
            rows_m: the penalised ones of its rows.
            chosen: which of the penalty's positions they are.
        """


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
