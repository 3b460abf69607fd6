"""Reinforcement learning with verifiable rewards as a stage."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune import verifiers
from evertune.data.encode import question_of
from evertune.data.rows import read_rows
from evertune.recipe.presets import ResolvedRl
from evertune.stages.place import Place
from evertune.stages.training import ask_guards, own_fields, training_fields, training_key, verifiers_of
from evertune.train.spec import RlSpec
from evertune.workspace import Workspace

if TYPE_CHECKING:
    from evertune.train.rollout import Checked

VERSION = 1


def order(place: Place) -> RlSpec:
    """The complete order for an rl stage."""
    settings = place.resolved
    assert isinstance(settings, ResolvedRl), place.label
    values: dict[str, Any] = {
        **training_fields(place, settings),
        **own_fields(settings),
        "kl_to": place.reference(settings.kl_to) if settings.kl else place.start,
        "verifiers": verifiers_of(place),
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
    rules = {name: verifiers.placed(one, spec.folder) for name, one in spec.verifiers.items()}
    for ref in spec.new:
        for row in read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit):
            verifiers.validate(rules[ref.source], question_of(row)[1], place=row.place)
    return run_rl(spec, workspace, partial(_check, rules), ask=ask_guards(spec))


def _check(rules: Mapping[str, Mapping[str, Any]], source: str, output: str, answer: Any) -> "Checked":
    from evertune.train.rollout import Checked

    found = verifiers.check(rules[source], output=output, answer=answer)
    return Checked(found.score, found.error, dict(found.parts))
