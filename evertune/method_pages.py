"""docs/methods.md and docs/timeline.md, written from the table: `python -m evertune.method_pages docs`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from evertune.methods import MARKS, MEANING, SECTIONS, Method, methods, timeline

INTRODUCTION = """# Methods

Written from `evertune/methods.yaml`; do not edit by hand (`make docs`). `evertune methods` prints the same table.

People cite elastic weight consolidation in interviews, and nobody reports shipping it. The line between what is
validated in production and what is not is part of this product: every method has a *standing*, every run records the
standing of what it used, and a recipe cannot use an academic method without saying `academic: allow`.
"""
TIMELINE = """# Key papers by year

Written from `evertune/methods.yaml`; do not edit by hand (`make docs`). Years are those of the first version. Which of
the methods are validated in production, and where they live in the code: [methods.md](methods.md). Identifiers that no
method's row cites are from memory.

| year | paper | what it brought | methods |
|---|---|---|---|
"""


def methods_page() -> str:
    """The table in short, then every method in full, section by section."""
    return "\n".join([INTRODUCTION, *_standings(), *_marks(), *_short(), *_sections()])


def timeline_page() -> str:
    """The key papers, each with the rows of the methods it is about."""
    rows = [
        (str(one.year), _linked(one.paper), _cell(one.what), ", ".join(_row_link(name) for name in one.methods))
        for one in timeline()
    ]
    return TIMELINE + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _standings() -> Iterator[str]:
    for standing, meaning in MEANING.items():
        count = sum(one.standing == standing for one in methods().values())
        yield f"- **{standing}** ({count}): {meaning}."
    yield ""


def _marks() -> Iterator[str]:
    told = ", ".join(f"*[{mark}]* {meaning}" for mark, meaning in MARKS.items())
    yield f"Marks say where a claim comes from: {told}. A claim without a mark is the maintainers' judgement.\n"


def _short() -> Iterator[str]:
    yield "| method | standing | section | first | in the code |\n|---|---|---|---|---|"
    for one in methods().values():
        place = "yes" if one.where else "no"
        yield f"| {_row_link(one.id)} | {one.standing} | {SECTIONS[one.section]} | {one.year} | {place} |"
    yield ""


def _sections() -> Iterator[str]:
    for section, title in SECTIONS.items():
        yield f"## {title}\n"
        for one in methods().values():
            if one.section == section:
                yield from _in_full(one)


def _in_full(one: Method) -> Iterator[str]:
    yield f"### {one.id}\n"
    yield f"**{_cell(one.name)}**, {one.standing}. {_cell(one.summary)}\n"
    yield f"    {one.formula}\n"
    yield f"- Evidence: {_cell(one.evidence)}"
    yield f"- Fails: {_cell(one.failure)}"
    yield f"- Default: {_cell(one.default)}"
    yield f"- Papers: {'; '.join(_linked(paper) for paper in one.papers)}"
    if one.keys:
        yield f"- Recipe: {', '.join(f'`{key}`' for key in one.keys)}"
    places = ", ".join(_place_link(place) for place in one.where)
    yield f"- In the code: {places or one.because}\n"


def _row_link(name: str) -> str:
    return f"[{name}](methods.md#{name})"


def _place_link(place: str) -> str:
    file, _, name = place.partition(":")
    return f"[`{name}`](../{file}) in `{file}`"


def _linked(paper: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _cell(text: str) -> str:
    """Text in which Markdown finds no emphasis, link or table cell."""
    return re.sub(r"([*_|<>])", r"\\\1", text)


def write_pages(folder: Path) -> None:
    """Write both pages."""
    (folder / "methods.md").write_text(methods_page(), encoding="utf-8")
    (folder / "timeline.md").write_text(timeline_page(), encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
