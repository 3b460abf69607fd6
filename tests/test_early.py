"""Items in batches: one fixed random order, clusters whole, a stop when the gate decides, and no decision it would not
make."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from evertune.cli import app
from evertune.early import Sides, Stopped, judge_in_batches, plan_batches
from evertune.gate import ProbeFacts
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, Probe, load_probe
from tests.test_gate import GUARD, WIDE, prose
from tests.tiny import write_tiny_model


def write_probe(folder: Path, name: str, n: int, size: int = 1) -> Probe:
    rows = [
        {"id": f"{name}{i}", "prompt": f"{name} {i}", "choices": ["a", "b"], "answer": 0, "cluster": f"c{i // size}"}
        for i in range(n)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    probe = load_probe(name, settings={"path": f"{name}.jsonl", "kind": "choice"}, root=folder)
    assert isinstance(probe, Probe)
    return probe


def ask(probes: list[Probe], lost: dict[str, set[str]], asked: list[str]) -> Stopped:
    """Every item is right before; the ones in `lost` are wrong afterwards. `asked` collects ids in order."""

    def table(probe: Probe, wrong: set[str]) -> ItemScores:
        ids = tuple(item.id for item in probe.items)
        facts: dict[str, Any] = {"kind": "choice", "direction": "higher", "items_digest": "i", "template_digest": "t"}
        cluster = tuple(item.cluster for item in probe.items)
        return ItemScores(probe=probe.name, ids=ids, score=[one not in wrong for one in ids], cluster=cluster, **facts)

    def score(probe: AnyProbe) -> Sides:
        assert isinstance(probe, Probe)
        asked.extend(item.id for item in probe.items)
        return Sides(table(probe, set()), table(probe, lost.get(probe.name, set())))

    facts: dict[str, ProbeFacts] = {one.name: GUARD for one in probes}
    return judge_in_batches(probes, facts, replace(WIDE, min_items=100), score)


def test_batches_hold_every_item_once_and_clusters_whole(tmp_path: Path) -> None:
    probes = [write_probe(tmp_path, "facts", 230, size=7), write_probe(tmp_path, "sums", 120)]
    batches = plan_batches(probes)
    found = {name: [i for batch in batches for i in batch.get(name, [])] for name in ("facts", "sums")}
    assert {name: sorted(places) for name, places in found.items()} == {
        "facts": list(range(230)),
        "sums": list(range(120)),
    }
    assert found["sums"] != sorted(found["sums"])
    for batch in batches:
        places = batch.get("facts", [])
        assert {i // 7 for i in places}.isdisjoint(set(range(33)) - {i // 7 for i in places})
        for cluster in {i // 7 for i in places}:
            assert sum(i // 7 == cluster for i in places) == min(7, 230 - 7 * cluster)
    assert all(sum(map(len, batch.values())) >= 50 for batch in batches[:-1])
    # Each batch is a sample of both.
    assert all(set(batch) == {"facts", "sums"} for batch in batches[:-1])


def test_the_order_is_fixed_with_the_items(tmp_path: Path) -> None:
    probes = [write_probe(tmp_path, "facts", 100)]
    assert plan_batches(probes) == plan_batches(probes)
    assert plan_batches(probes) != plan_batches([write_probe(tmp_path, "facts", 101)])


def test_a_large_loss_stops_after_a_batch_or_two_and_no_item_is_asked_in_vain(tmp_path: Path) -> None:
    probes, asked = [write_probe(tmp_path, "facts", 400), write_probe(tmp_path, "sums", 400)], []  # type: ignore[var-annotated]
    lost = {"facts": {f"facts{i}" for i in range(0, 400, 3)}}
    done = ask(probes, lost, asked)
    assert (done.verdict.decision, done.look) == ("HOLD", "early")
    assert done.items_asked == len(asked) <= 150
    assert done.items_in_all == 800


def test_an_equal_model_is_promoted_before_all_is_asked_but_not_before_the_least_number(tmp_path: Path) -> None:
    probes, asked = [write_probe(tmp_path, "facts", 600)], []  # type: ignore[var-annotated]
    done = ask(probes, {}, asked)
    assert (done.verdict.decision, done.look) == ("PROMOTE", "early")
    assert 100 <= done.items_asked < 600


def test_what_is_never_decided_early_gets_the_last_look_at_everything(tmp_path: Path) -> None:
    probes, asked = [write_probe(tmp_path, "facts", 210)], []  # type: ignore[var-annotated]
    done = ask(probes, {"facts": {f"facts{i}" for i in range(5)}}, asked)
    assert (done.look, done.items_asked, len(asked)) == ("last", 210, 210)


def test_a_loss_is_measured_whole_and_once(tmp_path: Path) -> None:
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)))
    text = load_probe("prose", settings={"path": "prose.jsonl", "kind": "bits_per_byte"}, root=tmp_path)
    calls = []

    def score(probe: AnyProbe) -> Sides:
        calls.append(probe.name)
        values = np.linspace(1.0, 1.2, 300)
        return Sides(prose(values), prose(values * 1.05))

    done = judge_in_batches([text], {"prose": GUARD}, WIDE, score)
    assert calls == ["prose"]
    assert (done.verdict.decision, done.look) == ("HOLD", "whole")


@pytest.mark.path
def test_two_models_are_asked_in_batches_and_the_evidence_replays(tmp_path: Path) -> None:
    old = write_tiny_model(tmp_path / "old")
    items = write_probe(tmp_path, "facts", 120)
    flags = ["--probes", str(tmp_path / "facts.jsonl"), "--workspace", str(tmp_path / "w"), "--in-batches"]
    flags += ["--set", "gate.min_items=50", "--set", "gate.margin.pooled=0.2", "--set", "gate.margin.probe=0.2"]
    evidence = tmp_path / "e.json"
    done = CliRunner().invoke(app, ["gate", str(old), "--against", str(old), *flags, "--evidence", str(evidence)])
    assert done.exit_code == 0
    assert f"asked 50 of {len(items.items)} items of each model in batches: 58% saved" in done.output
    body = json.loads(evidence.read_text())
    assert (body["look"], body["items_asked"]) == ("early", 50)
    assert CliRunner().invoke(app, ["gate", "--replay", str(evidence)]).exit_code == 0


def test_what_was_asked_is_not_asked_again_until_a_score_means_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_tiny_model(tmp_path / "old")
    write_probe(tmp_path, "facts", 60)
    flags = ["--probes", str(tmp_path / "facts.jsonl"), "--workspace", str(tmp_path / "w"), "--in-batches"]

    def count_asked() -> int:
        CliRunner().invoke(app, ["gate", str(old), "--against", str(old), *flags])
        return len(list((tmp_path / "w" / "objects").iterdir()))

    first = count_asked()
    assert count_asked() == first
    monkeypatch.setattr("evertune.judging.PROBE_VERSION", -1)
    assert count_asked() == first + 1
