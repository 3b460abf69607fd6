"""The names that others rely on, with exactly the pinned behaviour."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evertune
from evertune import measure
from evertune.errors import DataError, MergeError

ROOT = Path(__file__).parent.parent


def test_make_replay_stream_gives_the_pinned_order() -> None:
    expected = [("new", 0), ("old", 100), ("new", 1), ("new", 2), ("old", 101), ("new", 3), ("old", 102)]
    assert evertune.make_replay_stream([0, 1, 2, 3], [100, 101, 102], 0.5, 0) == expected


def test_make_replay_stream_defaults_to_three_tenths_of_the_new_rows() -> None:
    stream = evertune.make_replay_stream(range(20_000), [0])
    share = sum(kind == "old" for kind, _ in stream) / len(stream)
    assert share == pytest.approx(0.3 / 1.3, abs=0.01)


def test_make_replay_stream_cycles_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream = evertune.make_replay_stream([1, 2, 3], ["a", "b"], 1.0)
    assert [item for kind, item in stream if kind == "old"] == ["a", "b", "a"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf")])
def test_make_replay_stream_refuses_a_ratio_outside_zero_to_one(ratio: float) -> None:
    with pytest.raises(DataError, match="replay_ratio"):
        evertune.make_replay_stream([1], [2], ratio)


def test_make_replay_stream_refuses_to_replay_nothing() -> None:
    with pytest.raises(DataError, match="old_data"):
        evertune.make_replay_stream([1], [], 0.5)


def test_model_soup_is_the_pinned_mean() -> None:
    soup = evertune.model_soup([{"w": torch.tensor([1.0, 0, 0])}, {"w": torch.tensor([0, 2.0, 0])}])
    assert soup["w"].tolist() == [0.5, 1.0, 0.0]


def test_model_soup_keeps_the_digits_that_a_bfloat16_sum_would_lose() -> None:
    # 256 + 1 is 256 in bfloat16, so a running sum of eight would end at 256 / 8.
    models = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}]
    models += [{"w": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(7)]
    assert evertune.model_soup(models)["w"].item() == torch.tensor(263 / 8).bfloat16().item()


def test_task_arithmetic_gives_the_pinned_sums() -> None:
    zero, a, b = ({"w": torch.tensor(one)} for one in ([0.0, 0, 0], [1.0, 0, 0], [0.0, 2, 0]))
    assert evertune.task_arithmetic(zero, [a, b], [1, 1])["w"].tolist() == [1, 2, 0]
    assert evertune.task_arithmetic(zero, [b], [-1])["w"].tolist() == [0, -2, 0]
    assert evertune.task_arithmetic(zero, [a, b], [1, -1])["w"].tolist() == [1, -2, 0]


@pytest.mark.parametrize(
    "models",
    [
        [],
        [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}],
        [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}],
        [{"w": torch.zeros(2)}, {"w": torch.tensor([0.0, float("nan")])}],
        [{"w": torch.tensor([1])}, {"w": torch.tensor([2])}],
    ],
)
def test_model_soup_refuses_what_cannot_be_averaged(models: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(MergeError):
        evertune.model_soup(models)


def test_the_measures_take_plain_arrays() -> None:
    # Task 0: learnt at 0.9, ends at 0.6. Task 1: 0.8, ends at 0.9.
    R = np.array([[0.9, 0.1, 0.0], [0.7, 0.8, 0.2], [0.6, 0.9, 0.5]])
    assert measure.backward_transfer(R) == pytest.approx((-0.3 + 0.1) / 2)
    assert measure.forward_transfer(R, [0.0, 0.05, 0.1]) == pytest.approx((0.05 + 0.1) / 2)
    assert measure.forgetting(R) == pytest.approx((0.3 - 0.1) / 2)
    assert measure.retention(R) == pytest.approx((0.6 / 0.9 + 0.9 / 0.8) / 2)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, evertune, evertune.measure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_demo_in_the_package_is_the_one_in_the_recipes(tmp_path: Path) -> None:
    from evertune.demo import write_demo

    recipe = write_demo(tmp_path)
    assert recipe.read_bytes() == (ROOT / "recipes" / "demo.yaml").read_bytes()
    for path in sorted((tmp_path / "demo").iterdir()):
        assert path.read_bytes() == (ROOT / "recipes" / "demo" / path.name).read_bytes(), path.name
