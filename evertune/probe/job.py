"""Scores of a checkpoint as objects of a workspace: one per probe, keyed by weights, items and numerics."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evertune.hashing import digest_json
from evertune.measure.stats import mean_interval
from evertune.model.checkpoint import Checkpoint
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, LmEvalProbe
from evertune.probe.task_files import require_lm_eval
from evertune.workspace import Workspace

if TYPE_CHECKING:
    from evertune.model.open import OpenModel

# Raised by hand when the meaning of a score changes.
PROBE_VERSION = 2


def probe_key(checkpoint: Checkpoint, probe: AnyProbe, numerics: Mapping[str, Any]) -> str:
    """Key of the object that holds the scores of a checkpoint on a probe."""
    facts = {"kind": "probe", "version": PROBE_VERSION, "checkpoint": checkpoint.digest, "probe": probe.digest}
    packages = {"packages": numerics["packages"]} if numerics.get("packages") else {}
    where = {"dtype": numerics["dtype"], "device": numerics["device"], **packages}
    return digest_json({**facts, "name": probe.name, **where})


def run_probes(
    checkpoint: Checkpoint, probes: Sequence[AnyProbe], workspace: Workspace, *, numerics: Mapping[str, Any]
) -> list[str]:
    """Score a checkpoint on the probes it has no scores for, and publish each result as soon as it is there.

    An object holds `scores.parquet`; its record has `probe`, the ledger's facts of the result, and `volatile`.

    Args:
        numerics: the recipe's `dtype`, `device` and `threads`; and `packages`, where their versions count.

    Returns:
        The keys of the objects, in the order of the probes.

    Raises:
        ProbeError: see `score_probe` and `score_lm_eval`; results published before it are kept.
    """
    import torch

    from evertune.model.open import open_model

    keys = [probe_key(checkpoint, probe, numerics) for probe in probes]
    missing = [(key, probe) for key, probe in zip(keys, probes, strict=True) if workspace.manifest(key) is None]
    if not missing:
        return keys
    if numerics.get("threads"):
        torch.set_num_threads(numerics["threads"])
    opened = open_model(checkpoint, dtype=numerics["dtype"], device=numerics["device"])
    for key, probe in missing:
        began = time.monotonic()
        scores = score_one(opened, probe)

        def write(folder: Path, scores: ItemScores = scores) -> None:
            scores.write_parquet(folder / "scores.parquet")

        record = {
            "probe": _body(checkpoint, probe, scores),
            "volatile": {"seconds": round(time.monotonic() - began, 3)},
        }
        workspace.publish(kind="probe", key=key, record=record, write=write)
    return keys


def score_open(opened: "OpenModel", probes: Sequence[AnyProbe]) -> dict[str, ItemScores]:
    """Scores of a model in memory, such as an interpolation that is never written."""
    return {probe.name: score_one(opened, probe) for probe in probes}


def score_one(opened: "OpenModel", probe: AnyProbe) -> ItemScores:
    """Scores of a model in memory on one probe.

    Raises:
        ProbeError: see `score_probe` and `score_lm_eval`.
    """
    if isinstance(probe, LmEvalProbe):
        require_lm_eval(probe.name)
        from evertune.probe.lm_eval import score_lm_eval

        return score_lm_eval(opened, probe)
    from evertune.probe.score import score_probe

    return score_probe(opened, probe)


def _body(checkpoint: Checkpoint, probe: AnyProbe, scores: ItemScores) -> dict[str, Any]:
    """The ledger's facts of a result."""
    low, high = mean_interval(scores.score, scores.cluster, scores.weight)
    return {
        "checkpoint": checkpoint.digest,
        "probe": probe.name,
        "kind": probe.kind,
        "items_digest": scores.items_digest,
        "template_digest": scores.template_digest,
        "n": len(scores.ids),
        "clusters": len(set(scores.cluster)),
        "value": scores.value,
        "direction": scores.direction,
        "ci90": [low, high],
        "chance": probe.chance,
        "format_validity": None if scores.valid is None else float(np.mean(scores.valid)),
        "stop_rate": None if scores.stopped is None else float(np.mean(scores.stopped)),
    }
