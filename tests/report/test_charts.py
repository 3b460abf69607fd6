import itertools

import pytest

from evertune.report.charts import BOX_HEIGHT, interval_plot, line_chart, lineage_chart, shade, sparkline
from evertune.report.stages import Origin


def test_an_interval_lies_on_a_scale_of_four_margins() -> None:
    # 72 pixels for four margins of 5 points: one point is 3.6 pixels from the middle, 80.
    plot = interval_plot(-0.02, -0.04, 0.01, 0.05)
    assert (plot.zero, plot.dot, plot.low, plot.high, plot.margin) == (80, 72.8, 65.6, 83.6, 62)
    assert plot.cut == ()


def test_an_interval_beyond_the_scale_ends_in_an_arrow_and_has_no_dot() -> None:
    plot = interval_plot(-0.85, -0.9, -0.8, 0.05)
    assert (plot.low, plot.high, plot.dot, plot.cut) == (8, 8, None, ("left",))
    assert interval_plot(0.1, -0.1, 0.3, 0.05).cut == ("right",)


def test_without_a_margin_the_interval_fills_its_scale() -> None:
    plot = interval_plot(0.71, 0.68, 0.74, None)
    assert plot.margin is None
    assert plot.cut == ()
    assert 140 < plot.high < 152


def test_a_line_goes_from_corner_to_corner() -> None:
    chart = line_chart({"loss": [(1.0, 3.0), (5.0, 1.0)]}, width=200, height=100)
    assert chart is not None
    assert chart.lines[0].points == "52,10 188,76"
    assert chart.ticks_x == ((52, "1"), (188, "5"))
    assert chart.ticks_y == ((76, "1"), (10, "3"))
    assert chart.zero is None


def test_zero_is_drawn_where_the_line_crosses_it() -> None:
    chart = line_chart({"a": [(0.0, -1.0), (1.0, 3.0)]}, width=200, height=100)
    assert chart is not None
    assert chart.zero == 76 - 66 / 4


def test_a_single_point_is_no_line() -> None:
    assert line_chart({"a": [(0.0, 1.0)]}) is None
    assert sparkline([0.5]) is None


def test_a_level_line_has_a_height() -> None:
    chart = line_chart({"a": [(0.0, 2.0), (1.0, 2.0)]}, width=200, height=100)
    assert chart is not None
    assert [y for _, y in chart.lines[0].dots] == [43, 43]
    spark = sparkline([0.5, 0.5])
    assert spark is not None
    assert [y for _, y in spark.dots] == [11, 11]


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    series = {name: [(0.0, 0.0), (1.0, 1.0 + i / 100)] for i, name in enumerate("abcde")}
    chart = line_chart(series)
    assert chart is not None
    heights = sorted(one.end_label_y for one in chart.lines)
    assert all(b - a >= 13 for a, b in itertools.pairwise(heights))
    assert chart.top <= heights[0]
    assert heights[-1] <= chart.bottom


@pytest.mark.parametrize(("value", "opacity"), [(0.0, 0.06), (0.5, 0.53), (1.0, 1.0)])
def test_the_largest_drift_is_the_darkest(value: float, opacity: float) -> None:
    assert shade(value, 1.0) == opacity
    assert shade(0.0, 0.0) == 0.06


def test_the_lineage_runs_to_the_right_with_the_champions_line_on_top() -> None:
    chart = lineage_chart(
        [
            Origin("base", None, "base", "base"),
            Origin("1", "base", "promoted", "sft"),
            Origin("2-plain", "1", "held", "sft"),
            Origin("2-protected", "1", "champion", "sft"),
        ]
    )
    assert chart is not None
    place = {node.label: (node.x, node.y) for node in chart.nodes}
    assert place["base"][0] < place["1"][0] < place["2-plain"][0] == place["2-protected"][0]
    assert place["base"][1] == place["1"][1] == place["2-protected"][1] < place["2-plain"][1]
    assert chart.edges[-1].path.startswith(f"M{place['1'][0] + 172:g} {place['1'][1] + BOX_HEIGHT / 2:g} C")
    assert [edge.state for edge in chart.edges] == ["promoted", "held", "champion"]
