"""The drift audit: two checkpoints of a run side by side: weights, outputs, hidden states, calibration, habits.

    the base, the champion -> distance of weights by kind of matrix, exact KL on general and on taught text, CKA by
    layer, calibration error (in a child); prediction collapse, length and form of answers (from recorded scores)

What is found is an event of the ledger; `evertune monitor` and the report show it. Nothing is changed by it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evertune.display import Display
from evertune.errors import RecipeError
from evertune.hashing import digest_json
from evertune.ledger import Event, record_event, write_current
from evertune.lineage import Opened, current_events, find_checkpoint, open_workspace
from evertune.measure.habits import largest_share
from evertune.model.checkpoint import Checkpoint
from evertune.plan import make_plan
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, Probe
from evertune.process import Workers
from evertune.recipe.load import LoadedRecipe
from evertune.scoring import score_checkpoint
from evertune.suites import load_suite

# Raised by hand when the meaning of an audit changes.
VERSION = 1
TEXTS = 24


def audit(
    loaded: LoadedRecipe,
    *,
    label: str | None = None,
    against: str = "base",
    most: int = TEXTS,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measure how far a checkpoint has drifted from another, and record it.

    Args:
        label: the champion when not given.
        against: label of what it is compared with.
        most: texts of each probe that are read; calibration asks four times as many items.

    Returns:
        `{"label", "reference", "checkpoint", "kl", "cka", "weights", "calibration"}`, see `probe.compare`, and
        `"habits"`: {probe: {name: [before, after]}}, see `habits_of`.

    Raises:
        RecipeError: no such label, or twice the same model.
        CheckpointError: a model cannot be opened, or the two differ in architecture.
    """
    plan, opened, workers = make_plan(loaded), open_workspace(loaded.resolve(loaded.recipe.workspace)), Workers()
    shown = display or Display(quiet=True)
    sides = [find_checkpoint(opened, one) for one in (against, label)]
    (before_event, before), (after_event, after) = sides
    if before.digest == after.digest:
        raise RecipeError(
            f"'{after_event.body['label']}' is '{before_event.body['label']}': there is nothing between them.",
            remedy="Name another checkpoint with --at, or another reference with --against.",
        )
    with opened.workspace.lock(purpose="audit"):
        names = [one.body["label"] for one in (before_event, after_event)]
        groups = _groups(plan.probes, _taught(current_events(opened.ledger)))
        jobs = {name: [plan.probe_job(one) for one in probes] for name, probes in groups.items() if probes}
        if "general" not in jobs:
            suite = load_suite()
            jobs["general"] = [suite.probe_job(one) for one in suite.probes if one.kind == "bits_per_byte"]
        found = _compare(opened, workers, shown, before, after, jobs, plan.numerics, most, names)
        own = replace(plan, probes=tuple(one for one in plan.probes if not one.held_out))
        scores = [
            score_checkpoint(own, opened.workspace, workers, one, label=name, display=Display(quiet=True)).scores
            for one, name in zip((before, after), names, strict=True)
        ]
        habits = {name: habits_of(scores[0][name], scores[1][name]) for name in scores[0]}
        body = {"label": names[1], "reference": names[0], "checkpoint": after.digest, **found}
        body["habits"] = {name: one for name, one in habits.items() if one}
        record_event(opened.workspace, opened.ledger, "audit", digest_json(body), body, {"time": time.time()})
        write_current(opened.workspace, opened.ledger)
    return body


def habits_of(before: ItemScores, after: ItemScores) -> dict[str, list[Any]]:
    """What a score hides, before and after: of choices the option chosen most and its share (prediction collapse); of
    answers their mean length in characters, the share in the right form and the share that ended by themselves."""
    if before.kind == "choice":
        shares = [largest_share(one.prediction) for one in (before, after)]
        return {"chosen_most": [word for word, _ in shares], "its_share": [share for _, share in shares]}
    if before.valid is None or before.stopped is None:
        return {}
    return {
        "characters": [float(np.mean([len(text) for text in one.prediction])) for one in (before, after)],
        "right_form": [float(np.mean(one.valid)) for one in (before, after) if one.valid is not None],
        "ended": [float(np.mean(one.stopped)) for one in (before, after) if one.stopped is not None],
    }


def _taught(events: Sequence[Event]) -> set[str]:
    """Probes that were the target of a round."""
    verdicts = [one.body for one in events if one.kind == "verdict"]
    return {one["probe"] for body in verdicts for one in body["probes"] if one["role"] == "target"}


def _groups(probes: Sequence[AnyProbe], taught: set[str]) -> Mapping[str, list[Probe]]:
    """Probes whose texts are read: what was taught, and likelihoods of text that no round taught."""
    own = [one for one in probes if isinstance(one, Probe) and not one.held_out]
    return {
        "general": [one for one in own if one.kind == "bits_per_byte" and one.name not in taught],
        "taught": [one for one in own if one.name in taught],
    }


def _compare(
    opened: Opened,
    workers: Workers,
    display: Display,
    before: Checkpoint,
    after: Checkpoint,
    jobs: Mapping[str, list[dict[str, Any]]],
    numerics: Mapping[str, Any],
    most: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """Found in the workspace, or made in a child and kept."""
    digests = {"reference": before.digest, "checkpoint": after.digest}
    asked = {name: [[one["name"], one["settings"]] for one in each] for name, each in jobs.items()}
    key = digest_json(
        {"kind": "audit", "version": VERSION, **digests, "probes": asked, "most": most, "numerics": dict(numerics)}
    )
    if opened.workspace.manifest(key) is None:
        job = {
            "kind": "audit",
            "workspace": str(opened.workspace.root),
            "label": names[1],
            "key": key,
            "reference": before.to_json(),
            "candidate": after.to_json(),
            "groups": dict(jobs),
            "most": most,
            "numerics": dict(numerics),
        }
        with display.probing(f"{names[1]} beside {names[0]}", sum(map(len, jobs.values()))) as watch:
            workers.run(job, watch=watch)
    manifest = opened.workspace.manifest(key)
    if manifest is None:
        raise AssertionError("the audit reported success without an object")
    return dict(manifest.record)
