"""The page: jinja2 templates with autoescape on everything, and an atomic write."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from evertune.errors import WorkspaceError
from evertune.ledger import Event
from evertune.report import charts
from evertune.report.story import Report, build_report, gain_text
from evertune.report.text import FILTERS, next_command
from evertune.workspace import write_atomically

FOLDER = Path(__file__).parent


def render(report: Report) -> str:
    """One HTML document; the same report gives the same bytes."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return _templates().get_template("page.html.j2").render(r=report, style=style)


def write_report(events: Sequence[Event], out: Path) -> None:
    """Render events and write the file at once: a reader sees the old page or the new one, never half of one.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    page = render(build_report(events))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page.encode("utf-8"))
    except OSError as error:
        raise WorkspaceError(f"{out} cannot be written: {error.strerror}.", remedy="Name another --out.") from error


@functools.cache
def _templates() -> jinja2.Environment:
    # Compiling takes a third of a report's time; compiled templates lie where Python keeps its own.
    compiled = FOLDER / "__pycache__"
    is_kept = compiled.is_dir() and os.access(compiled, os.W_OK) and not sys.dont_write_bytecode
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        bytecode_cache=jinja2.FileSystemBytecodeCache(str(compiled)) if is_kept else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    environment.globals |= {"charts": charts, "gain_text": gain_text, "next_command": next_command}
    return environment
