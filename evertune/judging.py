"""The gate alone: any two checkpoints on a suite, or two logs of scores that already exist. No training, no run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evertune.display import Display
from evertune.errors import ProbeError
from evertune.gate import ProbeFacts
from evertune.hashing import digest_json
from evertune.judgement import Judged, judged
from evertune.model.bundled import fetch_bundled, resolve_base
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import load_codec
from evertune.probe.flips import flips_of
from evertune.probe.inspect_logs import read_inspect_logs
from evertune.probe.job import PROBE_VERSION
from evertune.probe.lm_eval_logs import read_lm_eval_logs
from evertune.probe.logs import LoggedTask, closest, pair_logs, settings_differences
from evertune.probe.scores import ItemScores
from evertune.process import Workers
from evertune.recipe.schema import Gate
from evertune.scoring import score_checkpoint
from evertune.suites import Suite
from evertune.workspace import Workspace

READERS: Mapping[str, Callable[..., dict[str, LoggedTask]]] = {
    "lm-eval": read_lm_eval_logs,
    "inspect": read_inspect_logs,
}


def judge_models(
    candidate: str, baseline: str, suite: Suite, folder: Path, *, display: Display, in_batches: bool = False
) -> Judged:
    """Score both checkpoints on a suite and judge the candidate against the baseline.

    Args:
        candidate: a bundled name, a model or adapter folder, or a .gguf file, which is imported once.
        baseline: what it must not be worse than; it stands for the champion and for the best.
        folder: workspace in which the scores are kept, so that the same question is answered at once next time.
        display: where the scores are printed.
        in_batches: ask items batch by batch and stop when the gate decides (`early.py`); both models are then open at
            once, and scores are kept for this question only.

    Raises:
        CheckpointError: one of the two is no model.
        ProbeError: the two read text differently, or an item cannot be scored.
    """
    after, before = (describe(_folder(one)) for one in (candidate, baseline))
    check_same_reading(after, before)
    workspace = Workspace.open(folder, create=True)
    with workspace.lock(purpose="gate"):
        workspace.recover()
        workers = Workers()
        if in_batches:
            return _judge_in_batches(suite, workspace, workers, after, before, (candidate, baseline), display)
        found = {
            one.digest: score_checkpoint(suite, workspace, workers, one, label=label, display=display).scores
            for one, label in ((before, baseline), (after, candidate))
        }
    return judged(
        candidate=candidate,
        baseline=baseline,
        digests={"candidate": after.digest, "baseline": before.digest},
        source=suite.source,
        facts=suite.facts,
        settings=suite.gate_body,
        before=found[before.digest],
        after=found[after.digest],
        flips=suite.flips(found[after.digest], found[before.digest]),
    )


def _judge_in_batches(
    suite: Suite,
    workspace: Workspace,
    workers: Workers,
    after: Checkpoint,
    before: Checkpoint,
    names: tuple[str, str],
    display: Display,
) -> Judged:
    facts = {name: asdict(one) for name, one in suite.facts.items()}
    asked = [[one.name, one.digest] for one in suite.probes]
    by_gate = {"facts": facts, "settings": suite.gate_body}
    identity = {"kind": "early", "version": 1, "scores": PROBE_VERSION, "probes": asked, "numerics": suite.numerics}
    key = digest_json({**identity, **by_gate, "candidate": after.digest, "baseline": before.digest})
    if workspace.manifest(key) is None:
        job = {
            "kind": "early",
            "workspace": str(workspace.root),
            "label": names[0],
            "key": key,
            "candidate": after.to_json(),
            "baseline": before.to_json(),
            "probes": [suite.probe_job(one) for one in suite.probes],
            "facts": facts,
            "settings": suite.gate_body,
            "numerics": suite.numerics,
        }
        with display.probing(f"{names[0]} against {names[1]}", len(suite.probes)) as watch:
            workers.run(job, watch=watch)
    manifest = workspace.manifest(key)
    if manifest is None:
        raise AssertionError("the batches reported success without an object")
    sides = [
        {name: ItemScores.read_parquet(workspace.path(key) / f"{side}-{name}.parquet") for name in facts}
        for side in ("before", "after")
    ]
    return judged(
        candidate=names[0],
        baseline=names[1],
        digests={"candidate": after.digest, "baseline": before.digest},
        source=suite.source,
        facts=suite.facts,
        settings=suite.gate_body,
        before=sides[0],
        after=sides[1],
        flips=suite.flips(sides[1], sides[0]),
        **manifest.record,
    )


def _folder(name_or_path: str) -> Path:
    return fetch_bundled(name_or_path) if name_or_path.endswith(".gguf") else resolve_base(name_or_path)


def check_same_reading(after: Checkpoint, before: Checkpoint) -> None:
    """Raise unless two checkpoints turn text into tokens and conversations into text in the same way.

    Raises:
        ProbeError: naming the parts that differ and where they part.
    """
    new, old = load_codec(after.base.path), load_codec(before.base.path)
    if new.digest == old.digest:
        return
    differences = settings_differences(_readable(old.parts), _readable(new.parts))
    lines = "\n".join(f"  {one}" for one in differences)
    raise ProbeError(
        f"{after.path} and {before.path} do not read text alike, so their scores cannot be compared item by item "
        f"(old side: {before.base.path.name}, new side: {after.base.path.name}):\n{lines}\n",
        remedy="Give both the same tokenizer files and chat template, or judge logs of answers (--from-lm-eval).",
    )


def _readable(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {**parts, "tokenizer": f"tokenizer.json {parts['tokenizer'][:12]}"}


def judge_logs(
    tool: str, old: Path, new: Path, *, gate: Gate, roles: Mapping[str, str], metrics: Mapping[str, str]
) -> Judged:
    """Judge the new side of two logs of another tool against the old one.

    Args:
        tool: `lm-eval` or `inspect`.
        roles: of tasks that are not guards.
        metrics: of tasks whose first metric is not the one wanted.

    Raises:
        ProbeError: a log is missing or malformed, the two were not measured alike, or a role names no task.
    """
    read = READERS[tool]
    pair = pair_logs(read(old, metrics=metrics), read(new, metrics=metrics), kind=tool)
    return _judge_scores(
        tool, old, new, gate=gate, roles=roles, before=pair.before, after=pair.after, prompts=pair.prompts
    )


def judge_tables(old: Path, new: Path, *, gate: Gate, roles: Mapping[str, str]) -> Judged:
    """Judge two sides of Parquet tables of item scores, as `ItemScores.write_parquet` writes them.

    Args:
        old, new: a table, or a folder of tables.

    Raises:
        ProbeError: a table is missing or malformed, or the sides differ in probes, items or templates.
    """
    before, after = (_tables(one) for one in (old, new))
    if set(before) != set(after):
        alone = ", ".join(sorted(set(before) ^ set(after)))
        raise ProbeError(f"{old} and {new}: these probes are on one side only: {alone}.")
    return _judge_scores("scores", old, new, gate=gate, roles=roles, before=before, after=after, prompts={})


def _tables(place: Path) -> dict[str, ItemScores]:
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise ProbeError(f"{place}: no .parquet file in it, expected tables of item scores.")
    found: dict[str, ItemScores] = {}
    for file in files:
        scores = ItemScores.read_parquet(file)
        if scores.probe in found:
            raise ProbeError(f"{file}: a second table of probe '{scores.probe}' under {place}; expected one.")
        found[scores.probe] = scores
    return found


def _judge_scores(
    source: str,
    old: Path,
    new: Path,
    *,
    gate: Gate,
    roles: Mapping[str, str],
    before: Mapping[str, ItemScores],
    after: Mapping[str, ItemScores],
    prompts: Mapping[str, Mapping[str, str]],
) -> Judged:
    unknown = sorted(set(roles) - set(before))
    if unknown:
        raise ProbeError(f"--role {unknown[0]}: no such probe. {closest(unknown[0], list(before))}")
    return judged(
        candidate=str(new),
        baseline=str(old),
        digests={},
        source=source,
        facts={name: ProbeFacts(role=roles.get(name, "guard"), safety=False, margin=None) for name in before},
        settings=gate.model_dump(),
        before=before,
        after=after,
        flips={name: flips_of(after[name], before[name], prompts.get(name, {})) for name in before},
    )
