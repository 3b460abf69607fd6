"""`evertune safety`: probe sets for refusals, over-refusals and disguised requests."""

from pathlib import Path
from typing import Annotated

import typer


def safety(
    folder: Annotated[Path, typer.Argument(help="Where the sets go.")],
    harmful: Annotated[
        Path | None, typer.Option(help="Your own requests to refuse, a prompt a line, in JSON; bundled if not given.")
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="Your own requests to answer, likewise.")] = None,
) -> None:
    """Write probe sets: harmful requests, harmless ones that sound alike, and the harmful ones in disguise."""
    from evertune.safety import write_safety

    lines = write_safety(folder, harmful=harmful, harmless=harmless)
    typer.echo(f"wrote {folder}. Under 'probes' of a recipe:\n\n{lines}")
    typer.echo("\nThe bundled requests are few and mild: they show a change, not how safe a model is. Bring your own.")
