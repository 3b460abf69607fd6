"""A check's report for a person."""

from typing import TYPE_CHECKING

from evertune.check.findings import CheckReport, Sample, StageEstimate
from evertune.durations import duration

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_report(report: CheckReport) -> None:
    """Print findings, stages and samples, and last whether a run can start."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for one in report.findings:
        told = escape(f"{one.place}: {one.message} {one.remedy}".rstrip())
        console.print(f"[{COLOURS[one.severity]}]{one.severity}[/]  {told}")
    for stage in report.stages:
        console.print(f"stage  {escape(stage.label)}: {escape(stage.summary)}{_state(stage)}")
    for sample in report.samples:
        _print_sample(sample, console)
    console.print(escape(f"{report.recipe}: {_conclusion(report)}"))


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


def _print_sample(sample: Sample, console: "Console") -> None:
    from rich.markup import escape

    console.print(f"\n[bold]{escape(f'{sample.source} {sample.id}')}[/] (tokens between « and » carry loss)")
    for piece, counted in sample.segments:
        console.print(f"[green]«{escape(piece)}»[/]" if counted else f"[dim]{escape(piece)}[/]", end="")
    console.print()
