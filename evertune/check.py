"""Everything that can be known before training, in about a second: no torch, no weights read.

Data and probes are read in full, training rows are compared with every probe item, every row is rendered and counted
through the chat template, and time and disk are estimated.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from evertune.data.encode import EncodedRow, encode_rows
from evertune.data.leak import find_leaks
from evertune.data.replay import drop_duplicates
from evertune.data.rows import Row, read_rows
from evertune.errors import EvertuneError
from evertune.ledger import Ledger
from evertune.measure.stats import minimum_items
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import Codec, load_codec
from evertune.probe.suite import AnyProbe, load_probe
from evertune.recipe.load import LoadedRecipe
from evertune.recipe.presets import ResolvedSft, resolve_stage
from evertune.recipe.schema import Recipe, Sft

# A core's bfloat16 matrix rate while training, in FLOP per second: a rough figure, said to be one.
CORE_FLOPS = 9e10
LEAKS_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing to know: an `error` stops a run, a `warning` should not be missed, a `note` explains."""

    severity: Literal["error", "warning", "note"]
    place: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage would do: rows, optimizer steps, tokens, and a rough time; `done` when the ledger has it."""

    label: str
    new_rows: int
    replay_rows: int
    steps: int
    tokens: int
    seconds: int
    disk_bytes: int
    done: bool


@dataclass(frozen=True)
class CheckReport:
    """What `evertune check` found."""

    recipe: str
    findings: tuple[Finding, ...]
    stages: tuple[StageEstimate, ...]
    samples: tuple["Sample", ...] = ()

    @property
    def has_errors(self) -> bool:
        return any(one.severity == "error" for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Shape: {"recipe", "ok", "findings": [{"severity", "place", "message", "remedy"}], "stages": [{"label",
        "new_rows", "replay_rows", "steps", "tokens", "seconds", "disk_bytes", "done"}], "samples": [{"source", "id",
        "segments": [[text, counted], ...]}]}."""
        return {"ok": not self.has_errors, **asdict(self)}


@dataclass(frozen=True)
class Sample:
    """A row as the model reads it, in pieces that carry loss or do not."""

    source: str
    id: str
    segments: tuple[tuple[str, bool], ...]


@dataclass
class _Look:
    """What has been read so far, and the findings."""

    loaded: LoadedRecipe
    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    probes: list[AnyProbe] = field(default_factory=list)
    base: Checkpoint | None = None
    codec: Codec | None = None

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def add(self, severity: Literal["error", "warning", "note"], place: str, message: str, remedy: str = "") -> None:
        self.findings.append(Finding(severity, place, message, remedy))

    def try_(self, place: str, call: Any, *arguments: Any, **named: Any) -> Any:
        """The call's result; None and a finding when it raises one of our errors."""
        try:
            return call(*arguments, **named)
        except EvertuneError as error:
            self.add("error", place, error.message, error.remedy)
            return None


def check_recipe(loaded: LoadedRecipe, *, sample: int = 0) -> CheckReport:
    """Look at everything a recipe names; problems become findings, not exceptions.

    Args:
        sample: rows per new source to render with the counted tokens marked.
    """
    look = _Look(loaded)
    _read_everything(look)
    _check_base(look)
    _check_leaks(look)
    _check_gate(look)
    stages = [
        estimate
        for i, one in enumerate(look.recipe.rounds)
        for k, stage in enumerate(one.stages)
        if stage.sft is not None and (estimate := _check_stage(look, i, k, stage.sft)) is not None
    ]
    _check_disk(look, stages)
    samples = _samples(look, sample) if sample and look.codec is not None else ()
    return CheckReport(str(loaded.path), tuple(look.findings), tuple(stages), tuple(samples))


def print_report(report: CheckReport) -> None:
    """The report for a person."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    for one in report.findings:
        console.print(
            f"[{colours[one.severity]}]{one.severity}[/]  {escape(one.place)}: {escape(one.message)}"
            f"{' ' + escape(one.remedy) if one.remedy else ''}"
        )
    for stage in report.stages:
        state = "done" if stage.done else f"about {_duration(stage.seconds)}"
        console.print(
            f"stage  {escape(stage.label)}: {stage.new_rows} new + {stage.replay_rows} replayed rows, {stage.steps} "
            f"steps, {stage.tokens:,} tokens, {state}"
        )
    for sample in report.samples:
        text = "".join(
            f"[green]{escape(piece)}[/]" if counted else f"[dim]{escape(piece)}[/]"
            for piece, counted in sample.segments
        )
        console.print(f"\n[bold]{escape(sample.source)} {escape(sample.id)}[/] (counted tokens between the marks)")
        plain = "".join(f"«{escape(piece)}»" if counted else escape(piece) for piece, counted in sample.segments)
        console.print(text if console.is_terminal else plain)
    errors = sum(one.severity == "error" for one in report.findings)
    console.print(f"{report.recipe}: {'fine' if not errors else f'{errors} error' + 's' * (errors > 1)}")


def _read_everything(look: _Look) -> None:
    for name, source in look.recipe.data.items():
        path = look.loaded.resolve(source.path)
        rows = look.try_(f"data.{name}", read_rows, path, format=source.format, source=name, limit=source.limit)
        if rows is not None:
            look.rows[name] = rows
            repeated = drop_duplicates(rows, [])[1]
            if repeated:
                first = f"{repeated[0].place} is one"
                look.add(
                    "note", f"data.{name}", f"{len(repeated)} of {len(rows)} rows repeat an earlier one ({first})."
                )
    for name, probe in look.recipe.probes.items():
        settings = probe.model_dump(exclude_none=True)
        loaded = look.try_(f"probes.{name}", load_probe, name, settings=settings, root=look.loaded.folder)
        if loaded is not None:
            look.probes.append(loaded)


def _check_base(look: _Look) -> None:
    path = look.try_("base", resolve_base, look.recipe.base, folder=look.loaded.folder)
    look.base = look.try_("base", describe, path) if path is not None else None
    if look.base is None:
        return
    look.codec = look.try_("base", load_codec, look.base.base.path)
    if look.codec is None:
        return
    chats = any(source.format != "text" for source in look.recipe.data.values())
    if look.codec.template is None and chats:
        look.add(
            "error",
            "base",
            f"{look.base.base.path} has no chat template, and the data has conversations.",
            "Add a chat_template.jinja that the model was trained with.",
        )
        look.codec = None
    elif look.codec.template is not None and not look.try_("base", look.codec.trains_stop):
        look.add(
            "error",
            "base",
            "the loss mask would never train a stop token: answers would not learn to end.",
            "Let the chat template end an assistant turn with a stop token of generation_config.json.",
        )


def _check_leaks(look: _Look) -> None:
    used = {
        name for one in look.recipe.rounds for stage in one.stages if stage.sft for name in _sources(look, stage.sft)
    }
    texts = [text for probe in look.probes for text in probe.texts()]
    for name in sorted(used & set(look.rows)):
        leaks = find_leaks(look.rows[name], texts)
        for leak in leaks[:LEAKS_SHOWN]:
            look.add(
                "error",
                f"data.{name}",
                f"{leak.file}:{leak.line} holds item {leak.item!r} of probe '{leak.probe}' "
                f"({leak.how}): a probe that was trained on measures nothing.",
                "Remove the row or the item.",
            )
        if len(leaks) > LEAKS_SHOWN:
            look.add("error", f"data.{name}", f"{len(leaks) - LEAKS_SHOWN} more rows hold probe items.")


def _check_gate(look: _Look) -> None:
    gate = look.recipe.gate
    for probe in look.probes:
        items = len(probe.prompts())
        if probe.kind == "lm_eval" or probe.role == "watch":
            continue
        if items < gate.min_items:
            look.add(
                "warning",
                f"probes.{probe.name}",
                f"{items} items; the gate asks for {gate.min_items} (gate.min_items), "
                "so it can never promote on this probe.",
                "Add items, or lower gate.min_items and widen the margins.",
            )
            continue
        margin = probe.margin or (gate.margin.safety if probe.safety else gate.margin.probe)
        needed = minimum_items(margin, gate.alpha)
        if probe.kind != "bits_per_byte" and items < needed:
            look.add(
                "warning",
                f"probes.{probe.name}",
                f"{items} items cannot rule out a drop of {margin:g} even when none flips: that takes {needed}.",
                "Add items or widen the margin.",
            )
    for i, one in enumerate(look.recipe.rounds):
        roles = {**{name: probe.role for name, probe in look.recipe.probes.items()}, **one.roles}
        if "target" not in roles.values():
            look.add(
                "warning",
                f"rounds[{i}]",
                "no probe is a target: only that nothing was lost will be shown.",
                "Give a probe the role 'target', or set it in 'roles'.",
            )


def _check_stage(look: _Look, i: int, k: int, stage: Sft) -> StageEstimate | None:
    place = f"rounds[{i}].stages[{k}].sft"
    settings = resolve_stage(look.recipe, stage)
    if any(name not in look.rows for name in _sources(look, stage)) or look.codec is None or look.base is None:
        return None
    both = sorted(set(stage.data) & set(settings.replay.sources) if settings.replay.share else ())
    if both:
        look.add("warning", place, f"'{both[0]}' is both new data and replay.", "Replay should hold other rows.")
    encoded: dict[str, Sequence[EncodedRow]] = {}
    for name in _sources(look, stage):
        found = look.try_(
            f"{place} ({name})",
            encode_rows,
            look.rows[name],
            look.codec,
            max_tokens=settings.max_tokens,
            too_long=settings.too_long,
        )
        if found is None:
            return None
        encoded[name] = found.rows
        if found.dropped:
            longest = max(one.tokens for one in found.dropped)
            look.add(
                "warning",
                f"{place} ({name})",
                f"{len(found.dropped)} rows are longer than max_tokens "
                f"{settings.max_tokens} (up to {longest}) and are left out.",
            )
    return _estimate(look, f"{look.recipe.rounds[i].name}/{k + 1}-sft", stage, settings, encoded, place, i)


def _estimate(
    look: _Look,
    label: str,
    stage: Sft,
    settings: ResolvedSft,
    encoded: dict[str, Sequence[EncodedRow]],
    place: str,
    i: int,
) -> StageEstimate:
    new = [row for name in stage.data for row in encoded[name]]
    pool = [row for name in settings.replay.sources if name != "history" for row in encoded[name]]
    history = "history" in settings.replay.sources and i > 0
    share = settings.replay.share if pool or history else 0.0
    if settings.replay.share and not share:
        look.add(
            "note", place, "no round has been promoted yet, so there is no history to replay: the share is 0 here."
        )
    per_epoch = len(new) + round(len(new) * share / (1 - share))
    steps = settings.steps or max(1, math.ceil(per_epoch * (settings.epochs or 1) / settings.batch_rows))
    rows = steps * settings.batch_rows
    lengths = [len(row.ids) for row in new] + [len(row.ids) for row in (pool or new)][: per_epoch - len(new)]
    tokens = round(rows * sum(lengths) / len(lengths))
    weights = _weight_bytes(look.base) if look.base else 0
    lora = settings.tune.lora is not None
    # Forward and input gradients, and weight gradients when the weights are trained; an anchor adds a forward.
    flops = (4 if lora else 6) + (2 * share if settings.anchor.kl else 0)
    seconds = round(flops * weights / 2 * tokens / (CORE_FLOPS * (os.cpu_count() or 1)))
    disk = weights // 20 if lora else weights * 8
    return StageEstimate(
        label, len(new), rows - min(rows, len(new)), steps, tokens, seconds, disk, _is_done(look, label)
    )


def _is_done(look: _Look, label: str) -> bool:
    """The workspace's last run was of this very recipe, and it made this checkpoint."""
    place = look.loaded.resolve(look.recipe.workspace) / "ledger.sqlite"
    if not place.is_file():
        return False
    ledger = Ledger.open(place, create=False)
    runs = ledger.events("run")
    same = bool(runs) and runs[-1].body["recipe_digest"] == look.loaded.digest
    return same and any(one.body["label"] == label for one in ledger.events("checkpoint"))


def _check_disk(look: _Look, stages: Sequence[StageEstimate]) -> None:
    needed = sum(one.disk_bytes for one in stages if not one.done)
    folder = look.loaded.resolve(look.recipe.workspace)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        look.add(
            "error",
            "workspace",
            f"about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free.",
            "Free some disk, or put the workspace elsewhere.",
        )


def _samples(look: _Look, count: int) -> list[Sample]:
    if look.codec is None:
        return []
    names = {name: None for one in look.recipe.rounds for stage in one.stages if stage.sft for name in stage.sft.data}
    found = []
    for name in names:
        for row in look.rows.get(name, [])[:count]:
            encoded = look.try_(f"data.{name}", encode_rows, [row], look.codec, max_tokens=1 << 30, too_long="drop")
            if encoded is not None:
                found.append(_sample(encoded.rows[0], look.codec))
    return found


def _sample(row: EncodedRow, codec: Codec) -> Sample:
    segments: list[tuple[str, bool]] = []
    start = 0
    counted = row.counted.tolist()
    for i in range(1, len(counted) + 1):
        if i == len(counted) or counted[i] != counted[start]:
            segments.append((codec.decode(row.ids[start:i].tolist(), special=True), counted[start]))
            start = i
    return Sample(row.source, row.id, tuple(segments))


def _sources(look: _Look, stage: Sft) -> list[str]:
    settings = resolve_stage(look.recipe, stage)
    replay = [name for name in settings.replay.sources if name != "history"] if settings.replay.share else []
    return list(dict.fromkeys([*stage.data, *replay]))


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for one in checkpoint.stack for path in Path(one.path).glob("*.safetensors"))


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"
