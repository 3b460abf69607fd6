"""What a run will do, worked out before anything heavy starts: probes, digests, stage keys, and the facts to record.

The key of a stage is the digest of everything its result depends on: kind and version of its meaning, the settings it
reads, the digests of start, base, data and reference, the seed and the numerics. Same key: nothing to do.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from evertune.data.cleaned import Cleaner, Given, OnBad
from evertune.data.history import Budget, choose, write_history
from evertune.data.index import remember
from evertune.data.rows import digest_rows, read_rows
from evertune.gate import GateSettings, ProbeFacts, own_margin
from evertune.hashing import digest_json
from evertune.methods import standing_of
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import Checkpoint, describe
from evertune.probe.flips import flips_of
from evertune.probe.job import probe_key
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, load_probe
from evertune.recipe.fields import REPLAYABLE
from evertune.recipe.load import LoadedRecipe
from evertune.recipe.schema import Recipe, Round, kept_sources
from evertune.train.spec import RowsRef
from evertune.workspace import Workspace

# Raised by hand when the meaning of the gate changes: verdicts are then made anew.
GATE_VERSION = 2
RECORDED_PACKAGES = ("evertune", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Plan:
    """A checked recipe with its base, probes and workspace resolved. Holds no weights and imports no torch."""

    loaded: LoadedRecipe
    base: Checkpoint
    probes: tuple[AnyProbe, ...]
    workspace: Path
    numerics: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def facts(self, one: Round | None = None) -> dict[str, ProbeFacts]:
        """What the gate must know of each probe, with the roles of this round."""
        roles = one.roles if one else {}
        return {
            each.name: ProbeFacts(role=roles.get(each.name, each.role), safety=each.safety, margin=each.margin)
            for each in self.probes
        }

    @cached_property
    def gate_body(self) -> dict[str, Any]:
        return self.recipe.gate.model_dump()

    @cached_property
    def gate_settings(self) -> GateSettings:
        return GateSettings.from_json(self.gate_body)

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Facts of the machine that a result does not depend on."""
        return {"machine": platform.machine(), "system": platform.platform(), "cpus": os.cpu_count()}

    def keyed(self, key: str) -> str:
        """A stage's key under the recipe's policy: with `versions: strict` it covers the packages' versions too."""
        packages = self.numerics.get("packages")
        return digest_json({"key": key, "packages": packages}) if packages else key

    @cached_property
    def run_body(self) -> dict[str, Any]:
        return {
            "name": self.recipe.name,
            "recipe": self.loaded.resolved,
            "recipe_digest": self.loaded.digest,
            "versions": package_versions(),
            "commit": source_commit(),
            "machine": self.machine,
            "round_names": [one.name for one in self.recipe.rounds],
            "seed": self.recipe.seed,
        }

    def probe_key(self, checkpoint: Checkpoint, probe: AnyProbe) -> str:
        return probe_key(checkpoint, probe, self.numerics)

    def probe_job(self, probe: AnyProbe) -> dict[str, Any]:
        """What a child needs to load this probe again."""
        return {"name": probe.name, "settings": self._settings(probe.name), "root": str(self.loaded.folder)}

    def _settings(self, name: str) -> dict[str, Any]:
        return self.recipe.probes[name].model_dump(exclude_none=True)

    def asked_on_the_way(self, one: Round) -> list[AnyProbe]:
        """Guards that can be asked while a stage of the round trains: not held out, and no tasks of lm-eval."""
        facts = self.facts(one)
        return [
            each
            for each in self.probes
            if facts[each.name].role == "guard" and not each.held_out and each.kind != "lm_eval"
        ]

    def margin_of(self, probe: AnyProbe, one: Round) -> float:
        """How far a guard may fall: in points, or relative where lower is better."""
        direction: Literal["higher", "lower"] = "lower" if probe.kind == "bits_per_byte" else "higher"
        return own_margin(direction, self.facts(one)[probe.name], self.gate_settings)

    def base_body(self) -> dict[str, Any]:
        """The ledger's facts of the base model."""
        return _checkpoint_body(self.base, None, label="base", round_name=None, stage="base")

    def interpolation_body(
        self,
        checkpoint: Checkpoint,
        key: str,
        label: str,
        round_name: str,
        share: Any,
        start: Checkpoint,
        candidate: Checkpoint,
    ) -> dict[str, Any]:
        """The ledger's facts of a rescue's winner, which lies between the start and the candidate.

        Args:
            share: of the candidate: a number, or a list of one per block of layers.
        """
        body = _checkpoint_body(
            checkpoint, key, label=label, round_name=round_name, stage="interpolate", methods=["wise_ft"]
        )
        return {**body, "start": start.digest, "parents": [candidate.digest], "settings": {"alpha": share}}

    def asked(self, *, held_out: bool) -> "Plan":
        """The same plan with only the probes that are held out, or only the others."""
        return replace(self, probes=tuple(one for one in self.probes if one.held_out == held_out))

    def flips(self, after: Mapping[str, ItemScores], before: Mapping[str, ItemScores]) -> dict[str, list[Any]]:
        """Per probe, the items whose score fell most, then those that rose: what a person wants to see first."""
        return {
            one.name: flips_of(after[one.name], before[one.name], one.prompts())
            for one in self.probes
            if one.name in after
        }

    def keep_history(self, one: Round, workspace: Workspace, *, without: Sequence[str] = ()) -> str:
        """Store the new rows of a promoted round for replay, within the recipe's budget; returns the object's key.

        Rows of a format that is never replayed, such as preferences, are left out.
        """
        names = sorted(name for name in kept_sources(one) if self.recipe.data[name].format in REPLAYABLE)
        refs = {name: self.rows_ref(name, without=without) for name in names}
        digests = {name: ref.digest for name, ref in refs.items()}
        formats = {name: self.recipe.data[name].format for name in names}
        seed = self.recipe.seed
        budget = Budget(**self.recipe.history.model_dump())
        facts = {"kind": "history", "version": 1, "data": digests, "formats": formats, "seed": seed}
        # Without a budget of the recipe's own the key is as it was before there were any.
        key = digest_json({**facts, **({"budget": budget.__dict__} if budget != Budget() else {})})

        counts: dict[str, dict[str, int]] = {}

        def write(folder: Path) -> dict[str, Any]:
            for name, ref in refs.items():
                rows = read_rows(Path(ref.path), format=ref.format, source=name, limit=ref.limit)
                # Before the object is whole: killed in between, the same rows are added once all the same.
                remember(workspace.root / "dedup", rows, round_name=one.name)
                kept = choose(rows, budget, seed)
                counts[name] = {"of": len(rows), "kept": len(kept)}
                write_history(folder / f"{name}.jsonl", kept)
            return {"round": one.name, "formats": formats, "rows": counts}

        return workspace.publish(kind="history", key=key, record={}, write=write).key

    def data_digest(self, name: str) -> str:
        source = self.recipe.data[name]
        files = digest_rows(self.loaded.resolve(source.path))
        return digest_json({"files": files, "format": source.format, "limit": source.limit})

    def rows_ref(self, name: str, *, without: Sequence[str] = ()) -> RowsRef:
        """A source's rows without those that hold probe items, that break a rule of the source, or that someone asked
        to remove.

        Raises:
            DataError: a row holds an item and the recipe calls that an error, or a row cannot be read.
        """
        source = self.recipe.data[name]
        path = self.loaded.resolve(source.path)
        given = Given(name, path, source.format, source.limit, self.data_digest(name))
        return self.clean(given, on_bad=source.bad_rows, keep=source.keep, without=without)

    def clean(
        self, given: Given, *, on_bad: OnBad = "error", keep: Sequence[str] = (), without: Sequence[str] = ()
    ) -> RowsRef:
        """Any rows, likewise."""
        workspace = Workspace.open(self.workspace, create=True)
        found = self._cleaner.clean(given, workspace, on_bad=on_bad, keep=keep, without=without)
        return RowsRef(
            source=given.source,
            path=str(found.path),
            format=given.format,
            limit=found.limit,
            digest=found.digest,
            removed=found.removed,
        )

    @cached_property
    def _cleaner(self) -> Cleaner:
        items = [text for probe in self.probes for text in probe.texts()]
        return Cleaner(items, on_leak=self.recipe.leaks)


def make_plan(loaded: LoadedRecipe) -> Plan:
    """Resolve a recipe's base, probes and workspace.

    Raises:
        CheckpointError: the base is missing or not a model.
        ProbeError: a probe file or item is wrong.
    """
    recipe = loaded.recipe
    workspace = loaded.resolve(recipe.workspace)
    base = describe(resolve_base(recipe.base, folder=loaded.folder))
    probes = tuple(
        load_probe(name, settings=probe.model_dump(exclude_none=True), root=loaded.folder)
        for name, probe in recipe.probes.items()
    )
    numerics = recipe.numerics.model_dump(exclude={"versions", "kernels", "compile"})
    if recipe.numerics.versions == "strict":
        numerics["packages"] = package_versions()
    return Plan(loaded=loaded, base=base, probes=probes, workspace=workspace, numerics=numerics)


def package_versions() -> dict[str, str]:
    """Of the packages that a result may depend on, and of Python."""
    versions = {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}
    return {**versions, "python": platform.python_version()}


def source_commit() -> str | None:
    """The commit that this package was installed from, where its installer wrote it down or the checkout still tells
    (PEP 610); None for a release."""
    # A checkout that was built in holds metadata of its own, without this file.
    texts = [one.read_text("direct_url.json") for one in importlib.metadata.distributions(name="evertune")]
    origin = json.loads(next((text for text in texts if text), "{}"))
    if "vcs_info" in origin:
        return str(origin["vcs_info"]["commit_id"])
    if not origin.get("dir_info", {}).get("editable"):
        return None
    command = ["git", "-C", unquote(urlparse(origin["url"]).path), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _checkpoint_body(
    checkpoint: Checkpoint,
    key: str | None,
    *,
    label: str,
    round_name: str | None,
    stage: str,
    methods: Sequence[str] = (),
) -> dict[str, Any]:
    """The ledger body of a checkpoint that no training made; every field of the shape is present."""
    return {
        "digest": checkpoint.digest,
        "object": key,
        "label": label,
        "round": round_name,
        "stage_index": None,
        "stage": stage,
        "standing": standing_of(methods),
        "methods": list(methods),
        "form": checkpoint.form,
        "stands_on": checkpoint.stands_on.digest if checkpoint.stands_on else None,
        "start": None,
        "settings": {},
        "data": [],
        "replay": None,
        "anchor": None,
        "steps": 0,
        "new_rows": 0,
        "replay_rows": 0,
        "tokens": 0,
        "counted_tokens": 0,
        "losses": [],
        "final": {},
        "bytes": sum(file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file()),
        "drift": None,
        "interference": None,
    }
