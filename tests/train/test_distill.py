"""Distillation on a tiny model: the loss against a naive one, what is asked of teachers and when, resume, bad input."""

import gc
import json
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.data.encode import EncodedPrompt, EncodedRow, encode_prompts
from evertune.errors import CheckpointError, DataError, IntegrityError, RecipeError
from evertune.hashing import canonical_json, digest_file
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import Codec, load_codec
from evertune.model.forward import Forward
from evertune.model.open import OpenModel, open_model
from evertune.train import distill_answers, distill_teachers
from evertune.train.batch import collate
from evertune.train.distill import Distillation, run_distill
from evertune.train.distill_losses import mixture
from evertune.train.distill_policy import OnPolicyFeed, SampledRow, answered_row, prompt_of
from evertune.train.distill_spec import AnswersSpec, DistillSpec, OnPolicySpec
from evertune.train.distill_targets import Targets
from evertune.train.distill_teachers import Teachers
from evertune.train.head import Head, split_model
from evertune.train.loop import count_items
from evertune.train.losses import bucket
from evertune.train.material import Material, load_material
from evertune.train.objective import Policy
from evertune.train.optimizer import Masters
from evertune.train.reference import LiveReference
from evertune.train.sample import sample_answers
from evertune.train.sft import run_sft
from evertune.workspace import Workspace
from tests.model.folders import change_json, change_tensors, copy, write_adapter_folder
from tests.tiny import write_tiny_model
from tests.train.distilled import make_distill_spec
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits, write_rows


class Interruption(Exception):
    """What the test throws into a step."""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[Checkpoint]:
    """Two adapters over the tiny model, and another model with the same words."""
    folder, base = tmp_path_factory.mktemp("teachers"), describe(tiny_model)
    adapters = [write_adapter_folder(base, folder / f"adapter-{seed}", seed=seed) for seed in (1, 2)]
    return [*adapters, describe(write_tiny_model(folder / "model", seed=5))]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


def _material(spec: DistillSpec) -> Material:
    return load_material(spec, load_codec(spec.start.base.path), world_size=1)


def _rows(spec: DistillSpec) -> list[EncodedRow]:
    """The rows of the new sources."""
    return [row for items in _material(spec).new.values() for item in items for row in item.rows]


def _taught(spec: DistillSpec, workspace: Workspace) -> Targets:
    """The targets, with what is missing of them computed."""
    targets = Targets(spec, root=workspace.cache, tmp=workspace.tmp)
    rows = _rows(spec)
    by_source = {source: [row for row in rows if row.source == source] for source in spec.routes}
    Teachers(spec, device="cpu").answer(by_source, targets)
    return targets


def _naive(checkpoint: Checkpoint, rows: Sequence[EncodedRow], temperature: float = 1.0) -> Tensor:
    """Full log-probabilities at the counted positions, by the model's own forward."""
    model = open_model(checkpoint, dtype="float32").model
    batch = collate(rows, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        return (model(batch.ids_BT).logits[batch.predicts_BT] / temperature).log_softmax(-1)


def _tree(workspace: Workspace, spec: DistillSpec) -> str:
    manifest = workspace.manifest(spec.key)
    assert manifest is not None
    return manifest.tree


def test_an_order_survives_the_way_through_json(tmp_path, tiny_model, teachers):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, anchor={"cache": "top64"}, words=None)
    assert DistillSpec.from_json(json.loads(canonical_json(spec.to_json()))) == spec


# The loss.


def _step_loss(spec: DistillSpec, targets: Targets, micro_batch_rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, cross-entropy and divergence of one step of 6 new and 2 replayed rows, divided; gradients)."""
    opened = open_model(spec.start, dtype="float32")
    opened.model.requires_grad_(True)
    decoder, head = split_model(opened.model)
    masters = Masters(dict(opened.model.named_parameters()))
    material = _material(spec)
    rows = [*material.first_rows(6, is_replay=False), *material.first_rows(2, is_replay=True)]
    objective, policy = Distillation(targets, spec), Policy(opened.model, decoder, head, opened.codec.pad_id)
    counts = count_items(rows, objective, ())
    sums = torch.zeros(len(counts.divisors))
    for first in range(0, len(rows), micro_batch_rows):
        sums += objective.backward(policy, rows[first : first + micro_batch_rows], counts, ())
    return sums[:3] / torch.tensor(list(counts.divisors.values()))[:3], masters.gradients()


@pytest.mark.parametrize(("loss", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 0.5)])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_loss_and_gradient_equal_a_naive_distillation(
    tmp_path, tiny_model, teachers, workspace, loss, temperature, weight
):
    spec = make_distill_spec(
        tmp_path, tiny_model, teachers, loss=loss, temperature=temperature, weight=weight, words=None, beta=0.3
    )
    found, gradients = _step_loss(spec, _taught(spec, workspace), micro_batch_rows=8)
    # The naive way: both models over everything, full logits, autograd, torch's kl_div.
    student, material = open_model(spec.start, dtype="float32").model.requires_grad_(True), _material(spec)
    new, old = material.first_rows(6, is_replay=False), material.first_rows(2, is_replay=True)
    batches = [collate([row for item in items for row in item.rows], pad_id=0, device=torch.device("cpu"))
               for items in (new, old)]  # fmt: skip
    logits = [student(one.ids_BT).logits[one.predicts_BT] for one in batches]
    ce = [F.cross_entropy(one, batch.targets_N, reduction="sum") for one, batch in zip(logits, batches, strict=True)]
    teacher = _naive(teachers[0], [row for item in new for row in item.rows], temperature)
    own = (logits[0] / temperature).log_softmax(-1)
    mix = torch.logsumexp(torch.stack([teacher + torch.tensor(0.3).log(), own + torch.tensor(0.7).log()]), dim=0)
    kl = {
        "forward_kl": F.kl_div(own, teacher, log_target=True, reduction="sum"),
        "reverse_kl": F.kl_div(teacher, own, log_target=True, reduction="sum"),
        "jsd": 0.3 * F.kl_div(mix, teacher, log_target=True, reduction="sum")
        + 0.7 * F.kl_div(mix, own, log_target=True, reduction="sum"),
    }[loss]
    counted, divergence = sum(len(one.targets_N) for one in batches), temperature**2 * kl
    naive = (weight * divergence + (1 - weight) * ce[0] + ce[1]) / counted
    naive.backward()
    expected = [naive.item(), (ce[0] + ce[1]).item() / counted, divergence.item() / len(batches[0].targets_N)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    for name, parameter in student.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-6, rtol=1e-3), name


def test_how_a_step_is_cut_up_does_not_change_it(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers)
    targets = _taught(spec, workspace)
    (whole, gradients), (cut, others) = (_step_loss(spec, targets, rows) for rows in (8, 1))
    assert torch.allclose(whole, cut, rtol=1e-5)
    assert all(torch.allclose(gradients[name], others[name], atol=1e-6, rtol=1e-3) for name in gradients)


# What teachers are asked, and when.


def test_a_target_is_what_the_teacher_opened_by_itself_says(tmp_path, tiny_model, teachers, workspace):
    routes = {"new": [0], "more": [1], "other": [2]}
    new = [write_rows(tmp_path / f"{name}.jsonl", 5, word=name) for name in routes]
    spec = make_distill_spec(tmp_path, tiny_model, teachers, routes, new=new, words=None, temperature=2.0)
    targets = _taught(spec, workspace)
    for source, (number,) in routes.items():
        rows = [row for row in _rows(spec) if row.source == source]
        found = targets.read(rows)
        assert found.ids_MJ is None
        assert torch.allclose(found.logp_ML, _naive(teachers[number], rows, 2.0), atol=1e-5)


def test_adapters_that_take_turns_on_one_base_say_the_same_bits(tmp_path, tiny_model, teachers, workspace):
    """Also after another adapter has been taken off again."""
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 1]}, words=None)
    together = _taught(spec, workspace)
    row = _rows(spec)[0]
    for number in (0, 1):
        alone = make_distill_spec(tmp_path, tiny_model, [teachers[number]], words=None)
        stored = _taught(alone, open_workspace(tmp_path / f"alone-{number}")).own(alone.teachers[0]).read(row)
        assert torch.equal(together.own(spec.teachers[number]).read(row)["logp"], stored["logp"])


def test_a_stack_of_adapters_teaches_as_a_stack(tmp_path, tiny_model, teachers, workspace):
    stack = write_adapter_folder(teachers[0], tmp_path / "above", seed=9)
    spec = make_distill_spec(tmp_path, tiny_model, [stack], words=None)
    rows = _rows(spec)[:3]
    assert torch.allclose(_taught(spec, workspace).read(rows).logp_ML, _naive(stack, rows), atol=1e-5)


@pytest.mark.parametrize("words", [8, None])
def test_several_teachers_of_a_row_are_the_mean_of_their_probabilities(
    tmp_path, tiny_model, teachers, workspace, words
):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 1, 2]}, words=words)
    rows = _rows(spec)[:4]
    found = _taught(spec, workspace).read(rows)
    # Weights 1, 2, 3 over the full vocabulary, then the same buckets.
    full = mixture([_naive(one, rows) for one in teachers], [1.0, 2.0, 3.0])
    expected = full if found.ids_MJ is None else bucket(full, found.ids_MJ)
    assert torch.allclose(found.logp_ML.exp(), expected.exp(), atol=2e-3)
    if found.ids_MJ is not None:
        assert found.ids_MJ.shape[1] == 3 * 8
        assert torch.allclose(found.logp_ML.exp().sum(-1), torch.ones(len(full)), atol=1e-5)


def test_models_are_loaded_one_after_another_and_gone_before_the_student(
    tmp_path, tiny_model, teachers, workspace, monkeypatch
):
    alive: list[weakref.ref[Any]] = []
    opened: list[Path] = []

    def watch(checkpoint: Checkpoint, **settings: Any) -> OpenModel:
        gc.collect()
        assert [one for one in alive if one() is not None] == [], "another model is still in memory"
        found = open_model(checkpoint, **settings)
        alive.append(weakref.ref(found.model))
        opened.append(checkpoint.path)
        return found

    monkeypatch.setattr(distill_teachers, "open_model", watch)
    monkeypatch.setattr("evertune.train.stage.open_model", watch)
    monkeypatch.setattr("evertune.train.stage.stage_drift", lambda *_, **__: {})
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [2, 0, 1]}, words=None)
    run_distill(spec, workspace)
    # The adapters' base once, the other model once, and the student.
    assert sorted(opened) == sorted([tiny_model.resolve(), teachers[2].path, tiny_model.resolve()])


def test_a_second_stage_asks_no_teacher_again(tmp_path, tiny_model, teachers, workspace, monkeypatch):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 1]}, steps=4)
    seen = 12  # 4 steps of 4 rows, one in four replayed
    # Each of the two names its own words for each row, then answers for the words of both.
    assert run_distill(spec, workspace)["volatile"]["teacher_forwards"] == 2 * 2 * seen
    monkeypatch.setattr(distill_teachers, "open_model", None)
    again = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 1]}, steps=4, lr=0.003, weight=0.9)
    assert run_distill(again, workspace)["volatile"]["teacher_forwards"] == 0
    # Another weighting of the same ensemble needs nothing new either.
    other = replace(again, key="1" * 64, teachers=[replace(one, weight=5.0 - one.weight) for one in again.teachers])
    assert run_distill(other, workspace)["volatile"]["teacher_forwards"] == 0


@pytest.mark.parametrize("change", [{"temperature": 2.0}, {"words": 17}, {"dtype": "bfloat16"}])
def test_another_temperature_width_or_precision_is_another_question(tmp_path, tiny_model, teachers, workspace, change):
    spec = make_distill_spec(tmp_path, tiny_model, teachers)
    rows = _rows(spec)
    _taught(spec, workspace)
    other = make_distill_spec(tmp_path, tiny_model, teachers, **change)
    targets = Targets(other, root=workspace.cache, tmp=workspace.tmp)
    assert len(targets.own(other.teachers[0]).missing(rows)) == len(rows)


def test_an_anchor_to_the_same_checkpoint_has_left_the_answers(tmp_path, tiny_model, workspace, monkeypatch):
    anchored = make_spec(tmp_path, tiny_model, anchor={"on": "both", "cache": "top64"})
    run_sft(anchored, workspace)
    monkeypatch.setattr(distill_teachers, "open_model", None)
    spec = make_distill_spec(tmp_path, tiny_model, [describe(tiny_model)], words=64)
    assert run_distill(spec, workspace)["volatile"]["teacher_forwards"] == 0


def test_only_rows_that_are_seen_are_answered(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, steps=1, share=0.0)
    assert run_distill(spec, workspace)["volatile"]["teacher_forwards"] == 4


def test_stored_answers_that_were_changed_are_refused(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers)
    _taught(spec, workspace)
    (file,) = workspace.cache.rglob("logp.raw")
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"logp\.raw"):
        run_distill(spec, workspace)


# The stage as a whole.


def test_the_student_comes_to_say_what_its_teacher_says(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, weight=1.0, steps=40, words=None, share=0.0)
    facts = run_distill(spec, workspace)["checkpoint"]
    unseen = make_distill_spec(tmp_path, tiny_model, teachers, new=[write_rows(tmp_path / "u.jsonl", 12, seed=50)])
    rows = _rows(unseen)
    teacher, before = _naive(teachers[0], rows), _naive(spec.start, rows)
    after = _naive(describe(workspace.path(spec.key)), rows)
    gaps = [F.kl_div(one, teacher, log_target=True, reduction="batchmean").item() for one in (before, after)]
    assert gaps[1] < 0.5 * gaps[0]
    assert facts["final"]["distill"] == facts["final"]["loss"], "weight 1 leaves the answers unread"


def test_the_facts_are_complete(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [1, 0]}, anchor={"on": "replay"})
    record = run_distill(spec, workspace)
    facts = record["checkpoint"]
    assert (facts["stage"], facts["form"], facts["stands_on"]) == ("distill", "adapter", spec.start.digest)
    assert facts["methods"] == ["logit_kd", "lora", "replay", "dedup", "anchored_sft_kl"]
    assert facts["settings"]["routes"] == {"new": ["teacher 1", "teacher 0"]}
    assert [one["checkpoint"] for one in facts["settings"]["teachers"]] == [one.digest for one in teachers]
    assert facts["final"].keys() == {"loss", "ce", "distill", "covered_mass", "kl"}
    assert 16 / 261 < facts["final"]["covered_mass"] < 1.0
    assert facts["replay"]["share_done"] == 0.25
    assert facts["parents"] == [one.digest for one in teachers]
    canonical_json(record)


def test_covered_mass_is_what_the_kept_words_hold_and_little_of_it_is_said(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, words=4, steps=6, share=0.0)
    facts = run_distill(spec, workspace)["checkpoint"]
    full = _naive(teachers[0], _rows(spec))  # 6 steps of 4 rows see each of the 24 once
    assert facts["final"]["covered_mass"] == pytest.approx(full.exp().topk(4).values.sum(-1).mean().item(), rel=1e-3)
    assert [one["name"] for one in facts["warnings"]] == ["covered_mass"]


def test_the_same_order_gives_the_same_bytes(tmp_path, tiny_model, teachers):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 2]}, loss="jsd", temperature=1.5)
    workspaces = [open_workspace(tmp_path / name) for name in ("a", "b")]
    found = [run_distill(spec, one)["checkpoint"] for one in workspaces]
    assert found[0] == found[1]
    assert _tree(workspaces[0], spec) == _tree(workspaces[1], spec)


def test_teachers_and_routes_change_the_result(tmp_path, tiny_model, teachers):
    weights = []
    for i, routes in enumerate(({"new": [0]}, {"new": [1]}, {"new": [0, 1]})):
        spec = make_distill_spec(tmp_path, tiny_model, teachers, routes)
        workspace = open_workspace(tmp_path / str(i))
        run_distill(spec, workspace)
        weights.append(published_weights(workspace, spec))
    assert not any(same_bits(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    "kind",
    [
        {"loss": "forward_kl", "tune": {"lora": {"rank": 2, "dropout": 0.2}}},
        {"loss": "jsd", "temperature": 2.0, "tune": {"full": {}}, "lr": 1e-3},
        {"loss": "reverse_kl", "words": None, "ema_decay": 0.9, "anchor": {"on": "both"}},
        {"route": "best", "routes": {"new": [2]}, "weight": 1.0},
    ],
)
def test_interrupted_it_ends_with_the_same_bits(tmp_path, tiny_model, teachers, monkeypatch, kind):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, **{"routes": {"new": [0, 2]}, "save_steps": 3, **kind})
    whole = open_workspace(tmp_path / "whole")
    run_distill(spec, whole)
    update = Masters.update
    for step in (4, 8):
        workspace, calls = open_workspace(tmp_path / f"broken-{step}"), []

        def break_down(self: Masters, rate: float, step: int = step, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == step:
                raise Interruption
            update(self, rate)

        with monkeypatch.context() as patch:
            patch.setattr(Masters, "update", break_down)
            with pytest.raises(Interruption):
                run_distill(spec, workspace)
        torch.manual_seed(step)
        run_distill(spec, workspace)
        assert _tree(workspace, spec) == _tree(whole, spec), f"interrupted in step {step}"


def test_interrupted_while_a_teacher_answers_only_what_is_missing_is_asked_again(
    tmp_path, tiny_model, teachers, workspace, monkeypatch
):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, steps=6, share=0.0)
    monkeypatch.setattr(distill_teachers, "SHARD_ROWS", 10)
    real, calls = distill_teachers._outputs, []

    def break_down(*arguments: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 15:
            raise Interruption
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill_teachers, "_outputs", break_down)
        with pytest.raises(Interruption):
            run_distill(spec, workspace)
    # 24 rows in shards of 10, the second broken off.
    assert run_distill(spec, workspace)["volatile"]["teacher_forwards"] == 14


# Bad input: one clear error, and no step is trained.


def _refused(spec: DistillSpec, workspace: Workspace, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run_distill(spec, workspace)
    assert workspace.manifest(spec.key) is None
    assert not list((workspace.work / spec.key).glob("step-*"))


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path, tiny_model, workspace):
    wide = write_tiny_model(tmp_path / "wide")
    change_json(wide / "config.json", vocab_size=300)
    change_tensors(
        wide / "model.safetensors",
        lambda tensors: tensors.update({"model.embed_tokens.weight": torch.randn(300, 32)}),
    )
    spec = make_distill_spec(tmp_path, tiny_model, [describe(wide)])
    _refused(spec, workspace, CheckpointError, "'teacher 0' has a vocabulary of 300 words, expected the student's 261")


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, tiny_model, workspace):
    other = describe(write_tiny_model(tmp_path / "other", template="llama2"))
    spec = make_distill_spec(tmp_path, tiny_model, [other])
    _refused(spec, workspace, CheckpointError, "'teacher 0' has another tokenizer or chat template")


def test_a_teacher_with_nan_weights_is_refused(tmp_path, tiny_model, workspace):
    sick = copy(tiny_model, tmp_path / "sick")
    change_tensors(sick / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    spec = make_distill_spec(tmp_path, tiny_model, [describe(sick)])
    _refused(spec, workspace, CheckpointError, r"values of model\.norm\.weight are NaN or Inf")


def test_a_teacher_whose_finite_weights_overflow_is_refused(tmp_path, tiny_model, workspace):
    sick = copy(tiny_model, tmp_path / "sick")
    change_tensors(sick / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    spec = make_distill_spec(tmp_path, tiny_model, [describe(sick)])
    _refused(spec, workspace, CheckpointError, "teacher 'teacher 0': .* its logits are NaN or Inf")


def test_a_row_for_which_the_outputs_overflow_is_named(tmp_path, tiny_model):
    opened = open_model(describe(tiny_model), dtype="float32")
    decoder, head = split_model(opened.model)
    live = LiveReference(
        opened.model, decoder, Head(torch.full_like(head.weight_VH, 3e38), None), frozen=nullcontext, pad_id=0
    )
    row = _rows(make_distill_spec(tmp_path, tiny_model, [opened.checkpoint]))[3]
    with pytest.raises(CheckpointError, match="its outputs for row 'new:4' of 'new' are NaN or Inf"):
        distill_teachers._outputs(live, row, lambda logp_MV, row, chosen: {"logp": logp_MV})


def test_a_teacher_that_has_changed_since_the_order_is_refused(tmp_path, tiny_model, teachers, workspace):
    adapter = write_adapter_folder(describe(tiny_model), tmp_path / "adapter", seed=3)
    spec = make_distill_spec(tmp_path, tiny_model, [adapter])
    change_tensors(adapter.path / "adapter_model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    _refused(spec, workspace, IntegrityError, "found checkpoint")


def test_more_words_than_there_are_are_refused(tmp_path, tiny_model, teachers, workspace):
    spec = make_distill_spec(tmp_path, tiny_model, teachers, {"new": [0, 1]}, words=131)
    _refused(spec, workspace, RecipeError, "131 words of 2 teachers are to be kept of a vocabulary of 261")


# Compressing a stack of adapters.


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, teachers: list[Checkpoint]) -> Checkpoint:
    """A second adapter over the first teacher; both have rank 3."""
    return write_adapter_folder(teachers[0], tmp_path_factory.mktemp("stack") / "second", seed=8)


def _compressed(folder: Path, model: Path, stack: Checkpoint, rank: int, **changes: Any) -> DistillSpec:
    settings = {"tune": {"lora": {"rank": rank}}, "weight": 1.0, "words": None, "share": 0.0, **changes}
    return make_distill_spec(folder, model, [stack], compressed=stack, **settings)


def _gap(checkpoint: Checkpoint, teacher: Checkpoint, rows: Sequence[EncodedRow]) -> float:
    logp, teacher_logp = _naive(checkpoint, rows), _naive(teacher, rows)
    return F.kl_div(logp, teacher_logp, log_target=True, reduction="batchmean").item()


def test_a_stack_becomes_one_adapter_over_its_base_that_says_the_same(tmp_path, tiny_model, stack, workspace):
    spec = _compressed(tmp_path, tiny_model, stack, 8, lr=1e-9, steps=1)
    facts = run_distill(spec, workspace)["checkpoint"]
    made = describe(workspace.path(spec.key))
    assert [one.digest for one in made.stack[:-1]] == [spec.start.digest]
    assert facts["final"]["held"] == pytest.approx(1.0)
    rows = _rows(spec)
    assert _gap(made, stack, rows) < 1e-3 * _gap(spec.start, stack, rows)


def test_teaching_mends_what_a_smaller_rank_has_lost(tmp_path, tiny_model, stack, workspace):
    cut = _compressed(tmp_path, tiny_model, stack, 2, lr=1e-9, steps=1)
    taught = _compressed(tmp_path, tiny_model, stack, 2, lr=3e-3, steps=40)
    held = [run_distill(one, workspace)["checkpoint"]["final"]["held"] for one in (cut, taught)]
    assert held[0] == held[1]
    assert 0.3 < held[0] < 0.9
    rows = _rows(cut)
    gaps = [_gap(describe(workspace.path(one.key)), stack, rows) for one in (cut, taught)]
    assert gaps[1] < 0.7 * gaps[0]


def test_a_compression_goes_on_after_an_interruption_with_the_same_bits(tmp_path, tiny_model, stack, monkeypatch):
    spec = _compressed(tmp_path, tiny_model, stack, 2, save_steps=3)
    whole, workspace = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_distill(spec, whole)
    update, calls = Masters.update, []

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
    assert _tree(workspace, spec) == _tree(whole, spec)


def test_layers_that_the_new_adapter_leaves_out_are_named(tmp_path, tiny_model, stack, workspace):
    tune = {"lora": {"rank": 2, "targets": ["q_proj"]}}
    spec = _compressed(tmp_path, tiny_model, stack, 2, tune=tune)
    _refused(spec, workspace, RecipeError, "the stack to compress changes model.layers.0.mlp.down_proj")


# The student answers.

SAYING: dict[str, Any] = {"share": 0.5, "max_new_tokens": 12, "temperature": 1.0, "steps": 3}


def _on_policy(folder: Path, model: Path, teachers: list[Checkpoint], **changes: Any) -> DistillSpec:
    how = OnPolicySpec(**{**SAYING, **{name: changes.pop(name) for name in list(changes) if name in SAYING}})
    length = {"steps": changes.pop("stage_steps", 8)}
    return make_distill_spec(folder, model, teachers, on_policy=how, **length, **changes)


def test_a_prompt_is_what_the_student_would_be_asked(tmp_path, tiny_model):
    spec = make_distill_spec(tmp_path, tiny_model, [describe(tiny_model)])
    codec = load_codec(tiny_model)
    lines = [json.loads(line) for line in Path(spec.new[0].path).read_text().splitlines()]
    for row, line in zip(_rows(spec), lines, strict=True):
        assert prompt_of(row).tolist() == codec.encode_prompt(line["messages"][:-1])


def test_of_a_conversation_the_last_answer_is_replaced():
    ids, counted = np.arange(9, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0, 1, 1, 0], dtype=bool)
    row = EncodedRow("s", "1", ids, counted, is_replay=False, digest="")
    found = answered_row(row, [70, 71])
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 5, 70, 71]
    assert found.counted.tolist() == [False] * 6 + [True] * 2


def test_the_students_answers_are_taught_and_nothing_else_of_them(tmp_path, tiny_model, teachers, workspace):
    spec = _on_policy(tmp_path, tiny_model, teachers, share=1.0, weight=0.7, words=None)
    opened = open_model(spec.start, dtype="float32")
    opened.model.requires_grad_(True)
    targets = Targets(spec, root=workspace.cache, tmp=workspace.tmp, passing=True)
    feed = OnPolicyFeed(
        spec,
        _material(spec),
        ask=lambda: Forward(opened),
        stop_ids=opened.codec.stop_ids,
        teachers=Teachers(spec, device="cpu"),
        targets=targets,
        gather=lambda one: one,
        rank=0,
    )
    feed.prepare(0)
    items = feed.step_rows(0)
    said = [item.row for item in items if isinstance(item, SampledRow)]
    assert len(said) == sum(not item.is_replay for item in items) == 3
    objective = Distillation(targets, spec)
    decoder, head = split_model(opened.model)
    counts = count_items(items, objective, ())
    sums = objective.backward(Policy(opened.model, decoder, head, opened.codec.pad_id), items, counts, ())
    # By hand: KL(teacher || student) at the answers' tokens, cross-entropy of the replayed row.
    own, teacher = _naive(spec.start, said), _naive(teachers[0], said)
    replayed = [item for item in items if item.is_replay]
    batch = collate([row for item in replayed for row in item.rows], pad_id=0, device=torch.device("cpu"))
    ce = F.nll_loss(_naive(spec.start, batch.rows), batch.targets_N, reduction="sum")
    kl = F.kl_div(own, teacher, log_target=True, reduction="sum")
    assert sums.tolist()[:3] == pytest.approx([ce.item() + 0.7 * kl.item(), ce.item(), kl.item()], rel=1e-4)
    assert counts.divisors["ce"] == len(batch.targets_N)
    assert sums[3].item() / counts.divisors["length"] == pytest.approx(len(own) / 3)


def test_answers_come_from_the_weights_as_they_are_and_from_the_seed(tmp_path, tiny_model, teachers, workspace):
    asked: list[list[list[int]]] = []

    class Listening(OnPolicyFeed):
        def prepare(self, step: int) -> dict[str, float]:
            told = super().prepare(step)
            if step % SAYING["steps"] == 0:
                rows = [item.rows[0].ids.tolist() for one in self._held for item in self.step_rows(one)]
                asked.append(rows)
            return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evertune.train.distill.OnPolicyFeed", Listening)
        for name, changes in (("a", {}), ("b", {}), ("c", {"lr": 0.02}), ("d", {"seed": 8})):
            run_distill(_on_policy(tmp_path, tiny_model, teachers, **changes), open_workspace(tmp_path / name))
    runs = [asked[first : first + 3] for first in range(0, 12, 3)]
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[2][0], "before the first step the weights are the same"
    assert runs[0][1] != runs[2][1]
    assert runs[0][0] != runs[3][0]


@pytest.mark.parametrize("kind", [{}, {"loss": "reverse_kl", "share": 1.0, "tune": {"full": {}}, "lr": 1e-3}])
def test_on_policy_interrupted_it_ends_with_the_same_bits(tmp_path, tiny_model, teachers, monkeypatch, kind):
    spec = _on_policy(tmp_path, tiny_model, teachers, routes={"new": [0, 2]}, save_steps=1, **kind)
    whole, workspace = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_distill(spec, whole)
    update, calls = Masters.update, []

    def break_down(self: Masters, rate: float) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Interruption
        update(self, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Masters, "update", break_down)
        with pytest.raises(Interruption):
            run_distill(spec, workspace)
    assert [one.name for one in (workspace.work / spec.key).glob("step-*")] == ["step-000003"]
    run_distill(spec, workspace)
    assert _tree(workspace, spec) == _tree(whole, spec)


def test_on_policy_the_student_comes_nearer_where_it_goes_by_itself(tmp_path, tiny_model, teachers, workspace):
    spec = _on_policy(
        tmp_path, tiny_model, teachers, stage_steps=60, share=1.0, weight=1.0, words=None, replay=[], lr=0.005
    )
    record = run_distill(spec, workspace)
    lines = (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()
    gaps = [json.loads(line)["distill"] for line in lines]
    assert sum(gaps[-10:]) < 0.6 * sum(gaps[:10])
    assert record["checkpoint"]["methods"][:2] == ["logit_kd", "gkd"]
    # Every row is answered anew, and no answer is kept: 60 steps of 4 rows.
    assert record["volatile"]["teacher_forwards"] == 60 * 4
    assert not list(workspace.cache.rglob("*.raw"))


# The teacher answers.

WRITING: dict[str, Any] = {
    "keep": "likeliest",
    "samples": 4,
    "max_new_tokens": 100,
    "temperature": 1.0,
    "verifiers": {},
}


def _written(folder: Path, model: Path, teacher: Checkpoint, **changes: Any) -> DistillSpec:
    how = AnswersSpec(**{**WRITING, **{name: changes.pop(name) for name in list(changes) if name in WRITING}})
    new = [write_rows(folder / "asked.jsonl", 8)]
    settings = {"weight": 0.0, "share": 0.0, "steps": 2, **changes}
    return make_distill_spec(folder, model, [teacher], {"asked": [0]}, new=new, answers=how, **settings)


def _stored_answers(spec: DistillSpec, workspace: Workspace) -> dict[str, list[int]]:
    """By question, what was kept of its answers."""
    targets, codec = Targets(spec, root=workspace.cache, tmp=workspace.tmp), load_codec(spec.start.base.path)
    store = targets.written(spec.teachers[0], "asked")
    return {one.id: store.read(distill_answers.asked(spec, one))["ids"][1:].tolist() for one in _prompts(spec, codec)}


def test_the_likeliest_of_the_answers_that_end_is_learnt_and_nothing_else(tmp_path, tiny_model, teachers, workspace):
    spec = _written(tmp_path, tiny_model, teachers[2])
    record = run_distill(spec, workspace)
    kept = _stored_answers(spec, workspace)
    codec, opened = load_codec(tiny_model), open_model(teachers[2], dtype="float32")
    assert 0 < sum(bool(ids) for ids in kept.values()) < 8, "some answers end in time and some do not"
    for name, ids in kept.items():
        prompt = next(one for one in _prompts(spec, codec) if one.id == name)
        said = sample_answers(
            Forward(opened),
            [prompt.prompt.ids.tolist()],
            seeds=[[distill_answers._seed(spec.seed, prompt, g) for g in range(4)]],
            max_new_tokens=100,
            temperature=1.0,
            stop_ids=codec.stop_ids,
        )[0]
        ended = [one.ids for one in said if one.stopped]
        rows = [distill_answers._conversation(prompt, one) for one in ended]
        means = [
            F.nll_loss(_naive(teachers[2], [row]), torch.tensor(one)) for row, one in zip(rows, ended, strict=True)
        ]
        assert tuple(ids) == (ended[int(torch.stack(means).argmin())] if ended else ())
    facts = record["checkpoint"]
    assert facts["final"]["answered"] == sum(bool(ids) for ids in kept.values()) / 8
    assert facts["final"]["loss"] == facts["final"]["ce"]
    assert facts["methods"] == ["seq_kd", "lora"]
    assert "distill" not in facts["final"]


def test_a_teacher_with_another_tokenizer_may_write_and_its_text_is_learnt(tmp_path, tiny_model, workspace):
    stranger = describe(write_tiny_model(tmp_path / "other", template="llama2", seed=5))
    ours, theirs = load_codec(tiny_model), load_codec(stranger.path)
    assert ours.digest != theirs.digest
    spec = _written(tmp_path, tiny_model, stranger, max_new_tokens=150, samples=8)
    record = run_distill(spec, workspace)
    kept = {name: ids for name, ids in _stored_answers(spec, workspace).items() if ids}
    assert kept
    lines = [json.loads(line) for line in Path(spec.new[0].path).read_text().splitlines()]
    turns = {f"asked:{i + 1}": line["messages"][:-1] for i, line in enumerate(lines)}
    opened = open_model(stranger, dtype="float32")
    for prompt in _prompts(spec, ours):
        said = sample_answers(
            Forward(opened),
            [theirs.encode_prompt(turns[prompt.id])],
            seeds=[[distill_answers._seed(spec.seed, prompt, g) for g in range(8)]],
            max_new_tokens=150,
            temperature=1.0,
            stop_ids=theirs.stop_ids,
        )[0]
        texts = [theirs.decode(one.ids[:-1]) for one in said if one.stopped]
        assert (prompt.id in kept) == bool(texts)
        if texts:
            rows = [[*turns[prompt.id], {"role": "assistant", "content": text}] for text in texts]
            read = [ours.encode_chat(row, answers=1) for row in rows]
            answers = [[one for one, c in zip(each.ids, each.counted, strict=True) if c] for each in read]
            assert kept[prompt.id] in answers
            assert kept[prompt.id][-1] in ours.stop_ids
    assert record["checkpoint"]["final"]["answered"] == len(kept) / 8


def _prompts(spec: DistillSpec, codec: Codec) -> list[EncodedPrompt]:
    items = load_material(spec, codec, world_size=1, encode=encode_prompts).new["asked"]
    return [one for one in items if isinstance(one, EncodedPrompt)]


def test_only_verified_answers_are_kept(tmp_path, tiny_model, teachers, workspace):
    asked: list[tuple[str, str, Any]] = []

    def check(source: str, output: str, answer: Any) -> bool:
        asked.append((source, output, answer))
        return len(output) % 2 == 0

    spec = _written(tmp_path, tiny_model, teachers[2], keep="verified", verifiers={"asked": {"exact": {}}})
    run_distill(spec, workspace, check)
    codec = load_codec(tiny_model)
    texts = [codec.decode(ids[:-1]) for ids in _stored_answers(spec, workspace).values() if ids]
    assert texts
    assert all(len(text) % 2 == 0 for text in texts)
    assert any(len(output) % 2 for _, output, _ in asked)
    lines = [json.loads(line) for line in Path(spec.new[0].path).read_text().splitlines()]
    assert {answer for _, _, answer in asked} <= {line["messages"][-1]["content"] for line in lines}


def test_a_prompt_with_another_right_answer_is_verified_anew(tmp_path, tiny_model, teachers, workspace):
    verified = {"keep": "verified", "verifiers": {"asked": {"exact": {}}}}
    first = _written(tmp_path, tiny_model, teachers[2], **verified)
    run_distill(first, workspace, lambda *_: True)
    answered = next(i for i, ids in enumerate(_stored_answers(first, workspace).values()) if ids)
    file = Path(first.new[0].path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[answered]["messages"][-1]["content"] = "corrected"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = replace(first, key="1" * 64, new=[replace(first.new[0], digest=digest_file(file))])
    asked: list[Any] = []
    run_distill(spec, workspace, lambda source, output, answer: bool(asked.append(answer)))
    assert set(asked) == {"corrected"}
    assert list(_stored_answers(spec, workspace).values())[answered] == []


def test_a_teacher_none_of_whose_answers_is_kept_is_an_error(tmp_path, tiny_model, teachers, workspace):
    spec = _written(tmp_path, tiny_model, teachers[2], keep="verified", verifiers={"asked": {"exact": {}}})
    with pytest.raises(DataError, match="teacher 'teacher 0' has written no answer that is kept to any of its 8 rows"):
        run_distill(spec, workspace, lambda *_: False)


@pytest.mark.parametrize(
    "kind",
    [{"weight": 0.0}, {"weight": 0.5, "tune": {"full": {}}, "lr": 1e-3}],
)
def test_with_written_answers_interrupted_it_ends_with_the_same_bits(tmp_path, tiny_model, teachers, monkeypatch, kind):
    spec = _written(tmp_path, tiny_model, teachers[0], steps=6, save_steps=2, **kind)
    whole, workspace = open_workspace(tmp_path / "whole"), open_workspace(tmp_path / "broken")
    run_distill(spec, whole)
    best, update, calls = distill_answers._best, Masters.update, []

    def break_down(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) in (4, 12):
            raise Interruption
        return best(*arguments) if len(arguments) > 2 else update(*arguments)

    # First while the teacher writes, then in a step.
    for place, name in ((distill_answers, "_best"), (Masters, "update")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, break_down)
            with pytest.raises(Interruption):
                run_distill(spec, workspace)
        calls[:] = [1] * 8
    run_distill(spec, workspace)
    assert _tree(workspace, spec) == _tree(whole, spec)


def test_what_was_written_is_not_written_again(tmp_path, tiny_model, teachers, workspace, monkeypatch):
    first = _written(tmp_path, tiny_model, teachers[2], weight=0.5)
    assert run_distill(first, workspace)["volatile"]["teacher_forwards"] > 0
    monkeypatch.setattr(distill_teachers, "open_model", None)
    again = _written(tmp_path, tiny_model, teachers[2], weight=0.5, lr=0.003)
    assert run_distill(again, workspace)["volatile"]["teacher_forwards"] == 0
    assert "distill" in run_distill(again, workspace)["checkpoint"]["final"]
