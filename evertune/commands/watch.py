"""`evertune watch`: a run from another terminal."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="The folder of a run.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Watch a run from another terminal: rounds, newest scores, the stage in training. Ends with the last round."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from evertune.watching import snapshots, take_snapshot

    console = Console(highlight=False, soft_wrap=True)
    if once:
        typer.echo("\n".join(take_snapshot(workspace).lines))
        return
    if not console.is_terminal:
        shown: tuple[str, ...] = ()
        for one in snapshots(workspace, every_seconds=every):
            if one.lines != shown:
                typer.echo("\n".join(line for line in one.lines if line not in shown))
            shown = one.lines
        return
    with Live(console=console, auto_refresh=False) as live:
        for one in snapshots(workspace, every_seconds=every):
            live.update(Text("\n".join(one.lines)), refresh=True)
