"""Federated fine-tuning as a stage: rounds over clients that keep their rows."""

from typing import Any

from evertune.federated.spec import FederatedSpec
from evertune.hashing import digest_json
from evertune.recipe.presets import ResolvedFederated
from evertune.stages.place import Place
from evertune.workspace import Workspace

VERSION = 1


def order(place: Place) -> FederatedSpec:
    """The complete order for a federated stage."""
    settings, plan = place.resolved, place.plan
    assert isinstance(settings, ResolvedFederated), place.label
    noise = settings.noise.model_dump() if settings.noise is not None else None
    values = {**vars(settings), "clients": None, "noise": noise}
    fields = {
        **values,
        "start": place.start,
        "base": plan.base,
        "clients": {name: [plan.rows_ref(one) for one in sources] for name, sources in settings.clients.items()},
        "seed": plan.recipe.seed,
        "dtype": plan.numerics["dtype"],
        "device": plan.numerics["device"],
        "threads": plan.numerics["threads"],
    }
    unkeyed = FederatedSpec(key="0" * 64, label=place.label, **fields)
    key = digest_json({"kind": "federated", "version": VERSION, **unkeyed.identity()})
    return FederatedSpec(key=key, label=place.label, **fields)


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    from evertune.federated.server import run_federated

    return run_federated(FederatedSpec.from_json(order), workspace)
