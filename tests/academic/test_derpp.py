"""DER++: what is stored comes back, and what is held stays."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evertune.academic.derpp import DerPlusPlus, kept, pack, unpack
from evertune.train.sft import run_sft
from tests.academic.stage import bench_of, spec_with
from tests.train.stage import make_spec, open_workspace


@pytest.fixture
def taught(tmp_path: Path, tiny_model: Path) -> tuple[Path, Path]:
    """The checkpoint of a first task, and what it carries."""
    workspace = open_workspace(tmp_path / "first")
    spec = spec_with(
        tmp_path, tiny_model, "derpp", {"memory_rows": 6}, tune={"full": {}}, lr=5e-3, share=0.0, replay=[]
    )
    run_sft(spec, workspace)
    place = workspace.path(spec.key)
    return place, place / "carried" / "derpp.safetensors"


def test_the_memory_holds_rows_with_the_outputs_of_the_published_model(
    taught: tuple[Path, Path], tmp_path: Path
) -> None:
    place, carried = taught
    memory = unpack(load_file(carried))
    assert [one.task for one in memory] == [0] * 6
    bench = bench_of(tmp_path, spec_with(tmp_path, place, "derpp", tune={"full": {}}))
    for one in memory:
        ids = torch.tensor(one.row.ids, dtype=torch.int64)[None]
        logp = bench.policy.model(input_ids=ids).logits[0, :-1].log_softmax(-1)[torch.from_numpy(one.row.counted[1:])]
        best = logp.topk(64, dim=1)
        assert torch.equal(one.words_MK.sort(dim=1).values, best.indices.sort(dim=1).values)
        torch.testing.assert_close(one.logp_ML[:, :64], logp.gather(1, one.words_MK), rtol=0, atol=5e-3)
        assert float((one.logp_ML.exp().sum(1) - 1).abs().max()) < 1e-5
    assert [one.row.digest for one in unpack(pack(memory))] == [one.row.digest for one in memory]
    assert unpack({}) == []
    assert pack([]) == {}


def test_its_gradient_is_that_of_both_terms(taught: tuple[Path, Path], tmp_path: Path, tiny_model: Path) -> None:
    options = {"rows": 100, "alpha": 0.7, "beta": 0.3, "words": 64}
    # Another model than the one that stored: its outputs differ.
    spec = spec_with(tmp_path, tiny_model, "derpp", options, tune={"full": {}}, carried=taught[1])
    bench = bench_of(tmp_path, spec)
    found: dict[str, torch.Tensor] = {}
    told = DerPlusPlus(bench).change(found, 0)
    model, kl, ce, count = bench.policy.model, torch.zeros(()), torch.zeros(()), 0
    for one in unpack(load_file(taught[1])):
        ids = torch.tensor(one.row.ids, dtype=torch.int64)[None]
        where = torch.from_numpy(one.row.counted[1:])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[where]
        inside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, one.words_MK, True)
        tail = (1 - logp.exp()[inside].view(len(logp), -1).sum(1)).log()
        now = torch.cat([logp.gather(1, one.words_MK), tail[:, None]], dim=1)
        kl = kl + (one.logp_ML.exp() * (one.logp_ML - now)).sum()
        ce = ce - logp.gather(1, ids[0, 1:, None][where]).sum()
        count += len(logp)
    assert told["derpp_kl"] == pytest.approx(float(kl.detach()) / count, rel=1e-3)
    assert told["derpp_kl"] > 0.001
    assert told["derpp_ce"] == pytest.approx(float(ce.detach()) / count, rel=1e-4)
    model.zero_grad()
    ((0.7 * kl + 0.3 * ce) / count).backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(found[name], one.grad, rtol=2e-3, atol=1e-5)


def test_the_old_outputs_are_held_and_both_tasks_go_on(taught: tuple[Path, Path], tmp_path: Path) -> None:
    place, carried = taught
    workspace, moved = open_workspace(tmp_path / "w"), []
    for alpha in (0.0, 5.0):
        options = {"alpha": alpha, "beta": 0.0, "memory_rows": 6}
        spec = spec_with(
            tmp_path, place, "derpp", options, tune={"full": {}}, carried=carried, lr=1e-2, share=0.0, replay=[],
            new=make_spec(tmp_path, place).replay, steps=10,
        )  # fmt: skip
        run_sft(spec, workspace)
        made = workspace.path(spec.key)
        bench = bench_of(
            tmp_path, spec_with(tmp_path, made, "derpp", {"rows": 100}, tune={"full": {}}, carried=carried)
        )
        moved.append(DerPlusPlus(bench).change({}, 0)["derpp_kl"])
        tasks = [one.task for one in unpack(load_file(made / "carried" / "derpp.safetensors"))]
        assert tasks == [0, 0, 0, 1, 1, 1]
    assert 0.0 < moved[1] < 0.5 * moved[0]


def test_the_memory_is_shared_alike() -> None:
    from evertune.academic.derpp import Stored, row_of

    row = row_of(0, torch.tensor([1, 2], dtype=torch.int32), torch.tensor([False, True]))
    memory = [Stored(task, row, torch.zeros(1, 2), torch.zeros(1, 3)) for task in (0, 0, 0, 0, 1, 1, 1, 1, 2)]
    assert [one.task for one in kept(memory, 6, 3)] == [0, 0, 1, 1, 2]
    assert [one.task for one in kept(memory, 1, 3)] == [0, 1, 2]
