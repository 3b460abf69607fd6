"""`evertune advise`: questions about a recipe before it is run, answered by small trials or from the record."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Questions before a round: how much replay, update or retrain.")


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


@app.command()
def update(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML, with at least one round promoted.")
    ],
    zero_tolerance: Annotated[
        bool, typer.Option("--zero-tolerance", help="Nothing may be lost: safety, compliance.")
    ] = False,
    with_model: Annotated[
        bool, typer.Option("--with-model", help="Compare rows by the base model's hidden states too.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write the recipe with the retrain beside it, as RECIPE-retrain.yaml.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Update the champion, or retrain from the base? With the numbers, and a round for either."""
    import yaml

    from evertune.recipe.load import load_recipe
    from evertune.retraining import advise_update, write_retrain

    loaded = load_recipe(recipe)
    found = advise_update(loaded, is_zero_tolerance=zero_tolerance, with_model=with_model)
    out = write_retrain(loaded, found) if write else None
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    typer.echo(f"round {found.round}: {found.choice}. {found.reason[0].upper()}{found.reason[1:]}.\n")
    for one in found.criteria:
        typer.echo(f"  {one.says:<8} {one.name:<24} {one.value}")
        typer.echo(f"  {'':<8} {'':<24} {one.rule}")
    typer.echo(
        f"\n  cost     the update about {found.update_tokens:,.0f} tokens, a retrain {found.retrain_tokens:,.0f}"
    )
    typer.echo("\nThe thresholds are heuristics. A round for either:\n")
    for name, body in (("update", found.update_round), ("retrain", found.retrain_round)):
        typer.echo(f"# {name}")
        typer.echo(yaml.safe_dump([body], sort_keys=False, allow_unicode=True))
    if out is not None:
        typer.echo(f"wrote {out}")


@app.command()
def baseline(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML, with at least one round promoted.")
    ],
    model: Annotated[str | None, typer.Option("--model", help="A retrained model that is there already.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Retrain from the base on the promoted rounds' data, or take a model, and score it for `evertune monitor`."""
    from evertune.display import Display
    from evertune.recipe.load import load_recipe
    from evertune.retraining import measure_baseline

    found = measure_baseline(load_recipe(recipe), model=model, display=Display(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    trained = f"{found['steps']} steps on {', '.join(found['data'])}" if found["data"] else "as it is"
    typer.echo(f"baseline {found['source']}: {trained}")
    for name, one in found["scores"].items():
        typer.echo(f"  {name:<20} {one['value']:.3f}  90% {one['ci90'][0]:.3f} to {one['ci90'][1]:.3f}")
    typer.echo("`evertune monitor` now compares the champion with it.")
