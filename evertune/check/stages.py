"""What each stage would do, and whether there is disk for all of them."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evertune.check.estimate import Amounts, amounts, estimate, nearest_folder, resume_bytes
from evertune.check.findings import Disk, StageEstimate
from evertune.check.look import Look, sources_of
from evertune.data.encode import EncodedRow, encode_rows
from evertune.data.replay import drop_duplicates
from evertune.data.rows import digest_rows
from evertune.hashing import digest_json
from evertune.recipe.presets import ResolvedSft, resolve_stage
from evertune.recipe.schema import Recipe, Sft


@dataclass(frozen=True)
class Planned:
    """A stage's estimate, and the disk it takes for resume points while it runs, and for the winner of a rescue."""

    estimate: StageEstimate
    resume_bytes: int
    rescue_bytes: int


def look_at_stages(look: Look) -> list[Planned]:
    """Estimates of the stages whose rows and base could be read; what is odd about them becomes findings."""
    return [
        found
        for i, one in enumerate(look.recipe.rounds)
        for k, stage in enumerate(one.stages)
        if stage.sft is not None and (found := _look_at_stage(look, i, k, stage.sft)) is not None
    ]


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


def _look_at_stage(look: Look, i: int, k: int, stage: Sft) -> Planned | None:
    place = f"rounds[{i}].stages[{k}].sft"
    settings = resolve_stage(look.recipe, stage)
    shapes = look.shapes
    if shapes is None or any(name not in look.rows for name in sources_of(look.recipe, stage)):
        return None
    encoded = {name: _encode(look, place, name, settings) for name in sources_of(look.recipe, stage)}
    new = {name: rows for name in stage.data if (rows := encoded[name]) is not None}
    if any(rows is None for rows in encoded.values()):
        return None
    replay = _replay_pool(look, i, place, stage, settings, {name: rows for name, rows in encoded.items() if rows})
    seen = amounts(new, replay, stage.data if isinstance(stage.data, dict) else None, settings)
    _look_at_amounts(look, place, settings, seen, sum(map(len, new.values())))
    one = look.recipe.rounds[i]
    label = f"{one.name}/{k + 1}-sft"
    found = estimate(label, seen, settings, shapes, look.recipe.numerics, done=_is_done(look, label, stage))
    rungs = one.rescue if one.rescue is not None else look.recipe.rescue
    may_rescue = k == len(one.stages) - 1 and any(rung.interpolate for rung in rungs)
    return Planned(found, resume_bytes(settings, shapes), found.disk_bytes * may_rescue)


def _encode(look: Look, place: str, name: str, settings: ResolvedSft) -> Sequence[EncodedRow] | None:
    """Rows of a source as a stage reads them; None, with an error, where one cannot be read."""
    key = (name, settings.max_tokens, settings.too_long)
    if key not in look.encodings and look.codec is not None:
        found = look.attempt(
            f"{place} ({name})", encode_rows, look.rows[name], look.codec,
            max_tokens=settings.max_tokens, too_long=settings.too_long,
        )  # fmt: skip
        look.encodings[key] = found
        if found is not None and found.dropped:
            longest = max(one.tokens for one in found.dropped)
            told = (
                f"{len(found.dropped)} of {len(look.rows[name])} rows are longer than max_tokens "
                f"{settings.max_tokens} (up to {longest}) and are left out, the first at {found.dropped[0].place}."
            )
            look.say("warning", f"{place} ({name})", told)
    encoding = look.encodings.get(key)
    return encoding.rows if encoding is not None else None


def _replay_pool(
    look: Look, i: int, place: str, stage: Sft, settings: ResolvedSft, encoded: Mapping[str, Sequence[EncodedRow]]
) -> dict[str, Sequence[EncodedRow]]:
    """What a stage replays, less what is also new; of `history`, the new rows of all rounds before, as if promoted."""
    if not settings.replay.share:
        return {}
    pool = {name: encoded[name] for name in settings.replay.sources if name != "history"}
    rows = {name: look.rows[name] for name in pool}
    if "history" in settings.replay.sources:
        for name in _history(look.recipe, i):
            found = _encode(look, place, name, settings) if name in look.rows else None
            if found is not None and name not in pool:
                pool[name], rows[name] = found, look.rows[name]
    both = [name for name in settings.replay.sources if name in stage.data]
    if both:
        told = f"'{both[0]}' is both new data and replay."
        look.say("warning", f"{place}.replay.from", told, "Replay other rows: these are seen as new ones already.")
    if settings.replay.dedup and pool:
        new = [row for name in stage.data for row in look.rows[name]]
        kept = drop_duplicates([row for each in rows.values() for row in each], new).kept
        ids = {(row.source, row.id) for row in kept}
        pool = {name: [row for row in each if (row.source, row.id) in ids] for name, each in pool.items()}
    return {name: each for name, each in pool.items() if each}


def _look_at_amounts(look: Look, place: str, settings: ResolvedSft, seen: Amounts, new_rows: int) -> None:
    if settings.replay.share and not seen.replay_rows:
        told = f"there is nothing to replay here, so the share is 0 and not {settings.replay.share:g}."
        if settings.replay.sources == ["history"]:
            look.say("note", place, f"no round comes before this one: {told}")
        else:
            look.say("warning", place, told, "Name a source of other rows in 'replay.from'.")
    if settings.anchor.kl and settings.anchor.on == "replay" and not seen.replay_rows:
        told = "the anchor is on replayed rows, and there are none here: nothing is anchored."
        look.say("note", place, told, "Set 'anchor.on: new', or replay something.")
    if seen.new_rows < new_rows:
        told = f"{seen.steps} steps show {seen.new_rows} of {new_rows} new rows; the others are not seen."
        look.say("note", place, told)


def _is_done(look: Look, label: str, stage: Sft) -> bool:
    """The workspace has this stage, made by this recipe from the rows that are there now."""
    recorded = [
        {one["source"]: one["sha256"] for one in event.body["data"]}
        for event in look.past
        if event.body["label"] == label
    ]
    return bool(recorded) and {name: _data_digest(look, name) for name in stage.data} in recorded


def _data_digest(look: Look, name: str) -> str:
    """As a run records it: of the bytes and of how they are read."""
    source = look.recipe.data[name]
    files = look.attempt(f"data.{name}", digest_rows, look.loaded.resolve(source.path))
    return digest_json({"files": files, "format": source.format, "limit": source.limit})


def _history(recipe: Recipe, i: int) -> list[str]:
    """Names of the sources of new rows of the rounds before."""
    stages = [stage.sft for one in recipe.rounds[:i] for stage in one.stages if stage.sft is not None]
    return list(dict.fromkeys(name for stage in stages for name in stage.data))
