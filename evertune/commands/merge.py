"""`evertune merge`: merge models, look at them before, take an adapter out after."""

import difflib
import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

DIGESTS = Path.home() / ".cache" / "evertune" / "digests.json"


class _MergeGroup(TyperGroup):
    """A group whose commands may be left out: `evertune merge CONFIG` is `evertune merge run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                ctx.fail(f"No such command or file '{args[0]}'. Did you mean '{near[0]}'?")
            args.insert(0, "run")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MergeGroup,
    no_args_is_help=True,
    help="Merge models: `evertune merge CONFIG --out FOLDER`, with our YAML or mergekit's.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A merge in YAML, ours or mergekit's.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all cores when not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@app.command("run")
def run(
    config: ConfigPath,
    out: Annotated[Path | None, typer.Option("--out", help="A new folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and every problem, from headers alone.")
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Merge models into a new folder. A merge that was killed goes on when the same command is given again."""
    with _uncollected():
        _run(config, out, dry_run=dry_run, threads=threads, as_json=as_json)


def _run(config: Path, out: Path | None, *, dry_run: bool, threads: int | None, as_json: bool) -> None:
    from evertune.errors import RecipeError
    from evertune.merge.config import load_config
    from evertune.merge.describe_plan import plan_body, plan_lines
    from evertune.merge.plan import default_threads, plan_merge
    from evertune.merge.run import check_planned, merge_planned

    loaded = load_config(config)
    plan = plan_merge(loaded, folder=config.absolute().parent, cache=DIGESTS)
    workers = threads or default_threads()
    if dry_run:
        _tell(plan_body(plan, workers), plan_lines(plan, workers), as_json=as_json)
        check_planned(plan, out)
        return
    if out is None:
        raise RecipeError("--out is missing: the folder to write.", remedy="Or give --dry-run to see the plan.")
    show = None if as_json or not os.isatty(2) else _progress
    result = merge_planned(plan, out, threads=workers, progress=show)
    if show:
        typer.echo("\r" + " " * 40 + "\r", nl=False, err=True)
    _tell(result.body(), result.lines(), as_json=as_json)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: what is imported for a merge stays until the end, and to walk it again and again, and
    once more when the process ends, costs as much as to import it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


@app.command("methods")
def methods(as_json: AsJson = False) -> None:
    """List the methods with their standing and papers."""
    from evertune.merge.methods import METHODS

    rows = [
        {"name": one.name, "standing": one.standing, "summary": one.summary, "paper": one.paper}
        for one in METHODS.values()
    ]
    lines = [f"{one['name']:<18} {one['standing']:<11} {one['summary']} ({one['paper']})" for one in rows]
    _tell(rows, lines, as_json=as_json)


@app.command("inspect")
def inspect(
    config: ConfigPath,
    text: Annotated[
        Path | None, typer.Option("--text", help="JSONL of {text} or {messages}: measure the loss barrier on it.")
    ] = None,
    points: Annotated[int, typer.Option(min=3, max=41, help="Points on each path.")] = 7,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the text.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Say before a merge whether it can work: same start, size and angle of task vectors, interference, barrier."""
    from evertune.merge.config import load_config
    from evertune.merge.inspect import inspect_models
    from evertune.merge.plan import plan_merge

    plan = plan_merge(load_config(config), folder=config.absolute().parent, cache=DIGESTS)
    loss = None if text is None else _loss_on(text, limit)
    found = inspect_models(plan, loss=loss, unit="bits per byte", points=points)
    _tell(found.body(), found.lines(), as_json=as_json)


@app.command("search")
def search(
    config: ConfigPath,
    recipe: Annotated[Path, typer.Option("--probes", metavar="RECIPE", help="A recipe: its probes are the measure.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the winner here.")] = None,
    how: Annotated[
        Literal["grid", "coordinate", "cma", "greedy"], typer.Option("--how", help="greedy is the greedy soup.")
    ] = "coordinate",
    steps: Annotated[int, typer.Option(min=1, max=50, help="Of the grid; 1 / steps is the step of the others.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Of coordinate; CMA-ES gets ten evaluations for each.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Try weights in memory on half of each probe's items, and report the winner on the other half."""
    from evertune.merge.config import load_config
    from evertune.merge_search import search_weights
    from evertune.recipe.load import load_recipe

    folder, measured = config.absolute().parent, load_recipe(recipe)
    found = search_weights(
        load_config(config), folder, measured, how=how, steps=steps, rounds=rounds, out=out, cache=DIGESTS
    )
    _tell(found.body(), found.lines(), as_json=as_json)


@app.command("extract")
def extract(
    model: Annotated[Path, typer.Argument(help="Folder of the tuned model.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the model it was tuned from.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the adapter.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    drop_rest: Annotated[
        bool, typer.Option("--drop-rest", help="Leave out changes that no adapter can hold, such as of norms.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter out of a tuned model and its base, and say how much of the change it holds."""
    from evertune.merge.extract import extract_adapter

    found = extract_adapter(model, base, out, rank=rank, drop_rest=drop_rest, cache=DIGESTS)
    _tell(found.body(), found.lines(), as_json=as_json)


def _loss_on(text: Path, limit: int) -> Any:
    """The losses, in bits per byte of a text, at points of the line between two checkpoints."""
    from evertune.merge.interpolate import scan
    from evertune.model.checkpoint import Checkpoint
    from evertune.probe.job import score_one
    from evertune.probe.suite import load_probe

    settings = {"path": str(text.absolute()), "kind": "bits_per_byte", "limit": limit}
    probe = load_probe("text", settings=settings, root=text.absolute().parent)

    def losses(first: Checkpoint, second: Checkpoint, shares: list[float]) -> list[float]:
        return scan(
            second, first, shares, dtype="float32", device="auto",
            visit=lambda share, opened: float(score_one(opened, probe).value),
        )  # fmt: skip

    return losses


def _tell(body: Any, lines: list[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(body, indent=2, ensure_ascii=False, sort_keys=True))
    else:
        for line in lines:
            typer.echo(line)


def _progress(done: int, total: int) -> None:
    typer.echo(f"\rmerging {done / max(total, 1):4.0%} of {total / 1e9:.2f} GB", nl=False, err=True)
