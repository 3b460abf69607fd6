"""The page: a jinja2 template with autoescape, filters that make hidden characters visible, and an atomic write."""

import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from evertune.errors import WorkspaceError
from evertune.ledger import Event
from evertune.report import charts
from evertune.report.story import Report, build_report
from evertune.workspace import write_atomically

FOLDER = Path(__file__).parent
SHOWN_CHARACTERS = 400


def render(report: Report) -> str:
    """One HTML document; the same report gives the same bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "number": number, "signed": signed, "moment": moment, "yaml": as_yaml}
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        r=report,
        style=style,
        charts=charts,
        edges=_edges(report),
        stage_losses=_losses(report),
        trends=_trends(report),
        rescue_curves=_rescue_curves(report),
        shown=SHOWN_CHARACTERS,
    )


def write_report(events: Sequence[Event], out: Path) -> None:
    """Render events and write the file at once.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    page = render(build_report(events))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode("utf-8"))
    except OSError as error:
        raise WorkspaceError(f"{out} cannot be written: {error.strerror}.", remedy="Name another --out.") from error


def visible(text: Any) -> str:
    """Text with control, format and bidirectional characters spelled out, so that what is shown is what is there."""
    return "".join(
        f"[U+{ord(char):04X}]"
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn") and char not in "\n\t"
        else char
        for char in str(text)
    )


def number(value: float | None, digits: int = 3) -> str:
    return "not recorded" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def moment(value: float | None) -> str:
    return "" if value is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value))


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _edges(report: Report) -> list[tuple[str, str, str]]:
    states = {row.label: row.state for row in report.rows}
    known = {row.digest: row.label for row in reversed(report.rows)}
    edges = []
    for stage in report.stages:
        if stage["start"] in known:
            edges.append((known[stage["start"]], stage["label"], states.get(stage["label"], "step")))
    for story in report.rounds:
        for one in story.rescues:
            edges.append((story.verdict["label"], one["label"], states.get(one["label"], "step")))
    return edges


def _losses(report: Report) -> list[tuple[str, Any]]:
    return [
        (
            one["label"],
            charts.lines(
                {"loss": [(float(s), float(v)) for s, v in one["losses"]]},
                label=f"loss of {one['label']}",
                x_name="step",
            ),
        )
        for one in report.stages
        if len(one["losses"]) > 1
    ]


def _trends(report: Report) -> dict[str, Any]:
    """Score of each probe over the champions, in order."""
    kept = [row for row in report.rows if row.label == "base" or row.state in ("promoted", "champion")]
    found = {}
    for j, column in enumerate(report.columns):
        points = [(float(i), cell.value) for i, row in enumerate(kept) if (cell := row.cells[j]) is not None]
        if len(points) > 1:
            label = f"{column.name} over the promoted models: " + ", ".join(f"{value:.3f}" for _, value in points)
            found[column.name] = charts.lines({column.name: points}, label=label, x_name="promotion")
    return found


def _rescue_curves(report: Report) -> list[tuple[str, Any]]:
    curves = []
    for story in report.rounds:
        for one in story.rescues:
            if len(one["scan"]) > 1:
                names = {name for point in one["scan"] for name in point["values"]}
                bounded = {each.name for each in report.columns if each.direction == "higher"}
                series = {
                    name: [
                        (point["alpha"], point["values"][name])
                        for point in sorted(one["scan"], key=lambda p: p["alpha"])
                    ]
                    for name in sorted(names & bounded)
                }
                curves.append(
                    (story.name, charts.lines(series, label=f"rescue of {story.name}", x_name="share of the update"))
                )
    return curves
