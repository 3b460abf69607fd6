"""One stream of tasks under several methods, each as ordinary runs: what is learnt, what is kept, what it costs.

The tasks are the recipe's sft stages, in the recipe's order and in others. A run is one method, one order, one seed; it
has one round in which the tasks follow each other, so that no verdict cuts the stream. Every method sees each new row
as often: a stage is as many epochs as the recipe says, and what a method replays comes on top.
"""

# K tasks, N runs

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from evertune.check import check_recipe
from evertune.display import Display
from evertune.errors import RecipeError
from evertune.ledger import Ledger
from evertune.lineage import current_events, open_workspace
from evertune.measure.matrix import backward_transfer, forgetting
from evertune.recipe.fields import REPLAYABLE
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.recipe.plugins import Kind, find_plugin, installed
from evertune.recipe.presets import resolve_sft
from evertune.recipe.schema import Round, Sft
from evertune.run import run_recipe
from evertune.workspace import Workspace

NAIVE = "naive"
# Parts of a method that are no plug-in.
OWN_PARTS = ("replay", "anchor", "lora", "full")
ROUND = "stream"
FIRST = f"{ROUND}/1-sft"
METRICS = "metrics.jsonl"
Places = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Task:
    """One task of the stream: its name, the probe that measures it, its stage, and the rows that it teaches."""

    name: str
    probe: str
    stage: Sft
    sources: tuple[str, ...]
    general: tuple[str, ...]


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    Attributes:
        order: names of the tasks as they were learnt.
        matrix: (K, K) R in that order: row i after task i; higher is better.
        average: ACC, the mean of its last row.
        backward, forgetting: BWT and the mean fall from the best; None with one task.
        general: mean change, since the base, of the probes that no task teaches, in [0, 1]; None where there is none.
        steps, new_rows, tokens: over all tasks.
        seconds: of training, as measured when the stage was performed.
        peak_bytes: the most memory of a training process.
    """

    method: str
    order: tuple[str, ...]
    seed: int
    matrix: list[list[float]]
    average: float
    backward: float | None
    forgetting: float | None
    general: float | None
    steps: int
    new_rows: int
    tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, method by method."""

    tasks: list[str]
    methods: list[str]
    orders: list[tuple[str, ...]]
    seeds: list[int]
    runs: list[RunResult]

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks,
            "orders": [list(one) for one in self.orders],
            "seeds": self.seeds,
            "methods": [self.summary(one) for one in self.methods if any(run.method == one for run in self.runs)],
            "runs": [{**one.__dict__, "order": list(one.order)} for one in self.runs],
        }

    def summary(self, method: str) -> dict[str, Any]:
        """Means of a method's runs with 90 % intervals, and its difference from the first method, run by run."""
        own = [one for one in self.runs if one.method == method]
        first = {(one.order, one.seed): one for one in self.runs if one.method == self.methods[0]}
        pairs = [(one, first[one.order, one.seed]) for one in own if (one.order, one.seed) in first]
        found: dict[str, Any] = {"method": method, "runs": len(own)}
        for name in ("average", "backward", "forgetting", "general"):
            values = [getattr(one, name) for one in own]
            found[name] = None if None in values else interval_over(values)
        found["against_first"] = interval_over([one.average - other.average for one, other in pairs])
        for name in ("steps", "new_rows", "tokens", "seconds", "peak_bytes"):
            found[name] = sum(getattr(one, name) for one in own) / len(own)
        return found


def interval_over(values: Sequence[float]) -> dict[str, Any]:
    """Mean of runs and its two-sided 90 % interval by Student's t; no interval of a single run."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "ci90": None}
    half = float(stats.t.ppf(0.95, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": mean, "ci90": [mean - half, mean + half]}


def compare(
    loaded: LoadedRecipe,
    methods: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    orders: int = 1,
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    start_method: str = "forkserver",
) -> Comparison:
    """Run what is missing of the comparison, beside the recipe's workspace, and write `comparison.json` there.

    Args:
        methods: `naive`, or parts joined by `+`: `replay`, `anchor`, `lora`, `full`, and names of plug-ins.
        tasks: names of those to learn; all of the recipe's when not given.
        orders: how many orders of the tasks: the recipe's, its reverse, then drawn ones.
        options: by part, what the recipe would say of it.
        overrides: what `loaded` was loaded with.

    Raises:
        RecipeError: a method or option that is none, a stage that is no task, or a recipe that does not pass a check:
            before anything is trained.
    """
    known = tasks_of(loaded)
    stream = _chosen(known, tasks)
    unasked = {one.probe for one in known} - {one.probe for one in stream}
    overrides = [*overrides, *_without_probes(loaded, unasked)]
    options = options or {}
    _check_parts(methods, options)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise RecipeError(f"found the seeds {', '.join(map(str, seeds))}, expected different ones, none below 0.")
    folder = loaded.resolve(loaded.recipe.workspace) / "compare"
    chosen = orders_of([one.name for one in stream], orders)
    planned = {
        (method, i, seed): [
            *overrides,
            *_overrides(loaded, _in_order(stream, order), method, options, seed, folder / _place(method, i, seed)),
        ]
        for i, order in enumerate(chosen)
        for seed in seeds
        for method in methods
    }
    for method in methods:
        for line in _checked(loaded, planned[method, 0, seeds[0]], method):
            say(line)
    runs: list[RunResult] = []
    for (method, i, seed), changes in planned.items():
        place = folder / _place(method, i, seed)
        others = [one for one in planned if one != (method, i, seed)]
        _share(place, {folder / _place(*one): ("base", FIRST) if one[1:] == (i, seed) else ("base",) for one in others})
        run_recipe(load_recipe(loaded.path, overrides=changes), display=Display(quiet=True), start_method=start_method)
        runs.append(read_run(place, method, _in_order(stream, chosen[i]), seed))
        say(f"{len(runs)} of {len(planned)}: {_run_line(runs[-1], i)}")
        made = Comparison([one.name for one in stream], list(methods), chosen, list(seeds), runs)
        _write(folder / "comparison.json", made)
    return made


def tasks_of(loaded: LoadedRecipe) -> list[Task]:
    """The recipe's sft stages as tasks, in its order.

    Raises:
        RecipeError: fewer than two, another kind of stage, a length in steps, or a task without a probe of its own.
    """
    recipe, found = loaded.recipe, []
    for i, one in enumerate(recipe.rounds):
        for j, stage in enumerate(one.stages):
            place = f"rounds[{i}].stages[{j}]"
            if stage.sft is None:
                raise RecipeError(f"{place}: found {stage.kind}, expected sft: a comparison's tasks are sft stages.")
            if stage.sft.steps is not None:
                raise RecipeError(
                    f"{place}.sft.steps: found a length in steps, expected epochs: with replay in every step a method "
                    "would see fewer new rows than another.",
                    remedy="Give epochs.",
                )
            name = one.name if len(one.stages) == 1 else f"{one.name}-{j + 1}"
            replay = resolve_sft(recipe, stage.sft).replay
            sources = tuple(stage.sft.data)
            general = tuple(each for each in replay.sources if each != "history" and each not in sources)
            found.append(Task(name, _probe_of(recipe.probes, one, sources, place), stage.sft, sources, general))
    if len(found) < 2:
        raise RecipeError(f"{loaded.path}: found {len(found)} task, expected two or more sft stages.")
    own = {source for one in found for source in one.sources}
    return [
        Task(one.name, one.probe, one.stage, one.sources, tuple(each for each in one.general if each not in own))
        for one in found
    ]


def _chosen(tasks: Sequence[Task], names: Sequence[str]) -> list[Task]:
    known = [one.name for one in tasks]
    unknown = [one for one in names if one not in known]
    if unknown or len(set(names)) < len(names) or len(names) == 1:
        raise RecipeError(
            f"found the tasks {', '.join(names)}, expected two or more different ones of {', '.join(known)}."
        )
    return [one for one in tasks if not names or one.name in names]


def _without_probes(loaded: LoadedRecipe, names: set[str]) -> list[str]:
    """The probes of tasks that are not learnt are not asked."""
    if not names:
        return []
    kept = {
        name: one.model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, one in loaded.recipe.probes.items()
        if name not in names
    }
    return [f"probes={json.dumps(kept)}"]


def orders_of(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """The order as given, its reverse, then drawn ones, all different.

    Raises:
        RecipeError: there are not so many.
    """
    if not 0 < count <= math.factorial(len(names)):
        raise RecipeError(
            f"found {count} orders, expected 1 to {math.factorial(len(names))}, the orders of {len(names)} tasks."
        )
    found = [tuple(names), tuple(reversed(names))][:count]
    drawn = random.Random(0)
    while len(found) < count:
        one = tuple(drawn.sample(list(names), len(names)))
        if one not in found:
            found.append(one)
    return found


def _in_order(tasks: Sequence[Task], order: Sequence[str]) -> list[Task]:
    by_name = {one.name: one for one in tasks}
    return [by_name[name] for name in order]


def _probe_of(probes: Mapping[str, Any], one: Round, sources: Sequence[str], place: str) -> str:
    """The probe that measures a task: the one target of its round, else the one that is called like a source."""
    open_ = [name for name, probe in probes.items() if not probe.held_out]
    targets = [name for name in open_ if one.roles.get(name, probes[name].role) == "target"]
    named = [name for name in open_ if name in sources]
    for found in (targets, named):
        if len(found) == 1:
            return found[0]
    raise RecipeError(
        f"{place}: found {len(targets)} targets and {len(named)} probes with the name of a source, expected one probe "
        "that measures what this stage teaches.",
        remedy="Name it in the round: roles: {PROBE: target}.",
    )


def parts_of(method: str) -> list[str]:
    """The parts of a method; none of `naive`."""
    return [] if method == NAIVE else method.split("+")


def _check_parts(methods: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    known = [*OWN_PARTS, *(name for kind in KINDS for name in installed(kind))]
    if not methods or len(set(methods)) < len(methods):
        raise RecipeError(f"found the methods {', '.join(methods) or 'none'}, expected different ones.")
    used = {part for method in methods for part in parts_of(method)}
    for part in sorted(used):
        if part not in known:
            raise RecipeError(f"found the method {part!r}, expected {NAIVE}, or parts joined by +: {', '.join(known)}.")
    for part in options:
        if part not in used:
            raise RecipeError(
                f"found options of {part!r}, which is in no method here: {', '.join(sorted(used)) or NAIVE}."
            )


KINDS: tuple[Kind, ...] = ("penalties", "gradient_rules", "objective")


def _overrides(
    loaded: LoadedRecipe,
    tasks: Sequence[Task],
    method: str,
    options: Mapping[str, Mapping[str, Any]],
    seed: int,
    place: Path,
) -> list[str]:
    """What turns the recipe into one run of the comparison."""
    parts = parts_of(method)
    stages = []
    for i, task in enumerate(tasks):
        earlier = [
            source
            for each in tasks[:i]
            for source in each.sources
            if loaded.recipe.data[source].format in REPLAYABLE and source not in task.sources
        ]
        stages.append({"sft": _stage(loaded, task, list(dict.fromkeys(earlier)), parts, options)})
    body = {"name": ROUND, "start": "base", "stages": stages}
    probes = {name: one.role for name, one in loaded.recipe.probes.items() if one.held_out}
    if probes:
        raise RecipeError(f"probes.{min(probes)}: found held_out, expected open probes: a comparison asks all of them.")
    return [
        f"workspace={json.dumps(str(place))}",
        f"seed={seed}",
        "rescue=[discard]",
        f"rounds={json.dumps([body])}",
    ]


def _stage(
    loaded: LoadedRecipe,
    task: Task,
    earlier: Sequence[str],
    parts: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A task's stage under a method. `earlier`: sources of the tasks before it."""
    settings = resolve_sft(loaded.recipe, task.stage)
    body: dict[str, Any] = task.stage.model_dump(mode="json", by_alias=True, exclude_none=True)
    body |= {"replay": {"share": 0.0}, "anchor": {"kl": 0.0}, "penalties": {}, "gradient_rules": {}, "objective": {}}
    body.setdefault("epochs", settings.epochs or 1.0)
    for part in parts:
        own = dict(options.get(part, {}))
        if part in ("lora", "full"):
            if "lr" in own:
                body["lr"] = own.pop("lr")
            body["tune"] = {part: own}
        elif part == "replay":
            replay = settings.replay.model_dump(mode="json", by_alias=True) | {"adapt": None} | own
            pool = [*own.get("from", task.general), *earlier]
            body["replay"] = {**replay, "from": pool} if pool else {"share": 0.0}
        elif part == "anchor":
            # There may be nothing replayed to anchor on, in a method without replay.
            on = settings.anchor.on if "replay" in parts else "new"
            body["anchor"] = settings.anchor.model_dump(mode="json") | {"on": on} | own
        else:
            kind = next(one for one in KINDS if part in installed(one))
            if "sources" in find_plugin(kind, part).options.model_fields:
                if not earlier:
                    continue
                own = {"from": list(earlier), **own}
            body[kind] = {**body[kind], part: own}
    return body


def _checked(loaded: LoadedRecipe, overrides: Sequence[str], method: str) -> Iterator[str]:
    """What a check says of a method's memory; raises for what it calls an error."""
    report = check_recipe(load_recipe(loaded.path, overrides=overrides))
    errors = [one for one in report.findings if one.severity == "error"]
    if errors:
        lines = "\n".join(f"  {one.place}: {one.message} {one.remedy}" for one in errors)
        raise RecipeError(f"the method '{method}' does not pass 'evertune check':\n{lines}")
    for one in report.findings:
        if "of memory" in one.message:
            yield f"{method}: {one.place.rsplit('.', 1)[-1]} {one.message}"
            return


def _place(method: str, order: int, seed: int) -> str:
    return f"{method}/order-{order + 1}-seed-{seed}"


def _share(place: Path, others: Mapping[Path, Sequence[str]]) -> None:
    """Take over what other runs of the comparison have made under these labels, scores included.

    An object's key is a digest of all it depends on: the run takes it for its own only where it would make the same.
    """
    if (place / "ledger.sqlite").is_file():
        return
    workspace = Workspace.open(place, create=True)
    for other, labels in others.items():
        if not (other / "ledger.sqlite").is_file():
            continue
        theirs = Workspace.open(other, create=False)
        made = [
            one.body
            for one in Ledger.open(other / "ledger.sqlite", create=False).events("checkpoint")
            if one.body["label"] in labels
        ]
        digests, keys = {one["digest"] for one in made}, {one.get("object") for one in made}
        for manifest in theirs.manifests():
            of_probe = manifest.kind == "probe" and manifest.record["probe"]["checkpoint"] in digests
            if (of_probe or manifest.key in keys) and workspace.manifest(manifest.key) is None:
                write = partial(_link, theirs.path(manifest.key), [one.path for one in manifest.files])
                workspace.publish(kind=manifest.kind, key=manifest.key, record=manifest.record, write=write)


def _link(source: Path, names: Sequence[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(source / name)


def read_run(place: Path, method: str, tasks: Sequence[Task], seed: int) -> RunResult:
    """The result of a finished run, from its ledger alone."""
    events = current_events(open_workspace(place).ledger)
    rows = [f"{ROUND}/{i + 1}-sft" for i in range(len(tasks))]
    asked = {(one.body["label"], one.body["probe"]): one.body for one in events if one.kind == "probe"}

    def value(label: str, probe: str) -> float:
        body = asked[label, probe]
        return float(body["value"] if body["direction"] == "higher" else -body["value"])

    matrix = [[value(label, task.probe) for task in tasks] for label in rows]
    taught = {task.probe for task in tasks}
    others = sorted(
        {probe for _, probe in asked if probe not in taught and asked["base", probe]["direction"] == "higher"}
    )
    made = {one.body["label"]: one for one in events if one.kind == "checkpoint" and one.body["label"] in rows}
    shown = [
        json.loads(line)["new_rows"]
        for event in made.values()
        for line in (place / "objects" / event.body["object"] / METRICS).read_text(encoding="utf-8").splitlines()
    ]
    return RunResult(
        method=method,
        order=tuple(task.name for task in tasks),
        seed=seed,
        matrix=matrix,
        average=float(np.mean(matrix[-1])),
        backward=backward_transfer(matrix),
        forgetting=forgetting(matrix),
        general=float(np.mean([value(rows[-1], one) - value("base", one) for one in others])) if others else None,
        steps=sum(one.body["steps"] for one in made.values()),
        new_rows=sum(shown),
        tokens=sum(one.body["tokens"] for one in made.values()),
        seconds=sum(one.volatile["seconds"] for one in made.values()),
        peak_bytes=max(one.volatile["peak_memory_bytes"] for one in made.values()),
    )


def _write(place: Path, made: Comparison) -> None:
    place.write_text(json.dumps(made.to_json(), indent=2) + "\n", encoding="utf-8")


def _run_line(one: RunResult, order: int) -> str:
    lost = "" if one.backward is None else f"  BWT {100 * one.backward:+.1f}"
    return (
        f"{one.method:<20} order {order + 1} seed {one.seed}:  ACC {100 * one.average:.1f}{lost}  {one.seconds:,.0f} s"
    )
