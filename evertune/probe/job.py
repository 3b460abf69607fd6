"""Scores of a checkpoint as objects of a workspace: one per probe, keyed by weights, items and numerics."""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evertune.hashing import digest_json
from evertune.measure.stats import mean_interval
from evertune.model.checkpoint import Checkpoint
from evertune.probe.scores import ItemScores, concatenate
from evertune.probe.suite import AnyProbe, LmEvalProbe, Probe
from evertune.probe.task_files import require_lm_eval
from evertune.workspace import Workspace

if TYPE_CHECKING:
    from evertune.model.open import OpenModel

# Raised by hand when the meaning of a score changes.
PROBE_VERSION = 5
# Items scored together on a CPU. In bfloat16 the last digits of a score follow the shape of its batch, so this number
# is part of what a score means.
PART_ITEMS = 100
# Kinds whose answers are generated token by token.
SPOKEN = ("generate", "episode")


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
    missing = [probe for key, probe in zip(keys, probes, strict=True) if workspace.manifest(key) is None]
    if not missing:
        return keys
    if numerics.get("threads"):
        torch.set_num_threads(numerics["threads"])
    opened = open_model(checkpoint, dtype=numerics["dtype"], device=numerics["device"])
    for probe, scores, seconds in score_each(opened, missing):
        publish_scores(checkpoint, probe, scores, workspace, numerics=numerics, seconds=seconds)
    return keys


def publish_scores(
    checkpoint: Checkpoint,
    probe: AnyProbe,
    scores: ItemScores,
    workspace: Workspace,
    *,
    numerics: Mapping[str, Any],
    seconds: float,
) -> None:
    """Publish a checkpoint's scores on a probe, made in so many seconds, as `run_probes` does."""
    workspace.publish(
        kind="probe",
        key=probe_key(checkpoint, probe, numerics),
        record={"probe": _body(checkpoint, probe, scores), "volatile": {"seconds": round(seconds, 3)}},
        write=lambda folder: scores.write_parquet(folder / "scores.parquet"),
    )


def score_open(opened: "OpenModel", probes: Sequence[AnyProbe], *, alone: bool = False) -> dict[str, ItemScores]:
    """Scores of a model in memory, such as an interpolation that is never written, by probe.

    Args:
        alone: in this process, which may hold what is not to be forked.

    Raises:
        ProbeError: see `score_probe` and `score_lm_eval`.
    """
    if alone:
        return {probe.name: score_one(opened, probe) for probe in probes}
    found = {probe.name: scores for probe, scores, _ in score_each(opened, probes)}
    return {probe.name: found[probe.name] for probe in probes}


def score_one(opened: "OpenModel", probe: AnyProbe) -> ItemScores:
    """Scores of a model in memory on one probe, in this process.

    Raises:
        ProbeError: see `score_probe` and `score_lm_eval`.
    """
    return concatenate([_score_part(opened, part) for part in _parts(opened, probe)])


def score_each(opened: "OpenModel", probes: Sequence[AnyProbe]) -> Iterator[tuple[AnyProbe, ItemScores, float]]:
    """Each probe with its scores and seconds, as it is done; of processes side by side a second counts by their number.

    Raises:
        ProbeError: see `score_probe` and `score_lm_eval`.
    """
    parts = {(i, k): part for i, probe in enumerate(probes) for k, part in enumerate(_parts(opened, probe))}
    counts = Counter(i for i, _ in parts)
    found: dict[int, dict[int, tuple[ItemScores, float]]] = defaultdict(dict)
    for (i, k), scores, seconds in _scored_parts(opened, parts):
        found[i][k] = scores, seconds
        if len(found[i]) == counts[i]:
            done = [found[i][k] for k in range(counts[i])]
            yield probes[i], concatenate([one for one, _ in done]), sum(one for _, one in done)


def _scored_parts(
    opened: "OpenModel", parts: Mapping[tuple[int, int], AnyProbe]
) -> Iterator[tuple[tuple[int, int], ItemScores, float]]:
    """Places of parts, as they are done, with scores and seconds."""
    import torch

    from evertune.model.packed_weights import constant_weights, packed_weights
    from evertune.model.packing import enable_packing
    from evertune.probe.processes import in_processes, is_divided

    def score(place: tuple[int, int]) -> tuple[tuple[int, int], ItemScores, float]:
        began = time.monotonic()
        return place, _score_part(opened, parts[place]), time.monotonic() - began

    # lm-eval has processes and files of its own.
    shared = {place: one for place, one in parts.items() if isinstance(one, Probe)}
    with constant_weights(opened.model):
        if not is_divided(opened):
            yield from map(score, parts)
            return
        processes = min(torch.get_num_threads(), len(shared))
        spoken = max((one.max_new_tokens for one in shared.values() if one.kind in SPOKEN), default=0)
        enable_packing(opened.model)  # tried here, not by each child
        with torch.no_grad(), packed_weights(opened.model, tokens=spoken):
            pass  # the children share the copy
        # The longest first, so that all end together.
        longest_first = sorted(shared, key=lambda place: _effort(shared[place]), reverse=True)
        for place, scores, seconds in in_processes(score, longest_first, processes):
            yield place, scores, seconds / processes
        yield from map(score, parts.keys() - shared.keys())


def _parts(opened: "OpenModel", probe: AnyProbe) -> list[AnyProbe]:
    """The probe's items on a CPU in parts of about equal size, else in one; the same for every model."""
    if isinstance(probe, LmEvalProbe) or opened.device.type != "cpu":
        return [probe]
    count = -(-len(probe.items) // PART_ITEMS)
    bounds = [len(probe.items) * k // count for k in range(count + 1)]
    return [replace(probe, items=probe.items[a:b]) for a, b in itertools.pairwise(bounds)]


def _effort(part: Probe) -> tuple[int, int]:
    """Sorts by what takes longer: tokens generated one by one, then characters read."""
    spoken = len(part.items) * part.samples * part.max_new_tokens * part.max_steps
    read = sum(len(turn["content"]) for item in part.items for turn in item.messages)
    return spoken if part.kind in SPOKEN else 0, read


def _score_part(opened: "OpenModel", part: AnyProbe) -> ItemScores:
    if isinstance(part, LmEvalProbe):
        require_lm_eval(part.name)
        from evertune.probe.lm_eval import score_lm_eval

        return score_lm_eval(opened, part)
    from evertune.probe.score import score_probe

    return score_probe(opened, part)


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
