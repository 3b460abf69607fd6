"""The story against numbers worked out by hand, and true first sentences for ledgers that stop anywhere."""

from collections.abc import Callable
from typing import Any

import pytest

from evertune.ledger import Event
from evertune.measure import backward_transfer, retention
from evertune.report import build_report
from tests.report.hostile import everything
from tests.report.story import SCORES, chain, evidence, facts, probe, promoted, story, verdict


def _until(kind: str, label: str) -> list[Event]:
    """The story up to and with the first event of a kind and label."""
    events = story()
    end = next(i for i, one in enumerate(events) if one.kind == kind and one.body.get("label") == label)
    return events[: end + 1]


def test_the_sentence_of_a_promotion() -> None:
    expected = "Round 2-protected PROMOTED. Kept 4 of 4 guarded skills; routing +71.0 points."
    assert build_report(story()).sentence == expected


def test_the_sentence_of_a_hold_names_the_losses_worst_first() -> None:
    events = [one for one in story() if one.body.get("round") != "2-protected"]
    assert build_report(events).sentence == (
        "Round 2-plain HELD after 1 rescue tried. Lost cards −85.0 points, copying −49.0 points, "
        "knowledge −9.0 points, prose −5.6 %. Kept 0 of 4 guarded skills; routing +72.0 points."
    )


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([], "The ledger is empty: nothing has been run."),
        (_until("checkpoint", "base"), "Nothing has been measured yet: no probe was scored and no round began."),
        (_until("probe", "base")[:3], "Only the base model has been measured, on 1 probe. No round has begun."),
        (
            [one for one in story() if one.body.get("round") is None and one.body.get("label") in (None, "base")],
            "Only the base model has been measured, on 6 probes. No round has begun.",
        ),
        (_until("checkpoint", "1/1-sft"), "Round 1 has no verdict yet: 1 stage trained. The champion is base."),
        (
            _until("verdict", "1/1-sft"),
            "Round 1 passed the gate, but its promotion is not recorded yet. Kept 3 of 3 guarded skills; "
            "cards +96.0 points.",
        ),
        (
            _until("checkpoint", "2-plain/1-sft"),
            "Round 2-plain has no verdict yet: 1 stage trained. The champion is 1/1-sft.",
        ),
    ],
)
def test_a_ledger_that_stops_early_has_a_true_sentence(events: list[Event], sentence: str) -> None:
    assert build_report(events).sentence == sentence


def test_a_hold_that_stops_before_its_rescue_says_so() -> None:
    assert build_report(_until("verdict", "2-plain/1-sft")).sentence.startswith(
        "Round 2-plain HELD, its rescue not finished. Lost cards"
    )


def test_a_failed_stage_is_the_first_thing_said() -> None:
    failure = {"round": "1", "stage": "1/1-sft", "error": "loss is NaN at step 7"}
    base = facts()[:8]
    report = build_report(chain([*base, ("failure", "f", failure, {})]))
    assert report.sentence == ("Round 1 stopped without a verdict: stage 1/1-sft failed. The champion is base.")
    assert report.stopped_by == (failure,)


def test_a_failure_made_good_is_kept_but_no_longer_stops_anything() -> None:
    failure = {"round": "1", "stage": "1/1-sft", "error": "killed"}
    found = facts()
    report = build_report(chain([*found[:8], ("failure", "f", failure, {}), *found[8:]]))
    assert report.stopped_by == ()
    assert report.failures == (failure,)
    assert report.sentence == build_report(story()).sentence


def test_a_rescue_that_was_promoted_tells_its_own_numbers() -> None:
    # The candidate lost copying; the rescue kept all: the sentence must speak of what is champion now.
    scores = SCORES["2-protected/1-sft"]
    found = [one for one in facts() if one[2].get("round") != "2-protected" and "2-protected" not in one[1]]
    at = next(i for i, one in enumerate(found) if one[0] == "rescue")
    body = {**found[at][2], "decision": "PROMOTE", "label": "2-plain/rescue-0.4"}
    body["probes"] = [
        {**one, "outcome": "watch" if one["role"] == "watch" else "pass", "after": scores[0]} for one in body["probes"]
    ]
    found[at:] = [("rescue", "r2", body, {}), *promoted("2-plain", "2-plain/rescue-0.4", by="rescue")]
    report = build_report(chain(found))
    assert report.sentence == (
        "Round 2-plain PROMOTED after a rescue, which keeps 0.4 of the update. Kept 4 of 4 guarded skills; "
        "routing +35.0 points."
    )
    assert report.line == ("base", "1/1-sft", "2-plain/rescue-0.4")
    assert [row.state for row in report.matrix.rows] == ["base", "promoted", "held", "champion"]


def test_a_guard_counts_as_kept_only_against_every_reference() -> None:
    body = verdict("1", "1/1-sft", "base", "INCONCLUSIVE", target="cards")
    best = {**evidence("copying", "1/1-sft", "base", target="cards"), "reference": "best", "outcome": "undecided"}
    body["probes"].append(best)
    until = next(i for i, one in enumerate(facts()) if one[0] == "verdict")
    found = [*facts()[:until], ("verdict", "v", body, {})]
    settled = ("settled", "v", {"round": "1", "decision": "INCONCLUSIVE", "champion": "base"}, {})
    report = build_report(chain([*found, settled]))
    assert report.sentence == "Round 1 INCONCLUSIVE. Kept 2 of 3 guarded skills; cards +96.0 points."


def test_what_a_person_decided_is_said_last() -> None:
    report = build_report(chain(everything()))
    assert report.sentence.endswith(
        "Then 1/1-sft was promoted by hand. Then rolled back by hand from 1/1-sft to 2-protected/1-sft."
    )
    assert report.line[-1] == "2-protected/1-sft"


def test_what_was_rolled_back_is_not_on_the_champions_line() -> None:
    back = {"label": "1/1-sft", "from": "2-protected/1-sft", "checkpoint": "x", "reason": "r", "after": "v3"}
    report = build_report(chain([*facts(), ("rollback", "b", back, {})]))
    assert report.line == ("base", "1/1-sft")
    states = {row.label: row.state for row in report.matrix.rows}
    assert states["2-protected/1-sft"] == "rolled back"
    assert states["1/1-sft"] == "champion"


def test_transfer_and_retention_are_those_of_the_measures() -> None:
    # Skill 0, cards: learnt at 0.96, ends at 0.95. R as the literature has it: rows after round 1 and after round 2.
    R = [[0.96, 0.05], [0.95, 0.76]]
    last = build_report(story()).summaries[-1]
    assert last.transfer is not None
    assert last.retention is not None
    assert last.transfer.value == pytest.approx(backward_transfer(R)) == pytest.approx(-0.01)
    assert last.retention.value == pytest.approx(retention(R)) == pytest.approx(0.95 / 0.96)
    # Each score has a half interval of 0.04: of the difference sqrt(2) x 0.04.
    assert last.transfer.high - last.transfer.value == pytest.approx(0.04 * 2**0.5)
    assert last.transfer.value - last.transfer.low == pytest.approx(0.04 * 2**0.5)
    half = ((0.04 / 0.96) ** 2 + (0.95 / 0.96 * 0.04 / 0.96) ** 2) ** 0.5
    assert last.retention.high - last.retention.value == pytest.approx(half)


def test_the_worst_skill_is_looked_for_among_those_of_the_base_too() -> None:
    def damaged(body: dict[str, Any]) -> dict[str, Any]:
        is_it = (body["label"], body["probe"]) == ("2-protected/1-sft", "knowledge")
        return {**body, "value": 0.3} if is_it else body

    found = [(kind, key, damaged(body) if kind == "probe" else body, {}) for kind, key, body, _ in facts()]
    worst = build_report(chain(found)).summaries[-1].worst
    assert worst is not None
    assert (worst.probe, worst.learnt_at, worst.retention) == ("knowledge", "base", pytest.approx(0.3 / 0.6))
    # Chance is 0.25: of 0.35 above it 0.05 are left, one seventh and not one half.
    assert worst.corrected == pytest.approx(0.05 / 0.35)


def test_nothing_is_invented_before_the_first_promotion() -> None:
    report = build_report(_until("verdict", "1/1-sft")[:-1])
    assert report.summaries == ()
    assert report.costs[0].round == "1"
    first = build_report([one for one in story() if one.body.get("round") in (None, "1")])
    assert first.summaries[-1].transfer is None
    assert first.summaries[-1].retention is None


def test_the_matrix_holds_each_score_and_its_change_against_the_champion_of_that_time() -> None:
    matrix = build_report(story()).matrix
    assert [row.label for row in matrix.rows] == list(SCORES)
    assert [column.name for column in matrix.columns] == ["copying", "knowledge", "prose", "cards", "routing", "arc"]
    for row in matrix.rows:
        for column in matrix.columns:
            cell = matrix.cell(row.label, column.name)
            assert cell is not None
            assert cell.value == probe(row.label, column.name)["value"]
    for label, before in (("1/1-sft", "base"), ("2-plain/1-sft", "1/1-sft"), ("2-protected/1-sft", "1/1-sft")):
        cell = matrix.cell(label, "cards")
        assert cell is not None
        assert cell.change == pytest.approx(SCORES[label][3] - SCORES[before][3])
    prose = matrix.cell("2-plain/1-sft", "prose")
    assert prose is not None
    # A loss that rose is worse.
    assert (prose.better, prose.outcome) == (False, "harm")


def test_a_stage_on_the_way_is_compared_with_the_champion_of_that_time() -> None:
    # The second round's first stage, scored before the round has a verdict.
    until = next(i for i, one in enumerate(facts()) if one[1] == "v2")
    row = build_report(chain(facts()[:until])).matrix.rows[-1]
    assert (row.label, row.state, row.before) == ("2-plain/1-sft", "step", "1/1-sft")
    assert row.cells[0] is not None
    assert (row.cells[0].change, row.cells[0].outcome) == (pytest.approx(0.42 - 0.91), None)


def test_the_cost_is_the_formula_on_recorded_tokens() -> None:
    first, plain, protected = build_report(story()).costs
    # Round 1: 12,000 tokens of its own once, 4,000 replayed; there is nothing else a retrain could show.
    assert (first.increment, first.new_tokens, first.passes, first.replayed) == (16000, 12000, 1.0, 4000.0)
    assert (first.retrain, first.new_share) == (12000.0, 1.0)
    # Round 2: half of the 24,000 tokens of all data are new. The held round before it used the same source: once.
    assert (protected.total_tokens, protected.retrain, protected.new_share) == (24000, 24000.0, 0.5)
    assert protected.increment / protected.retrain == pytest.approx(2 / 3)
    assert plain.replayed == 0
    assert first.seconds == pytest.approx(268.8)


def test_the_rescue_curve_runs_from_the_start_to_the_candidate() -> None:
    (curve,) = build_report(story()).curves
    assert [one.alpha for one in curve.shares] == [0.0, 0.2, 0.4, 0.7, 1.0]
    assert [one.passes for one in curve.shares] == [None, False, False, False, None]
    assert curve.chosen == 0.4
    # cards falls most: 85 points at the candidate, in proportion before.
    assert {one.worst_guard for one in curve.shares[1:]} == {"cards"}
    assert [change for _, change in curve.series["worst guard"]] == pytest.approx([0, -17, -34, -59.5, -85])
    assert curve.series["routing"][-1] == pytest.approx((1.0, 72.0))


def test_layers_are_in_the_order_of_the_model() -> None:
    layers = [name for name, _ in build_report(story()).stages[0].layers]
    assert layers == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(30))]


def test_the_made_evidence_has_the_fields_of_the_gates() -> None:
    # Keeps this room's test data honest when the gate changes its evidence.
    from dataclasses import fields

    from evertune.gate import Evidence

    assert set(evidence("cards", "1/1-sft", "base", target="cards")) == {one.name for one in fields(Evidence)}


@pytest.mark.parametrize("end", range(len(facts()) + 1))
def test_every_beginning_of_a_ledger_can_be_told(end: int, rendered: Callable[[list[Event]], str]) -> None:
    page = rendered(chain(facts()[:end]))
    assert page.startswith("<!DOCTYPE html>")
    assert "None" not in page
