"""A comparison of methods as a table: for a terminal, and as a page in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evertune.comparison import Comparison

READING = "## Reading"


def comparison_page(made: Comparison, *, command: str, facts: str, before: str = "") -> str:
    """The comparison as a page in Markdown: the table, what each task came to, and every run.

    Args:
        command: that made it; `facts`: when and on what.
        before: the page as it was; its section `Reading`, which is written by hand, stays.
    """
    head, *rows = _table(made)
    lines = [
        "# Methods on one stream of tasks",
        "",
        f"    {command}",
        "",
        f"{facts}. Written by this command with `--page`.",
    ]
    lines += ["", "In points, with 90 % intervals over orders and seeds (Student's t).", "", *_markdown([head, *rows])]
    orders = "; ".join(f"{i + 1}: {', '.join(one)}" for i, one in enumerate(made.orders))
    lines += [
        "",
        f"Orders: {orders}. Seeds: {', '.join(map(str, made.seeds))}. general: probes that no task teaches, since",
    ]
    lines += [
        "the base. tokens and seconds are of training, of a run.",
        "",
        "Accuracy on each task when all are learnt, mean over the runs:",
        "",
    ]
    lines += _markdown([["method", *made.tasks], *([one, *_ends(made, one)] for one in made.methods)])
    cells = [
        [one.method, str(made.orders.index(one.order) + 1), str(one.seed), f"{100 * one.average:.1f}"]
        + ["-" if value is None else f"{100 * value:+.1f}" for value in (one.backward, one.general)]
        for one in made.runs
    ]
    lines += ["", "Every run:", "", *_markdown([["method", "order", "seed", "ACC", "BWT", "general"], *cells])]
    _, found, reading = before.partition(f"\n{READING}\n")
    return "\n".join([*lines, "", READING, ""]) + (reading if found else "\nNot written yet.\n")


def _ends(made: Comparison, method: str) -> list[str]:
    """Per task in the comparison's order, the mean accuracy after a method's last task."""
    own = [one for one in made.runs if one.method == method]
    return [f"{100 * np.mean([one.matrix[-1][one.order.index(task)] for one in own]):.1f}" for task in made.tasks]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(cells)} |" for cells in rows)
    return [head, f"|{'---|' * len(rows[0])}", *rest]


def comparison_lines(made: Comparison) -> list[str]:
    """The table for a terminal, in points, with 90 % intervals over runs where there are several."""
    runs = len(made.orders) * len(made.seeds)
    head = f"{len(made.tasks)} tasks ({', '.join(made.tasks)}), {len(made.orders)} orders, {len(made.seeds)} seeds"
    table = _table(made)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [head, ""]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    note = "in points; 90 % intervals over the runs" if runs > 1 else "in points; one run a method, so no intervals"
    return [*lines, "", f"{note}. general: probes that no task teaches, since the base."]


def _table(made: Comparison) -> list[list[str]]:
    columns = [
        "ACC",
        "BWT",
        "forgetting",
        "general",
        f"ACC - {made.methods[0]}",
        "new rows",
        "tokens",
        "seconds",
        "peak MB",
    ]
    table = [["method", *columns]]
    for method in made.methods:
        one = made.summary(method)
        cells = [_cell(one["average"], signed=False), _cell(one["backward"]), _cell(one["forgetting"], signed=False)]
        cells += [_cell(one["general"]), _cell(one["against_first"]) if method != made.methods[0] else ""]
        cells += [f"{one[name]:,.0f}" for name in ("new_rows", "tokens", "seconds")]
        table.append([method, *cells, f"{one['peak_bytes'] / 1e6:,.0f}"])
    return table


def _cell(found: Mapping[str, Any] | None, *, signed: bool = True) -> str:
    if found is None:
        return "-"
    mean = f"{100 * found['mean']:+.1f}" if signed else f"{100 * found['mean']:.1f}"
    if found["ci90"] is None:
        return mean
    return f"{mean} ± {100 * (found['ci90'][1] - found['mean']):.1f}"
