"""Scores of a checkpoint on a plan's probes: found in the workspace, or made in a child process and kept there."""

from collections.abc import Mapping
from dataclasses import dataclass

from evertune.display import Display
from evertune.model.checkpoint import Checkpoint
from evertune.plan import Plan
from evertune.probe.scores import ItemScores
from evertune.process import Workers
from evertune.workspace import Manifest, Workspace


@dataclass(frozen=True)
class Scored:
    """Item scores by probe, the objects that hold them, and how many were made now."""

    scores: Mapping[str, ItemScores]
    objects: Mapping[str, Manifest]
    made_now: int


def score_checkpoint(
    plan: Plan, workspace: Workspace, workers: Workers, checkpoint: Checkpoint, *, label: str, display: Display
) -> Scored:
    """Score a checkpoint on every probe it has no scores for yet; a probe is never scored twice on the same weights.

    Raises:
        ProbeError: an item cannot be scored; nothing of that probe is kept.
    """
    keys = {one.name: plan.probe_key(checkpoint, one) for one in plan.probes}
    missing = [one for one in plan.probes if workspace.manifest(keys[one.name]) is None]
    if missing:
        job = {
            "kind": "probe",
            "workspace": str(workspace.root),
            "label": label,
            "checkpoint": checkpoint.to_json(),
            "probes": [plan.probe_job(one) for one in missing],
            "numerics": plan.numerics,
        }
        with display.probing(label, len(missing)) as watch:
            workers.run(job, watch=watch)
    objects = {name: workspace.manifest(key) for name, key in keys.items()}
    found = {name: one for name, one in objects.items() if one is not None}
    if len(found) != len(keys):
        raise AssertionError(f"probes {sorted(set(keys) - set(found))} reported success without an object")
    scores = {name: ItemScores.read_parquet(workspace.path(key) / "scores.parquet") for name, key in keys.items()}
    display.matrix_row(label, plan.probes, scores)
    return Scored(scores=scores, objects=found, made_now=len(missing))
