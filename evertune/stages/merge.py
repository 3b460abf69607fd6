"""A merge as a stage: models of the run, or any others, become one, which is probed and judged like any checkpoint.

Adapters over one base stay factors, exactly. Whole models are merged into a float32 master, so that a later merge does
not start from rounded numbers.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import MergeError
from evertune.hashing import digest_json
from evertune.methods import standing_of
from evertune.model.checkpoint import Checkpoint, describe
from evertune.recipe.presets import ResolvedMerge
from evertune.stages.place import Place
from evertune.workspace import Workspace

VERSION = 3
# Names of our methods -> rows of the table of all methods.
ROWS = {
    "linear": ("expert_merge",), "ema": ("ema",), "interpolate": ("wise_ft",), "dare_linear": ("dare",),
    "dare_ties": ("dare", "ties"), "della_linear": ("della",), "breadcrumbs_ties": ("breadcrumbs", "ties"),
}  # fmt: skip


@dataclass(frozen=True)
class MergeSpec:
    """Everything a merge needs.

    Attributes:
        config: the stage's settings, complete.
        models, merge_base: what the settings name.
    """

    key: str
    label: str
    start: Checkpoint
    base: Checkpoint
    config: dict[str, Any]
    models: dict[str, Checkpoint]
    merge_base: Checkpoint | None
    dtype: str
    device: str

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "start": self.start.to_json(),
            "base": self.base.to_json(),
            "models": {name: one.to_json() for name, one in self.models.items()},
            "merge_base": self.merge_base.to_json() if self.merge_base else None,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "MergeSpec":
        below = value["merge_base"]
        return cls(
            **{
                **value,
                "start": Checkpoint.from_json(value["start"]),
                "base": Checkpoint.from_json(value["base"]),
                "models": {name: Checkpoint.from_json(one) for name, one in value["models"].items()},
                "merge_base": Checkpoint.from_json(below) if below else None,
            }
        )

    def settings(self) -> dict[str, Any]:
        return _facts(self.config, self.models, self.merge_base)


def order(place: Place) -> MergeSpec:
    """The complete order for a merge stage.

    Raises:
        CheckpointError: a path names no checkpoint.
    """
    resolved = place.resolved
    assert isinstance(resolved, ResolvedMerge), place.label
    settings = resolved.settings
    models = {name: _named(place, one.path) for name, one in settings.models.items()}
    merge_base = _named(place, settings.base) if settings.base is not None else None
    config = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    facts = {
        "kind": "merge",
        "version": VERSION,
        "settings": _facts(config, models, merge_base),
        "start": place.start.digest,
        "dtype": place.plan.numerics["dtype"],
    }
    return MergeSpec(
        key=digest_json(facts),
        label=place.label,
        start=place.start,
        base=place.plan.base,
        config=config,
        models=models,
        merge_base=merge_base,
        dtype=place.plan.numerics["dtype"],
        device=place.plan.numerics["device"],
    )


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Merge and publish. An interrupted merge is begun anew.

    Raises:
        MergeError: the models do not fit together.
    """
    from evertune.merge.config import MergeConfig
    from evertune.merge.plan import plan_checkpoints
    from evertune.model.open import open_model
    from evertune.train.distance import drift_or_none

    spec = MergeSpec.from_json(order)
    began = time.monotonic()
    config = MergeConfig.model_validate(spec.config)

    def write(folder: Path) -> dict[str, Any]:
        try:
            interference = _write(plan_checkpoints(config, spec.models, spec.merge_base), folder)
        except MergeError as error:
            raise MergeError(f"{spec.label}: {error.message}", remedy=error.remedy) from error
        checkpoint = describe(folder)
        opened = open_model(checkpoint, dtype=spec.dtype, device=spec.device)
        rows = list(ROWS.get(config.method, (config.method,)))
        parents = {one.digest for one in spec.models.values()} | {spec.start.digest}
        facts = {
            "label": spec.label,
            "stage": "merge",
            "standing": standing_of(rows),
            "methods": rows,
            "form": checkpoint.form,
            "stands_on": checkpoint.stands_on.digest if checkpoint.stands_on else None,
            "start": spec.start.digest,
            "parents": sorted(parents | ({spec.merge_base.digest} if spec.merge_base else set())),
            "settings": spec.settings(),
            "merge": interference,
            "data": [],
            "replay": None,
            "anchor": None,
            "steps": 0,
            "new_rows": 0,
            "replay_rows": 0,
            "tokens": 0,
            "counted_tokens": 0,
            "losses": [],
            "final": {},
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "drift": drift_or_none(opened, start=spec.start, base=spec.base),
            "interference": None,
        }
        return {"checkpoint": facts, "volatile": {"time": time.time(), "seconds": time.monotonic() - began}}

    workspace.publish(kind="checkpoint", key=spec.key, record={}, write=write)
    manifest = workspace.manifest(spec.key)
    assert manifest is not None, "published and yet not there"
    return {name: manifest.record[name] for name in ("checkpoint", "volatile")}


def _write(plan: Any, folder: Path) -> dict[str, Any]:
    """Write the merged model or adapter; returns what the ledger keeps of how the models met."""
    from evertune.merge.engine import merge_into
    from evertune.merge.factored import common_base, write_factored
    from evertune.merge.run import check_output

    base = common_base(plan)
    facts: dict[str, Any] = {"numbers": _numbers(plan), "residual": None, "sign_conflict": None}
    if base is not None:
        residual = write_factored(plan, base, folder)
        return {**facts, "form": "adapter", "residual": vars(residual) if residual else None}
    check_output(plan)
    manifest, _, _ = merge_into(plan, folder)
    tensors = [one for one in manifest["tensors"].values() if one["relative_to"] == "base"]
    size = sum(one["elements"] for one in tensors)
    conflict = sum(one["sign_conflict"] * one["elements"] for one in tensors) / size if size else None
    return {**facts, "form": "model", "sign_conflict": conflict}


def _numbers(plan: Any) -> dict[str, dict[str, Any]]:
    """For each model: where its numbers come from, so that nobody needs to trust that none was rounded twice.

    stored: dtype of its weights, for adapters of the base they stand on. vectors: adapters whose factors were read as
    they were trained. rounded_before: whether those weights are another merge's, rounded to 16 bits, or stand among
    wider ones: a whole model trained from a float32 master is stored as it was computed with, perhaps in bfloat16.
    """
    from evertune.merge.plan import is_rounded_merge, numbers_of

    stored = {numbers_of(one) for one in plan.sources}
    return {
        one.name: {
            "stored": numbers_of(one),
            "vectors": [each.digest for each in one.checkpoint.stack[1:]],
            "rounded_before": is_rounded_merge(one) or (numbers_of(one) != "float32" and "float32" in stored),
        }
        for one in plan.sources
    }


def _named(place: Place, written: str) -> Checkpoint:
    known = {"origin": place.made[0], **place.past.checkpoints}
    return known.get(written) or place.reference(written)


def _facts(config: dict[str, Any], models: dict[str, Checkpoint], merge_base: Checkpoint | None) -> dict[str, Any]:
    """The settings with digests where they name checkpoints."""
    named = {name: {**one, "path": models[name].digest} for name, one in config["models"].items()}
    return {**config, "models": named, **({"base": merge_base.digest} if merge_base else {})}
