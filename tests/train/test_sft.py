"""The stage as a whole on a tiny model: what it promises about results, not only that it runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.data.stream import Stretches
from evertune.errors import TrainingError
from evertune.hashing import canonical_json
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import load_codec
from evertune.model.open import open_model
from evertune.train.material import Material, load_material
from evertune.train.sft import run_sft
from evertune.train.spec import SftSpec
from evertune.train.stage import Lesson
from evertune.workspace import Workspace
from tests.tiny import write_tiny_model
from tests.train.stage import (
    anchor,
    make_spec,
    open_workspace,
    published_weights,
    same_bits,
    write_rounded,
    write_rows,
)

PLAIN = {"tune": {"lora": {"rank": 4, "dropout": 0.0}}}
FULL: dict[str, Any] = {"tune": {"full": {}}, "lr": 1e-3}
# The body of a checkpoint event, but for what the caller alone knows.
BODY = {
    *("label", "stage", "standing", "methods", "form", "stands_on", "start", "settings", "data", "replay", "anchor"),
    *("steps", "new_rows", "replay_rows", "tokens", "counted_tokens", "losses", "final", "bytes", "drift"),
    "interference",
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


def _train(folder: Path, model: Path, workspace: Workspace, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the checkpoint's facts, its tensors)"""
    spec = make_spec(folder, model, **changes)
    facts = run_sft(spec, workspace)["checkpoint"]
    return facts, published_weights(workspace, spec)


def _close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(one[name], other[name], atol=tolerance, rtol=0) for name in one)


def test_an_order_survives_the_way_through_json(tmp_path, tiny_model):
    spec = make_spec(tmp_path, tiny_model, anchor={"cache": "top64"})
    assert SftSpec.from_json(json.loads(canonical_json(spec.to_json()))) == spec


@pytest.mark.parametrize("kind", [{}, FULL])
def test_the_same_order_gives_the_same_bytes(tmp_path, tiny_model, kind):
    spec = make_spec(tmp_path, tiny_model, anchor={}, ema_decay=0.9, **kind)
    trees = []
    for name in ("a", "b"):
        workspace = open_workspace(tmp_path / name)
        torch.manual_seed(len(trees))
        facts = run_sft(spec, workspace)["checkpoint"]
        manifest = workspace.manifest(spec.key)
        assert manifest is not None
        trees.append((manifest.tree, canonical_json(facts)))
    assert trees[0] == trees[1]


def test_the_loss_falls_and_the_facts_are_complete(tmp_path, tiny_model, workspace):
    spec = make_spec(tmp_path, tiny_model, anchor={"on": "replay"}, steps=30)
    record = run_sft(spec, workspace)
    facts = record["checkpoint"]
    assert facts.keys() == BODY
    assert facts["final"]["loss"] < 0.95 * facts["losses"][0][1]
    # 30 steps of 4 rows, one in four replayed.
    assert (facts["new_rows"], facts["replay_rows"], facts["replay"]["share_done"]) == (90, 30, 0.25)
    assert facts["replay"]["sources"] == {"old": 30}
    assert facts["anchor"] == {"kl": 0.1, "to": "start", "on": "replay", "direction": "forward", "cache": "off"}
    assert facts["drift"]["to_start"] == facts["drift"]["to_base"] > 0
    # One of two gradients: neither nothing nor the same twice, as where the second is written over the first.
    assert all(0 < abs(facts["interference"][name]) < 0.999 for name in ("start", "end"))
    layers = facts["interference"]["layers"]
    # Each layer has its own cosine; by Cauchy and Schwarz the one of all weights lies between the extremes and 0.
    assert layers.keys() == {name for name in facts["drift"]["layers"] if ".layers." in name}
    for i, name in enumerate(("start", "end")):
        values = [0.0, *(each[i] for each in layers.values())]
        assert min(values) - 1e-6 <= facts["interference"][name] <= max(values) + 1e-6
    assert facts["methods"] == ["sft", "lora", "replay", "dedup", "anchored_sft_kl"]
    assert record["volatile"].keys() == {"time", "seconds", "tokens_per_second", "peak_memory_bytes"}
    canonical_json(record)


def test_metrics_are_published_one_line_a_step_without_the_hour(tmp_path, tiny_model, workspace):
    spec = make_spec(tmp_path, tiny_model)
    run_sft(spec, workspace)
    lines = [json.loads(line) for line in (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["steps"] == 8 and "seconds" not in line for line in lines)
    live = [json.loads(line) for line in (workspace.work / spec.key / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in live)


@pytest.mark.parametrize(("kind", "with_anchor"), [(PLAIN, {"anchor": {"on": "replay"}}), (FULL, {})])
def test_four_rows_at_once_equal_four_times_one(tmp_path, tiny_model, workspace, kind, with_anchor):
    results = {
        rows: _train(tmp_path, tiny_model, workspace, steps=3, micro_batch_rows=rows, **kind, **with_anchor)
        for rows in (4, 3, 1)
    }
    for rows in (3, 1):
        assert _close(results[4][1], results[rows][1], 2e-5)
        for one, other in zip(results[4][0]["losses"], results[rows][0]["losses"], strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, tiny_model, workspace):
    for kind in ({"steps": 4}, {**FULL, "steps": 4}):
        one = _train(tmp_path, tiny_model, workspace, **kind)[1]
        other = _train(tmp_path, tiny_model, workspace, gradient_checkpointing=True, **kind)[1]
        assert _close(one, other, 1e-5)


def test_a_share_of_zero_is_the_plain_run(tmp_path, tiny_model, workspace):
    without = _train(tmp_path, tiny_model, workspace, share=0.0, replay=[])
    unused = _train(tmp_path, tiny_model, workspace, share=0.0)
    assert same_bits(without[1], unused[1])
    assert without[0]["replay"] is unused[0]["replay"] is None
    assert without[0]["interference"] is None


def test_an_anchor_of_weight_zero_is_no_anchor(tmp_path, tiny_model, workspace):
    facts, weights = _train(tmp_path, tiny_model, workspace, anchor={"kl": 0.0})
    assert facts["anchor"] is None
    assert same_bits(weights, _train(tmp_path, tiny_model, workspace)[1])


def test_replay_rows_that_are_new_rows_are_left_out_and_counted(tmp_path, tiny_model, workspace):
    (tmp_path / "copies").mkdir()
    same = write_rows(tmp_path / "copies" / "same.jsonl", 24)
    other = write_rows(tmp_path / "copies" / "other.jsonl", 5, word="times")
    facts, _ = _train(tmp_path, tiny_model, workspace, steps=2, replay=[same, other])
    assert (facts["replay"]["removed_duplicates"], facts["replay"]["pool_rows"]) == (24, 5)
    kept, _ = _train(tmp_path, tiny_model, workspace, steps=2, replay=[same, other], dedup=False)
    assert (kept["replay"]["removed_duplicates"], kept["replay"]["pool_rows"]) == (0, 29)
    alone, _ = _train(tmp_path, tiny_model, workspace, steps=2, replay=[same])
    assert (alone["replay"]["share_done"], alone["replay"]["pool_rows"]) == (0.0, 0)


def test_epochs_count_new_rows_and_a_part_of_a_step_is_a_step(tmp_path, tiny_model, workspace):
    # 24 new rows and 8 replayed: 32 a pass; 1.5 passes are 48 rows, 10 steps of 5.
    facts, _ = _train(tmp_path, tiny_model, workspace, steps=None, epochs=1.5, batch_rows=5)
    assert facts["steps"] == 10


@pytest.mark.parametrize(("kind", "direction"), [({**PLAIN, "lr": 0.03}, "forward"), ({**FULL, "lr": 3e-3}, "reverse")])
def test_a_heavier_anchor_holds_the_outputs_closer(tmp_path, tiny_model, workspace, kind, direction):
    kls = []
    for weight in (1e-6, 10.0, 300.0):
        anchored = {"kl": weight, "direction": direction}
        facts, _ = _train(tmp_path, tiny_model, workspace, anchor=anchored, steps=10, batch_rows=2, **kind)
        kls.append(facts["final"]["kl"])
    assert kls[0] > 1.2 * kls[1] > 1.2 * 5 * kls[2] > 0


@pytest.mark.parametrize("on", ["replay", "new", "both"])
def test_the_anchor_counts_only_the_rows_it_is_on(tmp_path, tiny_model, workspace, on):
    """Without replay rows an anchor on replay is none; otherwise the three settings differ."""
    facts, weights = _train(tmp_path, tiny_model, workspace, anchor={"on": on, "kl": 5.0}, replay=[], share=0.0)
    plain = _train(tmp_path, tiny_model, workspace, replay=[], share=0.0)[1]
    assert same_bits(weights, plain) == (on == "replay")
    assert ("kl" in facts["final"]) == (on != "replay")


@pytest.mark.parametrize(("steps", "shown"), [(2, 8), (200, 24 + 12)])
def test_the_reference_is_asked_of_the_rows_that_the_stage_sees(tmp_path, tiny_model, workspace, steps, shown):
    """Two steps of four rows see eight of the 36 there are; many steps see all, each stored once."""
    _train(tmp_path, tiny_model, workspace, steps=steps, anchor={"on": "both", "cache": "top64"})
    (index,) = workspace.cache.rglob("index.json")
    assert len(json.loads(index.read_text())["rows"]) == shown


def test_where_the_rows_are_settled_on_the_way_the_reference_is_asked_of_all(
    tmp_path, tiny_model, workspace, monkeypatch
):
    class Rows:
        """A feed of its own, over the same rows."""

        def __init__(self, material: Material) -> None:
            self._material = material

        def __getattr__(self, name: str) -> Any:
            return getattr(self._material, name)

    monkeypatch.setattr(Lesson, "feed", lambda self, setting, policy: Rows(setting.material))
    _train(tmp_path, tiny_model, workspace, steps=2, anchor={"on": "both", "cache": "top64"})
    (index,) = workspace.cache.rglob("index.json")
    assert len(json.loads(index.read_text())["rows"]) == 24 + 12


def test_a_stream_whose_share_can_be_raised_may_show_every_row(tmp_path, tiny_model):
    codec, spec = load_codec(tiny_model), make_spec(tmp_path, tiny_model, steps=2)
    material = load_material(spec, codec, world_size=1)
    assert len(material.shown()) == 8
    raised = replace(material, stream=Stretches(material.stream, 8, spec.share))
    assert len(raised.shown()) == len(raised.items()) == 24 + 12


def test_the_average_lies_between_start_and_end(tmp_path, tiny_model, workspace):
    start = open_model(describe(tiny_model), dtype="float32").model.get_input_embeddings().weight
    name = "model.embed_tokens.weight"
    end = _train(tmp_path, tiny_model, workspace, **FULL)[1][name]
    average = _train(tmp_path, tiny_model, workspace, ema_decay=0.9, **FULL)[1][name]
    assert 0 < (average - start).norm() < (end - start).norm()
    assert torch.equal(_train(tmp_path, tiny_model, workspace, ema_decay=1e-9, **FULL)[1][name], end)


def test_a_stage_on_an_adapter_makes_a_second_one_and_leaves_the_first(tmp_path, tiny_model, workspace):
    first = make_spec(tmp_path, tiny_model)
    run_sft(first, workspace)
    start = describe(workspace.path(first.key))
    base = describe(tiny_model)
    second = make_spec(tmp_path, tiny_model, start=start, anchor=anchor(base), lr=0.02)
    facts = run_sft(second, workspace)["checkpoint"]
    made = describe(workspace.path(second.key))
    assert [one.form for one in made.stack] == ["model", "adapter", "adapter"]
    assert made.stands_on is not None and made.stands_on.digest == start.digest == facts["stands_on"]
    assert describe(workspace.path(first.key)).digest == start.digest
    assert facts["drift"]["to_base"] != facts["drift"]["to_start"]
    ids = torch.arange(12).unsqueeze(0)
    folded = open_model(made, dtype="float32", fold=True).model(ids).logits
    assert torch.allclose(open_model(made, dtype="float32").model(ids).logits, folded, atol=1e-5)


def _dense_drift(before: Checkpoint, after: Checkpoint) -> float:
    """Relative L2 distance of the two as plain models."""
    old, new = (dict(open_model(one, dtype="float32", fold=True).model.named_parameters()) for one in (before, after))
    moved = sum(float((new[name] - old[name]).double().square().sum()) for name in old)
    return (moved / sum(float(one.double().square().sum()) for one in old.values())) ** 0.5


@pytest.mark.parametrize("kind", [{}, FULL])
def test_the_drift_of_a_stage_on_an_adapter_is_the_distance_of_the_dense_models(tmp_path, tiny_model, workspace, kind):
    first = make_spec(tmp_path, tiny_model, lr=0.1, steps=4)
    first_facts = run_sft(first, workspace)["checkpoint"]
    base, start = describe(tiny_model), describe(workspace.path(first.key))
    spec = make_spec(tmp_path, tiny_model, start=start, base=base, anchor=anchor(start), steps=4, **kind)
    facts = run_sft(spec, workspace)["checkpoint"]
    made = describe(workspace.path(spec.key))
    assert made.form == facts["form"] == ("model" if kind else "adapter")
    assert facts["stands_on"] == (None if kind else start.digest)
    assert first_facts["drift"]["to_start"] == pytest.approx(_dense_drift(base, start), rel=1e-4)
    assert facts["drift"]["to_start"] == pytest.approx(_dense_drift(start, made), rel=1e-4)
    assert facts["drift"]["to_base"] == pytest.approx(_dense_drift(base, made), rel=1e-4)
    assert (facts["drift"]["layers"]["model.embed_tokens"] == 0.0) == (not kind)


def test_a_base_of_another_shape_has_no_distance(tmp_path, tiny_model, workspace):
    other = describe(write_tiny_model(tmp_path / "untied", tied=False))
    facts, _ = _train(tmp_path, tiny_model, workspace, base=other, steps=2)
    assert facts["drift"]["to_base"] is None
    assert facts["drift"]["to_start"] > 0


def test_alpha_is_twice_the_rank_when_not_given(tmp_path, tiny_model, workspace):
    spec = make_spec(tmp_path, tiny_model, tune={"lora": {"rank": 3}})
    run_sft(spec, workspace)
    assert {one.scale for one in read_factors(workspace.path(spec.key)).values()} == {2.0}


def test_a_loss_that_is_not_a_number_stops_the_stage_and_names_the_step(tmp_path, tiny_model, workspace):
    spec = make_spec(tmp_path, tiny_model, lr=1e38, clip=None, warmup=0.0, save_steps=1, weight_decay=0.0)
    with pytest.raises(TrainingError, match=r"step \d: .*(nan|NaN|inf)"):
        run_sft(spec, workspace)
    assert workspace.manifest(spec.key) is None
    assert list(workspace.tmp.iterdir()) == []


def test_weights_that_are_not_finite_are_never_published(tmp_path, tiny_model, workspace, monkeypatch):
    from evertune.train.optimizer import Masters

    update = Masters.update
    calls: list[int] = []

    def poison(self: Masters, rate: float) -> None:
        update(self, rate)
        calls.append(1)
        if len(calls) == 8:
            next(iter(self.weights.values())).data.view(-1)[0] = float("nan")

    monkeypatch.setattr(Masters, "update", poison)
    spec = make_spec(tmp_path, tiny_model)
    with pytest.raises(TrainingError, match=r"step 8: weight model\.layers\.0"):
        run_sft(spec, workspace)
    assert workspace.manifest(spec.key) is None


def test_a_row_that_is_too_long_is_an_error_or_reported(tmp_path, tiny_model, workspace):
    from evertune.errors import DataError

    with pytest.raises(DataError, match="max_tokens"):
        _train(tmp_path, tiny_model, workspace, max_tokens=80)
    facts, _ = _train(tmp_path, tiny_model, workspace, max_tokens=80, too_long="drop")
    assert facts["data"][0]["dropped_long"] > 0
    assert facts["data"][0]["rows"] + facts["data"][0]["dropped_long"] == 24


def test_bfloat16_keeps_small_steps_in_its_masters(tmp_path, tiny_model, workspace):
    model = write_rounded(tiny_model, tmp_path / "narrow")
    facts, weights = _train(tmp_path, model, workspace, dtype="bfloat16", steps=10, **FULL)
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    assert facts["final"]["loss"] < facts["losses"][0][1]
