"""The page of `benchmarks.claims`: a table of verdicts and drawings in SVG, made of the results alone.

Drawings carry their numbers in `<title>`, need no script and read on light and dark pages.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evertune.comparison_table import READING

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 34, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00")
SHAPES = ("circle", "square", "diamond", "triangle", "circle")
STYLE = (
    "text{font:12px sans-serif;fill:#767676}.h{font-weight:bold}.a{stroke:#767676;stroke-width:1}"
    ".g{stroke:#767676;stroke-opacity:.25}.t{stroke:#d55e00;stroke-dasharray:4 3}"
)
Results = Mapping[str, Mapping[str, Any]]


def write_page(found: Results, says: Mapping[str, str], place: Path) -> None:
    """Write the page, and its drawings beside it in `images/`.

    Args:
        says: all statements by name, in the order of the page; those without a result are named as not run.

    A section `Reading`, which is written by hand, stays.
    """
    images = place.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    ordered = {name: found[name] for name in says if name in found}
    (images / "evidence.svg").write_text(intervals_svg(ordered), encoding="utf-8")
    for name, one in ordered.items():
        for i, plot in enumerate(one["plots"]):
            (images / f"evidence-{name}-{i + 1}.svg").write_text(points_svg(plot), encoding="utf-8")
    before = place.read_text(encoding="utf-8") if place.is_file() else ""
    _, found_reading, reading = before.partition(f"\n{READING}\n")
    place.write_text(page_of(ordered, says) + found_reading + reading, encoding="utf-8")


def page_of(found: Results, says: Mapping[str, str]) -> str:
    """The page in Markdown."""
    lines = [
        "# Evidence",
        "",
        "Published statements, tried again by",
        "",
        "    python -m benchmarks.claims --data DATA --folder WORK",
        "    python -m benchmarks.claims --folder WORK --page docs/evidence.md",
        "",
        "whose head says what is trained and how a verdict is read. The second command writes this page. Each is one",
        "small model, one seed unless the statement is about seeds or runs, and few items: what does not hold here may",
        "hold elsewhere. Intervals are 90 %.",
        "",
        "| | statement | figure | 90 % | holds above | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        has_figure = math.isfinite(one["figure"])
        figure = f"{one['figure']:.3g} | {one['low']:.3g} to {one['high']:.3g}" if has_figure else "none | none"
        lines.append(f"| {name} | {one['says']} | {figure} | {one['threshold']:g} | **{one['verdict']}** |")
    lines += ["", "![Figures with their intervals, each about its threshold](images/evidence.svg)", ""]
    for name, one in found.items():
        lines += [f"**{name}**: {one['reading']}.", ""]
        for i, plot in enumerate(one["plots"]):
            lines += [f"![{plot['title']}: {plot['y']} against {plot['x']}](images/evidence-{name}-{i + 1}.svg)", ""]
    rest = [f"{name} ({text})" for name, text in says.items() if name not in found]
    if rest:
        lines += ["Not run: " + "; ".join(rest), ""]
    sizes = {
        f"{one['date']}, {one['machine']}, {one['cores']} cores, {one['base']}, {one['rows']} rows a task, "
        f"{one['items']} items, {one['texts']} texts"
        for one in found.values()
    }
    minutes = sum(one["minutes"] for one in found.values())
    if sizes:
        lines += [f"Run: {'; '.join(sorted(sizes))}; {minutes:.0f} minutes in all.", ""]
    return "\n".join(lines)


def intervals_svg(found: Results) -> str:
    """A bar for each claim's interval and a dot for its figure, less the threshold, in units of the larger side."""
    row, left, width = 24, 112, 560
    height = TOP + row * len(found) + 12
    middle = left + (width - left - 112) / 2
    body = [f'<line class="t" x1="{middle}" y1="{TOP - 6}" x2="{middle}" y2="{height - 8}"/>']
    body.append(f'<text class="h" x="{middle}" y="18" text-anchor="middle">does not hold | holds</text>')
    for i, (name, one) in enumerate(found.items()):
        y = TOP + row * i + 10
        body.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<text x="{width - 104}" y="{y + 4}">{escape(one["verdict"])}</text>')
        if not math.isfinite(one["figure"]):
            continue
        offsets = [one[key] - one["threshold"] for key in ("low", "figure", "high")]
        room = middle - left - 6
        scale = room / (max((abs(value) for value in offsets if math.isfinite(value)), default=0.0) or 1.0)
        # A resample without a figure counts as minus infinity: its bar goes to the edge.
        low, figure, high = (middle + min(max(scale * value, -room), room) for value in offsets)
        told = f"{one['figure']:.3g} ({one['low']:.3g} to {one['high']:.3g}), threshold {one['threshold']:g}"
        body.append(f"<g><title>{escape(name)}: {told}</title>")
        body.append(f'<line stroke="{COLOURS[0]}" stroke-width="3" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>')
        body.append(f'<circle fill="{COLOURS[0]}" cx="{figure:.1f}" cy="{y}" r="5"/></g>')
    return _svg(width, height, "Figures and 90 % intervals about their thresholds, each on its own scale", body)


def points_svg(plot: Mapping[str, Any]) -> str:
    """Points, joined where `lines` says so, with a legend; series differ in colour and in shape."""
    series: Mapping[str, Sequence[Sequence[float]]] = plot["series"]
    points = [one for each in series.values() for one in each]
    across, up = (_ticks([one[k] for one in points]) for k in (0, 1))
    x_of = _scale(across, LEFT, WIDTH - RIGHT)
    y_of = _scale(up, HEIGHT - BOTTOM, TOP)
    body = [f'<text class="h" x="{LEFT}" y="18">{escape(plot["title"])}</text>']
    for value in across:
        x = x_of(value)
        body.append(f'<line class="g" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    for value in up:
        y = y_of(value)
        body.append(f'<line class="g" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    body.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(plot["x"])}</text>')
    turn = f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    body.append(f'<text transform="{turn}" text-anchor="middle">{escape(plot["y"])}</text>')
    for i, (name, each) in enumerate(series.items()):
        colour, shape = COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]
        places = [(x_of(x), y_of(y)) for x, y in each]
        if plot["lines"]:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            body.append(f'<polyline fill="none" stroke="{colour}" stroke-opacity=".6" points="{path}"/>')
        for (x, y), (own_x, own_y) in zip(places, each, strict=True):
            body.append(f"<g><title>{escape(name)}: {own_x:.4g}, {own_y:.4g}</title>{_mark(shape, x, y, colour)}</g>")
        row = HEIGHT + 16 * i + 4
        body.append(_mark(shape, LEFT + 6, row - 4, colour) + f'<text x="{LEFT + 18}" y="{row}">{escape(name)}</text>')
    return _svg(WIDTH, HEIGHT + 16 * len(series) + 2, f"{plot['title']}: {plot['y']} against {plot['x']}", body)


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    return "\n".join([f'{head} aria-label="{escape(label)}">', f"<style>{STYLE}</style>", *body, "</svg>", ""])


def _mark(shape: str, x: float, y: float, colour: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    corners = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }[shape]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose the values."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _scale(ticks: Sequence[float], start: float, end: float) -> Any:
    return lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0])
