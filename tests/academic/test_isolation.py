"""PackNet and progressive networks: earlier tasks come back bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evertune.academic.isolation import PackNet, kept_entries, lateral_rows, make_progressive, weights_of_task
from evertune.errors import TrainingError
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import describe
from evertune.train.sft import run_sft
from tests.academic.stage import bench_of, plugin_spec, spec_with
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits


def test_the_entries_that_changed_most_are_kept_and_only_free_ones() -> None:
    change = torch.tensor([[0.1, -0.9, 0.0], [0.4, 5.0, -0.2]])
    free = torch.tensor([[True, True, True], [True, False, True]])
    # Five are free; 60 % of them are three: -0.9, 0.4, -0.2.
    expected = torch.tensor([[False, True, False], [True, False, True]])
    assert torch.equal(kept_entries(change, free, 0.6), expected)
    # An entry that did not change stays free, however large the share.
    assert not kept_entries(change, free, 1.0)[0, 2]
    assert not kept_entries(change, free, 0.1).any()


def test_the_first_tasks_model_is_in_the_second_bit_for_bit(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    options = {"keep": 0.4, "retrain": 0.25}
    first = spec_with(tmp_path, tiny_model, "packnet", options, lr=1e-2, weight_decay=0.1, share=0.0, replay=[])
    run_sft(first, workspace)
    carried = workspace.path(first.key) / "carried" / "packnet.safetensors"
    second = spec_with(
        tmp_path, workspace.path(first.key), "packnet", options, carried=carried, lr=1e-2, weight_decay=0.1, seed=9,
        share=0.0, replay=[], new=make_spec(tmp_path, tiny_model).replay, label="r/second",
    )  # fmt: skip
    run_sft(second, workspace)
    owner = load_file(workspace.path(second.key) / "carried" / "packnet.safetensors")
    base = {name: one.detach().clone() for name, one in bench_of(tmp_path, first).trained.items()}
    one, two = (published_weights(workspace, spec) for spec in (first, second))
    assert not same_bits(one, two)
    assert not same_bits(base, one)
    assert same_bits(weights_of_task(two, base, owner, 1), one)
    assert same_bits(weights_of_task(two, base, owner, 2), two)
    assert same_bits(weights_of_task(two, base, owner, 0), base)
    for name, each in owner.items():
        shares = [float((each == task).float().mean()) for task in (1, 2)]
        # 40 % of all, then 40 % of the 60 % that are left; embeddings of words that never occur do not change.
        assert shares[0] <= 0.4
        assert shares[1] <= 0.4 * (1 - shares[0]) + 1e-6
        if "embed" not in name:
            assert shares[0] == pytest.approx(0.4, abs=0.01)
            assert shares[1] == pytest.approx(0.24, abs=0.01)
    assert torch.equal(two["model.norm.weight"], base["model.norm.weight"])


def test_a_model_without_free_weights_is_an_error_in_words(tmp_path: Path, tiny_model: Path) -> None:
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "packnet"))
    full = {name: torch.ones_like(one, dtype=torch.uint8) for name, one in bench.trained.items() if one.ndim >= 2}
    assert PackNet(bench.trained, full, share=0.5, prune_at=1).free_share == 0.0
    from safetensors.torch import save_file

    save_file(full, tmp_path / "full.safetensors")
    spec = spec_with(tmp_path, tiny_model, "packnet", carried=tmp_path / "full.safetensors")
    with pytest.raises(TrainingError, match="1 tasks have taken every weight"):
        run_sft(spec, open_workspace(tmp_path / "w"))
    averaged = spec_with(tmp_path, tiny_model, "packnet", ema_decay=0.5)
    with pytest.raises(TrainingError, match="an average over the steps mixes"):
        run_sft(averaged, open_workspace(tmp_path / "w"))


def test_lateral_rows_span_what_the_earlier_adapters_read() -> None:
    torch.manual_seed(1)
    first, second = torch.randn(2, 8), torch.randn(1, 8)
    found = lateral_rows([first, second], 4)
    torch.testing.assert_close(found[:3] @ found[:3].T, torch.eye(3), rtol=0, atol=1e-5)
    assert not found[3].any()
    for row in (*first, *second):
        torch.testing.assert_close(found.T @ (found @ row), row, rtol=0, atol=1e-5)


def test_a_column_reads_the_frozen_ones_and_they_stay(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    below = make_spec(tmp_path, tiny_model, label="r/below", steps=3, tune={"lora": {"rank": 2}})
    run_sft(below, workspace)
    place = workspace.path(below.key)
    held = {name: one.a_RI.clone() for name, one in read_factors(place).items()}
    spec = spec_with(
        tmp_path, place, "progressive", {"lateral": 2}, lr=1e-2, weight_decay=0.1, share=0.0, replay=[],
        tune={"lora": {"rank": 5}},
    )  # fmt: skip
    run_sft(spec, workspace)
    new = read_factors(workspace.path(spec.key))
    assert describe(workspace.path(spec.key)).stack[-2].digest == describe(place).digest
    for name, factor in new.items():
        torch.testing.assert_close(factor.a_RI[-2:], lateral_rows([held[name]], 2), rtol=0, atol=0)
        assert float(factor.b_OR[:, -2:].abs().max()) > 0
        assert torch.equal(read_factors(place)[name].a_RI, held[name])
    narrow = spec_with(tmp_path, place, "progressive", {"lateral": 4}, tune={"lora": {"rank": 4}})
    with pytest.raises(TrainingError, match="leave an adapter of rank 4 none of its own"):
        make_progressive(bench_of(tmp_path, narrow))
    assert plugin_spec(tmp_path, "progressive").method == "prognets"
