"""`evertune methods`: what there is, how well each is founded, and where it lives in the code."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from evertune.errors import RecipeError
from evertune.methods import MEANING, SECTIONS, Method, Standing
from evertune.methods import methods as table

COLUMNS = 100


def methods(
    name: Annotated[str | None, typer.Argument(metavar="ID", help="One method in full; all in short if none.")] = None,
    standing: Annotated[Standing | None, typer.Option(help="Only those of this standing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """List all methods with their standing: production, research (validate yourself) or academic."""
    chosen = [one for one in table().values() if standing in (None, one.standing) and name in (None, one.id)]
    if not chosen and name is not None and name in table():
        raise RecipeError(
            f"found --standing {standing}, but '{name}' is {table()[name].standing}.", remedy="Leave it out."
        )
    if not chosen:
        raise RecipeError(f"found no method {name!r}{_near(name)}", remedy="'evertune methods' lists all.")
    if as_json:
        body = {"methods": [one.to_json() for one in chosen]}
        typer.echo(json.dumps(body, indent=2, ensure_ascii=False, sort_keys=True))
        return
    for line in _one(chosen[0]) if name is not None else _all(chosen):
        typer.echo(line)


def _all(chosen: Sequence[Method]) -> Iterator[str]:
    for section, title in SECTIONS.items():
        rows = [one for one in chosen if one.section == section]
        if rows:
            yield f"\n{title}"
        for one in rows:
            yield f"  {one.id:<21} {one.standing:<11} {'' if one.where else 'no code':<8} {one.name}"
    yield ""
    for standing, meaning in MEANING.items():
        count = sum(one.standing == standing for one in chosen)
        if count:
            yield f"{count:>3} {standing}: {meaning}"
    yield "\n'evertune methods ID' shows one with its formula, evidence and place in the code."


def _one(method: Method) -> Iterator[str]:
    yield f"{method.name} ({method.id}): {method.standing}, {MEANING[method.standing]}"
    facts = {
        "what": method.summary,
        "formula": method.formula,
        "evidence": method.evidence,
        "fails": method.failure,
        "default": method.default,
        "papers": "; ".join(method.papers),
        "recipe": ", ".join(method.keys) or "no key selects it",
        "code": ", ".join(method.where) or method.because,
    }
    for name, text in facts.items():
        first, *more = textwrap.wrap(text, COLUMNS - 10, break_long_words=False, break_on_hyphens=False)
        yield f"  {name:<9}{first}"
        yield from (f"  {'':<9}{line}" for line in more)


def _near(name: str | None) -> str:
    import difflib

    near = difflib.get_close_matches((name or "").lower(), list(table()), n=1)
    return f". Did you mean {near[0]!r}?" if near else "."
