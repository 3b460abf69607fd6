"""Supervised fine-tuning as a stage."""

from typing import Any

from evertune.recipe.presets import ResolvedSft
from evertune.stages.place import Place
from evertune.stages.training import ask_guards, training_fields, training_key
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace

# Raised by hand when the meaning of the stage changes: old results are then made anew.
VERSION = 1


def order(place: Place) -> SftSpec:
    """The complete order for an sft stage."""
    settings = place.resolved
    assert isinstance(settings, ResolvedSft), place.label
    fields = training_fields(place, settings)
    unkeyed = SftSpec(key="0" * 64, label=place.label, **fields)
    return SftSpec(key=training_key(VERSION, unkeyed), label=place.label, **fields)


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    from evertune.train.sft import run_sft

    spec = SftSpec.from_json(order)
    return run_sft(spec, workspace, ask=ask_guards(spec))
