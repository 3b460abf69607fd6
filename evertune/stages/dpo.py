"""Direct preference optimisation as a stage."""

from typing import Any

from evertune.recipe.presets import ResolvedDpo
from evertune.stages.place import Place
from evertune.stages.training import ask_guards, own_fields, training_fields, training_key
from evertune.train.spec import DpoSpec
from evertune.workspace import Workspace

VERSION = 1


def order(place: Place) -> DpoSpec:
    """The complete order for a dpo stage."""
    settings = place.resolved
    assert isinstance(settings, ResolvedDpo), place.label
    fields = {
        **training_fields(place, settings),
        **own_fields(settings),
        "reference": place.reference(settings.reference),
    }
    unkeyed = DpoSpec(key="0" * 64, label=place.label, **fields)
    return DpoSpec(key=training_key(VERSION, unkeyed), label=place.label, **fields)


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    from evertune.train.dpo import run_dpo

    spec = DpoSpec.from_json(order)
    return run_dpo(spec, workspace, ask=ask_guards(spec))
