"""What the orders of trained stages have in common: rows, replay, anchor, numerics, and the key."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from evertune.data.cleaned import Given
from evertune.errors import RecipeError
from evertune.hashing import digest_file, digest_json
from evertune.model.checkpoint import Checkpoint
from evertune.recipe.plugins import Kind, find_plugin
from evertune.recipe.presets import ResolvedTraining
from evertune.recipe.schema import ADAPTING, Training
from evertune.stages.place import Place
from evertune.train.spec import CARRIED, AdaptSpec, AnchorSpec, GuardStopSpec, PluginSpec, RowsRef, TrainingSpec
from evertune.verifiers import located
from evertune.workspace import read_manifest

if TYPE_CHECKING:
    from evertune.model.open import OpenModel


def training_fields(place: Place, settings: ResolvedTraining) -> dict[str, Any]:
    """The fields of an order that do not depend on the objective."""
    plan, stage = place.plan, place.settings
    assert isinstance(stage, Training), place.label
    replay = _replay_refs(place, settings)
    return {
        "start": place.start,
        "base": plan.base,
        "new": [plan.rows_ref(name, without=place.without) for name in stage.new_sources],
        "weights": dict(stage.data) if isinstance(stage.data, dict) else None,
        "mix": settings.mix.model_dump(exclude_none=True) if settings.mix else None,
        "replay": replay,
        "share": settings.replay.share if replay else 0.0,
        "adapt": _adapt_spec(place, settings) if replay else None,
        "guard_stop": _guard_stop_spec(place, settings),
        "dedup": settings.replay.dedup,
        "anchor": _anchor_spec(place, settings),
        "plugins": [_plugin_spec(place, *one) for one in stage.plugins],
        "tune": settings.tune.model_dump(exclude_none=True),
        "lr": settings.lr,
        "epochs": settings.epochs,
        "steps": settings.steps,
        "schedule": settings.schedule,
        "warmup": settings.warmup,
        "batch_rows": settings.batch_rows,
        "micro_batch_rows": settings.micro_batch_rows,
        "max_tokens": settings.max_tokens,
        "too_long": settings.too_long,
        "weight_decay": settings.weight_decay,
        "clip": settings.clip,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "ema_decay": settings.ema.decay if settings.ema else None,
        "save_steps": settings.save_steps,
        "keep_steps": settings.keep_steps,
        "seed": plan.recipe.seed,
        "dtype": plan.numerics["dtype"],
        "device": plan.numerics["device"],
        "threads": plan.numerics["threads"],
        "track": list(plan.recipe.track),
        "folder": str(plan.loaded.folder),
        "kernels": plan.recipe.numerics.kernels,
        "compile": plan.recipe.numerics.compile,
        "fsdp": plan.recipe.launch is not None and plan.recipe.launch.fsdp,
    }


def own_fields(settings: ResolvedTraining) -> dict[str, Any]:
    """The fields that the settings have beside those of every trained stage, as plain values."""
    shared = {field.name for field in fields(ResolvedTraining)}
    own = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in shared}
    return {name: _plain(one) for name, one in own.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value.model_dump() if isinstance(value, BaseModel) else value


def training_key(version: int, spec: TrainingSpec) -> str:
    """Digest of what the result depends on; where files lie, names and bookkeeping are left out."""
    facts = spec.to_json()
    for name in ("key", "label", "threads", "track", "save_steps", "keep_steps", "folder", "fsdp"):
        del facts[name]
    facts |= {name: one.digest for name, one in vars(spec).items() if isinstance(one, Checkpoint)}
    if facts.get("server"):  # where it is, and how it is asked, makes no other answers
        facts["server"] = facts["server"]["model"]
    # What came later and is not used keeps the keys of before.
    for name in ("mix", "adapt", "guard_stop", "replay_ratio", "protect", "server", "compile"):
        if not facts.get(name, True):
            del facts[name]
    if facts["kernels"] == "torch":
        del facts["kernels"]
    for name in ("adapt", "guard_stop"):
        if name in facts:
            del facts[name]["probes"]
    facts["new"] = [[ref.source, ref.digest] for ref in spec.new]
    facts["replay"] = [[ref.source, ref.digest] for ref in spec.replay]
    if spec.anchor is not None:
        facts["anchor"]["reference"] = spec.anchor.reference.digest
    if spec.keeps_master:
        facts["master"] = "float32"
    facts["plugins"] = [one.identity() for one in spec.plugins]
    return digest_json({"kind": spec.kind, "version": version, **facts})


def verifiers_of(place: Place) -> dict[str, dict[str, Any]]:
    """The verifiers of the stage's new sources, those that have one."""
    plan = place.plan
    given = {name: plan.recipe.data[name].verifier for name in place.settings.new_sources}
    return {
        name: located(one.model_dump(exclude_none=True), plan.loaded.folder)
        for name, one in given.items()
        if one is not None
    }


def _replay_refs(place: Place, settings: ResolvedTraining) -> list[RowsRef]:
    return _refs(place, settings.replay_sources)


def _refs(place: Place, sources: Iterable[str]) -> list[RowsRef]:
    """Where the rows of these sources are; `history` is every source of every promoted round."""
    refs = []
    for name in sources:
        if name == "history":
            refs += [ref for folder in place.histories for ref in _history_refs(place, folder)]
        else:
            refs.append(place.plan.rows_ref(name, without=place.without))
    return refs


def _plugin_spec(place: Place, kind: Kind, name: str, options: Any) -> PluginSpec:
    plugin = find_plugin(kind, name)
    carried = place.start.path / CARRIED / f"{name}.safetensors"
    is_there = carried.is_file()
    return PluginSpec(
        kind=kind,
        name=name,
        method=plugin.method,
        make=plugin.make,
        version=plugin.version,
        options=options.model_dump(mode="json"),
        memory=_refs(place, getattr(options, "sources", ())),
        carried=str(carried) if is_there else None,
        carried_digest=digest_file(carried) if is_there else None,
    )


def _adapt_spec(place: Place, settings: ResolvedTraining) -> AdaptSpec | None:
    adapt = settings.replay.adapt
    if adapt is None or place.kind not in ADAPTING:
        return None
    guards = _guards_on_the_way(place, "replay.adapt")
    return AdaptSpec(every=adapt.every, raise_by=adapt.raise_by, most=adapt.most, **guards)


def _guard_stop_spec(place: Place, settings: ResolvedTraining) -> GuardStopSpec | None:
    stop = settings.guard_stop
    return GuardStopSpec(every=stop.every, **_guards_on_the_way(place, "guard_stop")) if stop is not None else None


def _guards_on_the_way(place: Place, setting: str) -> dict[str, Any]:
    """The guards that a stage asks while it trains, by name, and what is needed to load each.

    Raises:
        RecipeError: there are none.
    """
    plan = place.plan
    guards = plan.asked_on_the_way(place.round)
    if not guards:
        raise RecipeError(
            f"{place.label}: '{setting}' asks guards, and there are none but of lm-eval or held-out ones.",
            remedy=f"Add a guard, or leave '{setting}' out.",
        )
    facts = {
        one.name: {
            "margin": plan.margin_of(one, place.round),
            "lower": one.kind == "bits_per_byte",
            "digest": one.digest,
        }
        for one in guards
    }
    return {"guards": facts, "probes": [plan.probe_job(one) for one in guards]}


def ask_guards(spec: TrainingSpec) -> "Callable[[OpenModel], dict[str, float]] | None":
    """What asks the model in training for the mean score of each guard; None where nothing is asked on the way."""
    asking = spec.guard_stop or spec.adapt
    if asking is None:
        return None
    from evertune.probe.job import score_open
    from evertune.probe.suite import load_probe

    probes = [load_probe(one["name"], settings=one["settings"], root=Path(one["root"])) for one in asking.probes]
    return lambda opened: {name: float(one.value) for name, one in score_open(opened, probes, alone=True).items()}


def _history_refs(place: Place, folder: Path) -> list[RowsRef]:
    manifest = read_manifest(folder)
    return [
        place.plan.clean(
            Given(
                source=f"history/{manifest.record['round']}/{Path(entry.path).stem}",
                path=folder / entry.path,
                format=manifest.record["formats"][Path(entry.path).stem],
                limit=None,
                digest=entry.sha256,
            ),
            without=place.without,
        )
        for entry in manifest.files
    ]


def _anchor_spec(place: Place, settings: ResolvedTraining) -> AnchorSpec | None:
    anchor = settings.anchor
    if anchor.kl == 0.0:
        return None
    reference = place.reference(anchor.to)
    return AnchorSpec(kl=anchor.kl, on=anchor.on, direction=anchor.direction, cache=anchor.cache, reference=reference)
