"""What each stage would do, and whether there is disk for all of them.

`LOOKS` has a line for each kind of stage, as `stages.KINDS` has for how it is made.
"""

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evertune.check.estimate import (
    BYTES,
    Amounts,
    amounts,
    estimate,
    forward_seconds,
    kept_weights,
    nearest_folder,
    resume_bytes,
)
from evertune.check.findings import Disk, Severity, StageEstimate
from evertune.check.lengths import Length, Lengths, keep_lengths, key_of_rows, known_lengths
from evertune.check.look import Look, digest_cache, sources_of
from evertune.data.encode import Encoding, encode_pairs, encode_prompts, encode_rows, question_of
from evertune.data.history import Budget, choose
from evertune.data.quotas import Mixing
from evertune.data.replay import drop_duplicates
from evertune.data.rows import Row, digest_rows
from evertune.hashing import digest_file, digest_json
from evertune.model.checkpoint import describe, vocabulary_of
from evertune.recipe.fields import REPLAYABLE, StageSettings
from evertune.recipe.plugins import Kind, Plugin, find_plugin
from evertune.recipe.presets import (
    ResolvedDistill,
    ResolvedExternal,
    ResolvedFederated,
    ResolvedTraining,
    resolve_stage,
)
from evertune.recipe.schema import ADAPTING, Recipe, Round, Stage, Training, kept_sources, placed_stages
from evertune.verifiers import located, validate

MERGED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Planned:
    """A stage's estimate, and the disk it takes for resume points while it runs, and for the winner of a rescue."""

    estimate: StageEstimate
    resume_bytes: int
    rescue_bytes: int


@dataclass(frozen=True)
class StageView:
    """One stage of the recipe under inspection, with its settings given and filled in."""

    look: Look
    place: str
    round_index: int
    round: Round
    index: int
    stage: Stage
    way: str = ""

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def settings(self) -> StageSettings:
        return self.stage.settings

    @property
    def label(self) -> str:
        way = f"{self.way}/" if self.way else ""
        return f"{self.round.name}/{way}{self.index + 1}-{self.kind}"

    @property
    def resolved(self) -> Any:
        return resolve_stage(self.look.recipe, self.settings)

    def say(self, severity: Severity, message: str, remedy: str = "", *, at: str = "") -> None:
        """Keep a finding about the stage, or about one of its settings."""
        self.look.say(severity, f"{self.place}{at}", message, remedy)


def look_at_stages(look: Look) -> list[Planned]:
    """Estimates of the stages whose rows and base could be read; what is odd about them becomes findings."""
    views = [StageView(look, **vars(one)) for one in placed_stages(look.recipe)]
    return [found for view in views if (found := LOOKS[view.kind](view)) is not None]


def look_at_disk(look: Look, planned: Sequence[Planned]) -> Disk:
    """What the stages that are not done need at most, and what is free; an error where that is less."""
    waiting = [one for one in planned if not one.estimate.done]
    needed = sum(one.estimate.disk_bytes + one.rescue_bytes for one in waiting)
    needed += max((one.resume_bytes for one in waiting), default=0)
    free = shutil.disk_usage(nearest_folder(look.loaded.resolve(look.recipe.workspace))).free
    if needed > free:
        told = f"about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free."
        look.say("error", "workspace", told, "Free some disk, or put the workspace elsewhere.")
    return Disk(needed, free)


def look_at_training(view: StageView) -> Planned | None:
    """A stage that trains here: what its stream would show, and what that takes."""
    look, settings, stage = view.look, view.resolved, view.settings
    shapes, names = look.shapes, sources_of(look.recipe, stage)
    if shapes is None or any(name not in look.rows for name in names):
        return None
    encoded = {name: _encode(view, name, settings) for name in names}
    new = {name: rows for name in stage.new_sources if (rows := encoded[name]) is not None}
    if any(rows is None for rows in encoded.values()):
        return None
    replay = _replay_pool(view, settings, {name: rows for name, rows in encoded.items() if rows})
    weights = stage.data if isinstance(stage, Training) and isinstance(stage.data, dict) else None
    mixing = Mixing(weights=weights, **(settings.mix.model_dump(exclude_none=True) if settings.mix else {}))
    seen = amounts(new, replay, mixing, settings)
    _look_at_amounts(view, settings, seen, sum(map(len, new.values())))
    _look_at_plugins(view, settings, kept_weights(settings, shapes))
    found = estimate(view.label, seen, settings, shapes, look.recipe.numerics, done=_is_done(view))
    return Planned(found, resume_bytes(settings, shapes), rescue_bytes(view, found.disk_bytes))


def look_at_rewards(view: StageView) -> Planned | None:
    """A stage with verifiable rewards: as any that trains here, and whether its answers can be checked."""
    look, settings = view.look, view.resolved
    for name in view.settings.new_sources:
        verifier = look.recipe.data[name].verifier
        if verifier is None:
            continue
        given = verifier.model_dump(exclude_none=True)
        rule = look.attempt(f"data.{name}.verifier", located, given, look.loaded.folder)
        if rule is None:
            continue
        for row in look.rows.get(name, ()):
            if look.attempt(f"data.{name}", _can_be_checked, rule, row) is None:
                break
    if settings.server is not None and settings.tune.lora is None:
        told = "'server' needs 'tune: {lora: ...}': whole weights cannot be loaded while it serves."
        view.say("error", told, "Set 'tune' in the stage.")
    if not settings.kl:
        told = "'kl' is 0: nothing holds the policy to what it was before this stage."
        view.say("warning", told, "Leave 'kl' out for 0.01 to the sft stage, or anchor the answers.")
    return look_at_training(view)


def _can_be_checked(rule: dict[str, Any], row: Row) -> bool:
    validate(rule, question_of(row)[1], place=row.place)
    return True


def look_at_distill(view: StageView) -> Planned | None:
    """A student's training, and what its teachers answer before it: their words must be its words."""
    _look_at_teachers(view, view.resolved)
    planned = look_at_training(view)
    if planned is None or view.look.shapes is None:
        return planned
    look, settings, found = view.look, view.resolved, planned.estimate
    asked = {name: (members, _encode(view, name, settings) or ()) for name, members in settings.members.items()}
    # Only rows that the student sees are asked about, each once.
    share = min(1.0, found.new_rows / sum(len(rows) for _, rows in asked.values()))
    answers = sum(members * len(rows) for members, rows in asked.values())
    tokens = sum(members * row.tokens for members, rows in asked.values() for row in rows)
    counted = sum(members * row.counted for members, rows in asked.values() for row in rows)
    seconds = forward_seconds(share * tokens, share * counted, view.look.shapes, look.recipe.numerics)
    # A kept word is an id and a number in half precision; each member of an ensemble keeps the words of all.
    exact = look.words or 0
    width = exact if settings.words == "all" else settings.words * max(settings.members.values())
    told = replace(
        found,
        seconds=found.seconds + round(seconds),
        disk_bytes=found.disk_bytes + round(share * counted * width * 4),
        summary=f"{found.summary}, after about {round(share * answers):,} answers of teachers",
    )
    return replace(planned, estimate=told)


def look_at_external(view: StageView) -> Planned | None:
    """Another trainer's command: whether it can start, and the rows it gets. Its time and memory are its own."""
    look, settings = view.look, view.resolved
    _look_at_command(view, settings)
    if look.shapes is None or any(name not in look.rows for name in view.settings.new_sources):
        return None
    rows = sum(len(look.rows[name]) for name in view.settings.new_sources)
    found = StageEstimate(
        label=view.label,
        new_rows=rows,
        replay_rows=0,
        steps=0,
        tokens=0,
        counted_tokens=0,
        seconds=0,
        disk_bytes=look.shapes.weights * BYTES[look.recipe.numerics.dtype],
        done=_is_done(view),
        summary=f"{rows:,} rows for another trainer's command, at most {settings.hours:g} h",
    )
    return Planned(found, 0, rescue_bytes(view, found.disk_bytes))


def look_at_merge(view: StageView) -> Planned | None:
    """A merge: whether its method gets what it needs. Models that earlier stages make are not there yet."""
    from pydantic import ValidationError

    from evertune.merge.config import MergeConfig

    look, settings = view.look, view.resolved.settings
    try:
        MergeConfig.model_validate(settings.model_dump(by_alias=True, exclude_none=True))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            for told in str(one["ctx"]["error"] if "ctx" in one else one["msg"]).split("\n"):
                view.say("error", f"{told}.")
        return None
    if settings.dtype in ("bfloat16", "float16"):
        told = f"a whole model is rounded to {settings.dtype}; a later merge of it starts from rounded numbers."
        view.say("warning", told, "Leave dtype out for a float32 master; 'evertune export' rounds once.", at=".dtype")
    if look.shapes is None:
        return None
    found = StageEstimate(
        label=view.label,
        new_rows=0,
        replay_rows=0,
        steps=0,
        tokens=0,
        counted_tokens=0,
        seconds=0,
        disk_bytes=look.shapes.weights * MERGED_BYTES[settings.dtype],
        done=_is_done(view),
        summary=f"{settings.method} of {len(settings.models)} models",
    )
    return Planned(found, 0, rescue_bytes(view, found.disk_bytes))


def look_at_federated(view: StageView) -> Planned | None:
    """Rows of all clients, and what they train: an adapter each, in turn."""
    look, settings = view.look, view.resolved
    if look.shapes is None or any(name not in look.rows for name in view.settings.new_sources):
        return None
    encoded = {name: _encode(view, name, settings) for name in view.settings.new_sources}
    if any(one is None for one in encoded.values()):
        return None
    rows = sum(len(one or ()) for one in encoded.values())
    clients = len(settings.clients)
    # Client updates and the exchanges' models, in float32, and what is published.
    adapters = settings.rank * look.shapes.sides * 4 * (settings.exchanges * (clients + 1) + 1)
    found = StageEstimate(
        label=view.label,
        new_rows=rows * settings.exchanges,
        replay_rows=0,
        steps=0,
        tokens=0,
        counted_tokens=0,
        seconds=0,
        disk_bytes=adapters,
        done=_is_done(view),
        summary=f"{rows:,} rows with {clients} clients, {settings.exchanges} exchanges, {settings.aggregate}",
    )
    return Planned(found, 0, rescue_bytes(view, found.disk_bytes))


LOOKS: dict[str, Callable[[StageView], Planned | None]] = {
    "sft": look_at_training,
    "dpo": look_at_training,
    "rl": look_at_rewards,
    "distill": look_at_distill,
    "external": look_at_external,
    "merge": look_at_merge,
    "federated": look_at_federated,
}


# How a kind reads its new rows, where it is not as conversations and texts.
ENCODERS: dict[str, Callable[..., Encoding[Any]]] = {"dpo": encode_pairs, "rl": encode_prompts}


def rescue_bytes(view: StageView, disk_bytes: int) -> int:
    """Disk for the winner of a rescue, where this stage makes the candidate: as much, but whole models in float32."""
    shapes = view.look.shapes
    is_whole = shapes is not None and disk_bytes >= BYTES["bfloat16"] * shapes.weights
    winner = BYTES["float32"] * shapes.weights if shapes is not None and is_whole else disk_bytes
    return winner * _may_interpolate(view)


def _may_interpolate(view: StageView) -> bool:
    """Whether a rescue may put a point between this stage's result and its start in its place."""
    rungs = view.round.rescue if view.round.rescue is not None else view.look.recipe.rescue
    return view.index == len(view.round.stages) - 1 and any(rung.interpolate for rung in rungs)


def _look_at_plugins(view: StageView, settings: ResolvedTraining, trained: int) -> None:
    """What the stage's plug-ins keep in memory, whether they can work with what is trained, and what they remember."""
    assert isinstance(view.settings, Training)
    for kind, name, options in view.settings.plugins:
        plugin, place = find_plugin(kind, name), f".{kind}.{name}"
        if settings.tune.kind not in plugin.tunes:
            told = f"found tune: {settings.tune.kind}, expected {' or '.join(plugin.tunes)}, which {name} works on."
            view.say("error", told, "Change tune, or leave it out.", at=place)
        if view.kind not in plugin.stages:
            told = f"found {view.kind}, expected {' or '.join(plugin.stages)}, the stage that {name} works in."
            view.say("error", told, "Leave it out.", at=place)
        refused = plugin.refuses(options, settings) if plugin.refuses is not None else None
        if refused is not None:
            view.say("error", f"{refused}.", "Change one of them, or leave it out.", at=place)
        if plugin.standing == "academic":
            view.say("note", "is an academic method, not production-validated.", at=place)
        kept = _kept_in_memory(view, plugin, options, settings, trained)
        if kept is not None:
            view.say("note", kept, at=place)
        if plugin.carries and _may_interpolate(view):
            told = "a rescue by interpolation leaves nothing of what it carries to its next stage."
            view.say("note", told, at=place)
        lost = _stage_that_loses(view, kind, name) if plugin.carries else None
        if lost is not None:
            told = f"begins anew: what an earlier stage left for it is lost at {lost}, which does not name it."
            view.say("warning", told, f"Name {name} in every stage in between.", at=place)
        if getattr(options, "sources", None) == ["history"] and view.round_index == 0:
            view.say("note", "remembers nothing in the first round: there is no history yet.", at=place)


def _kept_in_memory(
    view: StageView, plugin: Plugin, options: Any, settings: ResolvedTraining, trained: int
) -> str | None:
    """What a plug-in keeps, of `history` a source for each new one of the rounds before; None where that is nothing."""
    sources = getattr(options, "sources", [])
    earlier = _history(view.look.recipe, view.round_index) if "history" in sources else []
    remembered = len({*sources, *earlier} - {"history"})
    copies = plugin.copies_of(options, remembered, full=settings.tune.kind == "full")
    more = plugin.more_bytes(options, settings.max_tokens) if plugin.more_bytes is not None else 0
    parts = [f"{copies:g} float32 {'copy' if copies == 1.0 else 'copies'} of the trained weights"] if copies else []
    parts += [f"up to {more / 1e6:,.1f} MB of outputs"] if more else []
    if not parts:
        return None
    return f"keeps {' and '.join(parts)}: {(copies * trained * 4 + more) / 1e6:,.1f} MB of memory."


def _stage_that_loses(view: StageView, kind: Kind, name: str) -> str | None:
    """The last stage before this one that does not name a plug-in which an earlier one named: what that one left beside
    its checkpoint goes to a stage that starts from exactly it."""
    is_named = [
        (one.place, any((kind, name) == (each, known) for each, known, _ in getattr(one.stage.settings, "plugins", ())))
        for one in placed_stages(view.look.recipe)
        if not one.way and (one.round_index, one.index) < (view.round_index, view.index)
    ]
    if not is_named or is_named[-1][1] or not any(named for _, named in is_named):
        return None
    return is_named[-1][0]


def _look_at_teachers(view: StageView, settings: ResolvedDistill) -> None:
    from evertune.train.distill_spec import check_teacher, check_words

    look = view.look
    if look.base is None:
        return
    vocabulary = look.attempt("base", vocabulary_of, look.base)
    if vocabulary is None:
        return
    kept = None if settings.words == "all" else settings.words
    look.attempt(f"{view.place}.words", check_words, kept, max(settings.members.values()), vocabulary)
    learns_words = settings.weight > 0.0
    for j, teacher in enumerate(settings.teachers):
        written, place = teacher.checkpoint, f"{view.place}.teachers[{j}]"
        if teacher.is_named:
            continue
        found = look.attempt(place, describe, look.loaded.resolve(written), cache=digest_cache())
        if found is not None and learns_words:
            look.attempt(place, check_teacher, written, found, look.base)


def _look_at_command(view: StageView, settings: ResolvedExternal) -> None:
    folder = view.look.loaded.folder
    program = shlex.split(settings.command)[0]
    if shutil.which(program) is None and shutil.which(str(folder / program)) is None:
        told = f"found no program {program!r}, neither on the PATH nor in {folder}."
        view.say("error", told, "Install it, or correct the command.", at=".command")
    for name in settings.files or []:
        if not (folder / name).is_file():
            view.say("error", f"{name}: found no file, expected one.", "Paths are relative to the recipe.", at=".files")


def _encode(view: StageView, name: str, settings: ResolvedTraining | ResolvedFederated) -> Sequence[Length] | None:
    """Lengths of a source's rows as a stage reads them; None, with an error, where one cannot be read."""
    look, place = view.look, view.place
    encode = ENCODERS.get(view.kind, encode_rows) if name in view.settings.new_sources else encode_rows
    key = (name, encode.__name__, settings.max_tokens, settings.too_long)
    if key not in look.lengths and look.words is not None:
        found = look.attempt(f"{place} ({name})", _lengths, look, name, encode, settings)
        look.lengths[key] = found
        if found is not None and found.dropped:
            longest = max(one.tokens for one in found.dropped)
            told = (
                f"{len(found.dropped)} of {len(look.rows[name])} rows are longer than max_tokens "
                f"{settings.max_tokens} (up to {longest}) and are left out, the first at {found.dropped[0].place}."
            )
            look.say("warning", f"{place} ({name})", told)
    lengths = look.lengths.get(key)
    return lengths.rows if lengths is not None else None


def _lengths(
    look: Look, name: str, encode: Callable[..., Encoding[Any]], settings: ResolvedTraining | ResolvedFederated
) -> Lengths:
    assert look.base is not None
    rows, most, too_long = look.rows[name], settings.max_tokens, settings.too_long
    key = key_of_rows(look.base, rows, encode.__name__, most, too_long)
    found = known_lengths(key)
    if found is None:
        found = Lengths.of(encode(rows, look.read_codec(), max_tokens=most, too_long=too_long))
        keep_lengths(key, name, found)
    return found


def _replay_pool(
    view: StageView, settings: ResolvedTraining, encoded: Mapping[str, Sequence[Length]]
) -> dict[str, Sequence[Length]]:
    """What a stage replays, less what is also new; of `history`, the new rows of all rounds before, as if promoted."""
    look, learnt = view.look, view.settings.new_sources
    if not settings.replay.share:
        return {}
    pool = {name: encoded[name] for name in settings.replay.sources if name != "history"}
    rows = {name: look.rows[name] for name in pool}
    if "history" in settings.replay.sources:
        for name in _history(look.recipe, view.round_index):
            found = _encode(view, name, settings) if name in look.rows else None
            if found is not None and name not in pool:
                rows[name] = choose(look.rows[name], Budget(**look.recipe.history.model_dump()), look.recipe.seed)
                remembered = {row.id for row in rows[name]}
                pool[name] = [row for row in found if row.id in remembered]
    both = [name for name in settings.replay.sources if name in learnt]
    if both:
        told = f"'{both[0]}' is both new data and replay."
        view.say("warning", told, "Replay other rows: these are seen as new ones already.", at=".replay.from")
    if settings.replay.dedup and pool:
        new = [row for name in learnt for row in look.rows[name]]
        near = settings.replay.dedup == "near"
        old = [row for each in rows.values() for row in each]
        kept = drop_duplicates(old, new, near=near, key=look.compared).kept
        ids = {(row.source, row.id) for row in kept}
        pool = {name: [row for row in each if (row.source, row.id) in ids] for name, each in pool.items()}
    return {name: each for name, each in pool.items() if each}


def _look_at_amounts(view: StageView, settings: ResolvedTraining, seen: Amounts, new_rows: int) -> None:
    if settings.replay.share and not seen.replay_rows:
        told = f"there is nothing to replay here, so the share is 0 and not {settings.replay.share:g}."
        if settings.replay.sources == ["history"]:
            view.say("note", f"no round comes before this one: {told}")
        else:
            view.say("warning", told, "Name a source of other rows in 'replay.from'.")
    _look_at_adapt(view, settings, seen)
    if settings.anchor.kl and settings.anchor.on == "replay" and not seen.replay_rows:
        told = "the anchor is on replayed rows, and there are none here: nothing is anchored."
        view.say("note", told, "Set 'anchor.on: new', or replay something.")
    for told in seen.odd:
        view.say("warning", told, "Change the weights, 'mix' or the number of steps.")
    if seen.new_rows < new_rows:
        view.say("note", f"{seen.steps} steps show {seen.new_rows} of {new_rows} new rows; the others are not seen.")


def _look_at_adapt(view: StageView, settings: ResolvedTraining, seen: Amounts) -> None:
    adapt = settings.replay.adapt
    if adapt is None or view.kind not in ADAPTING or not seen.replay_rows:
        return
    roles = view.round.roles
    guards = [
        one
        for one in view.look.probes
        if roles.get(one.name, one.role) == "guard" and not one.held_out and one.kind != "lm_eval"
    ]
    if not guards:
        told = "the share follows guards, and there are none but of lm-eval or held-out ones."
        view.say("error", told, "Add a guard, or leave 'adapt' out.", at=".replay.adapt")
        return
    times = -(-seen.steps // adapt.every)
    told = f"{', '.join(one.name for one in guards)} asked {times} times while it trains: time that is not estimated."
    view.say("note", told, at=".replay.adapt")
    if adapt.most < settings.replay.share:
        told = f"the share begins at {settings.replay.share:g}, above 'most': it will not rise."
        view.say("warning", told, "Raise 'most', or leave 'adapt' out.", at=".replay.adapt")


def _is_done(view: StageView) -> bool:
    """The workspace has this stage, made by this recipe from the rows and files that are there now."""
    look = view.look
    recorded = [event.body for event in look.past if event.body["label"] == view.label]
    data = {name: _data_digest(look, name) for name in view.settings.new_sources}
    return any(
        {one["source"]: one["sha256"] for one in body["data"]} == data
        and (view.kind != "external" or _command_facts(view) == body["settings"])
        for body in recorded
    )


def _command_facts(view: StageView) -> dict[str, Any]:
    """As a run records them: what decides what a command does."""
    folder, files = view.look.loaded.folder, view.resolved.files or []
    digests = {name: digest_file(folder / name) for name in files if (folder / name).is_file()}
    return {"command": view.resolved.command, "files": digests, "seed": view.look.recipe.seed}


def _data_digest(look: Look, name: str) -> str:
    """As a run records it: of the bytes and of how they are read."""
    source = look.recipe.data[name]
    files = look.attempt(f"data.{name}", digest_rows, look.loaded.resolve(source.path))
    return digest_json({"files": files, "format": source.format, "limit": source.limit})


def _history(recipe: Recipe, i: int) -> list[str]:
    """Names of the sources of new rows of the rounds before, as far as they can be replayed."""
    names = dict.fromkeys(name for one in recipe.rounds[:i] for name in kept_sources(one))
    return [name for name in names if recipe.data[name].format in REPLAYABLE]
