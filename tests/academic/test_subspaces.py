"""InfLoRA and OSFT: what they set aside stays aside, beside PEFT's own tuner."""

from pathlib import Path

import pytest
import torch
from torch import nn

from evertune.academic.projection import input_basis, input_covariances
from evertune.academic.subspaces import Osft, Protected, make_inflora, make_osft, new_input_directions
from evertune.train.sft import run_sft
from tests.academic.stage import bench_of, spec_with
from tests.train.stage import open_workspace, published_weights


def test_the_directions_are_new_inputs_outside_the_old_ones() -> None:
    # Old inputs along e0 and e1; new ones along e0 (strong), e2 (middle) and e3 (weak).
    new_II = torch.diag(torch.tensor([100.0, 0.0, 4.0, 1.0, 0.0], dtype=torch.float64))
    old_IK = torch.eye(5)[:, :2]
    found = new_input_directions(new_II, old_IK, 3)
    torch.testing.assert_close(found[:2].abs(), torch.eye(5)[2:4])
    # A third direction of new inputs does not exist: it is none, not one of the old.
    assert not found[2].any()
    torch.testing.assert_close(new_input_directions(new_II, None, 2).abs(), torch.eye(5)[[0, 2]])
    assert new_input_directions(torch.eye(3, dtype=torch.float64), None, 5).shape == (5, 3)


def test_old_inputs_do_not_reach_an_inflora_adapter(tmp_path: Path, tiny_model: Path) -> None:
    options = {"energy": 0.9, "memory_rows": 3}
    spec = spec_with(tmp_path, tiny_model, "inflora", options, lr=1e-2, share=0.0, replay=[])
    bench = bench_of(tmp_path, spec)
    make_inflora(bench)
    rows = [row for each in bench.memory.values() for row in each]
    old = input_covariances(bench, rows)
    assert len(old) == 14  # seven linear layers in each of two
    for name, covariance_II in old.items():
        a_RI = bench.trained[f"{name}.lora_A"].detach()
        # Ten per cent of the inputs' squared norm lie outside what is closed; without the method all may get through.
        reach = float((a_RI.double() @ covariance_II @ a_RI.double().T).trace() / covariance_II.trace())
        assert reach < 0.1
        assert float((a_RI @ input_basis(covariance_II, 0.9)).abs().max()) < 1e-5
    run_sft(spec, open_workspace(tmp_path / "w"))
    trained = published_weights(open_workspace(tmp_path / "w"), spec)
    factors = {key: one for key, one in trained.items() if "lora_A" in key}
    for key, one in factors.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        torch.testing.assert_close(one, bench.trained[name].detach(), rtol=0, atol=0)
    assert any(float(one.abs().max()) > 0 for key, one in trained.items() if "lora_B" in key)


def test_what_peft_may_change_is_what_we_may_change() -> None:
    from peft.tuners.osf.utils import decompose_weight_matrix, project_gradient_to_orthogonal_space

    torch.manual_seed(0)
    weight_OI, x_BI, y_BO = torch.randn(6, 9), torch.randn(20, 9), torch.randn(20, 6)
    ours = Protected.of(weight_OI, 0.5)
    assert ours.outputs_OK.shape == (6, 3)
    theirs = decompose_weight_matrix(weight_OI, 3)
    kept = theirs["U_high"] @ torch.diag(theirs["S_high"]) @ theirs["V_high"]
    optimizer = torch.optim.SGD([theirs[name] for name in ("U_low", "S_low", "V_low")], lr=0.05)
    for _ in range(5):
        lower = theirs["U_low"] @ torch.diag(theirs["S_low"]) @ theirs["V_low"]
        optimizer.zero_grad()
        (x_BI @ (kept + lower).T - y_BO).square().mean().backward()
        project_gradient_to_orthogonal_space(theirs)
        optimizer.step()
    change = (kept + theirs["U_low"] @ torch.diag(theirs["S_low"]) @ theirs["V_low"]).detach() - weight_OI
    assert float(change.norm()) > 0.01
    torch.testing.assert_close(ours.outside(change), change, rtol=0, atol=1e-4 * float(change.norm()))
    # And the set is no larger: the part of a free change that is let through touches neither side.
    through = ours.outside(torch.randn(6, 9))
    torch.testing.assert_close(theirs["U_high"].T @ through, torch.zeros(3, 9), rtol=0, atol=1e-5)
    torch.testing.assert_close(through @ theirs["V_high"].T, torch.zeros(6, 3), rtol=0, atol=1e-5)


def test_a_stage_of_adamw_stays_inside(tmp_path: Path, tiny_model: Path) -> None:
    spec = spec_with(tmp_path, tiny_model, "osft", {"protected": 0.75}, lr=1e-2)
    bench = bench_of(tmp_path, spec)
    start = {name: one.detach().clone() for name, one in bench.trained.items()}
    (rule,) = make_osft(bench).rules
    assert isinstance(rule, Osft)
    run_sft(spec, open_workspace(tmp_path / "w"))
    after = published_weights(open_workspace(tmp_path / "w"), spec)
    linear = {f"{name}.weight" for name, one in bench.policy.model.named_modules() if isinstance(one, nn.Linear)}
    for name in linear - {"lm_head.weight"}:
        change = after[name] - start[name]
        assert float(change.norm()) > 1e-4
        one = Protected.of(start[name], 0.75)
        assert float((one.outputs_OK.T @ change).norm()) < 1e-4 * float(change.norm())
        assert float((change @ one.inputs_IK).norm()) < 1e-4 * float(change.norm())
    for name in set(after) - linear:
        assert torch.equal(after[name], start[name]), name


def test_no_room_is_an_error_in_words(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evertune.academic import subspaces
    from evertune.errors import TrainingError

    monkeypatch.setattr(subspaces, "input_basis", lambda covariance, energy: torch.eye(len(covariance)))
    bench = bench_of(tmp_path, spec_with(tmp_path, tiny_model, "inflora"))
    with pytest.raises(TrainingError, match="no direction for the new one"):
        make_inflora(bench)
