"""What a stage did to each capability, against the closed forms of the paired tests."""

import pytest

from evertune.erosion import changes, erosion_body
from evertune.errors import ProbeError
from evertune.hashing import canonical_json
from evertune.measure import stats
from tests.test_gate import flipped, ones, prose, scores


def test_each_probe_is_compared_item_by_item_and_falls_are_adjusted_over_the_probes() -> None:
    before = {"kept": scores("kept", ones(100, 60)), "worn": scores("worn", ones(100, 80)), "loss": prose([1.0, 2.0])}
    after = {"kept": before["kept"], "worn": scores("worn", flipped(ones(100, 80), 12, 2)), "loss": prose([1.1, 2.2])}
    kept, worn, loss = changes(after, before)
    assert (kept.difference, kept.p_harm) == (0.0, 1.0)
    assert (worn.before, worn.after, worn.difference) == pytest.approx((0.8, 0.7, -0.1))
    assert worn.ci90 == stats.tango_interval(12, 2, 100, 0.05)
    # Of three p-values, 1, McNemar's and that of two equal relative losses; the smaller two stand first.
    assert worn.p_harm == pytest.approx(stats.holm([1.0, stats.mcnemar(12, 2), 0.25])[1])
    assert (loss.unit, loss.difference) == ("percent", pytest.approx(-0.1))


def test_a_gain_is_no_harm_and_what_one_side_was_not_asked_is_left_out() -> None:
    before = {"skill": scores("skill", ones(50, 10)), "old": scores("old", ones(50, 10))}
    [gain] = changes({"skill": scores("skill", ones(50, 40)), "new": scores("new", ones(50, 10))}, before)
    assert gain.ci90[0] > 0.4
    assert gain.p_harm > 0.99


def test_other_items_are_refused() -> None:
    with pytest.raises(ProbeError, match="items"):
        changes({"a": scores("a", ones(50, 10))}, {"a": scores("a", ones(51, 10))})


def test_the_body_is_plain() -> None:
    before = {"a": scores("a", ones(50, 10))}
    [body] = erosion_body(before, {"one/1-sft": before})
    assert body["since"] == "one/1-sft"
    assert canonical_json(body)
