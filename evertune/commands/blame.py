"""`evertune blame`: which stage, source and rows pushed a probe down."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def blame(
    probe: Annotated[str, typer.Argument(help="A probe of the recipe.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe whose workspace holds the round.")],
    label: Annotated[
        str | None, typer.Option("--at", metavar="LABEL", help="A checkpoint; the last judged candidate if not given.")
    ] = None,
    rows: Annotated[int, typer.Option(min=4, help="Rows sampled of each source.")] = 48,
    items: Annotated[int, typer.Option(min=1, help="Items of the probe, those that fell first.")] = 48,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Check it: the stage again without the source, with as many steps.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Find which stage, which source and which rows pushed a probe down."""
    from evertune.blame import blame as find
    from evertune.display import Display
    from evertune.recipe.load import load_recipe

    found = find(
        load_recipe(recipe), probe, label=label, rows=rows, items=items, retrain=retrain, display=Display(quiet=as_json)
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for line in blame_lines(found, recipe=recipe):
        typer.echo(line)


def blame_lines(body: Mapping[str, Any], *, recipe: Path) -> Iterator[str]:
    """What was found, for a terminal."""
    yield f"{body['probe']}, from {body['start']} to {body['label']}"
    for one in body["steps"]:
        mark = "  <- examined" if one["label"] == body["stage"] else ""
        yield f"  {one['label']:<32} {one['before']:.3f} -> {one['after']:.3f}  {_change(one)}{mark}"
    if body["stage"] is None:
        yield "No stage made it fall: there is nothing to blame."
        return
    yield ""
    if body["inside"]:
        inside = ", ".join(f"{value:.3f} after {step}" for step, value in body["inside"])
        yield f"Inside {body['stage']}, by the steps done: {inside}."
    what = "steps" if body["inside"] else "change"
    along = ", ".join(f"{loss:.3f} at {share:.0%} of the stage's {what}" for share, loss in body["points"])
    yield f"Its loss in nats on {body['items']} items, those that fell first: {along}."
    yield "How far training on each source pushed that loss up (below 0: down), first order, sampled:"
    yield f"  {'source':<24} {'shown':>7} {'sampled':>8} {'push':>10}  {'90% interval':<22} {'rows up':>8} {'share':>7}"
    for one in body["sources"]:
        low, high = one["ci90"]
        name = one["source"] + (" (replay)" if one["is_replay"] else "")
        yield (
            f"  {name:<24} {one['shown']:>7.0f} {one['sampled']:>8} {one['push']:>+10.3g}  "
            f"{f'{low:+.3g} to {high:+.3g}':<22} {one['rows_up']:>8.0%} {one['share']:>7.0%}"
        )
    for name in body["unread"]:
        yield f"  {name:<24} not examined: no rows with answers to learn, or none shown"
    if body["sources"][0]["ci90"][0] <= 0:
        yield "No push is shown to be above 0: to first order no source explains the fall. A rate too high, perhaps."
    yield ""
    yield f"Clusters of the sampled rows of {body['sources'][0]['source']}, most push first:"
    for one in body["clusters"]:
        words = ", ".join(one["words"]) or "no word"
        yield f"  {one['rows']:>3} rows, {one['push']:+.3g} a row, {one['rows_up']:.0%} up; marked by: {words}"
    for one in body["rows"][:3]:
        yield f"  worst: {one['place']}  {one['push']:+.3g}  {' '.join(one['text'].split())[:90]}"
    yield ""
    yield from _check_lines(body, recipe)


def _check_lines(body: Mapping[str, Any], recipe: Path) -> Iterator[str]:
    one = body["without"]
    if one is None:
        yield "This is first order and sampled: a lead, not a proof. Check it:"
        yield f"  evertune blame {body['probe']} {recipe} --retrain"
        return
    yield (
        f"Checked: the stage again without {one['source']}, {one['steps']} steps: {one['with']:.3f} with it, "
        f"{one['without']:.3f} without, {_change(one)}; {one['before']:.3f} before the stage."
    )
    low = one["ci90"][0]
    yield "Confirmed: without it the probe stands higher." if low > 0 else "Not confirmed: the interval holds 0."


def _change(one: Mapping[str, Any]) -> str:
    unit, scale = {"points": (" points", 100.0), "percent": ("%", 100.0), "score": ("", 1.0)}[one["unit"]]
    low, high = one["ci90"]
    return f"{scale * one['difference']:+.1f}{unit} (90% {scale * low:+.1f} to {scale * high:+.1f})"
