"""Rounds that need more than a verdict: held-out probes, sampled answers, a ladder that retrains, alpha spent."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evertune import run as run_module
from evertune.ledger import Event, verify_workspace
from evertune.lineage import current_events, find_checkpoint, log_body, open_workspace, promote
from evertune.process import Workers
from evertune.recipe.load import load_recipe
from evertune.report import write_report
from evertune.report.story import build_report
from evertune.run import Outcome, run_recipe

DEMO = Path(__file__).parent.parent / "recipes" / "demo"
RECIPE = """
evertune: 1
name: rounds
base: tiny-random
workspace: run
seed: 3
data:
  cards: {{path: {demo}/cards.jsonl, limit: 8}}
  general: {{path: {demo}/general.jsonl, limit: 8}}
{sources}
probes:
  routes: {{path: {demo}/probe-routes.jsonl, kind: generate, verifier: exact, max_new_tokens: 3, limit: 4, samples: 3,
            temperature: 1.0, role: {role}}}
  {knowledge}: {{path: {demo}/probe-knowledge.jsonl, kind: choice, limit: 8, margin: {margin}, held_out: {held_out}}}
  prose: {{path: {demo}/probe-prose.jsonl, kind: bits_per_byte, limit: 6, margin: 0.9}}
gate:
  margin: {{pooled: 0.9, probe: 0.9, format: 0.9, ratchet: 0.9}}
  min_items: 2
  min_clusters: 2
  spend_alpha: true
numerics: {{dtype: float32, device: cpu}}
rescue: {rescue}
rounds:
  - name: one
    stages: [{stages}]
{more}
"""
STAGE = """{sft: {data: [cards], steps: 4, lr: 0.05, batch_rows: 2, micro_batch_rows: 2,
                     tune: {lora: {rank: 2}}, replay: {share: 0.25, from: [general]}, anchor: {kl: 0.0}}}"""


def run(folder: Path, **values: Any) -> tuple[Outcome, list[Event]]:
    given = {"demo": DEMO, "knowledge": "knowledge", "margin": 0.9, "held_out": "false", "role": "guard",
             "rescue": "[discard]", "stages": STAGE, "sources": "", "more": "", **values}  # fmt: skip
    (folder / "recipe.yaml").write_text(RECIPE.format(**given))
    outcome = run_recipe(load_recipe(folder / "recipe.yaml"))
    events = current_events(open_workspace(folder / "run").ledger)
    write_report(events, folder / "report.html")
    return outcome, events


def bodies(events: list[Event], kind: str) -> list[dict[str, Any]]:
    return [one.body for one in events if one.kind == kind]


@pytest.mark.path
def test_held_out_probes_are_asked_once_and_only_where_the_others_pass(tmp_path: Path) -> None:
    outcome, events = run(tmp_path, held_out="true")
    assert outcome.last == "PROMOTE"
    (look,) = bodies(events, "look")
    assert (look["number"], list(look["probes"])) == (1, ["knowledge"])
    (verdict,) = bodies(events, "verdict")
    assert verdict["held_out"] is True
    assert any(one["probe"] == "knowledge" for one in verdict["probes"])
    asked = [(one["label"], one["probe"]) for one in bodies(events, "probe") if one.get("held_out")]
    assert sorted(asked) == [("base", "knowledge"), ("one/1-sft", "knowledge")]
    # The candidate was scored on it after the verdict of the others, not with the stage.
    order = [one.kind for one in events]
    assert order.index("look") < max(i for i, one in enumerate(events) if one.body.get("held_out"))
    assert "look 1 of this run" in (tmp_path / "report.html").read_text()
    # The verdict is the first of a run that spends its alpha: 6 / pi^2 of it.
    assert verdict["gate_alpha"] == pytest.approx(0.05 * 0.6079, rel=1e-3)


@pytest.mark.path
def test_held_out_probes_are_left_alone_where_the_others_do_not_pass(tmp_path: Path) -> None:
    outcome, events = run(tmp_path, held_out="true", role="target")
    assert outcome.last != "PROMOTE"
    assert bodies(events, "look") == []
    assert {one["probe"] for one in bodies(events, "probe")} == {"routes", "prose"}
    assert bodies(events, "verdict")[0]["held_out"] is False


@pytest.mark.path
def test_the_ladder_retrains_judges_and_stops_at_its_budget(tmp_path: Path) -> None:
    # The round has 4 steps, the two rungs 5 together: more than 1.2 times 4, so that the anchor is not tried. The steps
    # of the champion that it starts from are those of another round.
    rungs = "lower_lr, {fewer_epochs: {factor: 0.25}}, drop_stage, stronger_anchor"
    ladder = f"[{rungs}, {{interpolate: {{alphas: [0.5], blocks: 2}}}}, discard]\nrescue_budget: {{training: 1.2}}"
    more = f"  - {{name: two, roles: {{routes: target}}, stages: [{STAGE}]}}"
    outcome, events = run(tmp_path, rescue=ladder, more=more)
    assert outcome.decisions["one"] == "PROMOTE"
    assert outcome.last != "PROMOTE"
    rescues = bodies(events, "rescue")
    assert [one["rung"] for one in rescues] == ["lower_lr", "fewer_epochs", "interpolate"]
    assert [one["label"] for one in rescues][:2] == ["two/lower_lr/1-sft", "two/fewer_epochs/1-sft"]
    settings = {one["label"]: one["settings"] for one in bodies(events, "checkpoint")}
    assert settings["two/lower_lr/1-sft"]["lr"] == pytest.approx(0.015)
    assert settings["two/fewer_epochs/1-sft"]["steps"] == 1
    assert rescues[2]["blocks"] in ([0.5, 1.0], [1.0, 0.5])
    # Three rungs that train, one that drops a stage, two points: six candidates. Alpha is spent over the verdicts too.
    assert {one["tried"] for one in rescues} == {6}
    assert [one["gate_alpha"] for one in rescues] == [pytest.approx(0.05 * 0.60793 / k**2, rel=1e-3) for k in (3, 4, 5)]
    page = (tmp_path / "report.html").read_text()
    assert "learning rates times 0.3" in page


@pytest.mark.path
def test_answers_are_sampled_alike_for_every_checkpoint_and_count_once_an_item(tmp_path: Path) -> None:
    _, events = run(tmp_path)
    one = next(row for row in bodies(events, "verdict")[0]["probes"] if row["probe"] == "routes")
    assert (one["n"], one["samples"]) == (4, 3)
    assert json.dumps(bodies(events, "probe")).count('"n": 12') == 2


@pytest.mark.path
def test_a_stage_is_dropped_by_the_probes_that_were_asked_after_each_stage(tmp_path: Path) -> None:
    # A margin of 0.001 cannot be shown with 8 items. The base was not scored for this round, which starts from it.
    given: dict[str, Any] = {"margin": 0.001, "rescue": "[drop_stage]", "stages": f"{STAGE}, {STAGE}"}
    given["stages"] += "]\n    start: base\n    roles: {}\n    rescue: [drop_stage"
    outcome, events = run(tmp_path, **given)
    assert outcome.last == "INCONCLUSIVE"
    assert all("without stage" in one["why"] for one in bodies(events, "rescue"))
    # Held out, it is asked of the last checkpoint alone, and no stage can be blamed.
    outcome, events = run(tmp_path, held_out="true", **given)
    assert outcome.last == "INCONCLUSIVE"
    assert bodies(events, "verdict")[-1]["held_out"] is True


@pytest.mark.path
@pytest.mark.parametrize("tune", ["{lora: {rank: 2}}", "full"])
def test_a_scanned_point_is_not_scored_again_once_it_is_written(
    tmp_path: Path, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []
    perform = Workers.run

    def told(workers: Workers, job: dict[str, Any], **named: Any) -> dict[str, Any]:
        jobs.append((job["kind"], job["label"]))
        return perform(workers, job, **named)

    monkeypatch.setattr(Workers, "run", told)
    stage = STAGE.replace("{lora: {rank: 2}}", tune)
    _, events = run(tmp_path, stages=stage, **ladder_of(0.5))
    assert ("scan", "one") in jobs and ("probe", "one/rescue-0.5") not in jobs
    # Scored anew by the other way, it has the same scores, bit for bit.
    made = next(one for one in events if one.kind == "checkpoint" and one.body["label"] == "one/rescue-0.5")
    assert made.volatile["scan_seconds"] == 0.0, "there is no other point"
    workspace = open_workspace(tmp_path / "run").workspace
    manifests = [one for one in workspace.manifests() if one.kind == "probe"]
    objects = [workspace.path(one.key) for one in manifests if one.record["probe"]["checkpoint"] == made.body["digest"]]
    before = {one: (one / "scores.parquet").read_bytes() for one in objects}
    assert len(before) == 3
    for one in objects:
        shutil.rmtree(one)
    run(tmp_path, stages=stage, **ladder_of(0.5))
    assert jobs[-1] == ("probe", "one/rescue-0.5")
    assert {one: (one / "scores.parquet").read_bytes() for one in objects} == before


@pytest.mark.path
def test_a_renamed_probe_is_scanned_anew_and_a_changed_scan_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, Any] = {"rescue": "[{interpolate: {alphas: [0.5, 0.02]}}]", "knowledge": "facts"}

    def scans_made() -> int:
        return sum(one.kind == "scan" for one in open_workspace(tmp_path / "run").workspace.manifests())

    run(tmp_path, role="target", rescue="[{interpolate: {alphas: [0.5, 0.01]}}]")
    _, events = run(tmp_path, role="target", **changed)
    scans = [[one["alpha"] for one in body["scan"]] for body in bodies(events, "rescue") if body["alpha"] == 0.5]
    assert scans == [[0.5, 0.02]]
    assert "facts" in bodies(events, "rescue")[-1]["scan"][0]["values"]
    assert scans_made() == 2
    # Where a score means something else, what was scanned before is no answer.
    monkeypatch.setattr("evertune.run.PROBE_VERSION", -1)
    run(tmp_path, role="target", **changed)
    assert scans_made() == 3


@pytest.mark.path
def test_a_round_judged_otherwise_by_an_edited_recipe_is_told_by_its_newest_verdict(tmp_path: Path) -> None:
    assert run(tmp_path)[0].last == "PROMOTE"
    outcome, events = run(tmp_path, margin=0.001)
    assert outcome.last == "INCONCLUSIVE"
    told = build_report(events)
    assert told.sentence.startswith("Round one INCONCLUSIVE. ")
    assert told.sentence.endswith("The recipe as it stands ends at base, no longer at one/1-sft.")
    assert told.by_hand == ()


def ladder_of(alpha: float) -> dict[str, Any]:
    return {"role": "target", "rescue": f"[{{interpolate: {{alphas: [{alpha:g}]}}}}]"}


@pytest.mark.path
def test_a_changed_recipe_is_told_without_the_rungs_of_its_earlier_form(tmp_path: Path) -> None:
    more = f"  - {{name: two, start: base, stages: [{STAGE}]}}"
    _, first = run(tmp_path, **ladder_of(0.5), more=more)
    assert "position" not in {one.kind for one in first}
    outcome, events = run(tmp_path, **ladder_of(0.25), more=more)
    assert outcome.stages_run == 0
    assert [one["label"] for one in bodies(events, "rescue")] == ["one/rescue-0.25", "two/rescue-0.25"]
    told = build_report(events)
    assert [one.name for one in told.rounds] == ["one", "two"]
    assert {one.label for one in told.matrix.rows} == {
        "base", "one/1-sft", "one/rescue-0.25", "two/1-sft", "two/rescue-0.25",
    }  # fmt: skip
    assert "rescue-0.5" not in (tmp_path / "report.html").read_text()
    opened = open_workspace(tmp_path / "run")
    log = log_body(opened)
    assert [[each["alpha"] for each in one["rescue"]] for one in log["rounds"]] == [[0.25], [0.25]]
    assert told.head == log["head"]
    # The ledger keeps what was made, and it can be named.
    assert {one.key for one in first} <= {one["key"] for one in log["events"]}
    assert find_checkpoint(opened, "one/rescue-0.5")[0].body["label"] == "one/rescue-0.5"
    assert verify_workspace(opened.workspace, opened.ledger) == []


@pytest.mark.path
def test_a_recipe_that_is_changed_back_is_told_as_before(tmp_path: Path) -> None:
    _, first = run(tmp_path, **ladder_of(0.5))
    run(tmp_path, **ladder_of(0.25))
    _, events = run(tmp_path, **ladder_of(0.5))
    assert [one for one in events if one.kind != "position"] == first
    assert [one.kind for one in events].count("position") == 1
    # The same again adds nothing, and a ledger that was lost is told alike.
    place = tmp_path / "run" / "ledger.sqlite"
    head = open_workspace(tmp_path / "run").ledger.head()
    _, again = run(tmp_path, **ladder_of(0.5))
    assert (again, open_workspace(tmp_path / "run").ledger.head()) == (events, head)
    for one in place.parent.glob("ledger.sqlite*"):
        one.unlink()
    _, rebuilt = run(tmp_path, **ladder_of(0.5))
    assert [(one.kind, one.key, one.body) for one in rebuilt] == [(one.kind, one.key, one.body) for one in events]


@pytest.mark.path
def test_a_changed_recipe_that_is_stopped_is_told_as_far_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = f"  - {{name: two, start: base, stages: [{STAGE}]}}"
    run(tmp_path, **ladder_of(0.5), more=more)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "rescue", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, **ladder_of(0.25), more=more)
    told = build_report(current_events(open_workspace(tmp_path / "run").ledger))
    assert [one.state for one in told.rounds] == ["PLANNED", "PLANNED"]
    assert told.run is not None and told.run["recipe"]["rescue"][0]["interpolate"]["alphas"] == [0.25]
    _, events = run(tmp_path, **ladder_of(0.25), more=more)
    assert [one["alpha"] for one in bodies(events, "rescue")] == [0.25, 0.25]


@pytest.mark.path
def test_a_checkpoint_promoted_by_hand_stays_where_a_changed_recipe_comes_to_that_decision(tmp_path: Path) -> None:
    run(tmp_path, **ladder_of(0.5))
    promote(open_workspace(tmp_path / "run"), "one/rescue-0.5", reason="good enough")
    _, events = run(tmp_path, **ladder_of(0.25))
    told = build_report(events)
    assert told.line == ("base", "one/rescue-0.5")
    assert {one.label: one.state for one in told.matrix.rows}["one/rescue-0.5"] == "champion"
    assert [one["alpha"] for one in bodies(events, "rescue")] == [0.25]
    # With another round before it, the run does not come to the verdict that it followed.
    _, events = run(tmp_path, role="watch", stages=STAGE.replace("0.05", "0.04"))
    assert build_report(events).line == ("base", "one/1-sft")
    assert build_report(events).by_hand == ()


@pytest.mark.path
def test_a_round_of_several_stages_tells_what_each_did(tmp_path: Path) -> None:
    half = "{new: {path: start, weight: 0.5}, old: {path: base, weight: 0.5}}"
    stages = f"{STAGE}, {STAGE}, {{merge: {{method: linear, models: {half}}}}}"
    ladder = "[{interpolate: {toward: before, alphas: [0.5]}}, discard]"
    _, events = run(tmp_path, stages=stages, rescue=ladder, role="target")
    told = [(one["label"], [each["since"] for each in one["against"]]) for one in bodies(events, "erosion")]
    assert told == [("one/1-sft", ["base"]), ("one/2-sft", ["one/1-sft"]), ("one/3-merge", ["one/2-sft"])]
    changes = {one["probe"]: one for one in bodies(events, "erosion")[0]["against"][0]["changes"]}
    rows = {(one["label"], one["probe"]): one["value"] for one in bodies(events, "probe")}
    assert set(changes) == {"routes", "knowledge", "prose"}
    assert changes["prose"]["after"] == pytest.approx(rows["one/1-sft", "prose"])
    assert 'id="erosion"' in (tmp_path / "report.html").read_text()
    # The rescue goes back to what the last stage started from, not to what the round did.
    made = {one["label"]: one for one in bodies(events, "checkpoint")}
    assert made["one/rescue-0.5"]["start"] == made["one/2-sft"]["digest"]
    assert made["one/rescue-0.5"]["parents"] == [made["one/3-merge"]["digest"]]


@pytest.mark.path
def test_a_later_stage_is_compared_with_the_sft_stage_too(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Which?", "chosen": "This one.", "rejected": "No idea."}
    pairs.write_text("".join(json.dumps({**row, "prompt": f"Which of {i}?"}) + "\n" for i in range(8)))
    common = "steps: 1, batch_rows: 2, micro_batch_rows: 2, replay: {share: 0}, anchor: {kl: 0.0}"
    dpo = f"{{dpo: {{data: [pairs], {common}}}}}"
    sources = f"  pairs: {{path: {pairs}, format: preference}}"
    _, events = run(tmp_path, stages=f"{STAGE}, {dpo}, {dpo}", sources=sources)
    told = {one["label"]: [each["since"] for each in one["against"]] for one in bodies(events, "erosion")}
    assert told["one/3-dpo"] == ["one/2-dpo", "one/1-sft"]


@pytest.mark.path
def test_the_rows_of_a_stage_that_a_rescue_left_out_are_not_replayed_later(tmp_path: Path) -> None:
    # At a rate of 1 the second stage ruins the model: prose costs more than 90 % more bits.
    ruin = (
        STAGE.replace("[cards]", "[general]").replace("share: 0.25", "share: 0.0").replace("{lora: {rank: 2}}", "full")
    )
    ruin = ruin.replace("lr: 0.05", "lr: 1.0")
    _, events = run(tmp_path, rescue="[drop_stage]", stages=f"{STAGE}, {ruin}")
    assert [one["label"] for one in bodies(events, "promotion")] == ["one/drop_stage/1-sft"]
    kept = [one for one in open_workspace(tmp_path / "run").workspace.manifests() if one.kind == "history"]
    assert [sorted(one.record["formats"]) for one in kept] == [["cards"]]


@pytest.mark.path
def test_the_start_teaches_back_what_fell_in_one_more_stage(tmp_path: Path) -> None:
    # The round itself is not trained again: four steps of the first stage are found, the last stage is new.
    rungs = "[{distil_back: {by_probe: {knowledge: [general]}}}, discard]\nrescue_budget: {order: gain_for_cost}"
    outcome, events = run(tmp_path, rescue=rungs, margin=0.001)
    assert outcome.last != "PROMOTE"
    (one,) = bodies(events, "rescue")
    assert (one["rung"], one["label"]) == ("distil_back", "one/distil_back/2-distill")
    assert "base teaches" not in one["why"] and "champion teaches knowledge back on the rows of general" in one["why"]
    made = {body["label"]: body for body in bodies(events, "checkpoint")}
    stage = made["one/distil_back/2-distill"]
    assert stage["start"] == made["one/1-sft"]["digest"]
    assert [source["source"] for source in stage["data"]] == ["general"]
    assert stage["replay"]["sources"].keys() == {"cards"}
    assert outcome.stages_run == 2


def test_rows_that_a_rung_names_must_be_there(tmp_path: Path) -> None:
    from evertune.errors import RecipeError

    for rung, told in (
        ("{distil_back: {by_probe: {poetry: [cards]}}}", "no probe 'poetry'"),
        ("{more_replay: {by_probe: {prose: [verse]}}}", "no data source 'verse'"),
    ):
        with pytest.raises(RecipeError, match=told):
            run(tmp_path, rescue=f"[{rung}]")


@pytest.mark.path
def test_a_share_that_follows_guards_is_in_the_ledger_the_warnings_and_the_report(tmp_path: Path) -> None:
    adapt = "adapt: {every: 1, raise_by: 0.25, most: 0.5}"
    stage = STAGE.replace("from: [general]", f"from: [general], {adapt}").replace("lr: 0.05", "lr: 0.5")
    _, events = run(tmp_path, stages=stage, margin="0.0001")
    body = next(one for one in bodies(events, "checkpoint") if one["label"] == "one/1-sft")
    told = body["replay"]["adapt"]
    assert [one["step"] for one in told["asked"]] == [0, 1, 2, 3]
    assert set(told["asked"][0]["scores"]) == {"knowledge", "prose", "routes"}
    assert told["margins"] == {"knowledge": 0.0001, "prose": 0.9, "routes": 0.9}
    before = {one["probe"]: one["value"] for one in bodies(events, "probe") if one["label"] == "base"}
    assert told["asked"][0]["scores"]["knowledge"] == pytest.approx(before["knowledge"])
    rises = [(one, other) for one, other in itertools.pairwise(told["asked"]) if other["share"] > one["share"]]
    page = (tmp_path / "report.html").read_text()
    for _, one in rises:
        assert f"{100 * one['share']:.1f} % after step {one['step']}" in page
    assert len(rises) == sum(one["name"] == "replay_raised" for one in body.get("warnings", ()))
    assert body["replay"]["share_done"] == pytest.approx(sum(round(2 * one["share"]) for one in told["asked"]) / 8)
