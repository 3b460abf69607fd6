"""Another trainer's command as a stage: the start and the rows go out as files, and what comes back is taken through
the one door, digested, probed and judged like any checkpoint."""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.data.history import write_history
from evertune.data.rows import read_rows
from evertune.errors import RecipeError, TrainingError
from evertune.hashing import digest_file, digest_json
from evertune.methods import standing_of
from evertune.model.checkpoint import Checkpoint
from evertune.recipe.presets import ResolvedExternal
from evertune.stages.place import Place
from evertune.train.spec import RowsRef
from evertune.workspace import Workspace

VERSION = 1
LOG = "external.log"
# Between asking the command to end and ending it.
GRACE_SECONDS = 10.0
LAST_LINES = 5
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class ExternalSpec:
    """Everything the command needs.

    Attributes:
        folder: where the command runs; paths in it are relative to this.
        files: what decides the command's result beside its text: name and SHA-256 of each.
    """

    key: str
    label: str
    start: Checkpoint
    base: Checkpoint
    command: str
    data: list[RowsRef]
    files: dict[str, str]
    hours: float
    folder: str
    seed: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "start": self.start.to_json(),
            "base": self.base.to_json(),
            "data": [ref.to_json() for ref in self.data],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ExternalSpec":
        return cls(
            **{
                **value,
                "start": Checkpoint.from_json(value["start"]),
                "base": Checkpoint.from_json(value["base"]),
                "data": [RowsRef.from_json(ref) for ref in value["data"]],
            }
        )

    def settings(self) -> dict[str, Any]:
        return {"command": self.command, "files": self.files, "seed": self.seed}

    def words(self, *, model: Path, data: Path, output: Path) -> list[str]:
        """The command's words with the placeholders filled in, each word by itself: a path may hold spaces."""
        values = {"model": str(model), "data": str(data), "output": str(output), "seed": str(self.seed)}
        return [word.format_map(values) for word in shlex.split(self.command)]


def order(place: Place) -> ExternalSpec:
    """The complete order for an external stage.

    Raises:
        RecipeError: a file that it names cannot be read.
    """
    settings, plan = place.resolved, place.plan
    assert isinstance(settings, ResolvedExternal), place.label
    data = [plan.rows_ref(name, without=place.without) for name in settings.data or []]
    files = {name: file_digest(plan.loaded.resolve(name), name) for name in settings.files or []}
    facts = {
        "kind": "external",
        "version": VERSION,
        "command": settings.command,
        "start": place.start.digest,
        "data": [[ref.source, ref.digest] for ref in data],
        "files": files,
        "seed": plan.recipe.seed,
        "dtype": plan.numerics["dtype"],
    }
    return ExternalSpec(
        key=digest_json(facts),
        label=place.label,
        start=place.start,
        base=plan.base,
        command=settings.command,
        data=data,
        files=files,
        hours=settings.hours,
        folder=str(plan.loaded.folder),
        seed=plan.recipe.seed,
        dtype=plan.numerics["dtype"],
    )


def file_digest(path: Path, name: str) -> str:
    """SHA-256 of a file that decides what a command does.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        return digest_file(path)
    except OSError as error:
        raise RecipeError(
            f"files: {name!r} cannot be read ({path}): {error.strerror}.", remedy="Paths are relative to the recipe."
        ) from error


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Run the command and publish what it made. What an interrupted attempt left is deleted, and the command run again.

    The command's output, standard error included, is kept: in the published object as `external.log`, and after a
    failure in the stage's folder under `work/`.

    Raises:
        TrainingError: the command failed, or took too long.
        CheckpointError: what it left is not a sound checkpoint.
        DataError: a row of the data is wrong.
        KeyboardInterrupt: asked to stop; the command has been ended.
    """
    spec = ExternalSpec.from_json(order)
    folder = workspace.work / spec.key
    attempt, log = folder / "attempt", folder / LOG
    shutil.rmtree(attempt, ignore_errors=True)
    (attempt / "output").mkdir(parents=True)
    (attempt / "data").mkdir()
    began = time.monotonic()
    rows = _write_data(spec, attempt / "data")
    words = spec.words(model=_whole_start(spec, attempt), data=attempt / "data", output=attempt / "output")
    _run(spec, words, log)
    volatile = {"time": time.time(), "seconds": time.monotonic() - began}
    _publish(spec, workspace, attempt / "output", log, rows, volatile)
    shutil.rmtree(attempt, ignore_errors=True)
    manifest = workspace.manifest(spec.key)
    assert manifest is not None, "published and yet not there"
    return {name: manifest.record[name] for name in ("checkpoint", "volatile")}


def _write_data(spec: ExternalSpec, folder: Path) -> dict[str, int]:
    """Write the checked rows, one file a source; returns how many there are."""
    counts = {}
    for ref in spec.data:
        rows = read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit)
        write_history(folder / f"{ref.source}.jsonl", rows)
        counts[ref.source] = len(rows)
    return counts


def _whole_start(spec: ExternalSpec, attempt: Path) -> Path:
    """The start as a folder that any trainer can load: adapters are folded into whole weights."""
    if spec.start.form == "model":
        return spec.start.path
    from evertune.model.export import export_weights

    return export_weights(spec.start, attempt / "model").path


def _run(spec: ExternalSpec, words: list[str], log: Path) -> None:
    """Run the command to its end, in a session of its own. On Linux it dies with this process, however that ends."""
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        try:
            child = subprocess.Popen(
                words,
                cwd=spec.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise TrainingError(
                f"{spec.label}: cannot start {words[0]!r}: {error.strerror}.",
                remedy="Install it, or correct the stage's 'command'; it runs in the recipe's folder.",
            ) from error
        try:
            code = child.wait(spec.hours * 3600)
        except subprocess.TimeoutExpired:
            _end(child)
            raise TrainingError(
                f"{spec.label}: the command was stopped after {spec.hours:g} hours. {_last_words(log)}",
                remedy="Raise 'hours', or give it less to do.",
            ) from None
        except BaseException:
            _end(child)
            raise
    if code:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise TrainingError(f"{spec.label}: the command {how}. {_last_words(log)}", remedy=f"All it said is in {log}.")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the command and what it started: asked first, then not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)


def _last_words(log: Path) -> str:
    """The end of what the command said, on one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = " | ".join(line for line in lines[-LAST_LINES:] if not line.startswith("$ "))
    return f"Its last words: {said.removesuffix('.')}." if said else "It said nothing."


def _publish(
    spec: ExternalSpec,
    workspace: Workspace,
    output: Path,
    log: Path,
    rows: dict[str, int],
    volatile: dict[str, Any],
) -> None:
    from evertune.model.adopt import adopt
    from evertune.train.distance import drift_or_none

    def write(folder: Path) -> dict[str, Any]:
        opened = adopt(output, folder, start=spec.start, dtype=spec.dtype)
        shutil.copyfile(log, folder / LOG)
        checkpoint = opened.checkpoint
        facts = {
            "label": spec.label,
            "stage": "external",
            "standing": standing_of(["external"]),
            "methods": ["external"],
            "form": checkpoint.form,
            "stands_on": checkpoint.stands_on.digest if checkpoint.stands_on else None,
            "start": spec.start.digest,
            "settings": spec.settings(),
            "data": [{"source": ref.source, "sha256": ref.digest, "rows": rows[ref.source]} for ref in spec.data],
            "replay": None,
            "anchor": None,
            "steps": 0,
            "new_rows": sum(rows.values()),
            "replay_rows": 0,
            "tokens": 0,
            "counted_tokens": 0,
            "losses": [],
            "final": {},
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "drift": drift_or_none(opened, start=spec.start, base=spec.base),
            "interference": None,
        }
        return {"checkpoint": facts, "volatile": volatile}

    workspace.publish(kind="checkpoint", key=spec.key, record={}, write=write)
