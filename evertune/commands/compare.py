"""`evertune compare`: one stream of tasks under several methods."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from evertune.comparison import Comparison


def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe whose sft stages are the tasks.")],
    methods: Annotated[
        str, typer.Option(help="With commas: naive, replay, anchor, lora, full, or plug-ins such as ewc; joined by +.")
    ] = "naive,replay,replay+anchor",
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas; all of the recipe's when not given.")] = "",
    orders: Annotated[int, typer.Option(min=1, help="Orders of the tasks: the recipe's, its reverse, then drawn.")] = 1,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas; each is a run of every method and order.")] = "0",
    options: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PART=OPTIONS", help="What a recipe would say of a part: 'ewc={weight: 10}'."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a value of the recipe.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write the table as a page in Markdown; a section '## Reading' in it stays.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Train one stream of tasks under several methods: what is learnt, kept and spent, with intervals over runs.

    The same command goes on where it was stopped.
    """
    from evertune.comparison import compare as run_all
    from evertune.comparison_table import comparison_lines
    from evertune.errors import RecipeError
    from evertune.recipe.load import load_recipe

    if page is not None and not page.absolute().parent.is_dir():
        raise RecipeError(f"--page: no folder {page.parent}.", remedy="Make it, or name another page.")
    loaded = load_recipe(recipe, overrides=overrides or ())
    try:
        made = run_all(
            loaded,
            _listed(methods),
            tasks=_listed(tasks),
            orders=orders,
            seeds=_numbers(seeds),
            options=dict(map(_option, options or [])),
            overrides=overrides or (),
            say=lambda text: typer.echo(text, err=as_json),
        )
    except KeyboardInterrupt:
        typer.echo("\nStopped. Finished runs are kept; the same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    if page is not None:
        given = {
            "--methods": [methods],
            "--tasks": [tasks] if tasks else [],
            "--orders": [str(orders)],
            "--seeds": [seeds],
        }
        given |= {"--with": options or [], "--set": overrides or []}
        words = [word for flag, values in given.items() for value in values for word in (flag, value)]
        _write_page(page, made, loaded.recipe.base, shlex.join(["evertune", "compare", str(recipe), *words]))
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=2))
        return
    for line in ["", *comparison_lines(made)]:
        typer.echo(line)


def _write_page(page: Path, made: "Comparison", base: str, command: str) -> None:
    import datetime
    import os
    import platform

    from evertune.comparison_table import comparison_page
    from evertune.workspace import write_atomically

    facts = f"{datetime.datetime.now(tz=datetime.UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, {base}"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    write_atomically(page, comparison_page(made, command=command, facts=facts, before=before).encode("utf-8"))


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]


def _numbers(text: str) -> list[int]:
    from evertune.errors import RecipeError

    try:
        return [int(one) for one in _listed(text)]
    except ValueError:
        raise RecipeError(f"found the seeds {text!r}, expected whole numbers with commas, such as 1,2,3.") from None


def _option(text: str) -> tuple[str, dict[str, Any]]:
    """A part and its options, which are YAML."""
    import yaml

    from evertune.errors import RecipeError

    part, _, value = text.partition("=")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise RecipeError(f"--with: found {text!r}, expected PART={{KEY: VALUE}}, such as 'ewc={{weight: 10}}'.")
    return part.strip(), found
