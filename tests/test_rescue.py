"""The share of an update that a rescue keeps."""

from dataclasses import replace

import numpy as np
import pytest

from evertune.gate import GateSettings, ProbeFacts, judge
from evertune.rescue import choose
from tests.test_gate import BEFORE, FACTS, GUARD, TARGET, WIDE, flipped, ones, scores

ROLES = {"facts": GUARD, "skill": TARGET}


def _share(lost: int, learnt: int) -> dict[str, object]:
    return {"facts": scores("facts", flipped(FACTS, lost)), "skill": scores("skill", ones(300, learnt))}


def test_the_largest_share_that_passes_is_chosen() -> None:
    scan = {0.9: _share(40, 200), 0.7: _share(2, 150), 0.5: _share(0, 80)}
    chosen = choose(scan, BEFORE, BEFORE, ROLES, WIDE)
    assert chosen.alpha == 0.7
    assert chosen.passes == {0.9: False, 0.7: True, 0.5: True}
    assert chosen.values[0.9]["facts"] == pytest.approx(160 / 300)
    assert [one["alpha"] for one in chosen.scan_body()] == [0.9, 0.7, 0.5]


def test_when_none_passes_the_nearest_is_chosen_and_said_not_to_pass() -> None:
    # At 0.9 harm is proven; at 0.7 and 0.5 no gain is left, but at 0.5 nothing else fails.
    scan = {0.9: _share(40, 200), 0.7: _share(9, 10), 0.5: _share(0, 10)}
    chosen = choose(scan, BEFORE, BEFORE, ROLES, WIDE)
    assert chosen.alpha == 0.5
    assert not any(chosen.passes.values())


def test_the_number_tried_enters_the_correction() -> None:
    scan = {alpha: _share(6, 200) for alpha in np.linspace(0.1, 0.9, 20).round(3)}
    settings = replace(WIDE, probe=0.045, pooled=0.045)
    assert judge(scan[0.9], BEFORE, BEFORE, ROLES, settings).decision == "PROMOTE"
    assert not any(choose(scan, BEFORE, BEFORE, ROLES, settings).passes.values())


def test_a_scan_rarely_finds_a_share_that_lost_its_whole_margin() -> None:
    # Ten bad candidates with independent noise: the worst case for picking the luckiest.
    rng = np.random.default_rng(0)
    settings = GateSettings.from_json(_wide_body())
    found = {"corrected": 0, "not": 0}
    for _ in range(60):
        d = rng.choice([-1, 1, 0], size=(10, 300), p=[0.075, 0.025, 0.90])
        kept = rng.uniform(size=300) < 0.6
        verdicts = []
        for tried in (10, 1):
            passes = []
            for one in d:
                sides = [{"facts": scores("facts", np.where(one == 0, kept, one == s))} for s in (1, -1)]
                facts = {"facts": ProbeFacts("guard", False, 0.05)}
                passes.append(judge(*sides, sides[1], facts, settings, tried=tried).decision == "PROMOTE")
            verdicts.append(any(passes))
        found["corrected"] += verdicts[0]
        found["not"] += verdicts[1]
    assert found["corrected"] / 60 <= 0.12
    assert found["not"] / 60 > 0.2


def _wide_body() -> dict[str, object]:
    margin = {"pooled": 0.5, "probe": 0.5, "safety": 0.5, "loss": 0.5, "format": 0.5, "ratchet": 0.5}
    return {"alpha": 0.05, "margin": margin, "min_gain": 0.0, "min_items": 200, "min_clusters": 30}
