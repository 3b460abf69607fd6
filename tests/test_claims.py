"""The claims' statistics and drawings on numbers that can be redone on paper; a network with its units renamed."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from benchmarks.claims import CLAIMS, Point, barrier_of, matched_pairs
from benchmarks.claims_bench import bootstrap, renamed_units, spearman, verdict_of
from benchmarks.claims_page import page_of, points_svg, write_page
from tests.tiny import write_tiny_model


def test_the_verdict_is_read_off_the_interval():
    assert verdict_of(0.8, 0.6, 0.9, 0.5) == "holds"
    assert verdict_of(0.3, 0.1, 0.4, 0.5) == "does not"
    assert verdict_of(0.6, 0.4, 0.9, 0.5) == "undecided"
    assert verdict_of(float("nan"), 0.6, 0.9, 0.5) == "undecided"


def test_the_bootstrap_of_a_mean_is_about_its_normal_interval():
    values = np.random.default_rng(1).normal(size=200)
    figure, low, high = bootstrap(lambda chosen: float(values[chosen].mean()), len(values))
    half = 1.645 * values.std() / np.sqrt(200)
    assert figure == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_a_resample_without_a_figure_counts_as_worst():
    _, low, high = bootstrap(lambda chosen: float("nan") if 0 in chosen else 1.0, 2)
    assert (low, high) == (-np.inf, 1.0)


def test_rank_correlation_agrees_with_scipy_and_ties_share_their_rank():
    draw = np.random.default_rng(2)
    a, b = draw.integers(0, 6, 20), draw.normal(size=20)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_pairs_of_equal_gain_differ_in_one_thing_alone():
    def point(name: str, lr: float, epochs: int, gain: float) -> Point:
        return Point(name, lr, epochs, gain, np.zeros(1))

    points = [point("a", 1e-3, 1, 0.5), point("b", 1e-3, 2, 0.53), point("c", 4e-3, 2, 0.55), point("d", 4e-3, 1, 0.8)]
    assert [(one.name, two.name) for one, two in matched_pairs(points, "epochs")] == [("a", "b")]
    assert [(one.name, two.name) for one, two in matched_pairs(points, "lr")] == [("b", "c")]


def test_a_barrier_is_measured_from_the_line_between_the_ends():
    # The line is at 0.2 + share * 0.2; at a half it is at 0.3, and the path 0.4 above it.
    assert barrier_of([0.2, 0.7, 0.4], [0.0, 0.5, 1.0]) == pytest.approx(0.4)
    assert barrier_of([0.2, 0.1, 0.4], [0.0, 0.5, 1.0]) == 0.0


def test_renamed_units_are_the_same_function_with_other_weights(tmp_path: Path):
    write_tiny_model(tmp_path / "model")
    renamed_units(tmp_path / "model", tmp_path / "other", seed=3)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / one).float() for one in ("model", "other")]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        first, second = (one(input_ids=ids).logits for one in models)
    torch.testing.assert_close(first, second, atol=2e-5, rtol=1e-4)
    for (name, mine), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # Norms are all ones.
        assert mine.ndim == 1 or not torch.equal(mine, theirs), name
    with torch.no_grad():
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
        assert (models[0](input_ids=ids).logits - first).abs().mean() > 0.1 * first.abs().mean()


def result(figure: float, **more: object) -> dict[str, object]:
    facts = {"date": "2026-11-26", "machine": "x86_64", "cores": 2, "base": "tiny", "rows": 1, "items": 2, "texts": 3}
    values = {"figure": figure, "low": figure - 0.1, "high": figure + 0.1, "threshold": 0.5, "verdict": "holds"}
    return {**values, "reading": "it is so", "says": "More is more.", "plots": [], "minutes": 2.0, **facts, **more}


def test_the_page_shows_what_has_run_and_names_what_has_not(tmp_path: Path):
    plot = {"title": "A & B", "x": "gain", "y": "loss", "lines": True, "series": {"one": [[0.0, 1.0], [0.5, 3.0]]}}
    found = {"kl": result(0.8, plots=[plot]), "soup": result(float("nan"), verdict="undecided")}
    says = {name: str(one.__doc__) for name, one in CLAIMS.items()}
    write_page(json.loads(json.dumps(found)), says, tmp_path / "evidence.md")
    page = (tmp_path / "evidence.md").read_text()
    assert "| kl | More is more. | 0.8 | 0.7 to 0.9 | 0.5 | **holds** |" in page
    assert "| soup | More is more. | none | none | 0.5 | **undecided** |" in page
    assert "Not run: factors (" in page and "self-sft (" in page
    for name in ("evidence.svg", "evidence-kl-1.svg"):
        assert f"images/{name}" in page
        ElementTree.parse(tmp_path / "images" / name)
    (tmp_path / "evidence.md").write_text(f"{page}\n## Reading\n\nBy hand.\n")
    write_page(json.loads(json.dumps({"kl": found["kl"]})), says, tmp_path / "evidence.md")
    again = (tmp_path / "evidence.md").read_text()
    assert "| soup" not in again and again.endswith("\n## Reading\n\nBy hand.\n")


def test_a_page_of_nothing_says_that_nothing_has_run():
    assert "Not run: kl (so)" in page_of({}, {"kl": "so"})


def test_points_are_drawn_in_scale():
    series = {"one": [[0.0, 0.0], [1.0, 4.0]], "two": [[0.5, 2.0]]}
    tree = ElementTree.fromstring(points_svg({"title": "t", "x": "x", "y": "y", "lines": False, "series": series}))
    space = "{http://www.w3.org/2000/svg}"
    places = {
        group.find(f"{space}title").text: group.find(f"{space}circle")
        for group in tree.iter(f"{space}g")
        if group.find(f"{space}circle") is not None
    }
    low, high = places["one: 0, 0"], places["one: 1, 4"]
    (corners,) = [one.get("points") for one in tree.iter(f"{space}polygon")][:1]
    middle = np.mean([[float(value) for value in corner.split(",")] for corner in corners.split()], axis=0)
    for k, axis in enumerate(("cx", "cy")):
        assert middle[k] == pytest.approx((float(low.get(axis)) + float(high.get(axis))) / 2, abs=0.1)
