"""Adapters: merged on their factors exactly, materialised where the method needs it, taken out of a dense model."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from evertune.errors import CheckpointError, MergeError
from evertune.merge.extract import extract_adapter, randomised_svd
from evertune.merge.factored import recompress
from evertune.merge.plan import plan_merge
from evertune.merge.run import Result, merge_planned
from evertune.merge.sources import read_source
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import describe
from evertune.model.export import export_weights
from evertune.model.lora_config import scale_of
from evertune.model.open import open_model
from tests.merge.folders import configure, tensors_of
from tests.model.folders import change_json, write_adapter_folder
from tests.tiny import write_tiny_model

MODULE = "model.layers.1.mlp.up_proj"
TWO: dict[str, Any] = {"a": {"weight": 0.7}, "b": {"weight": 0.3}}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters a and b on it, a stack c on a, and all of them as dense models."""
    folder = tmp_path_factory.mktemp("adapters")
    base = describe(write_tiny_model(folder / "base"))
    a = write_adapter_folder(base, folder / "a", seed=1, rank=3)
    write_adapter_folder(base, folder / "b", seed=2, rank=2)
    write_adapter_folder(a, folder / "c", seed=3, rank=2)
    for name in "abc":
        export_weights(describe(folder / name), folder / f"dense-{name}")
    return folder


def _run(folder: Path, out: str, method: str, models: dict[str, Any], **settings: Any) -> Result:
    plan = plan_merge(configure(method, models, **settings), folder=folder)
    return merge_planned(plan, folder / out, threads=1)


def _delta(folder: Path) -> torch.Tensor:
    checkpoint = describe(folder)
    return sum((read_factors(one.path)[MODULE].delta() for one in checkpoint.stack[1:]), torch.zeros(64, 32))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ema", "interpolate"])
def test_a_linear_merge_of_adapters_is_one_exact_adapter(family: Path, method: str) -> None:
    settings: dict[str, Any] = {"base": "base"} if method in ("task_arithmetic", "interpolate") else {}
    models: dict[str, Any] = {"a": {}, "b": {}} if method == "ema" else TWO
    shares = {"linear": (0.7, 0.3), "task_arithmetic": (0.7, 0.3), "ema": (0.5, 0.5), "interpolate": (0.25, 0.0)}[
        method
    ]
    if method == "interpolate":
        models, settings["t"] = {"a": {}}, 0.25
    done = _run(family, f"out-{method}", method, models, **settings)
    assert done.checkpoint.form == "adapter"
    expected = shares[0] * _delta(family / "a") + shares[1] * _delta(family / "b")
    assert torch.allclose(_delta(done.checkpoint.path), expected, atol=1e-7)
    # It is the function that the dense merge computes.
    dense = _run(family, f"dense-{method}-out", method, models, **settings, output="model")
    ids = torch.arange(40).reshape(2, 20)
    logits = [
        open_model(one, dtype="float32").model(input_ids=ids).logits for one in (done.checkpoint, dense.checkpoint)
    ]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_equal_adapters_merge_to_that_adapter_not_to_three_times_it(family: Path) -> None:
    done = _run(family, "same", "linear", {"x": {"path": "a"}, "y": {"path": "a"}, "z": {"path": "a"}})
    assert torch.allclose(_delta(done.checkpoint.path), _delta(family / "a"), atol=1e-7)


def test_a_stack_counts_with_all_its_adapters(family: Path) -> None:
    done = _run(family, "stack", "linear", {"b": {"weight": 0.5}, "c": {"weight": 0.5}})
    expected = 0.5 * _delta(family / "b") + 0.5 * _delta(family / "c")
    assert torch.allclose(_delta(done.checkpoint.path), expected, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "slerp", "magmax"])
def test_other_methods_see_the_same_models_as_dense_ones(family: Path, method: str) -> None:
    settings: dict[str, Any] = {"base": "base"}
    adapters = _run(family, f"rows-{method}", method, {"a": {}, "c": {}}, **settings)
    models: dict[str, Any] = {"a": {"path": "dense-a"}, "c": {"path": "dense-c"}}
    dense = _run(family, f"rows-dense-{method}", method, models, **settings, different_starts="allow")
    assert adapters.checkpoint.form == "model"
    one, two = tensors_of(adapters.checkpoint.path), tensors_of(dense.checkpoint.path)
    off = sum(int((~torch.isclose(one[name], two[name], atol=1e-6)).sum()) for name in one)
    assert off <= 3  # a threshold between two nearly equal magnitudes


def test_recompression_is_the_best_of_its_rank_and_says_what_it_lost(family: Path) -> None:
    done = _run(family, "rank", "linear", TWO, rank=2)
    whole = (0.7 * _delta(family / "a") + 0.3 * _delta(family / "b")).double().numpy()
    u, sizes, v = np.linalg.svd(whole)
    best = (u[:, :2] * sizes[:2]) @ v[:2]
    assert np.allclose(_delta(done.checkpoint.path).numpy(), best, atol=1e-6)
    assert done.residual is not None
    factors = {MODULE: read_factors(family / "a")[MODULE]}
    full, none_lost = recompress(factors, 3)
    assert none_lost.overall < 1e-7
    assert torch.allclose(full[MODULE].delta(), factors[MODULE].delta(), atol=1e-6)
    _, some = recompress(factors, 1)
    _, parts, _ = np.linalg.svd(factors[MODULE].delta().double().numpy())
    assert some.overall == pytest.approx(float(np.sqrt(np.square(parts[1:]).sum() / np.square(parts).sum())), rel=1e-5)


def test_an_adapter_is_refused_where_only_a_model_is_exact(family: Path) -> None:
    with pytest.raises(MergeError, match="needs a linear method"):
        _run(family, "no", "ties", {"a": {}, "b": {}}, base="base", output="adapter")
    with pytest.raises(MergeError, match="needs a linear method"):
        _run(family, "no", "linear", {"a": {}, "dense-b": {}}, rank=4, different_starts="allow")
    # A sum that counts the base twice is no adapter over it.
    done = _run(family, "twice", "linear", {"a": {"weight": 1.0}, "b": {"weight": 1.0}}, normalize=False)
    assert done.checkpoint.form == "model"


@pytest.mark.parametrize("models", [{"a": {"weight": 0}, "b": {"weight": 0}}, {"a": {"weight": 0}}])
def test_adapters_of_which_none_counts_leave_the_base(family: Path, tmp_path: Path, models: dict[str, Any]) -> None:
    plan = plan_merge(configure("task_arithmetic", models, base="base"), folder=family)
    result = merge_planned(plan, tmp_path / "out", threads=1)
    base = tensors_of(family / "base")
    assert all(one.equal(base[name]) for name, one in tensors_of(result.checkpoint.path).items())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lm_head.base_layer.weight", r"a weight of the base, which PEFT stores.*save_embedding_layers=False"),
        ("model.embed_tokens.lora_embedding_A", r"the adapter of an embedding; only linear layers"),
        ("model.layers.0.lora_B.weight", r"does not belong to a pair"),
    ],
)
def test_what_is_no_pair_of_factors_is_said_to_be_what_it_is(family: Path, tmp_path: Path, key: str, said: str) -> None:
    shutil.copytree(family / "a", tmp_path / "odd")
    file = tmp_path / "odd/adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{key}": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=said):
        read_factors(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=said):
        read_source("odd", dataclasses.replace(describe(family / "a"), path=tmp_path / "odd"))


def test_variants_of_lora_are_refused_by_name(family: Path, tmp_path: Path) -> None:
    base = describe(family / "base")
    write_adapter_folder(base, tmp_path / "dora", seed=4)
    change_json(tmp_path / "dora" / "adapter_config.json", use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora is True"):
        _run(tmp_path, "out", "linear", {"dora": {}, "a": {"path": str(family / "a")}})


def test_scales_follow_pefts_patterns(tmp_path: Path) -> None:
    patterns = {"up_proj": 8, r"layers\.0\.mlp\.down_proj": 4, "model.layers.1.self_attn.q_proj": 2}
    names = [
        f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    ]
    for name in names:
        rank = patterns.get(get_pattern_key(list(patterns), name), 16)
        config = {"r": 16, "lora_alpha": 32, "rank_pattern": patterns}
        assert scale_of(tmp_path, config, name, rank) == 32 / rank
    assert scale_of(tmp_path, {"r": 16, "lora_alpha": 32, "use_rslora": True}, "x", 16) == 8.0


def test_extraction_gives_back_a_low_rank_change(family: Path) -> None:
    found = extract_adapter(family / "dense-a", family / "base", family / "extracted", rank=3)
    assert found.energy > 0.9999
    assert torch.allclose(_delta(family / "extracted"), _delta(family / "a"), atol=1e-5)
    short = extract_adapter(family / "dense-a", family / "base", family / "short", rank=1)
    _, sizes, _ = np.linalg.svd(_delta(family / "a").double().numpy())
    held = sizes[0] ** 2 / np.square(sizes).sum()
    assert short.by_tensor[f"{MODULE}.weight"] == pytest.approx(held, rel=1e-4)


def test_changes_that_no_adapter_holds_must_be_dropped_by_name(family: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = tensors_of(family / "dense-a")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
    export_weights(describe(family / "a"), tmp_path / "more")
    save_file(tensors, tmp_path / "more" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"lies in tensors that no adapter holds: model\.norm\.weight"):
        extract_adapter(tmp_path / "more", family / "base", tmp_path / "out", rank=3)
    found = extract_adapter(tmp_path / "more", family / "base", tmp_path / "out", rank=3, drop_rest=True)
    assert found.rest_names == ("model.norm.weight",)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3


def test_the_randomised_svd_finds_the_largest_triples() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((200, 150)) * (0.8 ** np.arange(150))
    u, sizes, v = randomised_svd(matrix, 6)
    exact = np.linalg.svd(matrix, compute_uv=False)[:6]
    assert np.allclose(sizes, exact, rtol=1e-6)
    assert np.allclose((u * sizes) @ v, u @ (u.T @ matrix), atol=1e-5)
