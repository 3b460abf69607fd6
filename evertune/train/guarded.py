"""A stage that ends early when a guard has fallen: guards are asked at fixed steps and compared with its start.

What was found stands in the metrics of the step that follows, and the brake reads it there: a resumed stage ends where
an unbroken one does.
"""

from collections.abc import Callable, Mapping, Sequence

from evertune.data.encode import Item
from evertune.model.open import OpenModel
from evertune.train.adapt import GUARD, Ask, asked, fallen
from evertune.train.loop import Feed
from evertune.train.sink import Metrics
from evertune.train.spec import GuardStopSpec

FALLEN = "fallen/"


class GuardedFeed:
    """A feed before whose steps guards are asked, now and then.

    Args:
        inner: the stage's own feed.
        ask: scores the model in training.
        opened: that model; modules' modes and random numbers are left as they were.
        agree: makes the value of the main process that of all.
    """

    def __init__(
        self,
        inner: Feed,
        stop: GuardStopSpec,
        ask: Ask,
        opened: OpenModel,
        agree: Callable[[Callable[[], dict[str, float]]], dict[str, float]],
    ) -> None:
        self.inner = inner
        self._stop, self._ask, self._opened, self._agree = stop, ask, opened, agree
        self._first: Mapping[str, float] | None = None

    @property
    def steps(self) -> int:
        return self.inner.steps

    @property
    def micro_steps(self) -> int:
        return self.inner.micro_steps

    @property
    def save_every(self) -> int:
        return self.inner.save_every

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[Item]:
        return self.inner.micro_batch(step, micro_step, rank)

    def step_rows(self, step: int) -> Sequence[Item]:
        return self.inner.step_rows(step)

    def prepare(self, step: int) -> Metrics:
        """Ask the guards where it is time, and tell which have fallen since the start by more than their margin."""
        told = self.inner.prepare(step)
        if step % self._stop.every:
            return told
        scores = self._agree(lambda: asked(self._ask, self._opened))
        self._first = self._first or scores
        drops = fallen([self._first, scores], self._stop.guards) if step else {}
        return {
            **told,
            **{f"{GUARD}{name}": value for name, value in scores.items()},
            **{f"{FALLEN}{name}": drop for name, drop in drops.items()},
        }

    def recall(self, history: Sequence[Metrics]) -> None:
        """Go on from what the first step's metrics tell of the start."""
        self.inner.recall(history)
        if history:
            self._first = {
                name.removeprefix(GUARD): value for name, value in history[0].items() if name.startswith(GUARD)
            }


def guard_brake(metrics: Metrics, stop: GuardStopSpec) -> str | None:
    """Why a stage should end after a step with these metrics, or None."""
    found = {name.removeprefix(FALLEN): drop for name, drop in metrics.items() if name.startswith(FALLEN)}
    if not found:
        return None
    told = ", ".join(
        f"guard '{name}' has fallen by {drop:.3g} since the stage began (margin {stop.guards[name]['margin']:g})"
        for name, drop in found.items()
    )
    return f"{told}."
