"""Where the lines of each drawing go. Plain coordinates, rounded, so that the same numbers give the same bytes; the
templates in `charts.html.j2` draw them and give each its words for a screen reader."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evertune.report.stages import Origin

# A guard's interval is drawn on a scale of this many margins to each side; what lies beyond ends in an arrow.
MARGINS_SHOWN = 4.0


@dataclass(frozen=True)
class IntervalPlot:
    """A difference with its interval about zero, on 160 x 22; `cut` names the sides it goes on beyond."""

    zero: float
    low: float
    high: float
    dot: float | None
    margin: float | None
    cut: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One named line of a chart; `dots` are the places of its points, `end` that of the last."""

    name: str
    points: str
    dots: tuple[tuple[float, float], ...]
    end_label_y: float


@dataclass(frozen=True)
class LineChart:
    """Lines over common axes. `ticks_y` and `ticks_x` hold (place, text); `zero` is the place of y = 0 if inside."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    lines: tuple[Line, ...]
    ticks_x: tuple[tuple[float, str], ...]
    ticks_y: tuple[tuple[float, str], ...]
    zero: float | None


@dataclass(frozen=True)
class Node:
    """A box of the lineage."""

    x: float
    y: float
    label: str
    state: str
    made_by: str


@dataclass(frozen=True)
class Edge:
    """A line from a parent's right side to a child's left side."""

    path: str
    state: str


@dataclass(frozen=True)
class LineageChart:
    """Boxes in columns by distance from the base, the champion's line on top."""

    width: int
    height: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 172, 44, 40, 16


def interval_plot(difference: float, low: float, high: float, margin: float | None) -> IntervalPlot:
    """A dot with its interval; with a margin the scale is four margins to each side, else the interval fills it."""
    reach = MARGINS_SHOWN * margin if margin else 1.15 * max(abs(low), abs(high), 1e-9)

    def x(value: float) -> float:
        return round(80 + 72 * max(-1.0, min(1.0, value / reach)), 1)

    cut = (("left",) if low < -reach else ()) + (("right",) if high > reach else ())
    dot = x(difference) if abs(difference) <= reach else None
    return IntervalPlot(x(0.0), x(low), x(high), dot, x(-margin) if margin else None, cut)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], *, width: int = 420, height: int = 170, labels: int = 0
) -> LineChart | None:
    """Lines over common axes; None without a line of two points.

    Args:
        series: (x, y) points by name, x rising.
        labels: pixels kept free on the right for the lines' names.
    """
    points = [point for one in series.values() for point in one]
    if not any(len(one) > 1 for one in series.values()):
        return None
    left, right, top, bottom = 52.0, width - 12.0 - labels, 10.0, height - 24.0
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    if y1 - y0 < 1e-12:
        y0, y1 = y0 - 0.5, y1 + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return round(left + (right - left) * across, 1), round(bottom - (bottom - top) * (y - y0) / (y1 - y0), 1)

    placed = {name: tuple(place(x, y) for x, y in one) for name, one in series.items() if one}
    heights = _apart([one[-1][1] for one in placed.values()], least=13.0, top=top, bottom=bottom)
    lines = tuple(
        Line(name, " ".join(f"{x:g},{y:g}" for x, y in dots), dots, end)
        for (name, dots), end in zip(placed.items(), heights, strict=True)
    )
    return LineChart(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        lines=lines,
        ticks_x=tuple((place(x, y0)[0], f"{x:g}") for x in sorted({x0, x1})),
        ticks_y=tuple((place(x0, y)[1], f"{y:.3g}") for y in (y0, y1)),
        zero=place(x0, 0.0)[1] if y0 < 0 < y1 else None,
    )


def sparkline(values: Sequence[float], *, width: int = 90, height: int = 22) -> Line | None:
    """A small line without axes; None with fewer than two values."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    step = (width - 8) / (len(values) - 1)
    dots = tuple(
        (
            round(4 + step * i, 1),
            round(height - 4 - (height - 8) * ((v - low) / (high - low) if high > low else 0.5), 1),
        )
        for i, v in enumerate(values)
    )
    return Line("", " ".join(f"{x:g},{y:g}" for x, y in dots), dots, dots[-1][1])


def shade(value: float, largest: float) -> float:
    """Opacity of a heat cell: 0.06 for nothing, 1 for the largest."""
    return round(0.06 + 0.94 * (value / largest if largest > 0 else 0.0), 2)


def lineage_chart(checkpoints: Sequence[Origin]) -> LineageChart | None:
    """The family of checkpoints from left to right; None without one."""
    if not checkpoints:
        return None
    depth: dict[str, int] = {}
    for one in checkpoints:
        depth[one.label] = depth[one.parent] + 1 if one.parent in depth else 0
    columns: dict[int, list[Origin]] = {}
    for one in checkpoints:
        columns.setdefault(depth[one.label], []).append(one)
    place: dict[str, tuple[float, float]] = {}
    nodes = []
    for level, members in columns.items():
        # Stable: what is on the champion's line comes first, the rest in the order it was made.
        for row, one in enumerate(sorted(members, key=lambda each: each.state not in ("base", "champion", "promoted"))):
            x, y = 4 + level * (BOX_WIDTH + GAP_X), 4 + row * (BOX_HEIGHT + GAP_Y)
            place[one.label] = (x, y)
            nodes.append(Node(x, y, one.label, one.state, one.made_by))
    edges = tuple(
        Edge(_curve(place[one.parent], place[one.label]), one.state) for one in checkpoints if one.parent in place
    )
    width = 8 + len(columns) * (BOX_WIDTH + GAP_X) - GAP_X
    height = 8 + max(map(len, columns.values())) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    return LineageChart(width, height, tuple(nodes), edges)


def _curve(parent: tuple[float, float], child: tuple[float, float]) -> str:
    x0, y0, x1, y1 = parent[0] + BOX_WIDTH, parent[1] + BOX_HEIGHT / 2, child[0], child[1] + BOX_HEIGHT / 2
    middle = (x0 + x1) / 2
    return f"M{x0:g} {y0:g} C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"


def _apart(places: Sequence[float], *, least: float, top: float, bottom: float) -> list[float]:
    """The same heights moved so that no two are nearer than `least`, kept inside where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for above, below in itertools.pairwise(order):
        moved[below] = max(moved[below], moved[above] + least)
    limit = bottom
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - least
    return [round(max(top, one), 1) for one in moved]
