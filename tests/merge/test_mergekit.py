"""Our numbers against mergekit's own, under `compat: mergekit`.

mergekit.safetensors holds a small model, three experts, and what mergekit 0.1.5 made of them in float32, rounded to
bfloat16; `python benchmarks/merge.py parity` makes it again.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.merge.folders import merge, tensors_of, write_model

KEPT = Path(__file__).parent / "mergekit.safetensors"
# Share of elements that may differ, by one step of bfloat16: weights in tenths of numbers on a grid often add up to the
# middle between two, and the order of the sum decides. TIES: where a
# magnitude equals the threshold, or a sign is tied, which element stays is mergekit's sort's choice.
TOLERANCE = {"linear": 0.01, "slerp": 0.001, "task_arithmetic": 0.001, "model_stock": 0.001, "ties": 0.02}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("mergekit")
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(KEPT, framework="pt") as reader:
        settings = json.loads(reader.metadata()["settings"])
        for key in reader.keys():  # noqa: SIM118
            owner, name = key.split("/", 1)
            found.setdefault(owner, {})[name] = reader.get_tensor(key)
    for name in ("base", "e0", "e1", "e2"):
        write_model(folder / name, found[name])
    return folder, settings, found


@pytest.mark.parametrize("method", TOLERANCE)
def test_compat_gives_mergekits_numbers(kept: tuple[Path, dict[str, Any], Any], method: str) -> None:
    folder, settings, theirs = kept
    facts = settings[method]
    more = {key: facts[key] for key in ("t", "lambda", "density") if key in facts}
    base = {"base": "base"} if facts.get("base") else {}
    ours = tensors_of(merge(folder, method, method, facts["models"], compat="mergekit", **base, **more).checkpoint.path)
    different = elements = 0
    for name, tensor in theirs[method].items():
        elements += tensor.numel()
        off = tensor != ours[name]
        different += int(off.sum())
        if method != "ties":
            step = tensor.float().abs().clamp_min(1e-30) * 2.0**-7
            assert bool(((ours[name].float() - tensor.float()).abs() <= step).all()), name
    assert theirs[method].keys() == ours.keys()
    assert different / elements <= TOLERANCE[method], f"{different} of {elements}"


def test_without_compat_a_sign_tie_and_a_negative_weight_are_ours(kept: tuple[Path, dict[str, Any], Any]) -> None:
    folder, settings, theirs = kept
    facts = settings["ties"]
    ours = tensors_of(merge(folder, "ours", "ties", facts["models"], base="base", density=0.4).checkpoint.path)
    name = "model.layers.0.mlp.up_proj.weight"
    same = torch.isclose(ours[name].float(), theirs["ties"][name].float(), rtol=2**-7)
    assert 0.9 < float(same.float().mean()) < 1.0
