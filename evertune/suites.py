"""Probes without a run: a suite is what `evertune gate` asks two checkpoints, with the gate that reads the answers.

A suite comes from a recipe, from a YAML file with only `probes` (and `gate`, `numerics`), from files of items, or is
the general one that this package brings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from evertune.data.lines import values_of
from evertune.errors import DataError, ProbeError, RecipeError
from evertune.gate import GateSettings, ProbeFacts
from evertune.model.checkpoint import Checkpoint
from evertune.probe.flips import flips_of
from evertune.probe.job import probe_key
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, load_probe
from evertune.recipe.fields import Config
from evertune.recipe.load import load_recipe
from evertune.recipe.overrides import override
from evertune.recipe.problems import problem_lines
from evertune.recipe.schema import Gate, Numerics, Probe
from evertune.recipe.strict_yaml import Document, read_yaml

GENERAL = Path(__file__).parent / "general" / "suite.yaml"
ITEM_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


class SuiteFile(Config):
    """A recipe's probes and gate without the rest."""

    probes: dict[str, Probe] = Field(min_length=1)
    gate: Gate = Gate()
    numerics: Numerics = Numerics()


class _GateFile(Config):
    gate: Gate = Gate()


@dataclass(frozen=True)
class Suite:
    """Probes with their settings, what their paths are relative to, and the gate.

    `source` says where they come from: a path, or `general`.
    """

    source: str
    probes: tuple[AnyProbe, ...]
    settings: Mapping[str, Mapping[str, Any]]
    root: Path
    gate: Gate
    numerics: dict[str, Any]

    def probe_key(self, checkpoint: Checkpoint, probe: AnyProbe) -> str:
        return probe_key(checkpoint, probe, self.numerics)

    def probe_job(self, probe: AnyProbe) -> dict[str, Any]:
        """What a child needs to load this probe again."""
        return {"name": probe.name, "settings": dict(self.settings[probe.name]), "root": str(self.root)}

    @property
    def facts(self) -> dict[str, ProbeFacts]:
        """What the gate must know of each probe."""
        return {one.name: ProbeFacts(role=one.role, safety=one.safety, margin=one.margin) for one in self.probes}

    @cached_property
    def gate_body(self) -> dict[str, Any]:
        return self.gate.model_dump()

    @cached_property
    def gate_settings(self) -> GateSettings:
        return GateSettings.from_json(self.gate_body)

    def flips(self, after: Mapping[str, ItemScores], before: Mapping[str, ItemScores]) -> dict[str, list[Any]]:
        """Per probe, the items that changed most."""
        return {one.name: flips_of(after[one.name], before[one.name], one.prompts()) for one in self.probes}


def load_suite(places: Sequence[Path] = (), *, overrides: Sequence[str] = ()) -> Suite:
    """The suite that the places name; the general one when there is none.

    Args:
        places: one recipe or suite in YAML; or files of items, or folders of such, each a guard named for its file.
        overrides: `gate.alpha=0.01` and the like, applied to what a YAML says or to the defaults.

    Raises:
        RecipeError: the YAML, or an override, is wrong.
        ProbeError: a file of items is wrong, or what it holds cannot be told.
    """
    yamls = [one for one in places if one.suffix in (".yaml", ".yml")]
    if yamls and len(places) > 1:
        raise RecipeError(
            f"--probes was given {yamls[0]} and {len(places) - 1} more; a YAML file stands alone.",
            remedy="Name the other probes in the YAML.",
        )
    for one in places:
        if not one.exists():
            raise RecipeError(f"--probes {one}: no such file or folder.")
    if yamls:
        return _from_yaml(yamls[0], overrides)
    if not places:
        return _from_document(read_yaml(GENERAL), overrides, source="general", root=GENERAL.parent)
    document = Document({"probes": _guess_settings(places)}, {(): "--set"})
    return _from_document(document, overrides, source=", ".join(map(str, places)), root=Path.cwd())


def load_gate(overrides: Sequence[str] = ()) -> Gate:
    """The default gate with overrides, for scores that come without probes.

    Raises:
        RecipeError: an override is wrong.
    """
    document = Document({"gate": {}}, {(): "--set"})
    for one in overrides:
        override(document.value, document.places, one)
    try:
        return _GateFile.model_validate(document.value).gate
    except ValidationError as error:
        raise RecipeError(
            "\n".join(problem_lines(error, document.value, document.places, root=_GateFile)[:10])
        ) from None


def _from_yaml(path: Path, overrides: Sequence[str]) -> Suite:
    document = read_yaml(path.absolute())
    if isinstance(document.value, dict) and "rounds" in document.value:
        loaded = load_recipe(path, overrides=overrides)
        recipe = loaded.recipe
        parts = SuiteFile(probes=dict(recipe.probes), gate=recipe.gate, numerics=recipe.numerics)
        return _suite(parts, source=str(path), root=loaded.folder)
    return _from_document(document, overrides, source=str(path), root=path.absolute().parent)


def _from_document(document: Document, overrides: Sequence[str], *, source: str, root: Path) -> Suite:
    for one in overrides:
        override(document.value, document.places, one)
    try:
        parts = SuiteFile.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(problem_lines(error, document.value, document.places, root=SuiteFile)[:10])
        ) from None
    return _suite(parts, source=source, root=root)


def _suite(parts: SuiteFile, *, source: str, root: Path) -> Suite:
    settings = {name: one.model_dump(exclude_none=True) for name, one in parts.probes.items()}
    return Suite(
        source=source,
        probes=tuple(load_probe(name, settings=one, root=root) for name, one in settings.items()),
        settings=settings,
        root=root,
        gate=parts.gate,
        numerics=parts.numerics.model_dump(),
    )


def _guess_settings(places: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Settings of a probe per file, by what its first item holds."""
    files: list[Path] = []
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        files += [one for one in inside if one.name.endswith(ITEM_SUFFIXES)]
    if not files:
        raise ProbeError(f"{places[0]}: no files of items in it, expected {', '.join(ITEM_SUFFIXES)}.")
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        name = file.name.split(".")[0].removeprefix("probe-").lower()
        if name in found:
            raise ProbeError(f"{file}: another file is also called '{name}'; names of probes come from the files.")
        found[name] = {"path": str(file.absolute()), **_guess(file)}
    return found


def _guess(file: Path) -> dict[str, Any]:
    try:
        first = next((value for _, value in values_of(file)), None)
    except DataError as error:
        raise ProbeError(error.message, remedy=error.remedy) from error
    if first is None:
        raise ProbeError(f"{file}: no items in it, expected at least one.")
    if "choices" in first:
        return {"kind": "choice"}
    if "answer" in first:
        return {"kind": "generate", "verifier": {"exact": {}}}
    if "text" in first or "messages" in first:
        return {"kind": "bits_per_byte"}
    raise ProbeError(
        f"{file}: the first item has {', '.join(sorted(first)) or 'nothing'}; expected 'choices' and 'answer', "
        "'answer', 'text' or 'messages'.",
        remedy="Other verifiers and kinds are set in a YAML of 'probes': docs/gate.md.",
    )
