"""Reinforcement learning with verifiable rewards as a stage."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune import verifiers
from evertune.data.encode import question_of
from evertune.data.rows import read_rows
from evertune.recipe.presets import ResolvedRl, ResolvedTraining
from evertune.stages.place import Place
from evertune.stages.training import training_fields, training_key
from evertune.train.spec import RlSpec
from evertune.workspace import Workspace

if TYPE_CHECKING:
    from evertune.train.rollout import Checked

VERSION = 1


def order(place: Place) -> RlSpec:
    """The complete order for an rl stage."""
    settings, recipe = place.resolved, place.plan.recipe
    assert isinstance(settings, ResolvedRl), place.label
    shared = {field.name for field in fields(ResolvedTraining)}
    own = {field.name: getattr(settings, field.name) for field in fields(ResolvedRl) if field.name not in shared}
    checks = {name: recipe.data[name].verifier for name in place.settings.new_sources}
    values: dict[str, Any] = {
        **training_fields(place, settings),
        **own,
        "kl_to": place.reference(settings.kl_to) if settings.kl else place.start,
        "verifiers": {name: one.model_dump(exclude_none=True) for name, one in checks.items() if one is not None},
    }
    unkeyed = RlSpec(key="0" * 64, label=place.label, **values)
    return RlSpec(key=training_key(VERSION, unkeyed), label=place.label, **values)


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Train with the sources' verifiers.

    Raises:
        ProbeError: no output could equal an answer.
    """
    from evertune.train.rl import run_rl

    spec = RlSpec.from_json(order)
    for ref in spec.new:
        for row in read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit):
            verifiers.validate(spec.verifiers[ref.source], question_of(row)[1], place=row.place)
    return run_rl(spec, workspace, lambda source, output, answer: _check(spec, source, output, answer))


def _check(spec: RlSpec, source: str, output: str, answer: Any) -> "Checked":
    from evertune.train.rollout import Checked

    found = verifiers.check(spec.verifiers[source], output=output, answer=answer)
    return Checked(found.score, found.error, dict(found.parts))
