"""Why a probe fell: the stage after which it fell most, then that stage's data: which source, which cluster of rows.

    scores on record -> the stage, and the checkpoints kept inside it -> pushes of its rows (`influence/`)
                     -> perhaps: the stage again without the source

What is found is an event of the ledger, so that the report shows it. Nothing is changed by it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from evertune.data.cleaned import Given
from evertune.data.quotas import Mixing, quotas_of
from evertune.display import Display
from evertune.errors import DataError, ProbeError, RecipeError
from evertune.gate import compare_scores
from evertune.hashing import digest_json
from evertune.influence.order import VERSION, SourceOrder
from evertune.ledger import Event, record_event, write_current
from evertune.lineage import Opened, checkpoint_path, current_events, open_workspace
from evertune.model.checkpoint import Checkpoint, describe
from evertune.plan import Plan, make_plan
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe
from evertune.process import Workers
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.recipe.schema import Training
from evertune.run import run_recipe
from evertune.scoring import score_checkpoint
from evertune.workspace import Workspace

ROWS, ITEMS = 48, 48
# Kept checkpoints that pushes are measured at; each costs as much as another point of the line.
MOST_KEPT = 3
FORMATS = ("messages", "text", "preference")


@dataclass(frozen=True)
class _Made:
    """A checkpoint with its ledger body, and its scores on the probe."""

    label: str
    body: Mapping[str, Any]
    checkpoint: Checkpoint
    scores: ItemScores


@dataclass(frozen=True)
class _Case:
    """What the questions after the first are asked of."""

    plan: Plan
    opened: Opened
    workers: Workers
    display: Display
    probe: Probe


def blame(
    loaded: LoadedRecipe,
    probe_name: str,
    *,
    label: str | None = None,
    rows: int = ROWS,
    items: int = ITEMS,
    retrain: bool = False,
    display: Display | None = None,
) -> dict[str, Any]:
    """Find what pushed a probe down in a round, and record it.

    Args:
        loaded: the recipe whose workspace holds the round.
        label: a checkpoint at the end of the walk; the last candidate that was judged, when not given.
        rows: sampled of each source.
        items: of the probe, those that fell first.
        retrain: perform the stage again without the worst source, from the same start and with as many steps, and
            score the probe.

    Returns:
        `{"round", "label", "probe", "start", "steps": [{"label", "before", "after", "difference", "ci90", "unit"}],
        "stage": the label of the stage that is examined, or None where no stage made the probe fall, "unread": sources
        that hold no answers to learn, "inside": [[steps done, the probe's value]] of the checkpoints kept inside that
        stage, "points", "items", "sources", "clusters", "rows": see `find_pushes`, "without": see `_without`, or
        None}`.

    Raises:
        RecipeError: no such probe, label or judged round, or nothing can be left out.
        ProbeError: the probe has no loss: an lm-eval task, or never answered rightly.
        DataError: a source has changed since the stage was trained.
    """
    plan = make_plan(loaded)
    case = _Case(
        plan, open_workspace(plan.workspace), Workers(), display or Display(quiet=True), _probe(plan, probe_name)
    )
    with case.opened.workspace.lock(purpose="blame"):
        events = current_events(case.opened.ledger)
        chain = _chain(case, events, label or _last_judged(events, plan.workspace))
        steps = [_compare(after.scores, before.scores) for before, after in pairwise(chain)]
        body: dict[str, Any] = {
            "round": chain[-1].body["round"],
            "label": chain[-1].label,
            "probe": probe_name,
            "start": chain[0].label,
            "steps": [{"label": after.label, **one} for after, one in zip(chain[1:], steps, strict=True)],
            "stage": None,
            "without": None,
        }
        worst = min(range(len(steps)), key=lambda i: float(steps[i]["difference"]))
        found: dict[str, Any] = {}
        if steps[worst]["difference"] < 0:
            before, after = chain[worst], chain[worst + 1]
            found = {"stage": after.label, **_examine(case, events, before, after, rows, items)}
        body |= found
    if retrain and found:
        body["without"] = _without(case, chain[worst], chain[worst + 1], body["sources"])
    _record(case, body)
    return body


def _record(case: _Case, body: dict[str, Any]) -> None:
    opened = case.opened
    with opened.workspace.lock(purpose="blame"):
        record_event(opened.workspace, opened.ledger, "blame", digest_json(body), body, {"time": time.time()})
        write_current(opened.workspace, opened.ledger)


# --- the walk over the stages


def _probe(plan: Plan, name: str) -> Probe:
    found = next((one for one in plan.probes if one.name == name), None)
    if found is None:
        raise RecipeError(
            f"no probe '{name}' in {plan.loaded.path}; it has: {', '.join(one.name for one in plan.probes)}."
        )
    if not isinstance(found, Probe):
        raise ProbeError(
            f"probe '{name}' is a task of lm-eval, which keeps its items to itself: there is no loss to follow.",
            remedy="Blame a probe of kind choice, generate or bits_per_byte.",
        )
    return found


def _last_judged(events: Sequence[Event], workspace: Path) -> str:
    verdicts = [one.body for one in events if one.kind == "verdict"]
    if not verdicts:
        raise RecipeError(f"no round of {workspace} has been judged yet.", remedy="Run the recipe first.")
    return str(verdicts[-1]["label"])


def _chain(case: _Case, events: Sequence[Event], label: str) -> list[_Made]:
    """From what the label's round started from to the label, each scored on the probe."""
    made = [one for one in events if one.kind == "checkpoint"]
    by_digest = {one.body["digest"]: one for one in made}
    last = next((one for one in made if one.body["label"] == label), None)
    if last is None or last.body["round"] is None:
        known = ", ".join(one.body["label"] for one in made if one.body["round"])
        raise RecipeError(f"no checkpoint '{label}' of a round in {case.plan.workspace}; it has: {known or 'none'}.")
    walked = [last]
    while walked[0].body["round"] == last.body["round"]:
        before = by_digest.get(walked[0].body["start"] or "")
        if before is None:
            raise RecipeError(
                f"'{walked[0].body['label']}' started from a model that this workspace does not know.",
                remedy="Blame a round that started from the base or from a champion.",
            )
        walked.insert(0, before)
    return [_made(case, one) for one in walked]


def _made(case: _Case, event: Event) -> _Made:
    return _scored(case, event.body["label"], event.body, checkpoint_path(case.opened, event))


def _scored(case: _Case, label: str, body: Mapping[str, Any], path: Path) -> _Made:
    workspace = case.opened.workspace
    checkpoint = describe(path, cache=workspace.cache / "digests.json")
    asked = replace(case.plan, probes=(case.probe,))
    scored = score_checkpoint(asked, workspace, case.workers, checkpoint, label=label, display=Display(quiet=True))
    return _Made(label, body, checkpoint, scored.scores[case.probe.name])


def _compare(after: ItemScores, before: ItemScores) -> dict[str, Any]:
    """One probe, paired by item, with the interval that the gate would show; nothing is decided."""
    found, unit = compare_scores(after, before, level=0.05)
    values = {"before": before.value, "after": after.value}
    return {**values, "difference": found.difference, "ci90": list(found.ci90), "unit": unit}


# --- the stage's data


def _examine(
    case: _Case, events: Sequence[Event], before: _Made, after: _Made, rows: int, items: int
) -> dict[str, Any]:
    """The pushes of a stage's rows: found in the workspace, or made in a child and kept."""
    orders, unread = _sources(case, events, after)
    if not orders:
        raise RecipeError(
            f"'{after.label}' ({after.body['stage']}) was given no rows with answers to learn"
            + (f": {', '.join(unread)} hold none." if unread else "."),
            remedy="The walk over the stages is all that can be said.",
        )
    plan, workspace = case.plan, case.opened.workspace
    settings = after.body["settings"]
    kept = _kept(case, after)
    spread = [kept[len(kept) * i // MOST_KEPT] for i in range(MOST_KEPT)] if len(kept) > MOST_KEPT else kept
    asked = {
        "rows": rows,
        "items": items,
        "max_tokens": settings.get("max_tokens", 1024),
        "seed": plan.recipe.seed,
        "device": plan.numerics["device"],
    }
    identity = {
        "sources": [[one.source, digest, one.shown, one.beta] for one, digest in orders],
        "candidate": after.checkpoint.digest,
        "start": before.checkpoint.digest,
        "probe": case.probe.digest,
        "kept": [one.checkpoint.digest for _, one in spread],
        **asked,
    }
    key = digest_json({"kind": "blame", "version": VERSION, **identity})
    if workspace.manifest(key) is None:
        job = {
            "kind": "blame",
            "workspace": str(workspace.root),
            "label": after.label,
            "key": key,
            "candidate": after.checkpoint.to_json(),
            "start": before.checkpoint.to_json(),
            "probe": plan.probe_job(case.probe),
            "before": str(workspace.path(plan.probe_key(before.checkpoint, case.probe)) / "scores.parquet"),
            "after": str(workspace.path(plan.probe_key(after.checkpoint, case.probe)) / "scores.parquet"),
            "sources": [asdict(one) for one, _ in orders],
            "threads": plan.numerics["threads"],
            "kept": [(step / after.body["steps"], one.checkpoint.to_json()) for step, one in spread],
            **asked,
        }
        with case.display.probing(f"{after.label}: following {case.probe.name} into {len(orders)} sources", 1) as watch:
            case.workers.run(job, watch=watch)
    manifest = workspace.manifest(key)
    if manifest is None:
        raise AssertionError("the pushes reported success without an object")
    return {"unread": unread, "inside": [[step, one.scores.value] for step, one in kept], **manifest.record}


def _kept(case: _Case, after: _Made) -> list[tuple[int, _Made]]:
    """The checkpoints that were kept inside a stage by the number of steps done, each scored on the probe."""
    workspace = case.opened.workspace
    found = {
        int(one.record["step"]): workspace.path(one.key)
        for one in workspace.manifests()
        if one.kind == "kept" and one.record["stage"] == after.body["object"]
    }
    return [(step, _scored(case, f"{after.label}, step {step}", after.body, found[step])) for step in sorted(found)]


def _sources(case: _Case, events: Sequence[Event], after: _Made) -> tuple[list[tuple[SourceOrder, str]], list[str]]:
    """The sources of a stage with rows to learn from and their digests, and those without."""
    body, plan = after.body, case.plan
    removed = tuple(sorted({text for one in events if one.kind == "removal" for text in one.body["texts"]}))
    shown = _shown(plan, body)
    found: list[tuple[SourceOrder, str]] = []
    unread: list[str] = []
    beta = float(body["settings"].get("beta", 0.1)) if body["stage"] == "dpo" else None
    for one in body["data"]:
        name = one["source"]
        source = plan.recipe.data.get(name)
        if source is None or source.format not in FORMATS:
            unread.append(name)
            continue
        refs = (plan.rows_ref(name, without=without) for without in dict.fromkeys(((), removed)))
        ref = next((each for each in refs if each.digest == one["sha256"]), None)
        if ref is None:
            raise DataError(
                f"source '{name}' has other rows than when '{after.label}' was trained.",
                remedy="Restore the file: what is no longer there cannot be examined.",
            )
        own = beta if source.format == "preference" else None
        found.append((SourceOrder(name, ref.path, ref.format, ref.limit, False, shown[name], own), ref.digest))
    replay = body["replay"] or {"sources": {}, "sha256": {}}
    for name, times in replay["sources"].items():
        order = _replayed(case, name, replay["sha256"].get(name), float(times), removed)
        if order is None or not times:
            unread.append(name)
        else:
            found.append((order, str(replay["sha256"][name])))
    return found, unread


def _shown(plan: Plan, body: Mapping[str, Any]) -> dict[str, float]:
    """How many rows of each new source the stage has shown."""
    sizes = {one["source"]: int(one["rows"]) for one in body["data"]}
    tokens = {one["source"]: int(one["tokens"]) for one in body["data"]}
    mixing = Mixing()
    for one in plan.recipe.rounds:
        if one.name == body["round"] and body["stage_index"] is not None and body["stage_index"] < len(one.stages):
            settings = one.stages[body["stage_index"]].settings
            if isinstance(settings, Training):
                weights = dict(settings.data) if isinstance(settings.data, dict) else None
                mixing = Mixing(weights=weights, **(settings.mix.model_dump(exclude_none=True) if settings.mix else {}))
    try:
        quotas = quotas_of(mixing, sizes, tokens)
    except DataError:  # the recipe's sources are no longer those of the stage: a rescue's, or an edited round
        quotas = sizes
    total = sum(quotas.values())
    return {name: body["new_rows"] * quotas[name] / total for name in sizes}


def _replayed(case: _Case, name: str, digest: str | None, times: float, removed: tuple[str, ...]) -> SourceOrder | None:
    """A replayed source: one of the recipe's, or the rows of a promoted round."""
    plan, workspace = case.plan, case.opened.workspace
    for without in dict.fromkeys(((), removed)):
        if name in plan.recipe.data:
            ref = plan.rows_ref(name, without=without)
            if ref.digest == digest:
                return SourceOrder(name, ref.path, ref.format, ref.limit, True, times)
        for manifest in workspace.manifests():
            if manifest.kind != "history":
                continue
            for entry in manifest.files:
                stem = Path(entry.path).stem
                if name != f"history/{manifest.record['round']}/{stem}":
                    continue
                path = workspace.path(manifest.key) / entry.path
                given = Given(name, path, manifest.record["formats"][stem], None, entry.sha256)
                ref = plan.clean(given, without=without)
                if ref.digest == digest:
                    return SourceOrder(name, ref.path, ref.format, ref.limit, True, times)
    return None


# --- the check: the stage again, without its worst source


def _without(case: _Case, before: _Made, after: _Made, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The stage again without the source that pushed most, and what the probe scores then.

    From the same start, with as many steps, the other sources filling up its place.

    Returns:
        `{"source", "before", "with", "without", "difference", "ci90", "unit", "steps"}`: the probe's value at the
        start, after the stage, and after the stage without the source; the difference is of the last two, paired.
    """
    plan, body = case.plan, after.body
    worst = next((str(one["source"]) for one in sources if not one["is_replay"]), "")
    new = [one["source"] for one in body["data"]]
    one = next((each for each in plan.recipe.rounds if each.name == body["round"]), None)
    index = body["stage_index"]
    if one is None or index is None or after.label != f"{one.name}/{index + 1}-{body['stage']}":
        raise RecipeError(
            f"--retrain: '{after.label}' is no stage of the recipe as it stands.",
            remedy="Blame the round's own candidate.",
        )
    if len(new) < 2 or not worst:
        raise RecipeError(
            f"--retrain: '{after.label}' has {len(new)} source of new rows, so that none can be left out.",
            remedy="Split the source into files by what you suspect, name each in 'data', and run the round again.",
        )
    stage: dict[str, Any] = one.model_dump(mode="json", by_alias=True, exclude_none=True)["stages"][index]
    ((kind, settings),) = stage.items()
    data = settings["data"]
    settings["data"] = (
        {name: share for name, share in data.items() if name != worst}
        if isinstance(data, dict)
        else [name for name in data if name != worst]
    )
    settings.pop("epochs", None)
    settings["steps"] = body["steps"]
    case.display.line(f"performing {after.label} again without '{worst}': {body['steps']} steps")
    place = plan.workspace / "pilots" / "blame" / digest_json([after.checkpoint.digest, worst])[:16]
    loaded = load_recipe(plan.loaded.path, overrides=_overrides(case, before, one.name, {kind: settings}, place))
    run_recipe(loaded, display=Display(quiet=True))
    again = make_plan(loaded)
    events = current_events(open_workspace(place).ledger)
    made = [each for each in events if each.kind == "checkpoint" and each.body["round"] == one.name][-1]
    workspace = Workspace.open(place, create=False)
    probe = next(each for each in again.probes if each.name == case.probe.name)
    key = again.probe_key(describe(workspace.path(made.body["object"])), probe)
    scores = ItemScores.read_parquet(workspace.path(key) / "scores.parquet")
    found = _compare(scores, after.scores)
    return {
        "source": worst,
        "before": before.scores.value,
        "with": after.scores.value,
        "without": scores.value,
        "difference": found["difference"],
        "ci90": found["ci90"],
        "unit": found["unit"],
        "steps": made.body["steps"],
    }


def _overrides(case: _Case, before: _Made, name: str, stage: Mapping[str, Any], place: Path) -> list[str]:
    """The recipe as one round of one stage, judged by the blamed probe alone, in a workspace of its own."""
    plan = case.plan
    settings = plan.recipe.probes[case.probe.name].model_dump(mode="json", by_alias=True, exclude_none=True)
    ((kind, own),) = stage.items()
    overrides = [f"workspace={json.dumps(str(place))}", "rescue=[discard]"]
    replay = own.get("replay") or {}
    if "history" in (replay.get("from") or ()):
        named = [one for one in replay["from"] if one != "history"]
        for number, kept in enumerate(_history(case.opened.workspace)):
            overrides.append(f"data.history-{number}={json.dumps(kept)}")
            named.append(f"history-{number}")
        own = {**own, "replay": {**replay, "from": named} if named else {**replay, "share": 0.0}}
    body = {"name": name, "start": str(before.checkpoint.path), "stages": [{kind: own}]}
    return [
        *overrides,
        f"probes={json.dumps({case.probe.name: {**settings, 'role': 'guard', 'held_out': False}})}",
        f"rounds={json.dumps([body])}",
    ]


def _history(workspace: Workspace) -> list[dict[str, str]]:
    return [
        {"path": str(workspace.path(one.key) / f"{name}.jsonl"), "format": format}
        for one in workspace.manifests()
        if one.kind == "history"
        for name, format in one.record["formats"].items()
    ]
