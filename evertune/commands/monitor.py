"""`evertune monitor`: five dimensions over the rounds of a workspace, each with its trigger and what to do."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evertune.report.monitor import Dimension

MARKS = {"fine": "fine ", "watch": "watch", "act": "ACT  ", "unknown": "?    "}


def monitor(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="The folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Watch forgetting, new skills, safety, cost and drift over all rounds, and say what to do."""
    from evertune.lineage import current_events, open_workspace
    from evertune.report import build_report
    from evertune.report.monitor import to_json

    found = build_report(current_events(open_workspace(workspace).ledger))
    if as_json:
        typer.echo(json.dumps({"champion": found.line[-1], "dimensions": to_json(found.monitor)}, indent=2))
        return
    typer.echo(f"champion {found.line[-1]}, {len(found.line) - 1} promotions")
    for line in monitor_lines(found.monitor):
        typer.echo(line)


def monitor_lines(dimensions: "Sequence[Dimension]") -> Iterator[str]:
    """For a terminal."""
    for one in dimensions:
        yield ""
        yield f"{MARKS[one.state]} {one.name}: acts when {one.trigger}"
        for each in one.readings:
            yield f"      {MARKS[each.state]} {each.what:<20} {each.value}"
        if not one.readings:
            yield f"      not measured: {one.measure}"
        if one.state in ("act", "watch"):
            yield f"      do: {one.action}"
