"""`evertune gate`: judge any two checkpoints, or two logs of scores that another tool has written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evertune.errors import RecipeError

if TYPE_CHECKING:
    from evertune.judgement import Judged

EXIT_OF_DECISION = {"PROMOTE": 0, "HOLD": 2, "INCONCLUSIVE": 4}
ROLES = ("guard", "target", "watch")
Sides = tuple[Path, Path]


def gate(
    candidate: Annotated[
        str | None, typer.Argument(help="A model or adapter folder, a .gguf file, or a bundled name.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="BASELINE", help="The model it must not be worse than.")
    ] = None,
    probes: Annotated[
        list[Path] | None,
        typer.Option(
            "--probes",
            metavar="FILE",
            help="A recipe, a YAML of probes and gate, or files of items (repeat it); a general suite when not given.",
        ),
    ] = None,
    from_lm_eval: Annotated[
        Sides | None, typer.Option("--from-lm-eval", metavar="OLD NEW", help="Two outputs of lm-eval --log_samples.")
    ] = None,
    from_inspect: Annotated[
        Sides | None, typer.Option("--from-inspect", metavar="OLD NEW", help="Two logs of Inspect, .eval or .json.")
    ] = None,
    from_scores: Annotated[
        Sides | None,
        typer.Option("--from-scores", metavar="OLD NEW", help="Two folders or files of Evertune's scores.parquet."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", metavar="EVIDENCE", help="Work the verdict of an evidence file out anew.")
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", metavar="PROBE=ROLE", help="guard (the default), target or watch; for scores and logs."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="TASK=METRIC", help="Metric (or scorer) of a task; its first when not given."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the gate, as gate.margin.probe=0.05."),
    ] = None,
    in_batches: Annotated[
        bool,
        typer.Option("--in-batches", help="Ask 50 items at a time and stop when decided: large losses cost little."),
    ] = False,
    workspace: Annotated[Path, typer.Option(help="Where scores are kept.")] = Path("gate-workspace"),
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Write Markdown.")] = None,
    evidence: Annotated[
        Path | None,
        typer.Option("--evidence", metavar="FILE", help="Write what --json prints: it replays without the models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Judge a checkpoint against another: promote (exit 0), hold (2) or inconclusive (4)."""
    sources = {
        "--against": against,
        "--from-lm-eval": from_lm_eval,
        "--from-inspect": from_inspect,
        "--from-scores": from_scores,
        "--replay": replay,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise RecipeError(
            f"evertune gate: found {' and '.join(given) or 'nothing to compare'}, expected one of: CANDIDATE --against "
            "BASELINE, --from-lm-eval OLD NEW, --from-inspect OLD NEW, --from-scores OLD NEW, --replay EVIDENCE."
        )
    if (candidate is None) != (against is None):
        raise RecipeError("evertune gate: a CANDIDATE goes with --against BASELINE, and neither without the other.")
    from evertune.display import Display

    display = Display(quiet=as_json)
    if replay is not None:
        from evertune.judgement import replay as replayed

        body = replayed(replay)
    elif candidate is not None and against is not None:
        _refuse(role, "--role", "set roles in the YAML of --probes")
        _refuse(metric, "--metric", "it is for logs")
        from evertune.judging import judge_models
        from evertune.suites import load_suite

        suite = load_suite(probes or (), overrides=overrides or ())
        done = judge_models(candidate, against, suite, workspace, display=display, in_batches=in_batches)
        body = _with_next(done, candidate)
    else:
        _refuse(probes, "--probes", "logs bring their own items")
        _refuse(in_batches, "--in-batches", "all of a log's items have been asked already")
        body = _judge_logs(from_lm_eval, from_inspect, from_scores, role, metric, overrides).to_json()
    _write(body, junit=junit, markdown=markdown, evidence=evidence)
    if as_json:
        import json

        typer.echo(json.dumps(body, indent=2, ensure_ascii=False, sort_keys=True))
    else:
        display.judgement(body)
    raise typer.Exit(EXIT_OF_DECISION[body["decision"]])


def _judge_logs(
    lm_eval: Sides | None,
    inspect: Sides | None,
    scores: Sides | None,
    role: Sequence[str] | None,
    metric: Sequence[str] | None,
    overrides: Sequence[str] | None,
) -> "Judged":
    from evertune.judging import judge_logs, judge_tables
    from evertune.suites import load_gate

    settings = load_gate(overrides or ())
    roles = _pairs(role, "--role")
    for name, one in roles.items():
        if one not in ROLES:
            raise RecipeError(f"--role {name}={one}: found {one!r}, expected one of {', '.join(ROLES)}.")
    if scores is not None:
        _refuse(metric, "--metric", "tables of scores have one metric")
        return judge_tables(*scores, gate=settings, roles=roles)
    sides = lm_eval or inspect
    if sides is None:
        raise AssertionError("no source of scores")
    tool = "lm-eval" if lm_eval else "inspect"
    return judge_logs(tool, *sides, gate=settings, roles=roles, metrics=_pairs(metric, "--metric"))


def _pairs(given: Sequence[str] | None, flag: str) -> dict[str, str]:
    found = {}
    for one in given or ():
        name, sign, value = one.partition("=")
        if not (name and sign and value):
            raise RecipeError(f"{flag} {one}: expected NAME=VALUE.")
        found[name] = value
    return found


def _refuse(value: Any, flag: str, why: str) -> None:
    if value:
        raise RecipeError(f"{flag} does not go with what is compared here: {why}.")


def _with_next(done: "Judged", candidate: str) -> dict[str, Any]:
    from dataclasses import replace

    return replace(done, next=f"evertune show {candidate}").to_json()


def _write(body: dict[str, Any], *, junit: Path | None, markdown: Path | None, evidence: Path | None) -> None:
    import json

    from evertune.renderings import to_junit, to_markdown

    files = {
        junit: lambda: to_junit(body),
        markdown: lambda: to_markdown(body),
        evidence: lambda: json.dumps(body, ensure_ascii=False, sort_keys=True) + "\n",
    }
    for path, render in files.items():
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(render(), encoding="utf-8")
