"""Small charts as SVG text: deterministic, labelled for screen readers, readable without scripts and in print."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 120


def interval_plot(difference: float, low: float, high: float, margin: float | None, *, label: str) -> Markup:
    """A dot with its interval on a line with 0 and -margin marked."""
    reach = max(abs(low), abs(high), margin or 0.0, 1e-6) * 1.1

    def x(value: float) -> str:
        return f"{80 + 76 * value / reach:.1f}"

    bar = "" if margin is None else f'<line class="margin" x1="{x(-margin)}" x2="{x(-margin)}" y1="2" y2="22"/>'
    return Markup(
        f'<svg class="interval" viewBox="0 0 160 24" role="img" aria-label="{escape(label)}">'
        f'<line class="zero" x1="80" x2="80" y1="2" y2="22"/>{bar}'
        f'<line class="range" x1="{x(low)}" x2="{x(high)}" y1="12" y2="12"/>'
        f'<circle cx="{x(difference)}" cy="12" r="4"/></svg>'
    )


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, x_name: str) -> Markup:
    """Lines over a common x axis, each named at its end; axes carry the least and largest value."""
    points = [point for one in series.values() for point in one]
    if not points:
        return Markup("")
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> str:
        across = 40 + (WIDTH - 130) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)
        up = HEIGHT - 22 - (HEIGHT - 34) * ((y - y0) / (y1 - y0) if y1 > y0 else 0.5)
        return f"{across:.1f},{up:.1f}"

    parts = [f'<svg class="lines" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts.append(f'<text x="36" y="16" text-anchor="end">{y1:.3g}</text>')
    parts.append(f'<text x="36" y="{HEIGHT - 22}" text-anchor="end">{y0:.3g}</text>')
    parts.append(f'<text x="40" y="{HEIGHT - 4}">{escape(x_name)} {x0:g} to {x1:g}</text>')
    for i, (name, one) in enumerate(series.items()):
        path = " ".join(place(x, y) for x, y in one)
        end_x, end_y = place(*one[-1]).split(",")
        parts.append(f'<polyline class="line line{i % 6}" points="{path}"/>')
        parts.append(f'<circle class="dot dot{i % 6}" cx="{end_x}" cy="{end_y}" r="3"/>')
        parts.append(f'<text x="{float(end_x) + 6:.1f}" y="{float(end_y) + 4:.1f}">{escape(name[:14])}</text>')
    return Markup("".join([*parts, "</svg>"]))


def lineage(edges: Sequence[tuple[str, str, str]], champion: str) -> Markup:
    """Boxes from left to right by depth: parent, child and the child's state; held ones dashed, the champion bold."""
    depth: dict[str, int] = {}
    for parent, child, _ in edges:
        depth.setdefault(parent, 0)
        depth[child] = depth[parent] + 1
    if not depth:
        return Markup("")
    columns: dict[int, list[str]] = {}
    for name, level in depth.items():
        columns.setdefault(level, []).append(name)
    place = {
        name: (10 + 210 * level, 12 + 46 * row) for level, names in columns.items() for row, name in enumerate(names)
    }
    width, height = 210 * len(columns) + 10, 46 * max(map(len, columns.values())) + 12
    states = {child: state for _, child, state in edges}
    parts = [
        f'<svg class="lineage" viewBox="0 0 {width} {height}" role="img" aria-label="Which checkpoint came from which">'
    ]
    for parent, child, state in edges:
        (x0, y0), (x1, y1) = place[parent], place[child]
        parts.append(f'<line class="{escape(state)}" x1="{x0 + 190}" y1="{y0 + 15}" x2="{x1}" y2="{y1 + 15}"/>')
    for name, (x, y) in place.items():
        state = "champion" if name == champion else states.get(name, "step")
        parts.append(f'<rect class="{escape(state)}" x="{x}" y="{y}" width="190" height="30" rx="4"/>')
        parts.append(f'<text x="{x + 8}" y="{y + 20}">{escape(name[:28])}</text>')
    return Markup("".join([*parts, "</svg>"]))
