"""What a plug-in gets to work with, and where its parts go into the trainer."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from evertune.data.encode import EncodedRow, encode_rows
from evertune.data.rows import read_rows
from evertune.errors import TrainingError
from evertune.model.checkpoint import Checkpoint
from evertune.model.open import OpenModel
from evertune.train.loop import Trainer, count_items
from evertune.train.objective import CrossEntropy, Objective, Policy
from evertune.train.penalty import GradientRule, Penalty
from evertune.train.reference import ReferenceSource
from evertune.train.spec import PluginSpec, TrainingSpec
from evertune.workspace import Workspace

MEMORY_ROWS = 256


@dataclass(frozen=True)
class Parts:
    """What a plug-in adds to a trainer."""

    penalties: Sequence[Penalty] = ()
    rules: Sequence[GradientRule] = ()
    objective: Objective | None = None


@dataclass(frozen=True)
class Bench:
    """What a plug-in is made from, when the weights are still the start's.

    A stage that goes on from a resume point makes its plug-ins anew from the start's weights; what they learn later is
    theirs to give back in `GradientRule.state`.

    Attributes:
        options: as the recipe gives them, with the plug-in's defaults.
        trained: the trained float32 weights by name; a new adapter's `<module>.lora_A` and `.lora_B`, or all.
        seed: of the recipe, for what a plug-in draws.
        carried: what the stage before left for this plug-in; empty where it left nothing.
    """

    spec: TrainingSpec
    plugin: PluginSpec
    trainer: Trainer
    opened: OpenModel
    workspace: Workspace

    @property
    def options(self) -> dict[str, Any]:
        return self.plugin.options

    @property
    def trained(self) -> Mapping[str, Tensor]:
        return self.trainer.masters.weights

    @property
    def policy(self) -> Policy:
        return self.trainer.policy

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def is_lora(self) -> bool:
        return self.spec.is_lora

    @property
    def start(self) -> Checkpoint:
        return self.spec.start

    @cached_property
    def memory(self) -> dict[str, list[EncodedRow]]:
        """The first `memory_rows` rows of each remembered source, marked as replay; a source is one earlier task.

        Raises:
            DataError: a row cannot be read or encoded.
        """
        limit = int(self.options.get("memory_rows", MEMORY_ROWS))
        found = {}
        for ref in self.plugin.memory:
            rows = read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit)[:limit]
            encoding = encode_rows(rows, self.opened.codec, max_tokens=self.spec.max_tokens, too_long="drop")
            if encoding.rows:
                found[ref.source] = [row.as_replay() for row in encoding.rows]
        return found

    @cached_property
    def carried(self) -> dict[str, Tensor]:
        return load_file(self.plugin.carried) if self.plugin.carried else {}

    def new_rows(self, most: int) -> list[EncodedRow]:
        """The first different new rows that the stage shows, at most so many; a pair counts as its two answers."""
        found: dict[str, EncodedRow] = {}
        for step in range(self.trainer.feed.steps):
            for item in self.trainer.feed.step_rows(step):
                if not item.is_replay:
                    found.update({row.digest: row for row in item.rows})
            if len(found) >= most:
                break
        return list(found.values())[:most]

    def gradient(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Gradient of the rows' mean cross-entropy per counted token at the present weights, without dropout.

        The accumulated gradients of the step are lost: ask inside `GradientRule.change`, or before the first step.
        """
        return self.loss_and_gradient(rows)[1]

    def loss_and_gradient(self, rows: Sequence[EncodedRow]) -> tuple[float, dict[str, Tensor]]:
        """The rows' mean cross-entropy too; see `gradient`."""
        masters = self.trainer.masters
        self.policy.model.eval()
        masters.zero_gradients()
        objective = CrossEntropy()
        counts = count_items(rows, objective, ())
        sums = objective.backward(self.policy, rows, counts, ())
        found = masters.gradients()
        masters.zero_gradients()
        return float(sums[0]) / counts.divisors["loss"], found

    def reference(self) -> ReferenceSource:
        """Where the frozen start's outputs come from."""
        return ReferenceSource(
            reference=self.spec.start,
            opened=self.opened,
            is_start=self.is_lora,
            cache=self.workspace.cache,
            tmp=self.workspace.tmp,
        )


@dataclass(frozen=True)
class Plugged:
    """The plug-ins of a stage as they were put in, for its facts and for what it leaves to the next stage."""

    benches: Sequence[Bench] = ()
    rules: Sequence[GradientRule] = field(default=())

    def facts(self) -> list[dict[str, Any]]:
        """The ledger's account of each: what it was, how it was set, what it remembered and went on from."""
        return [
            {
                "kind": one.plugin.kind,
                "name": one.plugin.name,
                "method": one.plugin.method,
                "options": one.plugin.options,
                "memory_rows": {source: len(rows) for source, rows in one.memory.items()},
                "carried": one.plugin.carried_digest,
            }
            for one in self.benches
        ]

    def carried(self) -> dict[str, dict[str, Tensor]]:
        """What each rule leaves to the next stage, by its name; those that leave nothing are absent."""
        return {rule.name: one for rule in self.rules if (one := rule.carried())}


def plug_in(spec: TrainingSpec, trainer: Trainer, opened: OpenModel, workspace: Workspace) -> Plugged:
    """Make the stage's plug-ins and put their parts into the trainer, in the recipe's order.

    Raises:
        TrainingError: two parts have one name.
        EvertuneError: what a plug-in says about its input.
    """
    benches = [Bench(spec, one, trainer, opened, workspace) for one in spec.plugins]
    rules: list[GradientRule] = []
    for bench in benches:
        parts = _maker(bench.plugin.make)(bench)
        trainer.penalties = [*trainer.penalties, *parts.penalties]
        trainer.objective = parts.objective or trainer.objective
        for rule in parts.rules:
            trainer.add_rule(rule)
            rules.append(rule)
    for names in ([one.name for one in trainer.penalties], [one.name for one in rules]):
        repeated = sorted({one for one in names if names.count(one) > 1})
        if repeated:
            raise TrainingError(f"two plug-ins have the name '{repeated[0]}'.", remedy="Leave one of them out.")
    return Plugged(benches, rules)


def _maker(place: str) -> Callable[[Bench], Parts]:
    """The function behind `module:function`."""
    module, _, name = place.partition(":")
    make: Callable[[Bench], Parts] = getattr(importlib.import_module(module), name)
    return make
