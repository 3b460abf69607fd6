"""A planned merge performed: as one adapter where that is exact, else as a model; and what came out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import EvertuneError, MergeError
from evertune.merge.engine import Merged, Progress, check_new, check_room, partial_of, run_merge
from evertune.merge.factored import Residual, common_base, write_factored
from evertune.merge.plan import MANIFEST, MergePlan
from evertune.merge.starts import check_starts
from evertune.model.checkpoint import Checkpoint, describe


@dataclass(frozen=True)
class Result:
    """A finished merge.

    residual: what cutting the rank of a merged adapter lost.
    merged: facts of a merged model; None for an adapter.
    """

    plan: MergePlan
    checkpoint: Checkpoint
    merged: Merged | None = None
    residual: Residual | None = None

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "path": str(self.checkpoint.path),
            "digest": self.checkpoint.digest,
            "form": self.checkpoint.form,
            "method": self.plan.method.name,
            "plan": self.plan.digest,
            "notes": list(self.plan.notes),
            "residual": vars(self.residual) if self.residual else None,
        }
        if self.merged is not None:
            body |= {"resumed_segments": self.merged.resumed, "cpu_seconds": vars(self.merged.seconds)}
        return body

    def lines(self) -> list[str]:
        lines = [f"note: {one}" for one in self.plan.notes]
        if self.merged is not None and self.merged.resumed:
            lines.append(f"went on from {self.merged.resumed} finished segments")
        if self.residual is not None:
            lines.append(
                f"rank {self.plan.config.rank} holds all but {self.residual.overall:.2%} of the update "
                f"(worst: {self.residual.worst:.2%}, {self.residual.worst_module})"
            )
        if self.merged is not None:
            lines += _conflicts(self.merged.manifest)
        what = "adapter" if self.checkpoint.form == "adapter" else "model"
        return [*lines, f"wrote {what} {self.checkpoint.digest[:12]}: {self.checkpoint.path}"]


def merge_planned(
    plan: MergePlan, out: Path, *, threads: int | None = None, progress: Progress | None = None
) -> Result:
    """Merge into a new folder.

    Raises:
        MergeError: as `run_merge`; or an adapter is asked for where only a model is exact.
    """
    base = common_base(plan)
    if base is None:
        check_output(plan)
        merged = run_merge(plan, out, threads=threads, progress=progress)
        return Result(plan, merged.checkpoint, merged)
    out = out.absolute()
    check_new(out)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        residual = write_factored(plan, base, temporary)
        _write_manifest(plan, temporary, residual)
        describe(temporary)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Result(plan, describe(out), residual=residual)


def check_planned(plan: MergePlan, out: Path | None = None) -> None:
    """What would stop a planned merge before it begins, all at once: its form, different starts, its folder, its disk.

    Raises:
        MergeError, WorkspaceError: as `merge_planned`.
    """
    as_model = common_base(plan) is None
    checks: list[Callable[[], None]] = [lambda: check_output(plan)] if as_model else []
    checks += [lambda: check_starts(plan)] if as_model and plan.config.different_starts == "refuse" else []
    if out is not None:
        place = out.absolute()
        checks.append(lambda: check_new(place))
        checks += [lambda: check_room(plan, partial_of(plan, place))] if as_model else []
    errors: list[EvertuneError] = []
    for check in checks:
        try:
            check()
        except EvertuneError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else MergeError("\n".join(str(one) for one in errors))


def check_output(plan: MergePlan) -> None:
    """Raise MergeError where an adapter is asked for and would not be exact."""
    if plan.config.output == "adapter" or plan.config.rank is not None:
        raise MergeError(
            "output: adapter, or a rank, needs a linear method (linear, ema, interpolate, task_arithmetic) whose "
            "models are adapters over one base.",
            remedy="Set output: model and leave rank out; 'evertune merge extract' makes an adapter of the result.",
        )


def _write_manifest(plan: MergePlan, folder: Path, residual: Residual | None) -> None:
    config = plan.config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"base"})
    for one in config["models"].values():
        del one["path"]
    body = {
        "version": 1,
        "plan": plan.digest,
        "config": config,
        "models": {one.name: one.checkpoint.digest for one in plan.sources if one is not plan.base},
        "base": plan.sources[0].checkpoint.base.digest,
        "residual": vars(residual) if residual else None,
    }
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _conflicts(manifest: dict[str, Any]) -> list[str]:
    """Where experts collide most, if they do."""
    tensors = [
        (facts["sign_conflict"], name)
        for name, facts in manifest["tensors"].items()
        if facts["cosines"] and facts["relative_to"] == "base"
    ]
    if not tensors:
        return []
    worst, name = max(tensors)
    mean = sum(one for one, _ in tensors) / len(tensors)
    return [f"sign conflicts: {mean:.0%} of the elements that two models change, {worst:.0%} in {name}"]
