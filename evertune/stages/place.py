"""Where a stage stands in a run, and the order made from it: everything a child needs, under a key of its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evertune.model.checkpoint import Checkpoint, describe
from evertune.plan import Plan
from evertune.recipe.fields import StageSettings
from evertune.recipe.presets import Resolved, resolve_stage
from evertune.recipe.schema import Round


@dataclass(frozen=True)
class Past:
    """What the run has made so far.

    Attributes:
        checkpoints: by label, the base first, in the order they were made.
        promoted: label of what each promoted round has promoted.
        values: by label, the value on each probe, turned so that higher is better.
    """

    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    promoted: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """One stage of one round, with the checkpoints it may name.

    Attributes:
        made: what the round starts from, then what each stage before this one has made.
        champion: the last promoted checkpoint, or the base.
        histories: folders with the training rows of promoted rounds.
        attempt: the rescue whose amended round this is; "" in the round itself.
        past: what the run has made before this stage, earlier stages of this round included.
        without: digests of texts that must not be used again (`evertune data remove`).
    """

    plan: Plan
    round: Round
    index: int
    made: Sequence[Checkpoint]
    champion: Checkpoint
    histories: Sequence[Path] = field(default=())
    attempt: str = ""
    past: Past = field(default_factory=Past)
    without: Sequence[str] = field(default=())

    @property
    def kind(self) -> str:
        return self.round.stages[self.index].kind

    @property
    def settings(self) -> StageSettings:
        """As the recipe gives them."""
        return self.round.stages[self.index].settings

    @property
    def resolved(self) -> Resolved:
        """The settings with nothing left open."""
        return resolve_stage(self.plan.recipe, self.settings)

    @property
    def label(self) -> str:
        """What people call the stage's checkpoint."""
        attempt = f"{self.attempt}/" if self.attempt else ""
        return f"{self.round.name}/{attempt}{self.index + 1}-{self.kind}"

    @property
    def start(self) -> Checkpoint:
        """What the stage starts from."""
        return self.made[-1]

    def reference(self, written: str) -> Checkpoint:
        """The checkpoint that a setting names: `start`, `sft`, `base`, `champion`, or a path.

        `sft` is what the newest sft stage of this round has made; what the round starts from where there is none.

        Raises:
            CheckpointError: there is no checkpoint at the path.
        """
        named = {"start": self.start, "sft": self._sft, "base": self.plan.base, "champion": self.champion}
        return named.get(written) or describe(self.plan.loaded.resolve(written))

    @property
    def _sft(self) -> Checkpoint:
        done = [i for i, stage in enumerate(self.round.stages[: self.index]) if stage.sft is not None]
        return self.made[done[-1] + 1] if done else self.made[0]


class Order(Protocol):
    """What a child is told to do: a frozen dataclass of plain values, and the key of the object that it publishes.

    The key is the digest of everything the result depends on: kind and version of its meaning, settings, digests of
    start, base, data and references, seed and numerics; not where files lie, and not how often it saves.
    """

    @property
    def key(self) -> str: ...

    def to_json(self) -> dict[str, Any]:
        """All of it, for the child."""

    def settings(self) -> dict[str, Any]:
        """What a reader of the ledger wants to see: no paths, nothing that the result does not depend on."""
