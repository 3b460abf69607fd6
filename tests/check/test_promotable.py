"""A gate that can never promote is said to be one before anything is trained."""

from pathlib import Path

import pytest

from evertune.check.promotable import minimum_items
from evertune.measure import stats
from tests.check.folders import check, said, write_rows


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.02, 0.03, 0.1, 0.4])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_the_fewest_items_are_those_of_the_statistics(margin: float, alpha: float) -> None:
    assert minimum_items(margin, alpha) == stats.minimum_items(margin, alpha)


def test_the_fewest_items_are_the_first_whose_bound_lies_inside_the_margin() -> None:
    # With no flip at all the lower bound of n items is above -3 points from this n on.
    n = minimum_items(0.03, 0.05)
    assert n == 88
    assert stats.tango_lower_bound(0, 0, n, 0.05) >= -0.03
    assert stats.tango_lower_bound(0, 0, n - 1, 0.05) < -0.03


def test_too_few_items_are_a_warning_that_says_how_many_are_needed(recipe: Path) -> None:
    warnings = said(check(recipe, "gate.min_items=11"), "warning")
    assert warnings == [("probes.cards", "10 items, and gate.min_items asks for 11: no round can be promoted.")]


def test_too_few_clusters_are_a_warning(recipe: Path) -> None:
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": 0, "cluster": f"c{i % 3}"} for i in range(12)]
    write_rows(recipe.parent / "probe-facts.jsonl", items)
    [(place, told)] = said(check(recipe), "warning")
    assert place == "probes.facts"
    assert told.startswith("3 clusters of items, and gate.min_clusters asks for 8")


def test_a_margin_too_tight_for_the_items_is_a_warning(recipe: Path) -> None:
    [(place, told)] = said(check(recipe, "probes.facts.margin=0.03"), "warning")
    assert (place, "that takes 88" in told) == ("probes.facts", True)
    [(place, told)] = said(check(recipe, "gate.margin.format=0.03"), "warning")
    assert (place, "form of the answers" in told) == ("probes.cards", True)
    [(place, told)] = said(check(recipe, "gate.margin.pooled=0.01"), "warning")
    assert (place, "12 items together" in told, "takes 268" in told) == ("rounds[0]", True, True)


def test_probes_that_are_only_watched_need_no_items(recipe: Path) -> None:
    report = check(recipe, "gate.min_items=11", "probes.cards.role=watch", "rounds[0].roles={facts: target}")
    assert said(report, "warning") == [
        ("rounds[0]", "no probe is a guard: it cannot be promoted, since nothing shows what is lost.")
    ]


def test_a_round_without_a_target_is_a_warning(recipe: Path) -> None:
    report = check(recipe, "probes.cards.role=guard")
    assert said(report, "warning") == [("rounds[0]", "no probe is a target: only that nothing was lost can be shown.")]
    assert said(check(recipe, "probes.cards.role=guard", "rounds[0].roles.cards=target"), "warning") == []
