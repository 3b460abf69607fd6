"""The reference live and stored: the same divergence, no second forward pass, and no silent damage."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.data.encode import EncodedRow
from evertune.errors import CheckpointError, IntegrityError
from evertune.model.adapter import add_adapter
from evertune.model.checkpoint import describe
from evertune.model.open import OpenModel, open_model
from evertune.train.batch import collate
from evertune.train.cache import ReferenceCache
from evertune.train.head import split_model
from evertune.train.losses import bucket, forward_kl, reverse_kl, top_words
from evertune.train.reference import Reference, ReferenceSource, reference_outputs
from evertune.train.sft import run_sft
from tests.tiny import write_tiny_model
from tests.train.stage import anchor, make_spec, open_workspace, published_weights


def _row(seed: int, length: int) -> EncodedRow:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 250, length, dtype=np.int32)
    counted = generator.random(length) < 0.5
    counted[-1] = True
    return EncodedRow("made-up", str(seed), ids, counted, is_replay=False, digest=f"{seed:064x}")


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl}
ROWS = [_row(seed, length) for seed, length in enumerate((9, 17, 4))]


@pytest.fixture
def policy(tiny_model: Path) -> OpenModel:
    """The tiny model with an adapter that has moved."""
    opened = open_model(describe(tiny_model), dtype="float32")
    trained = add_adapter(opened, rank=4, alpha=8, dropout=0.5, targets="all-linear", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return opened


def _source(policy: OpenModel, folder: Path, **changes: Any) -> ReferenceSource:
    settings: dict[str, Any] = {"reference": policy.checkpoint, "is_start": True, **changes}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return ReferenceSource(opened=policy, cache=folder / "cache", tmp=folder / "tmp", **settings)


def _log_probabilities(opened: OpenModel, rows: Sequence[EncodedRow]) -> Tensor:
    """Full-vocabulary log-probabilities at the counted positions, by the model's own forward."""
    batch = collate(rows, pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        return opened.model.eval()(batch.ids_BT).logits[batch.predicts_BT].log_softmax(-1)


def _values(reference: Reference, logp: Tensor, direction: Any, rows: Sequence[EncodedRow] = ROWS) -> Tensor:
    values = reference.values(rows, direction)
    half = len(logp) // 2
    return torch.cat([values(logp[:half], slice(0, half)), values(logp[half:], slice(half, len(logp)))])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("is_start", [True, False])
def test_live_and_stored_hidden_states_give_the_naive_divergence(policy, tmp_path, direction, is_start):
    start = open_model(policy.checkpoint, dtype="float32")
    logp, ref_logp = _log_probabilities(policy, ROWS), _log_probabilities(start, ROWS)
    pair = (logp, ref_logp) if direction == "forward" else (ref_logp, logp)
    naive = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
    assert naive.min() > 1e-4
    source = _source(policy, tmp_path, is_start=is_start)
    source.complete("hidden", ROWS)
    for reference in (source.live(), source.from_cache("hidden")):
        assert torch.allclose(_values(reference, logp, direction), naive, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_stored_top_words_give_the_bucketed_divergence(policy, tmp_path, direction):
    start = open_model(policy.checkpoint, dtype="float32")
    logp, ref_logp = _log_probabilities(policy, ROWS), _log_probabilities(start, ROWS)
    ids, kept = top_words(ref_logp, 64)
    source = _source(policy, tmp_path)
    source.complete("top64", ROWS)
    found = _values(source.from_cache("top64"), logp, direction)
    expected = DIVERGENCES[direction](bucket(logp, ids), kept)
    assert torch.allclose(found, expected, atol=1e-3, rtol=2e-2)
    assert (found <= DIVERGENCES[direction](logp, ref_logp) + 1e-3).all()


def test_the_stored_top_words_of_the_policy_itself_have_no_divergence(policy, tmp_path):
    start = open_model(policy.checkpoint, dtype="float32")
    source = _source(policy, tmp_path)
    source.complete("top64", ROWS)
    found = _values(source.from_cache("top64"), _log_probabilities(start, ROWS), "forward")
    assert found.abs().max() < 1e-6
    assert found.min() > -1e-7


def test_the_live_reference_leaves_the_policy_as_it_was(policy, tmp_path):
    policy.model.train()
    before = _log_probabilities(policy, ROWS)
    policy.model.train()
    _source(policy, tmp_path).live().values(ROWS, "forward")
    assert policy.model.training
    assert torch.equal(_log_probabilities(policy, ROWS), before)


def test_the_live_reference_drops_nothing_while_the_policy_trains(policy, tmp_path):
    reference = _source(policy, tmp_path).live()
    expected = reference.hidden(ROWS)
    for module in policy.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    policy.model.train()
    assert torch.equal(reference.hidden(ROWS), expected)


@pytest.mark.parametrize("kind", ["hidden", "top64"])
@pytest.mark.parametrize("is_start", [True, False])
def test_a_second_use_runs_the_reference_no_more(policy, tmp_path, monkeypatch, kind, is_start):
    assert _source(policy, tmp_path, is_start=is_start).complete(kind, ROWS) == len(ROWS)
    again = _source(policy, tmp_path, is_start=is_start)
    assert again.complete(kind, ROWS) == 0
    # A reference that is not the start would have to be opened: from the cache it is not even that.
    monkeypatch.setattr("evertune.train.reference.open_model", None)
    again.complete(kind, ROWS)
    again.from_cache(kind).values(ROWS, "forward")


def test_only_missing_rows_are_computed_and_each_content_once(policy, tmp_path):
    source = _source(policy, tmp_path)
    assert source.complete("top64", ROWS[:1]) == 1
    more = [*ROWS, replace(ROWS[2], id="the same content again", is_replay=True)]
    assert source.complete("top64", more) == 2
    logp = _log_probabilities(policy, more)
    assert len(_values(source.from_cache("top64"), logp, "forward", more)) == len(logp)


def test_another_reference_kind_or_dtype_has_its_own_entries(policy, tmp_path, tiny_model):
    source = _source(policy, tmp_path)
    source.complete("top64", ROWS)
    assert source.complete("hidden", ROWS) == len(ROWS)
    other = replace(policy.checkpoint, digest="f" * 64)
    assert replace(source, reference=other, is_start=True).stored("top64").missing(ROWS) == ROWS
    narrow = open_model(describe(tiny_model), dtype="bfloat16")
    assert replace(source, opened=narrow).stored("top64").missing(ROWS) == ROWS


def test_what_is_stored_of_a_row_does_not_depend_on_its_company(policy, tmp_path):
    alone, together = _source(policy, tmp_path / "a"), _source(policy, tmp_path / "b")
    alone.complete("hidden", ROWS[:1])
    together.complete("hidden", ROWS)
    stored = [one.stored("hidden").read(ROWS[0])["hidden"] for one in (alone, together)]
    assert torch.equal(*stored)


def test_rows_read_alone_come_in_few_lengths_and_have_the_same_outputs(policy, tmp_path):
    live, lengths = _source(policy, tmp_path).live(), []
    rows = [_row(seed, length) for seed, length in enumerate((3, 40, 63, 64, 65, 100, 128))]
    expected = [live.hidden([row]) for row in rows]
    embedding = policy.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    store = reference_outputs(live, "hidden")
    for row, one in zip(rows, expected, strict=True):
        assert torch.allclose(store(row)["hidden"], one, atol=1e-5)
    assert set(lengths) == {64, 128}


@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", "original_max_position_embeddings": 100, "factor": 2.0}])
def test_a_row_is_not_padded_past_what_the_model_reads(policy, tmp_path, rope):
    text = policy.model.config.get_text_config()
    text.max_position_embeddings = 200 if rope else 100
    text.rope_parameters = {**text.rope_parameters, **rope}
    live, lengths = _source(policy, tmp_path).live(), []
    policy.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    store = reference_outputs(live, "hidden")
    for length in (30, 70):
        store(_row(1, length))
    assert lengths[0] == 64 and lengths[1] < 71


def test_bytes_per_position_are_as_promised(policy, tmp_path):
    source = _source(policy, tmp_path)
    source.complete("top64", ROWS)
    source.complete("hidden", ROWS)
    positions = sum(int(row.counted[1:].sum()) for row in ROWS)
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "cache").rglob("*.raw")}
    assert sizes["ids.raw"] + sizes["logp.raw"] == 258 * positions
    assert sizes["hidden.raw"] == 4 * 32 * positions


def test_bfloat16_hidden_states_come_back_bit_for_bit(tmp_path, tiny_model):
    opened = open_model(describe(tiny_model), dtype="bfloat16")
    source = _source(opened, tmp_path, is_start=False)
    source.complete("hidden", ROWS)
    stored = torch.cat([source.stored("hidden").read(row)["hidden"] for row in ROWS])
    live = torch.cat([source.live().hidden([row]) for row in ROWS])
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, live)


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damaged_entries_are_refused(policy, tmp_path, how):
    source = _source(policy, tmp_path)
    source.complete("top64", ROWS)
    (file,) = (tmp_path / "cache").rglob("logp.raw")
    data = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    elif how == "flip":
        data[10] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[:-2])
    with pytest.raises(IntegrityError, match=r"logp\.raw"):
        source.stored("top64")


def test_nothing_is_visible_before_all_rows_are_stored(policy, tmp_path):
    cache = _source(policy, tmp_path).stored("hidden")
    done: list[EncodedRow] = []

    def compute(row: EncodedRow) -> dict[str, Tensor]:
        if done:
            raise OSError("disk full")
        done.append(row)
        return {"hidden": torch.zeros(int(row.counted[1:].sum()), 4)}

    with pytest.raises(OSError, match="disk full"):
        cache.add(ROWS, compute)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert _source(policy, tmp_path).stored("hidden").missing(ROWS) == ROWS


def test_a_reference_with_another_tokenizer_is_refused(policy, tmp_path):
    other = describe(write_tiny_model(tmp_path / "other", template="llama2"))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        _source(policy, tmp_path, reference=other, is_start=False).live()


@pytest.mark.parametrize("kind", [{"tune": {"lora": {"rank": 4}}}, {"tune": {"full": {}}, "lr": 1e-3}])
def test_a_stage_anchored_live_and_from_stored_hidden_states_ends_alike(tmp_path, tiny_model, kind):
    workspace = open_workspace(tmp_path / "w")
    found = {}
    for cache in ("off", "hidden", "top64"):
        spec = make_spec(tmp_path, tiny_model, anchor={"cache": cache, "kl": 5.0}, **kind)
        facts = run_sft(spec, workspace)["checkpoint"]
        found[cache] = (facts["final"]["kl"], published_weights(workspace, spec))
    for name, weight in found["off"][1].items():
        assert torch.allclose(weight, found["hidden"][1][name], atol=1e-4)
    assert found["hidden"][0] == pytest.approx(found["off"][0], rel=1e-3)
    assert 0 < found["top64"][0] < found["off"][0]


def test_a_stage_anchored_to_another_checkpoint_is_pulled_toward_it(tmp_path, tiny_model):
    other = describe(write_tiny_model(tmp_path / "other", seed=5))
    workspace = open_workspace(tmp_path / "w")
    spec = make_spec(tmp_path, tiny_model, steps=12, lr=3e-3, tune={"full": {}}, anchor=anchor(other, kl=100.0))
    facts = run_sft(spec, workspace)["checkpoint"]
    lines = (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()
    kls = [json.loads(line)["kl"] for line in lines]
    assert facts["anchor"]["to"] == other.digest
    assert kls[-1] < 0.7 * kls[0]


def test_the_cache_reads_through_a_map_and_not_into_memory(policy, tmp_path):
    source = _source(policy, tmp_path)
    source.complete("hidden", ROWS)
    cache = ReferenceCache(
        source.cache,
        source.tmp,
        identity={
            "reference": policy.checkpoint.digest,
            "codec": policy.codec.digest,
            "dtype": "torch.float32",
            "kind": "hidden",
        },
    )
    tensor = cache.read(ROWS[0])["hidden"]
    (file,) = source.cache.rglob("hidden.raw")
    maps = Path("/proc/self/maps").read_text()
    assert str(file) in maps
    assert tensor.shape == (int(ROWS[0].counted[1:].sum()), split_model(policy.model)[1].weight_VH.shape[1])
