"""Scores of a checkpoint on the probes of a plan or a suite: found in the workspace, or made in a child and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evertune.display import Display
from evertune.model.checkpoint import Checkpoint
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe
from evertune.process import Workers
from evertune.workspace import Manifest, Workspace


class Asked(Protocol):
    """What asks: a recipe's plan, or a suite without a recipe."""

    @property
    def probes(self) -> Sequence[AnyProbe]: ...

    @property
    def numerics(self) -> dict[str, Any]: ...

    def probe_key(self, checkpoint: Checkpoint, probe: AnyProbe) -> str:
        """Key of the object that holds the scores."""

    def probe_job(self, probe: AnyProbe) -> dict[str, Any]:
        """What a child needs to load the probe again."""


@dataclass(frozen=True)
class Scored:
    """Item scores by probe, the objects that hold them, and how many were made now."""

    scores: Mapping[str, ItemScores]
    objects: Mapping[str, Manifest]
    made_now: int


def score_checkpoint(
    asked: Asked, workspace: Workspace, workers: Workers, checkpoint: Checkpoint, *, label: str, display: Display
) -> Scored:
    """Score a checkpoint on every probe it has no scores for yet; a probe is never scored twice on the same weights.

    Raises:
        ProbeError: an item cannot be scored; nothing of that probe is kept.
    """
    keys = {one.name: asked.probe_key(checkpoint, one) for one in asked.probes}
    missing = [one for one in asked.probes if workspace.manifest(keys[one.name]) is None]
    if missing:
        job = {
            "kind": "probe",
            "workspace": str(workspace.root),
            "label": label,
            "checkpoint": checkpoint.to_json(),
            "probes": [asked.probe_job(one) for one in missing],
            "numerics": asked.numerics,
        }
        with display.probing(label, len(missing)) as watch:
            workers.run(job, watch=watch)
    objects = {name: workspace.manifest(key) for name, key in keys.items()}
    found = {name: one for name, one in objects.items() if one is not None}
    if len(found) != len(keys):
        raise AssertionError(f"probes {sorted(set(keys) - set(found))} reported success without an object")
    scores = {name: ItemScores.read_parquet(workspace.path(key) / "scores.parquet") for name, key in keys.items()}
    display.matrix_row(label, asked.probes, scores)
    return Scored(scores=scores, objects=found, made_now=len(missing))
