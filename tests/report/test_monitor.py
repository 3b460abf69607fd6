"""The five dimensions from ledgers made in the test: what pulls a trigger, what only may, what is not measured."""

from typing import Any

import pytest

from evertune.ledger import Event
from evertune.report import build_report
from evertune.report.monitor import Dimension, slope_per_round
from tests.report.story import chain, facts


def dimensions(*more: tuple[str, dict[str, Any]], monitor: dict[str, float] | None = None) -> dict[str, Dimension]:
    """Of the made-up run with more events."""
    found = facts()
    if monitor is not None:
        kind, key, body, volatile = found[0]
        found[0] = (kind, key, {**body, "recipe": {**body["recipe"], "monitor": monitor}}, volatile)
    found += [(kind, f"more-{i}", body, {}) for i, (kind, body) in enumerate(more)]
    events: list[Event] = chain(found)
    return {one.name: one for one in build_report(events).monitor}


def reading(dimension: Dimension, what: str) -> tuple[str, str]:
    return next((one.state, one.value) for one in dimension.readings if one.what == what)


def test_a_loss_within_its_trigger_is_fine_and_a_smaller_trigger_is_pulled() -> None:
    # cards: 0.96 where it was learnt, 0.95 now: -1.0 %, of 100 items.
    state, told = reading(dimensions()["Forgetting"], "cards")
    assert (state, told[:6]) == ("fine", "-1.0 %")
    state, _ = reading(dimensions(monitor={"forgetting": 0.005})["Forgetting"], "cards")
    assert state == "watch"  # beyond the trigger, and the interval holds 0
    assert dimensions(monitor={"forgetting": 0.005})["Forgetting"].state == "watch"


def test_a_loss_of_bits_counts_as_a_loss() -> None:
    # prose: 1.190 bits at the base, 1.197 now: 0.6 % worse.
    state, told = reading(dimensions()["Forgetting"], "prose")
    assert (state, told[:6]) == ("fine", "-0.6 %")


def test_a_taught_skill_is_held_against_a_retrained_model() -> None:
    # routing: 0.05 at the base, 0.76 now. Retrained 0.80: (0.76 - 0.05) / (0.80 - 0.05) = 95 %; 0.99: 76 %.
    name = "New skills against a retrain"
    assert dimensions()[name].state == "unknown"
    near = ("baseline", {"source": "retrained", "scores": {"routing": {"value": 0.80, "ci90": [0.73, 0.87]}}})
    assert reading(dimensions(near)[name], "routing")[0] == "fine"
    far = ("baseline", {"source": "retrained", "scores": {"routing": {"value": 0.99, "ci90": [0.97, 1.0]}}})
    state, told = reading(dimensions(far)[name], "routing")
    assert state == "act"
    assert "76 % of what it gains" in told


def test_safety_counts_probes_that_are_marked() -> None:
    assert dimensions()["Safety"].state == "unknown"


def test_cost_is_counted_from_the_first_round_and_pulls_at_its_share() -> None:
    state, told = reading(dimensions(monitor={"cost": 50.0})["Cost"], "updates")
    assert state == "fine" and "2 rounds since 1, against" in told
    assert reading(dimensions(monitor={"cost": 0.01})["Cost"], "updates")[0] == "act"


def test_drift_of_outputs_comes_from_an_audit_of_this_champion() -> None:
    body = {
        "label": "2-protected/1-sft",
        "reference": "base",
        "kl": {"general": {"nats": 0.25, "tokens": 900}, "taught": {"nats": 2.0, "tokens": 300}},
        "cka": [], "weights": {}, "calibration": {}, "habits": {},
    }  # fmt: skip
    drift = dimensions(("audit", body))["Drift"]
    assert reading(drift, "output on general text")[0] == "act"
    # What is taught must change.
    assert reading(drift, "output on taught text")[0] == "fine"
    assert not any("output" in one.what for one in dimensions(("audit", {**body, "label": "base"}))["Drift"].readings)


def test_a_trend_is_the_slope_of_a_line_through_the_champions() -> None:
    assert slope_per_round([0.9, 0.8, 0.7]) == pytest.approx(-0.1)
    assert slope_per_round([0.9]) is None
