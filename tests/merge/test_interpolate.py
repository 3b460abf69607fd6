"""The line between two checkpoints: exact ends, no drift from point to point, and a winner that is what was scanned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.errors import MergeError
from evertune.merge.in_memory import apply_into
from evertune.merge.interpolate import above, scan, write_winner
from evertune.merge.plan import plan_merge
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.export import export_weights
from evertune.model.open import OpenModel, open_model
from tests.merge.folders import configure, random_tensors, tensors_of, write_model
from tests.model.folders import change_tensors, write_adapter_folder
from tests.tiny import write_tiny_model

IDS = torch.arange(40).reshape(2, 20)
POINTS = [0.0, 0.25, 0.75, 1.0, 0.25]


@pytest.fixture(scope="module")
def family(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """A base, two adapters on it one above the other, and a base of other weights."""
    folder = tmp_path_factory.mktemp("line")
    base = describe(tiny_model)
    one = write_adapter_folder(base, folder / "one", seed=1)
    two = write_adapter_folder(one, folder / "two", seed=2, rank=2)
    other = describe(write_tiny_model(folder / "other", seed=9))
    return {"base": base, "one": one, "two": two, "other": other}


@torch.no_grad()
def _logits(opened: OpenModel) -> Tensor:
    return opened.model(input_ids=IDS).logits.clone()


def _weights(opened: OpenModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in opened.model.named_parameters()}


def _scan(candidate: Checkpoint, reference: Checkpoint, points: list[float], visit: Any, dtype: str = "float32") -> Any:
    return scan(candidate, reference, points, dtype=dtype, device="cpu", visit=lambda alpha, opened: visit(opened))


def test_what_stands_above_the_reference_is_found(family: dict[str, Checkpoint]) -> None:
    base, one, two, other = (family[name] for name in ("base", "one", "two", "other"))
    assert above(two, one) == (two,)
    assert above(two, base) == (one, two)
    assert above(one, two) is None
    assert above(one, one) is None
    assert above(two, other) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("candidate", "reference"), [("one", "base"), ("two", "one"), ("two", "base")])
def test_scaled_adapters_meet_both_ends_to_the_bit(
    family: dict[str, Checkpoint], candidate: str, reference: str, dtype: str
) -> None:
    found = _scan(family[candidate], family[reference], POINTS, _logits, dtype)
    start, end = (_logits(open_model(family[name], dtype=dtype)) for name in (reference, candidate))
    assert torch.equal(found[0], start)
    assert torch.equal(found[3], end)
    assert torch.equal(found[1], found[4])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(("candidate", "reference"), [("one", "base"), ("two", "base")])
def test_scaled_adapters_are_the_straight_line_in_weights(
    family: dict[str, Checkpoint], candidate: str, reference: str
) -> None:
    (found,) = _scan(family[candidate], family[reference], [0.3], _logits)
    ends = [open_model(family[name], dtype="float32", fold=True) for name in (reference, candidate)]
    start, moved = (_weights(one) for one in ends)
    with torch.no_grad():
        for name, tensor in ends[1].model.named_parameters():
            tensor.copy_(0.7 * start[name].double() + 0.3 * moved[name].double())
    assert torch.allclose(found, _logits(ends[1]), atol=1e-5)


def test_one_adapter_is_written_as_itself_with_a_scale(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    candidate, reference = family["two"], family["one"]
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        write_winner(candidate, reference, 0.3, folder)
        winner = describe(folder)
        assert winner.stands_on is not None
        assert winner.stands_on.digest == reference.digest
        before, after = read_factors(candidate.path), read_factors(folder)
        assert all(torch.equal(before[name].b_OR, after[name].b_OR) for name in before)
        assert all(after[name].scale == pytest.approx(0.3 * before[name].scale, rel=1e-12) for name in before)
        (scanned,) = _scan(candidate, reference, [0.3], _logits, dtype)
        assert torch.equal(_logits(open_model(winner, dtype=dtype)), scanned)


def test_several_adapters_are_written_as_one(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    write_winner(family["two"], family["base"], 0.7, tmp_path)
    winner = describe(tmp_path)
    assert winner.stack[:-1] == (family["base"],)
    assert {factor.rank for factor in read_factors(tmp_path).values()} == {5}
    (scanned,) = _scan(family["two"], family["base"], [0.7], _logits)
    assert torch.allclose(_logits(open_model(winner, dtype="float32")), scanned, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_models_meet_both_ends_to_the_bit_and_never_drift(family: dict[str, Checkpoint], dtype: str) -> None:
    found = _scan(family["other"], family["base"], POINTS, _weights, dtype)
    start, end = (_weights(open_model(family[name], dtype=dtype)) for name in ("base", "other"))
    stored = [_weights(open_model(family[name], dtype="float32")) for name in ("base", "other")]
    for name in start:
        assert torch.equal(found[0][name], start[name])
        assert torch.equal(found[3][name], end[name])
        assert torch.equal(found[1][name], found[4][name])
        # From the numbers that are stored, however the model is opened.
        middle = 0.75 * stored[0][name].double() + 0.25 * stored[1][name].double()
        assert torch.equal(found[1][name], middle.float().to(start[name].dtype))


def test_an_adapter_against_another_model_is_folded_first(family: dict[str, Checkpoint]) -> None:
    (found,) = _scan(family["one"], family["other"], [1.0], _weights)
    folded = _weights(open_model(family["one"], dtype="float32", fold=True))
    # One sums the update's terms in float64 and the other in float32.
    assert all(torch.allclose(found[name], folded[name], rtol=0, atol=1e-7) for name in folded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_winner_has_the_weights_that_were_scanned(
    family: dict[str, Checkpoint], tmp_path: Path, dtype: str
) -> None:
    write_winner(family["other"], family["base"], 0.3, tmp_path)
    (scanned,) = _scan(family["other"], family["base"], [0.3], _weights, dtype)
    winner = open_model(describe(tmp_path), dtype=dtype)
    written = _weights(winner)
    assert winner.checkpoint.form == "model"
    assert written.keys() == scanned.keys()
    assert all(torch.equal(written[name], scanned[name]) for name in written)


def test_a_tuned_copy_of_the_base_is_a_dense_pair(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    tuned = export_weights(family["one"], tmp_path / "tuned")
    assert above(tuned, family["base"]) is None
    found = _scan(tuned, family["base"], [0.0, 1.0], _logits)
    assert torch.equal(found[0], _logits(open_model(family["base"], dtype="float32")))
    assert torch.equal(found[1], _logits(open_model(tuned, dtype="float32")))


def test_models_without_one_start_are_refused(family: dict[str, Checkpoint], tmp_path: Path) -> None:
    untied = describe(write_tiny_model(tmp_path / "untied", tied=False))
    with pytest.raises(MergeError, match=r"untied: has a head of its own, but the result's configuration"):
        _scan(family["other"], untied, [0.5], _logits)
    speech = describe(write_tiny_model(tmp_path / "speech", template="generation"))
    with pytest.raises(MergeError, match="differ in tokenizer or chat template"):
        _scan(speech, family["base"], [0.5], _logits)


def test_a_dense_winner_is_a_float32_master_made_from_what_is_stored(
    family: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for name, seed in (("half", 3), ("full", 4)):
        place = write_tiny_model(tmp_path / name, seed=seed)
        if name == "half":
            change_tensors(
                place / "model.safetensors", lambda ts: ts.update({key: one.bfloat16() for key, one in ts.items()})
            )
    (tmp_path / "out").mkdir()
    ends = [describe(tmp_path / name) for name in ("half", "full")]
    write_winner(ends[1], ends[0], (0.25, 0.75), tmp_path / "out")
    written, start, end = (tensors_of(one) for one in (tmp_path / "out", tmp_path / "half", tmp_path / "full"))
    assert {one.dtype for one in written.values()} == {torch.float32}
    for name, tensor in written.items():
        # Two blocks of one layer each; the embedding goes with the first, the last norm with the last.
        share = 0.25 if ".layers.0." in name or "embed" in name else 0.75
        expected = start[name].double() + share * (end[name].double() - start[name].double())
        assert torch.equal(tensor, expected.float()), name


def test_saved_buffers_must_agree(tmp_path: Path) -> None:
    for k, name in enumerate(("a", "b")):
        write_model(tmp_path / name, {"a_steps": torch.tensor([k]), **random_tensors(k)})
    plan = plan_merge(configure("interpolate", {"a": {}}, base="b"), folder=tmp_path)
    with pytest.raises(MergeError, match="the I64 buffer a_steps differs"):
        apply_into(plan, torch.nn.ParameterDict())
