"""What a person sees while a run goes on: one live line a stage, the matrix growing, the verdict with its reasons.

On a terminal the lines are coloured and a stage's line is updated in place; without one, or with `CI` set, the same
facts are plain lines.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from evertune.consolidation import Best, gain
from evertune.durations import duration
from evertune.gate import Verdict
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe
from evertune.workspace import Workspace

COLOURS = {"PROMOTE": "bold green", "HOLD": "bold red", "INCONCLUSIVE": "bold yellow"}
# A fall is told when its p-value, adjusted over the probes, is below.
SHOWN = 0.05
# Width of a log file, where there is no terminal to ask.
LOG_COLUMNS = 120
OUTCOME_COLOURS = {"pass": "green", "harm": "red", "too_few": "yellow", "undecided": "yellow", "watch": "dim"}


class Display:
    """Writes progress to a console; holds the rows of the matrix seen so far.

    Args:
        quiet: write nothing.
        console: a rich console; the process's standard output when not given.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        if console is None and not self._console.is_terminal:
            self._console.width = LOG_COLUMNS
        self._live = self._console.is_terminal and not os.environ.get("CI")
        self._first_row = True

    def recovered(self, recovery: Any, adopted: Sequence[Any]) -> None:
        """Say what an interrupted run left behind, if anything."""
        for line in recovery.lines():
            self._console.print(f"[yellow]recovered[/] {escape(line)}")
        if adopted:
            self._console.print(f"[yellow]recovered[/] {len(adopted)} finished steps that were not yet in the ledger")

    def round_begins(self, name: str, champion: str) -> None:
        """Head a round with what it will be judged against."""
        self._console.print(f"\n[bold]Round {escape(name)}[/]  [dim]against {escape(champion)}[/]")

    @contextlib.contextmanager
    def stage(self, label: str, key: str, workspace: Workspace) -> Iterator[Callable[[], None]]:
        """One live line while a stage trains, fed from its metrics file; one line when it is done."""
        metrics = workspace.work / key / "metrics.jsonl"
        began = time.monotonic()
        state: dict[str, Any] = {}
        if not self._live:
            self._console.print(f"  training {escape(label)}")
        with self._status(f"{label}: starting") as status:

            def watch() -> None:
                last = last_line(metrics)
                if last is not None:
                    state.update(last)
                    status(f"{label}: {progress(state, time.monotonic() - began)}")

            yield watch
            watch()
        self._console.print(f"  made     {escape(label)}  [dim]{progress(state, time.monotonic() - began)}[/]")

    @contextlib.contextmanager
    def probing(self, label: str, probes: int) -> Iterator[Callable[[], None]]:
        """One live line while a checkpoint is scored."""
        began = time.monotonic()
        with self._status(f"{label}: scoring {probes} probes") as status:
            yield lambda: status(f"{label}: scoring {probes} probes, {time.monotonic() - began:.0f} s")

    @contextlib.contextmanager
    def rescuing(
        self, label: str, shares: Sequence[float | tuple[float, ...]], toward: str
    ) -> Iterator[Callable[[], None]]:
        """One live line while interpolations are scored in memory."""
        began = time.monotonic()
        numbers = [share for share in shares if not isinstance(share, tuple)]
        what = ", ".join(f"{share:g}" for share in numbers) if numbers else f"{len(shares)} points by blocks of layers"
        self._console.print(f"  rescue   interpolating {escape(label)} toward {escape(toward)}: {what} of the update")
        with self._status(f"{label}: scoring interpolations") as status:
            yield lambda: status(f"{label}: scoring interpolations, {time.monotonic() - began:.0f} s")

    def matrix_row(self, label: str, probes: Sequence[AnyProbe], scores: Mapping[str, ItemScores]) -> None:
        """One row of R[i, j]; the head of the table before the first."""
        widths = [max(len(one.name), 9) for one in probes]
        if self._first_row:
            heads = "  ".join(one.name.rjust(width) for one, width in zip(probes, widths, strict=True))
            roles = "  ".join(one.role.rjust(width) for one, width in zip(probes, widths, strict=True))
            self._console.print(f"\n[bold]{escape('R[stage, probe]'.ljust(26) + heads)}[/]")
            self._console.print(f"[dim]{''.ljust(26)}{roles}[/]")
            self._first_row = False
        cells = "  ".join(_cell(scores[one.name]).rjust(width) for one, width in zip(probes, widths, strict=True))
        self._console.print(f"{escape(label.ljust(26))}{cells}")

    def verdict(self, label: str, verdict: Verdict, body: Mapping[str, Any], *, next_command: str) -> None:
        """The decision, the evidence per probe, the reasons, and the next command."""
        colour = COLOURS[verdict.decision]
        tried = f", one of {body['tried']} tried" if body["tried"] > 1 else ""
        self._console.print(f"\n  [{colour}]{verdict.decision}[/]  {escape(label)}[dim]{tried}[/]")
        self._console.print(evidence_table(body))
        told = _kept_forms(body)
        if told:
            self._console.print(f"[dim]{told}[/]")
        for reason in body["reasons"]:
            self._console.print(f"  - {escape(reason)}")
        self._console.print(f"  [dim]next:[/] {escape(next_command)}")

    def ways(self, best: Best) -> None:
        """What each way to consolidate a round came to, and the one that is kept."""
        for name, verdict in best.verdicts.items():
            kept = "  [bold]kept[/]" if name == best.name else ""
            told = f"{verdict.decision}, gain {100 * gain(verdict):+.1f} points"
            self._console.print(f"  best of  {escape(name.ljust(10))} {told}{kept}")

    def teachers(self, label: str, forwards: int | None) -> None:
        """How often the teachers of a stage were asked when it was made; nothing where it has none."""
        if forwards is not None:
            told = f"{forwards:,} forward passes" if forwards else "0 forward passes, every answer was in the cache"
            self._console.print(f"  teachers {escape(label)}: {told}")

    def academic(self, label: str, methods: Sequence[str]) -> None:
        """Say that a checkpoint was made with methods that nobody has validated in production, if it was."""
        if methods:
            told = f"made with {', '.join(methods)}: not production-validated"
            self._console.print(f"  [bold yellow]academic[/] {escape(label)} {escape(told)}")

    def judgement(self, body: Mapping[str, Any]) -> None:
        """A verdict without a round: decision, evidence, reasons."""
        colour = COLOURS[body["decision"]]
        names = f"{escape(body['label'])} [dim]against {escape(body['champion_label'])}[/]"
        self._console.print(f"\n[{colour}]{body['decision']}[/]  {names}")
        self._console.print(evidence_table(body))
        for reason in body["reasons"]:
            self._console.print(f"- {escape(reason)}")
        if body.get("items_asked") is not None:
            asked, in_all = body["items_asked"], body["items_in_all"]
            saved = f"{1 - asked / in_all:.0%} saved" if asked < in_all else "no early decision"
            self._console.print(f"- asked {asked:,} of {in_all:,} items of each model in batches: {saved}")

    def looks_at_held_out(self, number: int) -> None:
        self._console.print(f"  everything else passes: look {number} at the held-out probes")

    def promoted(self, round_name: str, label: str) -> None:
        self._console.print(f"  [green]champion[/] is now {escape(label)}")

    def discarded(self, round_name: str, label: str, champion: str) -> None:
        self._console.print(f"  set aside {escape(label)}; champion stays {escape(champion)}, digest unchanged")

    def erosion(self, body: Mapping[str, Any]) -> None:
        """What a stage is shown to have worn away and to have gained, since when."""
        for each in body["against"]:
            told = [
                f"{one['probe']} {one['difference']:+.3f} ({one['ci90'][0]:+.3f} to {one['ci90'][1]:+.3f})"
                f"{' worn away' if one['p_harm'] < SHOWN else ''}"
                for one in each["changes"]
                if one["p_harm"] < SHOWN or one["ci90"][0] > 0
            ]
            rest = len(each["changes"]) - len(told)
            told += [f"{rest} not shown to have moved"] if rest else []
            self._console.print(f"  since    {escape(each['since'])}: {escape(', '.join(told))}")

    def warnings(self, label: str, warnings: Sequence[Mapping[str, str]]) -> None:
        """What a person should know of how a stage ended."""
        for one in warnings:
            self._console.print(f"  [yellow]warning[/]  {escape(label)}: {escape(one['name'])}: {escape(one['text'])}")

    def line(self, text: str) -> None:
        """One plain line."""
        self._console.print(escape(text))

    @contextlib.contextmanager
    def _status(self, text: str) -> Iterator[Callable[[str], None]]:
        if not self._live:
            yield lambda text: None
            return
        with Status(escape(text), console=self._console) as status:
            yield lambda text: status.update(escape(text))


def evidence_table(body: Mapping[str, Any]) -> Table:
    """The verdict's table: one row per probe and reference; form and stop rates only where they are not kept."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("probe", "against", "n", "before", "after", "difference", "90% interval", "margin", "p (Holm)", ""):
        table.add_column(name, justify="left" if name in ("probe", "against", "") else "right")
    for one in ([body["pooled"]] if body["pooled"] else []) + body["probes"]:
        if one["role"] == "form" and one["outcome"] == "pass":
            continue
        colour = OUTCOME_COLOURS[one["outcome"]]
        low, high = one["ci90"]
        table.add_row(
            escape(one["probe"]),
            one["reference"],
            str(one["n"]),
            f"{one['before']:.3f}",
            f"{one['after']:.3f}",
            f"{one['difference']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            "" if one["margin"] is None else f"{one['margin']:.3f}",
            "" if one["p_holm"] is None else f"{one['p_holm']:.3f}",
            f"[{colour}]{one['outcome'].replace('_', ' ')}[/]",
        )
    return table


def _kept_forms(body: Mapping[str, Any]) -> str:
    forms = [one["outcome"] == "pass" for one in body["probes"] if one["role"] == "form"]
    return f"format and stop rate: {sum(forms)} of {len(forms)} comparisons kept" if forms else ""


def _cell(scores: ItemScores) -> str:
    return f"{scores.value:.3f}" + (" v" if scores.direction == "lower" else "")


def progress(state: Mapping[str, Any], seconds: float) -> str:
    """How far a stage is, from its newest metrics; what is left is as many steps as the last one took."""
    if "step" not in state:
        return f"{seconds:.0f} s"
    steps = f"/{state['steps']}" if "steps" in state else ""
    speed = f", {state['tokens_per_second']:.0f} tokens/s" if state.get("tokens_per_second") else ""
    rest = (state.get("steps", 0) - state["step"]) * state.get("seconds", 0.0)
    left = f", about {duration(round(rest))} left" if rest > 0 else ""
    return f"step {state['step']}{steps}, loss {state.get('loss', float('nan')):.3f}{speed}, {seconds:.0f} s{left}"


def last_line(path: Any) -> dict[str, Any] | None:
    """The last complete line of a growing metrics file, or None."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
    return None
