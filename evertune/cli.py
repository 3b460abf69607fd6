"""The command line: arguments in, one call out. Heavy imports happen inside the commands that need them.

Exit codes: 0 fine or promoted, 1 a bug (the traceback goes to a file), 2 held, 3 bad input, 4 inconclusive,
5 integrity or environment.
"""

import copy
import gc
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from evertune.commands.advise import app as advise_app
from evertune.commands.audit import audit
from evertune.commands.blame import blame
from evertune.commands.compare import compare
from evertune.commands.data import app as data_app
from evertune.commands.federated import app as federated_app
from evertune.commands.gate import EXIT_OF_DECISION, gate
from evertune.commands.merge import app as merge_app
from evertune.commands.methods import methods
from evertune.commands.monitor import monitor
from evertune.commands.safety import safety
from evertune.commands.steps import steps
from evertune.commands.watch import watch
from evertune.errors import EvertuneError, RecipeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep one language model learning: train an update, prove nothing was lost, promote it or hold it.",
)
model_app = typer.Typer(no_args_is_help=True, help="Fetch and list bundled models.")
app.add_typer(model_app, name="model")
app.command()(gate)
app.command()(blame)
app.command()(audit)
app.command()(safety)
app.command()(monitor)
app.command()(compare)
app.command()(watch)
data_app.command()(steps)
app.add_typer(data_app, name="data")
app.add_typer(merge_app, name="merge")
app.add_typer(federated_app, name="federated")
app.command()(methods)
app.add_typer(advise_app, name="advise")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
WorkspacePath = Annotated[Path, typer.Argument(metavar="WORKSPACE", help="The folder of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override, as rounds[0].stages[0].sft.lr=1e-4.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="A new or empty folder.")] = Path()) -> None:
    """Write a commented recipe that runs, with starter data and probes."""
    from evertune.recipe.starter import write_starter

    for path in write_starter(folder):
        _say(f"wrote {path}")
    _say(f"next: evertune check {folder / 'recipe.yaml'}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from evertune.recipe.json_schema import recipe_json_schema

    _print_json(recipe_json_schema())


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    sample: Annotated[int, typer.Option(min=0, help="Show this many rows with the counted tokens marked.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find everything that can be known before training: syntax, data, leaks, templates, disk, time."""
    # numpy's BLAS starts a thread for each core as it is imported, and a check multiplies nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from evertune.check import check_recipe, print_report
    from evertune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or ())
    report = check_recipe(loaded, sample=sample)
    if as_json:
        _print_json(report.to_json())
    else:
        print_report(report)
    raise typer.Exit(3 if report.has_errors else 0)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Run a recipe, or what is missing of it, and write the report."""
    from evertune.display import Display

    loaded = _checked(recipe, overrides)
    display = Display(quiet=quiet)
    from evertune.run import run_recipe

    try:
        outcome = run_recipe(loaded, display=display)
    except KeyboardInterrupt:
        display.line("\nStopped. What is finished is kept; the same command goes on from here.")
        raise typer.Exit(130) from None
    workspace = loaded.resolve(loaded.recipe.workspace)
    out = workspace / "report.html"
    _write_report(workspace, out)
    display.line(f"\n{outcome.stages_run} stages trained, {outcome.probes_run} probes scored now.  report: {out}")
    raise typer.Exit(EXIT_OF_DECISION[outcome.last])


@app.command()
def report(
    workspace: WorkspacePath,
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Render the ledger of a run as one self-contained HTML file."""
    _write_report(workspace, out)
    _say(f"report: {out}")


@app.command()
def log(workspace: WorkspacePath, as_json: AsJson = False) -> None:
    """Show what happened in a workspace, in order."""
    from evertune.lineage import log_body, open_workspace

    body = log_body(open_workspace(workspace))
    if as_json:
        _print_json(body)
        return
    from evertune.listing import log_lines

    for line in log_lines(body):
        _say(line)


@app.command()
def show(
    place: Annotated[Path, typer.Argument(metavar="WORKSPACE|CHECKPOINT", help="A workspace, or any model folder.")],
    label: Annotated[str | None, typer.Argument(help="Label in the workspace; the champion when not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint holds, what it stands on, and what to deploy."""
    from evertune.listing import show_body, show_lines

    body = show_body(place, label)
    if as_json:
        _print_json(body)
        return
    for line in show_lines(body):
        _say(line)


@app.command()
def promote(
    workspace: WorkspacePath,
    label: Annotated[str, typer.Argument(help="Label of the checkpoint.")],
    reason: Annotated[str, typer.Option(help="Why: it is kept in the ledger.")],
) -> None:
    """Make a checkpoint the champion by your own decision."""
    from evertune.lineage import open_workspace
    from evertune.lineage import promote as decide

    event = decide(open_workspace(workspace), label, reason=reason)
    _say(f"champion: {event.body['label']} ({event.body['checkpoint'][:12]})")


@app.command()
def rollback(
    workspace: WorkspacePath,
    label: Annotated[str | None, typer.Argument(help="Label to return to; the champion before this one.")] = None,
    reason: Annotated[str, typer.Option(help="Why: it is kept in the ledger.")] = "",
) -> None:
    """Return to an earlier champion."""
    from evertune.lineage import open_workspace, roll_back

    event = roll_back(open_workspace(workspace), label, reason=reason)
    _say(f"champion: {event.body['label']} ({event.body['checkpoint'][:12]}), was {event.body['from']}")


@app.command()
def export(
    workspace: WorkspacePath,
    label: Annotated[str | None, typer.Argument(help="Label of the checkpoint; the champion when not given.")] = None,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")] = Path("exported-model"),
    form: Annotated[Literal["weights", "adapter"], typer.Option("--as", help="Folded, or one adapter.")] = "weights",
) -> None:
    """Write a checkpoint as a plain model folder or as one adapter, with a model card."""
    from evertune.listing import export_checkpoint

    export_checkpoint(workspace, label, out, form=form)
    _say(f"wrote {out}")


@app.command()
def verify(workspace: WorkspacePath, as_json: AsJson = False) -> None:
    """Read every byte of a workspace again and name what was altered."""
    from evertune.ledger import verify_workspace
    from evertune.lineage import open_workspace

    opened = open_workspace(workspace)
    problems = verify_workspace(opened.workspace, opened.ledger)
    objects = len(opened.workspace.keys())
    if as_json:
        found = [{"place": one.place, "found": one.found, "expected": one.expected} for one in problems]
        _print_json({"workspace": str(workspace), "objects": objects, "clean": not problems, "problems": found})
    else:
        for one in problems:
            _say(f"{one.place}: found {one.found}, expected {one.expected}")
        _say(f"{objects} objects read, {len(problems)} problems" if problems else f"{objects} objects read, all clean")
    raise typer.Exit(5 if problems else 0)


@app.command()
def doctor() -> None:
    """Say what this machine offers and what is missing."""
    from evertune.listing import doctor_lines

    for line in doctor_lines():
        _say(line)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data and run go.")] = Path("demo-run"),
) -> None:
    """Run the demo: teach two skills, once carelessly and once protected, and see which update passes."""
    from evertune.demo import write_demo

    recipe = write_demo(folder)
    model_get("smollm2-135m")
    run(recipe, overrides=["workspace=run"])


@model_app.command("get")
def model_get(name: Annotated[str, typer.Argument(help="smollm2-135m, tiny-random, or a .gguf file.")]) -> None:
    """Fetch a bundled model, or import a .gguf file, once, and verify it."""
    from evertune.model.bundled import fetch_bundled

    _say(f"{name}: {fetch_bundled(name)}")


def main() -> NoReturn:
    """Entry of the `evertune` command; turns every error into its exit code."""
    # Hardly anything that a command imports is ever garbage: looked through at the usual rate, and once more at the
    # end, it takes a tenth of the time of a check.
    gc.set_threshold(200_000)
    try:
        _main()
    finally:
        gc.freeze()


def _asked(name: str = "") -> typer.Typer:
    """The app with what has this name alone, where something has: to build all takes longer than many a command."""
    commands = [one for one in app.registered_commands if one.callback and _spelt(one.callback) == name]
    groups = [one for one in app.registered_groups if one.name == name]
    if not commands and not groups:
        return app
    chosen = copy.copy(app)
    # One command alone would be the program itself, without a name.
    other = [one for one in app.registered_commands if one.callback is doctor]
    chosen.registered_commands, chosen.registered_groups = [*commands, *other], groups
    return chosen


def _spelt(command: Callable[..., Any]) -> str:
    return command.__name__.replace("_", "-")


def _main() -> NoReturn:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows each line when it happens, not when a buffer is full.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        code = _asked(*sys.argv[1:2])(standalone_mode=False)
    except EvertuneError as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        _complain(f"WorkspaceError: {error.filename or 'the system'}: {error.strerror or error}")
        sys.exit(5)
    except Exception as error:
        if hasattr(error, "format_message"):
            # A wrong command line. Typer carries a click of its own, so the class cannot be named for all versions.
            if not error.format_message():
                sys.exit(0)  # no arguments at all: the help was printed
            _complain(f"{error.format_message()} See 'evertune --help'.")
            sys.exit(3)
        _complain(f"This is a bug in Evertune: {type(error).__name__}: {error}\nTraceback: {_keep_traceback()}")
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _checked(recipe: Path, overrides: list[str] | None) -> Any:
    from evertune.check import check_recipe
    from evertune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or ())
    errors = [one for one in check_recipe(loaded).findings if one.severity == "error"]
    if errors:
        lines = "\n".join(f"  {one.place}: {one.message} {one.remedy}" for one in errors)
        raise RecipeError(f"{recipe} does not pass 'evertune check':\n{lines}")
    return loaded


def _write_report(workspace: Path, out: Path) -> None:
    from evertune.lineage import current_events, open_workspace
    from evertune.report import write_report

    write_report(current_events(open_workspace(workspace).ledger), out)


def _keep_traceback() -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="evertune-", suffix=".traceback.txt", delete=False) as file:
        file.write(traceback.format_exc())
    return Path(file.name)


def _print_json(body: Any) -> None:
    typer.echo(json.dumps(body, indent=2, ensure_ascii=False, sort_keys=True))


def _say(text: str) -> None:
    typer.echo(text)


def _complain(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    main()
