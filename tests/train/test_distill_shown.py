"""Self-distillation: what the teacher reads, what the student learns of it, and when it is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evertune.data.encode import EncodedRow
from evertune.errors import DataError, RecipeError
from evertune.hashing import digest_json
from evertune.measure.stats import compare_paired
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import load_codec
from evertune.model.forward import Forward
from evertune.model.open import open_model
from evertune.train.batch import collate
from evertune.train.distill import Distillation, run_distill
from evertune.train.distill_policy import OnPolicyFeed, prompt_of
from evertune.train.distill_shown import Demonstrations
from evertune.train.distill_spec import DemonstrationSpec, DistillSpec, OnPolicySpec
from evertune.train.distill_targets import Targets
from evertune.train.distill_teachers import Teachers
from evertune.train.head import split_model
from evertune.train.loop import count_items
from evertune.train.material import load_material
from evertune.train.objective import Policy
from evertune.train.optimizer import Masters
from tests.model.folders import change_tensors
from tests.tiny import write_tiny_model
from tests.train.distilled import make_distill_spec
from tests.train.stage import open_workspace

# What random weights make of a demonstration is chance: they find the rows' answers likelier behind the first of these
# (0.04 nats per token), and less likely behind the second (-0.03).
HELPS, HURTS = "Say nothing.", "It is {answer}. {answer}"
SAMPLING = OnPolicySpec(share=1.0, max_new_tokens=6, temperature=1.0, steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that minds what it has read: its matrices are four times the usual random ones."""
    folder = write_tiny_model(tmp_path_factory.mktemp("self") / "model", seed=0)
    larger = {False: 4.0, True: 1.0}
    change_tensors(
        folder / "model.safetensors",
        lambda all: all.update({name: one * larger["norm" in name] for name, one in all.items()}),
    )
    return folder


def _spec(folder: Path, model: Path, text: str = HELPS, **changes: Any) -> DistillSpec:
    """A stage in which the model teaches itself."""
    demonstration = DemonstrationSpec(text, changes.pop("gain_rows", 12))
    spec = make_distill_spec(folder, model, [describe(model)], share=0.0, **changes)
    told = replace(spec, demonstration=demonstration)
    return replace(told, key=digest_json(told.to_json()))


def _encoded(spec: DistillSpec, shown: Demonstrations) -> list[EncodedRow]:
    material = load_material(spec, load_codec(spec.start.base.path), world_size=1, encode=shown.encode)
    return [row for items in material.new.values() for item in items for row in item.rows]


def _naive(checkpoint: Checkpoint, rows: Sequence[EncodedRow]) -> torch.Tensor:
    opened = open_model(checkpoint, dtype="float32").model
    batch = collate(rows, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        return opened(batch.ids_BT).logits[batch.predicts_BT].log_softmax(-1)


def test_an_order_survives_the_way_through_json_and_none_leaves_no_trace(tmp_path, model):
    spec = _spec(tmp_path, model)
    assert DistillSpec.from_json(spec.to_json()) == spec
    plain = make_distill_spec(tmp_path, model, [describe(model)])
    assert "demonstration" not in plain.to_json()
    assert DistillSpec.from_json(plain.to_json()) == plain


def test_the_teacher_reads_question_and_demonstration_and_the_student_the_question_alone(tmp_path, model):
    spec, shown = _spec(tmp_path, model, "A good answer: {answer} {braces stay}"), None
    shown = Demonstrations(spec.demonstration.text)
    codec, rows = load_codec(model), _encoded(spec, shown)
    row = rows[1]
    turns = [
        {"role": "user", "content": "please 1 plus 0?\n\nA good answer: It is 1! {braces stay}"},
        {"role": "assistant", "content": "It is 1!"},
    ]
    taught = codec.encode_chat(turns, answers=1)
    last = int(np.flatnonzero(taught.counted)[-1])
    assert shown.shown(row).ids.tolist() == taught.ids[: last + 1]
    assert prompt_of(row).tolist() == codec.encode_prompt([{"role": "user", "content": "please 1 plus 0?"}])
    for one in rows:
        assert one.ids[one.counted].tolist() == shown.shown(one).ids[shown.shown(one).counted].tolist()
    # The same answer to the same question is another thing to be taught behind another demonstration.
    assert len({one.digest for one in rows}) == len(rows)
    other = Demonstrations("Another.")
    assert _encoded(spec, other)[1].digest != row.digest
    assert _encoded(spec, other)[1].ids.tolist() == row.ids.tolist()


@pytest.mark.parametrize("on_policy", [None, SAMPLING])
def test_loss_is_the_divergence_from_the_teacher_that_has_read_more(tmp_path, model, on_policy):
    spec = _spec(tmp_path, model, "Good: {answer}", weight=1.0, words=None, on_policy=on_policy)
    workspace, shown = open_workspace(tmp_path / "workspace"), Demonstrations("Good: {answer}")
    targets = Targets(spec, root=workspace.cache, tmp=workspace.tmp, passing=on_policy is not None)
    teachers = Teachers(spec, device="cpu", read=shown.shown)
    material = load_material(spec, load_codec(model), world_size=1, encode=shown.encode)
    opened = open_model(spec.start, dtype="float32")
    if on_policy is None:
        items = material.step_rows(0)
        teachers.answer({"new": [row for item in items for row in item.rows]}, targets)
    else:
        feed = OnPolicyFeed(
            spec, material, ask=lambda: Forward(opened), stop_ids=opened.codec.stop_ids, teachers=teachers,
            targets=targets, gather=lambda one: one, rank=0, answered=shown.answered,
        )  # fmt: skip
        feed.prepare(0)
        items = feed.step_rows(0)
    rows = [row for item in items for row in item.rows]
    opened.model.requires_grad_(True)
    decoder, head = split_model(opened.model)
    objective = Distillation(targets, spec)
    counts = count_items(items, objective, ())
    sums = objective.backward(Policy(opened.model, decoder, head, opened.codec.pad_id), items, counts, ())
    student, teacher = _naive(spec.start, rows), _naive(spec.start, [shown.shown(row) for row in rows])
    by_hand = F.kl_div(student, teacher, log_target=True, reduction="sum").item()
    assert by_hand > 0.0
    assert sums[2].item() == pytest.approx(by_hand, rel=1e-3)


def test_the_gain_is_what_the_demonstration_does_to_the_likelihood_and_is_measured_once(tmp_path, model):
    spec, workspace = _spec(tmp_path, model, epochs=1.0, steps=None), open_workspace(tmp_path / "workspace")
    record = run_distill(spec, workspace)
    shown = Demonstrations(HELPS)
    rows = _encoded(spec, shown)
    gains = []
    for row in rows:
        target = torch.from_numpy(row.ids[row.counted]).long()
        with_, without = (
            _naive(spec.start, [one]).gather(1, target[:, None]).mean() for one in (shown.shown(row), row)
        )
        gains.append(float(with_ - without))
    material = load_material(spec, load_codec(model), world_size=1, encode=shown.encode)
    seen = list(dict.fromkeys(pick.index for pick in material.picks()))[:12]
    final = record["checkpoint"]["final"]
    assert final["gain"] == pytest.approx(np.mean([gains[i] for i in seen]), abs=1e-5)
    assert record["checkpoint"]["methods"][:1] == ["logit_kd"]
    assert "sdft_onpolicy" in record["checkpoint"]["methods"]
    assert record["checkpoint"]["standing"] == "academic"
    # Twelve rows twice for the gain, 24 to be taught; nobody is asked again.
    assert record["volatile"]["teacher_forwards"] == 24 + 24
    again = _spec(tmp_path, model, epochs=1.0, steps=None, lr=0.02)
    assert run_distill(again, workspace)["volatile"]["teacher_forwards"] == 0


def test_a_demonstration_that_does_not_help_is_refused_before_training(tmp_path, model):
    spec, workspace = _spec(tmp_path, model, HURTS), open_workspace(tmp_path / "workspace")
    with pytest.raises(
        RecipeError, match=r"does not help teacher 'teacher 0'.*-0\.03.*expected a gain above 0"
    ) as told:
        run_distill(spec, workspace)
    assert "would teach what the model knows" in str(told.value)
    assert workspace.manifest(spec.key) is None
    assert not list((workspace.work / spec.key).glob("step-*"))


def test_a_gain_that_may_be_chance_is_no_gain():
    # The mean is above 0 and its bound is not: 1.645 standard errors and more are asked for.
    gains = [0.3, -0.2, 0.1, -0.1, 0.05, 0.0]
    assert np.mean(gains) > 0.0
    assert compare_paired(gains, list("abcdef"), level=0.05, bounded=False).lower_bound < 0.0


def test_a_row_that_is_too_long_with_its_demonstration_is_named_or_left_out(tmp_path, model):
    longest = max(len(row.ids) for row in _encoded(_spec(tmp_path, model), Demonstrations("x")))
    spec = _spec(tmp_path, model, "y" * 60, max_tokens=longest + 20)
    with pytest.raises(DataError, match=r"new.jsonl:\d+: found \d+ tokens with the demonstration, expected at most"):
        run_distill(spec, open_workspace(tmp_path / "workspace"))


def test_the_student_learns_to_answer_as_if_it_had_read_the_demonstration(tmp_path, model):
    spec = _spec(tmp_path, model, steps=40, lr=0.02, weight=1.0, words=None)
    workspace = open_workspace(tmp_path / "workspace")
    record = run_distill(spec, workspace)
    lines = record["checkpoint"]["losses"]
    assert lines[-1][1] < 0.5 * lines[0][1]


@pytest.mark.parametrize("on_policy", [None, replace(SAMPLING, share=0.5)])
def test_interrupted_it_ends_with_the_same_bits(tmp_path, model, monkeypatch, on_policy):
    spec = _spec(tmp_path, model, save_steps=3, steps=8, on_policy=on_policy)
    whole, workspace = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_distill(spec, whole)
    update, calls = Masters.update, []

    class Interruption(Exception):
        pass

    def break_down(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Interruption
        update(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Masters, "update", break_down)
        with pytest.raises(Interruption):
            run_distill(spec, workspace)
    run_distill(spec, workspace)
    trees = [one.manifest(spec.key) for one in (whole, workspace)]
    assert all(trees)
    assert trees[0].tree == trees[1].tree
