"""A check's report for a person."""

import os
from typing import Any

import typer

from evertune.check.findings import CheckReport, Sample, StageEstimate
from evertune.durations import duration

STYLES: dict[str, dict[str, Any]] = {
    "error": {"fg": "red", "bold": True},
    "warning": {"fg": "yellow"},
    "note": {"dim": True},
}


def print_report(report: CheckReport) -> None:
    """Print findings, stages and samples, and last whether a run can start; in colour on a terminal."""
    for one in report.findings:
        severity = typer.style(one.severity, **STYLES[one.severity])
        _say(f"{severity}  {one.place}: {one.message} {one.remedy}".rstrip())
    for stage in report.stages:
        _say(f"stage  {stage.label}: {stage.summary}{_state(stage)}")
    for sample in report.samples:
        _say(_sample(sample))
    _say(f"{report.recipe}: {_conclusion(report)}")


def _say(text: str) -> None:
    # typer takes the colours out where there is no terminal, and knows nothing of https://no-color.org.
    typer.echo(text, color=False if os.environ.get("NO_COLOR") else None)


def _state(stage: StageEstimate) -> str:
    if stage.done:
        return ", done"
    return f", about {duration(stage.seconds)} on this machine's CPU" if stage.seconds else ""


def _conclusion(report: CheckReport) -> str:
    errors = sum(one.severity == "error" for one in report.findings)
    if errors:
        return f"{errors} error{'s' if errors > 1 else ''}"
    waiting = [one for one in report.stages if not one.done]
    disk = f"{report.disk.needed_bytes / 1e9:.1f} of {report.disk.free_bytes / 1e9:.0f} GB of disk"
    return f"fine; {len(waiting)} of {len(report.stages)} stages to do, {disk}"


def _sample(sample: Sample) -> str:
    name = typer.style(f"{sample.source} {sample.id}", bold=True)
    pieces = [
        typer.style(f"«{piece}»", fg="green") if counted else typer.style(piece, dim=True)
        for piece, counted in sample.segments
    ]
    return f"\n{name} (tokens between « and » carry loss)\n{''.join(pieces)}"
