"""Reads all that a recipe names, and says what is wrong with it. A problem is a finding, not an exception."""

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from evertune.check.estimate import Shapes, nearest_folder, shapes_of
from evertune.check.findings import Finding, Severity
from evertune.check.lengths import Lengths, keep_words, key_of_tokenizer, known_words
from evertune.data.compared import compared_text
from evertune.data.history import Budget, choose
from evertune.data.leak import Leak, LeakFinder, rows_by_probe
from evertune.data.quality import broken_rules, read_rules, rows_by_rule
from evertune.data.replay import drop_duplicates
from evertune.data.rows import BadRows, Row, read_rows
from evertune.errors import EvertuneError
from evertune.model.bundled import home, resolve_base
from evertune.model.checkpoint import Checkpoint, describe
from evertune.probe.suite import AnyProbe, load_probe
from evertune.recipe.fields import REPLAYABLE, StageSettings
from evertune.recipe.load import LoadedRecipe
from evertune.recipe.presets import resolve_stage
from evertune.recipe.schema import NAMED_REFERENCES, Recipe, kept_sources, placed_stages

if TYPE_CHECKING:
    from evertune.ledger import Event
    from evertune.model.codec import Codec

LEAKS_SHOWN = 5

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Look:
    """What has been read so far, and the findings."""

    loaded: LoadedRecipe
    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    probes: list[AnyProbe] = field(default_factory=list)
    base: Checkpoint | None = None
    words: int | None = None
    """Tokens that the base's tokenizer knows; None where it cannot be used."""
    lengths: dict[tuple[str, str, int, str], Lengths | None] = field(default_factory=dict)
    texts: dict[tuple[str, str], bytes] = field(default_factory=dict)

    own_codec: "Codec | None" = None

    def read_codec(self) -> "Codec":
        """The base's tokenizer with its template, read when it is asked for.

        Raises:
            CheckpointError: it cannot be read, which `words` says.
        """
        if self.own_codec is None:
            assert self.base is not None
            self.own_codec = _load_codec(self.base.base.path)
        return self.own_codec

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def say(self, severity: Severity, place: str, message: str, remedy: str = "") -> None:
        """Keep a finding."""
        self.findings.append(Finding(severity, place, message, remedy))

    def attempt(self, place: str, call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
        """The call's result; None and an error when it raises one of ours, or the system refuses."""
        try:
            return call(*arguments, **named)
        except EvertuneError as error:
            self.say("error", place, error.message, error.remedy)
        except OSError as error:
            self.say("error", place, f"{error.filename or 'the system'}: {error.strerror or error}.")
        return None

    def compared(self, row: Row) -> bytes:
        """The digest of what a row is compared by; sources are compared with each other in several stages."""
        key = (row.source, row.id)
        if key not in self.texts:
            self.texts[key] = hashlib.blake2b(
                compared_text(row).encode("utf-8", "surrogatepass"), digest_size=16
            ).digest()
        return self.texts[key]

    @cached_property
    def shapes(self) -> Shapes | None:
        if self.base is None or self.words is None:
            return None
        return self.attempt("base", shapes_of, self.base.base, self.words)

    @cached_property
    def past(self) -> "Sequence[Event]":
        """Checkpoints in the workspace that this very recipe made."""
        path = self.loaded.resolve(self.recipe.workspace) / "ledger.sqlite"
        events = self.attempt("workspace", _events, path) if path.is_file() else None
        runs = [one for one in events or () if one.kind == "run"]
        if not any(one.body["recipe_digest"] == self.loaded.digest for one in runs):
            return ()
        return [one for one in events or () if one.kind == "checkpoint"]


def digest_cache() -> Path | None:
    """Digests of weights that were read before, beside the fetched models: the second check reads no weight.

    None where nothing can be written there: then every check reads the weights.
    """
    place = home() / "digests.json"
    return place if os.access(nearest_folder(place), os.W_OK) else None


def read_data(look: Look) -> None:
    """Every row of every source, and how many of them repeat."""
    for name, source in look.recipe.data.items():
        place = f"data.{name}"
        path = look.loaded.resolve(source.path)
        bad = BadRows()
        on_bad = bad if source.bad_rows == "quarantine" else None
        rows = look.attempt(place, read_rows, path, format=source.format, source=name, limit=source.limit, bad=on_bad)
        if bad.found:
            first = f"{bad.found[0]['file']}:{bad.found[0]['line']}: {bad.found[0]['problem']}"
            look.say("warning", place, f"{len(bad.found)} rows cannot be read and are left out, the first at {first}")
        if rows is not None and source.keep:
            rows = _within_rules(look, name, rows, source.keep)
        if rows is None:
            continue
        look.rows[name] = rows
        if source.format in REPLAYABLE:
            repeated = drop_duplicates(rows, [], key=look.compared).removed
            if repeated:
                told = f"{len(repeated)} of {len(rows)} rows repeat an earlier one, the first at {repeated[0].place}."
                look.say("note", place, told)


def look_at_numerics(look: Look) -> None:
    """What the recipe's numerics need of this machine."""
    numerics = look.recipe.numerics
    if numerics.kernels == "liger" and importlib.util.find_spec("liger_kernel") is None:
        look.say(
            "error",
            "numerics.kernels",
            "found 'liger', and liger-kernel is not installed.",
            remedy="Run `pip install 'evertune[gpu]'`, or use 'kernels: torch'.",
        )
    # What torch.compile takes, and no other.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if numerics.compile and shutil.which(compiler) is None:
        look.say(
            "error",
            "numerics.compile",
            f"found no C++ compiler: '{compiler}' is not there, and torch.compile needs one.",
            remedy="Install it, name another in CXX, or leave 'compile' out.",
        )


def look_at_history(look: Look) -> None:
    """Sources of which a promoted round would not keep every row."""
    budget = Budget(**look.recipe.history.model_dump())
    names = dict.fromkeys(name for one in look.recipe.rounds for name in kept_sources(one))
    for name in names:
        rows = look.rows.get(name, [])
        if look.recipe.data[name].format in REPLAYABLE and rows:
            kept = look.attempt("history.by", choose, rows, budget, look.recipe.seed)
            if kept is not None and len(kept) < len(rows):
                told = f"a promoted round keeps {len(kept)} of {len(rows)} rows of '{name}' ({budget.policy})."
                look.say("note", "history", told)


def _within_rules(look: Look, name: str, rows: list[Row], keep: Sequence[str]) -> list[Row] | None:
    """Rows that break no rule of the source; None where nothing is left or a rule is none."""
    place = f"data.{name}.keep"
    rules = look.attempt(place, read_rules, keep)
    if rules is None:
        return None
    broken = broken_rules(rows, rules, name)
    if not broken:
        return rows
    told = ", ".join(f"{count} '{rule}'" for rule, count in rows_by_rule(broken.values()).items())
    first = rows[next(iter(broken))].place
    if len(broken) == len(rows):
        look.say("error", place, f"all {len(rows)} rows break a rule ({told}): nothing is left.", "Change the rules.")
        return None
    look.say("note", place, f"{len(broken)} of {len(rows)} rows break a rule and are left out ({told}), e.g. {first}.")
    return [row for i, row in enumerate(rows) if i not in broken]


def read_probes(look: Look) -> None:
    """Every item of every probe, with its verifier."""
    for name, probe in look.recipe.probes.items():
        settings = probe.model_dump(exclude_none=True)
        loaded = look.attempt(f"probes.{name}", load_probe, name, settings=settings, root=look.loaded.folder)
        if loaded is not None:
            look.probes.append(loaded)


def read_models(look: Look) -> None:
    """The base with its tokenizer and template, and the checkpoints that rounds and anchors name by path."""
    path = look.attempt("base", resolve_base, look.recipe.base, folder=look.loaded.folder)
    look.base = look.attempt("base", describe, path, cache=digest_cache()) if path is not None else None
    if look.base is not None:
        _look_at_tokenizer(look, look.base)
    for place, written in _named_checkpoints(look):
        found = look.attempt(place, describe, look.loaded.resolve(written), cache=digest_cache())
        codec = look.attempt(place, _load_codec, found.base.path) if found is not None else None
        own = look.attempt("base", look.read_codec) if codec is not None and look.words is not None else None
        if codec is not None and own is not None and codec.digest != own.digest:
            told = f"{written} has another tokenizer or chat template than the base."
            look.say("error", place, told, "Name a checkpoint that stands on the same base.")


def _load_codec(folder: Path) -> "Codec":
    from evertune.model.codec import load_codec  # with its library and that of templates

    return load_codec(folder)


def _look_at_tokenizer(look: Look, base: Checkpoint) -> None:
    """Whether rows can be read; where a check before this one has found that they can, nothing is read again."""
    key = key_of_tokenizer(base)
    if os.access(base.base.path / "tokenizer.json", os.R_OK):
        look.words = known_words(key)
    if look.words is not None:
        return
    codec = look.attempt("base", _load_codec, base.base.path)
    if codec is None:
        return
    look.own_codec = codec
    look.words = codec.tokenizer.get_vocab_size(with_added_tokens=True)
    found = len(look.findings)
    _look_at_template(look, codec)
    if look.words is not None and codec.template is not None and len(look.findings) == found:
        keep_words(key, look.words)


def _look_at_template(look: Look, codec: "Codec") -> None:
    if codec.template is None:
        asked = [f"probes.{one.name}" for one in look.probes if one.kind in ("choice", "generate", "episode")]
        chats = [f"data.{name}" for name, source in look.recipe.data.items() if source.format != "text"]
        if asked or chats:
            told = f"{codec.folder} has no chat template, and {', '.join([*chats, *asked])} need one."
            look.say("error", "base", told, "Add the chat_template.jinja that the model was trained with.")
            look.words = None
        return
    trains_stop = look.attempt("base", codec.trains_stop)
    if trains_stop is None:
        look.words = None
    elif not trains_stop:
        told = "the loss mask would never train a stop token: answers would not learn to end."
        remedy = "Let the chat template end an assistant's turn with a stop token of generation_config.json."
        look.say("error", "base", told, remedy)


def _named_checkpoints(look: Look) -> Iterator[tuple[str, str]]:
    for i, one in enumerate(look.recipe.rounds):
        if one.start not in ("champion", "base"):
            yield f"rounds[{i}].start", one.start
        for j, way in enumerate(one.ways):
            if way.retrain is not None and way.retrain.start not in ("champion", "base"):
                yield f"rounds[{i}].consolidate.best_of[{j}].retrain.start", way.retrain.start
    for placed in placed_stages(look.recipe):
        for name, written in resolve_stage(look.recipe, placed.stage.settings).references.items():
            if written not in NAMED_REFERENCES:
                yield f"{placed.place}.{name}", written


def look_at_leaks(look: Look) -> None:
    """Rows that are trained on or replayed and hold an item of a probe: errors, or left out from here on."""
    stages = [one.stage.settings for one in placed_stages(look.recipe)]
    texts = [look.attempt(f"probes.{one.name}", one.texts) or [] for one in look.probes]
    finder = LeakFinder(text for each in texts for text in each)
    for name in sorted({name for stage in stages for name in sources_of(look.recipe, stage)} & set(look.rows)):
        found = finder.find(look.rows[name])
        leaks = [one for one in found if one.is_leak]
        if leaks and look.recipe.leaks == "remove":
            _leave_out(look, name, leaks)
        else:
            for leak in leaks[:LEAKS_SHOWN]:
                told = (
                    f"{leak.file}:{leak.line} holds item {leak.item!r} of probe '{leak.probe}' ({leak.how}): a probe "
                    "that was trained on measures nothing."
                )
                look.say("error", f"data.{name}", told, "Remove the row or the item, or set 'leaks: remove'.")
            if len(leaks) > LEAKS_SHOWN:
                look.say("error", f"data.{name}", f"{len(leaks) - LEAKS_SHOWN} more rows hold items of probes.")
        _tell_overlap(look, name, [one for one in found if not one.is_leak])


def _leave_out(look: Look, name: str, leaks: Sequence[Leak]) -> None:
    ids = {one.row_id for one in leaks}
    probes = ", ".join(f"{count} of '{probe}'" for probe, count in rows_by_probe(leaks).items())
    look.rows[name] = [row for row in look.rows[name] if row.id not in ids]
    told = f"{len(ids)} rows hold items of probes ({probes}) and are left out"
    if look.rows[name]:
        look.say("warning", f"data.{name}", f"{told}, the first at {leaks[0].file}:{leaks[0].line} ({leaks[0].how}).")
    else:
        look.say("error", f"data.{name}", f"{told}: nothing is left.", "Train on other rows, or probe with others.")


def _tell_overlap(look: Look, name: str, found: Sequence[Leak]) -> None:
    if found:
        rows, items = len({one.row_id for one in found}), len({(one.probe, one.item) for one in found})
        one = max(found, key=lambda each: each.score)
        told = (
            f"{rows} rows share half or more of the words of {items} probe items, the most at {one.file}:{one.line} "
            f"with item {one.item!r} of probe '{one.probe}' ({one.score:.0%}): the probe measures less than it seems."
        )
        look.say("note", f"data.{name}", told)


def _events(path: Path) -> "list[Event]":
    from evertune.ledger import Ledger

    return Ledger.open(path, create=False).events()


def sources_of(recipe: Recipe, stage: StageSettings) -> list[str]:
    """Names of all sources that a stage reads, new ones first."""
    replayed = [*resolve_stage(recipe, stage).replay_sources, *stage.remembered_sources]
    return list(dict.fromkeys([*stage.new_sources, *(name for name in replayed if name != "history")]))
