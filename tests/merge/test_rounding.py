"""Models that are merged again and again: rounding does not add up, and where it would, that is said."""

from pathlib import Path

import numpy as np
import torch

from evertune.merge.plan import plan_merge
from evertune.stages.merge import _numbers as ledger_numbers
from tests.merge.folders import configure, merge, random_tensors, tensors_of, write_model

ROUNDS = 20
HALF_AND_HALF = {"new": {"weight": 0.5}, "old": {"weight": 0.5}}


def _keep_learning(folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Twenty rounds: learn a small change, then average with the champion; returns the last champion."""
    champion = random_tensors(0)
    for number in range(ROUNDS):
        step = random_tensors(1000 + number, dtype=torch.float32, std=1.5e-4)
        place = folder / f"{dtype}-{number}"
        write_model(place / "old", champion)
        write_model(place / "new", {name: champion[name].float() + step[name] for name in champion})
        champion = tensors_of(merge(place, "out", "linear", HALF_AND_HALF, dtype=dtype).checkpoint.path)
    return champion


def test_a_float32_master_stays_within_its_bound_of_the_exact_sum_over_twenty_rounds(tmp_path: Path) -> None:
    base = random_tensors(0, dtype=torch.float64)
    exact = {name: start.bfloat16().double() for name, start in random_tensors(0, dtype=torch.float32).items()}
    update = {name: torch.zeros_like(one) for name, one in base.items()}
    for number in range(ROUNDS):
        for name, step in random_tensors(1000 + number, dtype=torch.float32, std=1.5e-4).items():
            update[name] += 0.5 * step.double()
    masters, rounded = _keep_learning(tmp_path, "float32"), _keep_learning(tmp_path, "bfloat16")
    different = elements = 0
    errors = {"master": 0.0, "rounded": 0.0, "size": 0.0}
    for name in exact:
        whole = exact[name] + update[name]
        off = (masters[name].double() - whole).abs()
        # Each round: half of the rounding of what was learnt, and the rounding of the merge, 2^-24 of the value each.
        largest = torch.maximum(whole.abs(), exact[name].abs()) + 1e-3
        assert bool((off <= ROUNDS * 1.5 * 2.0**-24 * largest).all()), name
        errors["master"] += float(off.square().sum())
        errors["rounded"] += float((rounded[name].double() - whole).square().sum())
        errors["size"] += float(update[name].square().sum())
        different += int((masters[name].bfloat16() != whole.bfloat16()).sum())
        elements += whole.numel()
    # Of the whole update: below a ten-thousandth, where merges that are rounded each time lose a tenth.
    assert np.sqrt(errors["master"] / errors["size"]) < 1e-4
    assert np.sqrt(errors["rounded"] / errors["size"]) > 0.05
    # Deployed in bfloat16, the master is the exact sum but for values that lie in the middle between two.
    assert different <= 0.001 * elements


def test_a_merge_of_a_rounded_merge_says_so_and_of_a_master_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0)):
        write_model(tmp_path / name, random_tensors(seed))
    merge(tmp_path, "rounded", "linear", {"a": {}, "b": {}})
    merge(tmp_path, "master", "linear", {"a": {}, "b": {}}, dtype="float32")
    notes = {
        name: plan_merge(configure("linear", {"x": {"path": name}, "b": {}}), folder=tmp_path).notes
        for name in ("a", "rounded", "master")
    }
    assert notes["a"] == notes["master"] == ()
    assert "x: is a merge itself, rounded to bfloat16" in notes["rounded"][0]
    assert notes["rounded"] == tuple(
        merge(tmp_path, "again", "linear", {"x": {"path": "rounded"}, "b": {}}).manifest["notes"]
    )


def test_the_ledger_tells_a_half_wide_model_among_wider_ones(tmp_path: Path) -> None:
    wide = random_tensors(0, dtype=torch.float32)
    write_model(tmp_path / "master", wide)
    write_model(tmp_path / "trained", {name: one.bfloat16() for name, one in wide.items()})
    write_model(tmp_path / "again", {name: one.bfloat16() for name, one in wide.items()})

    def told(*names: str) -> dict[str, bool]:
        plan = plan_merge(configure("linear", {name: {} for name in names}), folder=tmp_path)
        return {name: one["rounded_before"] for name, one in ledger_numbers(plan).items()}

    assert told("master", "trained") == {"master": False, "trained": True}
    assert told("trained", "again") == {"trained": False, "again": False}
