"""What a child process does: one job in, one JSON-able result out. Only this module and `run` know all working rooms.

A job is `{"kind": ..., "workspace": path, ...}`; its kind is one of those below, or a kind of stage.
`python -m evertune.worker JOB.json` performs one under a launcher such as torchrun: rank 0 writes `JOB.result.json`
beside it.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evertune.errors import EvertuneError
from evertune.hashing import canonical_json
from evertune.stages import KINDS
from evertune.workspace import Workspace

Job = dict[str, Any]


def perform(job: Job) -> dict[str, Any]:
    """Perform one job while holding the workspace's worker lock; returns its facts as plain JSON values.

    Raises:
        EvertuneError: what the rooms raise, unchanged.
    """
    workspace = Workspace.open(Path(job["workspace"]), create=False)
    with workspace.worker_lock():
        if job["kind"] in _JOBS:
            return _JOBS[job["kind"]](job, workspace)
        return KINDS[job["kind"]].perform(job["spec"], workspace)


def report_error(error: BaseException) -> dict[str, Any]:
    """An error as plain values, so that the parent can raise it again under its own name."""
    if isinstance(error, EvertuneError):
        return {"type": type(error).__name__, "message": error.message, "remedy": error.remedy}
    return {"type": "bug", "message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _probe(job: Job, workspace: Workspace) -> dict[str, Any]:
    from evertune.model.checkpoint import Checkpoint
    from evertune.probe.job import run_probes
    from evertune.probe.suite import load_probe

    probes = [load_probe(one["name"], settings=one["settings"], root=Path(one["root"])) for one in job["probes"]]
    checkpoint = Checkpoint.from_json(job["checkpoint"])
    return {"keys": run_probes(checkpoint, probes, workspace, numerics=job["numerics"])}


def _scan(job: Job, workspace: Workspace) -> dict[str, Any]:
    """Score every share of the candidate in memory; one Parquet of item scores per share, by its number, and probe."""
    import torch

    from evertune.merge.interpolate import Share, scan
    from evertune.model.checkpoint import Checkpoint
    from evertune.model.open import OpenModel
    from evertune.probe.job import score_each
    from evertune.probe.suite import load_probe

    numerics = job["numerics"]
    if numerics.get("threads"):
        torch.set_num_threads(numerics["threads"])
    probes = [load_probe(one["name"], settings=one["settings"], root=Path(one["root"])) for one in job["probes"]]
    shares: list[Share] = [tuple(one) if isinstance(one, list) else one for one in job["shares"]]

    def write(folder: Path) -> dict[str, Any]:
        numbers = {share: number for number, share in enumerate(shares)}
        spent: list[dict[str, float]] = [{} for _ in shares]

        def visit(share: Share, opened: OpenModel) -> None:
            for probe, scores, seconds in score_each(opened, probes):
                scores.write_parquet(folder / f"{numbers[share]}-{probe.name}.parquet")
                spent[numbers[share]][probe.name] = seconds

        candidate, reference = (Checkpoint.from_json(job[one]) for one in ("candidate", "reference"))
        scan(candidate, reference, shares, dtype=numerics["dtype"], device=numerics["device"], visit=visit)
        return {"shares": job["shares"], "volatile": {"seconds": spent}}

    return {"key": workspace.publish(kind="scan", key=job["key"], record={}, write=write).key}


def _early(job: Job, workspace: Workspace) -> dict[str, Any]:
    """Ask both sides batch by batch until the gate decides; both sides' scores so far as Parquet."""
    from evertune.early import Sides, judge_in_batches
    from evertune.gate import GateSettings, ProbeFacts
    from evertune.model.checkpoint import Checkpoint
    from evertune.model.open import open_model
    from evertune.probe.job import score_one
    from evertune.probe.suite import AnyProbe, load_probe

    probes = [load_probe(one["name"], settings=one["settings"], root=Path(one["root"])) for one in job["probes"]]
    facts = {name: ProbeFacts(**one) for name, one in job["facts"].items()}

    def write(folder: Path) -> dict[str, Any]:
        before, after = (
            open_model(
                Checkpoint.from_json(job[side]), dtype=job["numerics"]["dtype"], device=job["numerics"]["device"]
            )
            for side in ("baseline", "candidate")
        )

        def score(probe: AnyProbe) -> Sides:
            return Sides(score_one(before, probe), score_one(after, probe))

        done = judge_in_batches(probes, facts, GateSettings.from_json(job["settings"]), score)
        for side, scores in (("before", done.before), ("after", done.after)):
            for name, one in scores.items():
                one.write_parquet(folder / f"{side}-{name}.parquet")
        return {"look": done.look, "items_asked": done.items_asked, "items_in_all": done.items_in_all}

    return {"key": workspace.publish(kind="early", key=job["key"], record={}, write=write).key}


def _interpolate(job: Job, workspace: Workspace) -> dict[str, Any]:
    """Write a point of a scan as a checkpoint; where it has the weights that were scanned, the scores are its own."""
    from evertune.merge.interpolate import is_exact, write_winner
    from evertune.model.checkpoint import Checkpoint, describe
    from evertune.probe.job import publish_scores
    from evertune.probe.scores import ItemScores
    from evertune.probe.suite import load_probe

    candidate, reference = (Checkpoint.from_json(job[one]) for one in ("candidate", "reference"))
    number, scanned = job["number"], workspace.manifest(job["scan"])
    assert scanned is not None, "scanned before it is written"
    share = scanned.record["shares"][number]

    def write(folder: Path) -> dict[str, Any]:
        write_winner(candidate, reference, tuple(share) if isinstance(share, list) else share, folder)
        return {}

    key = workspace.publish(kind="checkpoint", key=job["key"], record={}, write=write).key
    if is_exact(candidate, reference):
        winner = describe(workspace.path(key), cache=workspace.cache / "digests.json")
        for one in job["probes"]:
            probe = load_probe(one["name"], settings=one["settings"], root=Path(one["root"]))
            scores = ItemScores.read_parquet(workspace.path(job["scan"]) / f"{number}-{probe.name}.parquet")
            seconds = scanned.record["volatile"]["seconds"][number][probe.name]
            publish_scores(winner, probe, scores, workspace, numerics=job["numerics"], seconds=seconds)
    return {"key": key}


def _blame(job: Job, workspace: Workspace) -> dict[str, Any]:
    """The pushes of a stage's rows on a probe, in the record of an object without files."""
    import torch

    from evertune.influence.order import SourceOrder
    from evertune.influence.push import find_pushes
    from evertune.model.checkpoint import Checkpoint
    from evertune.probe.scores import ItemScores
    from evertune.probe.suite import Probe, load_probe

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    probe = load_probe(job["probe"]["name"], settings=job["probe"]["settings"], root=Path(job["probe"]["root"]))
    assert isinstance(probe, Probe), "asked of a probe with items"
    candidate, start = (Checkpoint.from_json(job[one]) for one in ("candidate", "start"))

    def write(folder: Path) -> dict[str, Any]:
        return find_pushes(
            candidate,
            start,
            probe,
            ItemScores.read_parquet(Path(job["before"])),
            ItemScores.read_parquet(Path(job["after"])),
            [SourceOrder(**one) for one in job["sources"]],
            most_rows=job["rows"],
            most_items=job["items"],
            max_tokens=job["max_tokens"],
            seed=job["seed"],
            device=job["device"],
            kept=[(share, Checkpoint.from_json(one)) for share, one in job["kept"]],
        )

    return {"key": workspace.publish(kind="blame", key=job["key"], record={}, write=write).key}


def _audit(job: Job, workspace: Workspace) -> dict[str, Any]:
    """Two checkpoints side by side, in the record of an object without files."""
    import torch

    from evertune.model.checkpoint import Checkpoint
    from evertune.model.open import open_model
    from evertune.probe.compare import compare_models
    from evertune.probe.suite import Probe, load_probe

    numerics = job["numerics"]
    if numerics.get("threads"):
        torch.set_num_threads(numerics["threads"])
    groups = {
        name: [
            probe
            for one in each
            if isinstance(probe := load_probe(one["name"], settings=one["settings"], root=Path(one["root"])), Probe)
        ]
        for name, each in job["groups"].items()
    }

    def write(folder: Path) -> dict[str, Any]:
        sides = [
            open_model(Checkpoint.from_json(job[side]), dtype=numerics["dtype"], device=numerics["device"], fold=True)
            for side in ("reference", "candidate")
        ]
        return compare_models(sides[0], sides[1], groups, most_texts=job["most"])

    return {"key": workspace.publish(kind="audit", key=job["key"], record={}, write=write).key}


_JOBS: dict[str, Callable[[Job, Workspace], dict[str, Any]]] = {
    "probe": _probe,
    "scan": _scan,
    "early": _early,
    "interpolate": _interpolate,
    "blame": _blame,
    "audit": _audit,
}


def main(path: str) -> int:
    """Entry under a launcher: perform the job in the file; rank 0 writes the result, the others say what went wrong.
    Returns the exit code."""
    place = Path(path)
    job = json.loads(place.read_text(encoding="utf-8"))
    try:
        answer: dict[str, Any] = {"result": perform(job)}
    except Exception as error:
        answer = {"error": report_error(error)}
    if int(os.environ.get("RANK", "0")) == 0:
        place.with_suffix(".result.json").write_bytes(canonical_json(answer))
    elif "error" in answer:
        told = answer["error"]
        sys.stderr.write(f"{told.get('traceback', '')}{told['type']}: {told['message']}\n")
    return 0 if "result" in answer else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
