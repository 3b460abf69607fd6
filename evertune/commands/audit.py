"""`evertune audit`: how far a checkpoint has drifted from another."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def audit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe whose workspace holds the checkpoints.")],
    label: Annotated[
        str | None, typer.Option("--at", metavar="LABEL", help="A checkpoint; the champion if not given.")
    ] = None,
    against: Annotated[str, typer.Option("--against", metavar="LABEL", help="What it is compared with.")] = "base",
    texts: Annotated[int, typer.Option(min=1, help="Texts of each probe that are read.")] = 24,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Measure drift: weights by kind of matrix, outputs on general and taught text, layers, calibration, habits."""
    from evertune.audit import audit as measure
    from evertune.display import Display
    from evertune.recipe.load import load_recipe

    found = measure(load_recipe(recipe), label=label, against=against, most=texts, display=Display(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for line in audit_lines(found):
        typer.echo(line)


def audit_lines(body: Mapping[str, Any]) -> Iterator[str]:
    """For a terminal."""
    yield f"{body['label']} beside {body['reference']}"
    yield ""
    yield "outputs: mean exact KL from the reference, nats a token"
    for name, one in body["kl"].items():
        yield f"  {name + ' text':<24} {one['nats']:.5f}   over {one['tokens']:,} tokens"
    if body["cka"]:
        lowest = min(range(len(body["cka"])), key=lambda i: body["cka"][i])
        where = f"layer {lowest}" if lowest else "the embedding"
        last, least = body["cka"][-1], body["cka"][lowest]
        yield f"hidden states: CKA {last:.4f} after the last layer, lowest {least:.4f} after {where}"
    yield ""
    yield f"weights  {'relative L2':>24} {'largest spectral ratio':>24}"
    for name, one in sorted(body["weights"].items(), key=lambda each: -each[1]["relative_l2"]):
        yield f"  {name:<20} {one['relative_l2']:>10.5f} {one['spectral']:>24.5f}"
    yield ""
    for name, (old, new) in body["calibration"].items():
        yield f"{name}: calibration error {old:.3f} -> {new:.3f}"
    for name, one in body["habits"].items():
        yield f"{name}: {habit_text(one)}"


def habit_text(one: Mapping[str, Any]) -> str:
    """The habits of a probe's answers, before and after, in words."""
    if "its_share" in one:
        (old, new), (was, now) = one["chosen_most"], one["its_share"]
        return f"chosen most: {old!r} {was:.0%} -> {new!r} {now:.0%}"
    lengths, forms, ends = one["characters"], one["right_form"], one["ended"]
    return (
        f"answers of {lengths[0]:.0f} -> {lengths[1]:.0f} characters, right form {forms[0]:.0%} -> {forms[1]:.0%}, "
        f"ended by themselves {ends[0]:.0%} -> {ends[1]:.0%}"
    )
