"""`evertune advise`: small trials that answer a question about a recipe before it is run."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Small trials that answer a question before a recipe is run.")


@app.callback()
def _group() -> None:
    """A group, also while it has one command."""


@app.command()
def replay(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")],
    round_name: Annotated[
        str | None, typer.Option("--round", help="The first that is not settled, else the last.")
    ] = None,
    shares: Annotated[str, typer.Option(help="Shares to try, with commas.")] = "0,0.05,0.1,0.2,0.3",
    rows: Annotated[int, typer.Option(min=4, help="Rows of each source at the last rung.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Try shares of replay on a part of the data, and say what each keeps and gains."""
    from evertune.advice import advice_lines, advise_replay
    from evertune.errors import RecipeError
    from evertune.recipe.load import load_recipe

    try:
        values = [float(one) for one in shares.split(",")]
    except ValueError:
        raise RecipeError(f"found the shares {shares!r}, expected numbers with commas, such as 0,0.1,0.3.") from None
    loaded = load_recipe(recipe)
    found = advise_replay(
        loaded, round_name=round_name, shares=values, rows=rows, say=lambda text: typer.echo(text, err=as_json)
    )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    for line in ["", *advice_lines(found)]:
        typer.echo(line)
