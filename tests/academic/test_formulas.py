"""The papers' formulas, each against something worked by hand or solved by somebody else's solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from evertune.academic.importance import mean_of, normalised
from evertune.academic.lwf import softened
from evertune.academic.olora import Olora, overlap
from evertune.academic.projection import add_, dot, gem_multipliers, input_basis, orthonormal, picks
from evertune.academic.quadratic import HALF, LowRankDistance, Quadratic, decayed_sum, quadratic
from evertune.academic.si import Si, path_importance
from evertune.train.losses import forward_kl


def test_ewc_gives_the_posterior_mean_of_a_linear_gaussian_problem() -> None:
    # Two tasks y = X w + noise of deviation s, columns of X orthogonal, so that the Fisher information is diagonal:
    # X'X / s^2 over all rows. The posterior after both (flat prior) solves (X1'X1 + X2'X2) w = X1'y1 + X2'y2.
    generator = torch.Generator().manual_seed(0)
    s, rows, truth = 0.5, 64, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    designs, answers = [], []
    for task in range(2):
        q, _ = torch.linalg.qr(torch.randn(rows, 3, generator=generator, dtype=torch.float64))
        designs.append(q * torch.tensor([3.0, 1.0, 0.2], dtype=torch.float64) * (1 + task))
        noise = s * torch.randn(rows, generator=generator, dtype=torch.float64)
        answers.append(designs[-1] @ (truth + task) + noise)
    first = torch.linalg.lstsq(designs[0], answers[0]).solution

    def gradients():
        # Labels mean +- s have the variance of the model's own: the true Fisher without sampling error.
        for x in designs[0]:
            for sign in (1.0, -1.0):
                w = first.clone().requires_grad_(True)
                label = (x @ first).detach() + sign * s
                (-((label - x @ w) ** 2) / (2 * s**2)).backward()
                yield {"w": w.grad}

    # Two labels a row: count the rows, and halve.
    fisher = mean_of(gradients(), {"w": first}, 2, torch.square)
    assert torch.allclose(fisher["w"].double(), (designs[0].T @ designs[0]).diagonal() / s**2, rtol=1e-5)

    w = first.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-12)
    penalty = Quadratic("ewc", 1.0, {"w": first}, {"w": fisher["w"].double()}, HALF)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((answers[1] - designs[1] @ w) ** 2).sum() / (2 * s**2)
        held = penalty.on_weights({"w": w})
        assert held is not None
        total = loss + penalty.weight * held
        total.backward()
        return total

    optimizer.step(closure)
    both = sum(x.T @ x for x in designs), sum(x.T @ y for x, y in zip(designs, answers, strict=True))
    assert torch.allclose(w.detach(), torch.linalg.solve(*both), atol=1e-6)
    assert not torch.allclose(w.detach(), torch.linalg.lstsq(designs[1], answers[1]).solution, atol=0.1)


def test_importance_is_a_mean_of_squares_and_not_the_square_of_a_mean() -> None:
    # Rows that pull in opposite directions both need the weight; a batch's mean gradient is 0 and sees nothing.
    rows = [{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([-1.0, 1.0])}]
    found = mean_of(rows, {"w": torch.zeros(2)}, 2, torch.square)
    assert found["w"].tolist() == [1.0, 5.0]
    batch_mean_squared = (rows[0]["w"] + rows[1]["w"]).div(2).square()
    assert batch_mean_squared.tolist() == [0.0, 4.0]


def test_a_normalised_importance_has_mean_one_and_zero_stays_zero() -> None:
    found = normalised({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([8.0])})
    assert found["a"].tolist() == [0.25, 0.75]
    assert found["b"].tolist() == [2.0]
    assert normalised({"a": torch.zeros(2)})["a"].tolist() == [0.0, 0.0]


def test_online_ewc_fades_older_tasks() -> None:
    # F <- 0.5 F + F_t over 4, 2, 1: (4 * 0.5 + 2) * 0.5 + 1 = 3; EWC itself adds them: 7.
    tasks = [{"w": torch.tensor([value])} for value in (4.0, 2.0, 1.0)]
    assert decayed_sum(tasks, 0.5)["w"].tolist() == [3.0]
    assert decayed_sum(tasks, 1.0)["w"].tolist() == [7.0]
    assert tasks[0]["w"].tolist() == [4.0]


def test_a_quadratic_pull_by_hand() -> None:
    # 2 * (3 - 1)^2 + 1 * (0 - 2)^2 = 12; gradient 2 * 2 * 2 and 2 * 1 * -2.
    w = torch.tensor([3.0, 0.0], requires_grad=True)
    value = quadratic({"w": w}, {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 1.0])})
    value.backward()
    assert value.item() == 12.0
    assert w.grad is not None
    assert w.grad.tolist() == [8.0, -4.0]


def test_no_earlier_task_means_no_pull() -> None:
    assert Quadratic("ewc", 1.0, {"w": torch.ones(1)}, {}, HALF).on_weights({"w": torch.zeros(1)}) is None


def test_mas_by_hand() -> None:
    # f(x) = w x with |f|^2 = w^2 x^2 and derivative 2 w x^2. At w = 0.5, rows x = 1 and 3: |1| and |9|, mean 5.
    rows = [{"w": torch.tensor([2 * 0.5 * x**2])} for x in (1.0, 3.0)]
    assert mean_of(rows, {"w": torch.zeros(1)}, 2, torch.abs)["w"].tolist() == [5.0]


def test_the_distance_of_an_adapter_is_that_of_its_product() -> None:
    generator = torch.Generator().manual_seed(1)
    a_RI, b_OR = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    penalty = LowRankDistance("l2sp", 1.0, scale=2.0)
    found = penalty.on_weights({"m.lora_A": a_RI, "m.lora_B": b_OR})
    assert found is not None
    assert float(found) == pytest.approx(0.5 * float((2.0 * b_OR @ a_RI).square().sum()), rel=1e-5)


def test_si_by_hand() -> None:
    # Loss 1/2 (w - 3)^2 from w = 0, two steps of rate 0.5: w = 1.5, then 2.25. Gradients -3 and -1.5.
    # omega = 3 * 1.5 + 1.5 * 0.75 = 5.625; the loss really fell by 4.5 - 0.28125: a finite step counts its start.
    # Omega = 5.625 / (2.25^2 + 0.9375) = 5.625 / 6 = 0.9375.
    w = torch.tensor([0.0])
    weights = {"w": w}
    rule = Si(weights, Quadratic("si", 0.1, {"w": torch.zeros(1)}, {}, 1.0), {}, 0.9375)
    for _ in range(2):
        gradient = {"w": w - 3.0}
        rule.change(gradient, 0)
        w -= 0.5 * gradient["w"]
        rule.see(weights)
    assert rule.state()["w"].tolist() == [5.625]
    assert rule.carried()["w"].tolist() == [0.9375]


def test_si_leaves_its_own_penalty_out_of_the_path_and_adds_up_over_tasks() -> None:
    # Omega 2 was carried here, c = 0.5, centre 1. At w = 2 the gradient is the loss's -4 plus 2 * 0.5 * 2 * (2 - 1).
    w = torch.tensor([2.0])
    before = {"w": torch.tensor([2.0])}
    rule = Si({"w": w}, Quadratic("si", 0.5, {"w": torch.tensor([1.0])}, before, 1.0), before, 1.0)
    rule.change({"w": torch.tensor([-2.0])}, 0)
    w += 1.0
    rule.see({"w": w})
    assert rule.state()["w"].tolist() == [4.0]
    # 4 / ((3 - 1)^2 + 1) + 2.
    assert rule.carried()["w"].tolist() == [pytest.approx(2.8)]


def test_a_weight_whose_path_made_the_loss_rise_is_not_important() -> None:
    found = path_importance({"w": torch.tensor([-1.0, 1.0])}, {"w": torch.tensor([1.0, 0.0])}, 0.5)
    assert found["w"].tolist() == [0.0, 2.0]


def test_lwf_softens_both_sides() -> None:
    # p = (0.8, 0.2), T = 2: square roots 0.894 and 0.447, so 2/3 and 1/3.
    found = softened(torch.tensor([[0.8, 0.2]]).log(), 2.0).exp()
    assert torch.allclose(found, torch.tensor([[2 / 3, 1 / 3]]), atol=1e-6)
    other = softened(torch.tensor([[0.5, 0.5]]).log(), 2.0)
    # KL((2/3, 1/3) || (1/2, 1/2)) = 2/3 ln 4/3 + 1/3 ln 2/3.
    expected = 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3)
    assert float(forward_kl(other, found.log())) == pytest.approx(expected, abs=1e-6)


def test_olora_counts_the_overlap_of_row_spaces() -> None:
    # A_1 = (1, 0), A_t = (2, 5): |A_1 A_t'| = 2; against (0, 1) as well: 2 + 5.
    trained = torch.tensor([[2.0, 5.0]])
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -1.0]])
    assert float(overlap([one], trained)) == 2.0
    assert float(overlap([one, other], trained)) == 7.0
    assert float(overlap([torch.tensor([[5.0, -2.0]])], trained)) == 0.0
    assert Olora(0.5, 0.0, {}).on_weights({"m.lora_A": trained}) is None


def _vectors(count: int, size: int) -> st.SearchStrategy[list[list[float]]]:
    number = st.floats(-3, 3, allow_nan=False, width=32)
    return st.lists(st.lists(number, min_size=size, max_size=size), min_size=count, max_size=count)


@settings(max_examples=60, deadline=None)
@given(_vectors(2, 4))
def test_agems_projection_never_opposes_memory(vectors: list[list[float]]) -> None:
    g, r = ({"a": torch.tensor(v[:3]), "b": torch.tensor(v[3:])} for v in vectors)
    along, square = dot(g, r), dot(r, r)
    if along < 0.0 < square:
        add_(g, -along / square, r)
    size = max(dot(g, g), 1e-12) ** 0.5 * max(square, 1e-12) ** 0.5
    assert dot(g, r) >= -1e-5 * size - 1e-6


@settings(max_examples=40, deadline=None)
@given(_vectors(4, 5))
def test_gem_agrees_with_a_general_solver_of_the_primal(vectors: list[list[float]]) -> None:
    # min |x - g|^2 with x.g_k >= 0: scipy's SLSQP, which knows nothing of the dual.
    g, *memories = (np.array(v, dtype=np.float64) for v in vectors)
    M = np.array(memories)
    v = gem_multipliers(M @ M.T, M @ g, margin=0.0)
    found = g + v @ M
    scale = 1 + np.abs(M).max() * np.abs(g).max()
    assert (M @ found >= -1e-6 * scale).all()
    assert (v >= 0).all()
    assert np.allclose(v * (M @ found), 0.0, atol=1e-5 * scale**2)
    solved = minimize(
        lambda x: ((x - g) ** 2).sum(),
        found + 0.01,
        jac=lambda x: 2 * (x - g),
        constraints=[{"type": "ineq", "fun": lambda x: M @ x, "jac": lambda x: M}],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 300},
    )
    if solved.success and (M @ solved.x >= -1e-9).all():
        assert ((found - g) ** 2).sum() <= solved.fun + 1e-4 * scale


def test_gem_by_hand() -> None:
    # g = (-1, -1), memories (1, 0) and (0, 1): the nearest gradient that opposes neither is 0; margin 0.5 goes beyond.
    gram, along = np.eye(2), np.array([-1.0, -1.0])
    assert gem_multipliers(gram, along, 0.0).tolist() == pytest.approx([1.0, 1.0])
    assert gem_multipliers(gram, along, 0.5).tolist() == pytest.approx([1.5, 1.5])
    # A memory twice: the program has many solutions, and one projected gradient.
    twice = gem_multipliers(np.ones((2, 2)), np.array([-1.0, -1.0]), 0.0)
    assert twice.sum() == pytest.approx(1.0)
    assert gem_multipliers(np.zeros((1, 1)), np.zeros(1), 0.0).tolist() == [0.0]


def test_ogd_leaves_nothing_along_the_memory() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [{"a": torch.randn(4, generator=generator), "b": torch.randn(2, 2, generator=generator)} for _ in range(3)]
    basis = orthonormal([*rows, rows[0]])
    assert len(basis) == 3, "what is spanned already is left out"
    gram = np.array([[dot(one, other) for other in basis] for one in basis])
    assert np.allclose(gram, np.eye(3), atol=1e-6)
    g = {"a": torch.randn(4, generator=generator), "b": torch.randn(2, 2, generator=generator)}
    for one in basis:
        add_(g, -dot(g, one), one)
    assert all(abs(dot(g, row)) < 1e-5 for row in rows)


def test_gpm_keeps_the_leading_directions_that_hold_the_energy() -> None:
    # Squared norms 8, 1, 1 along the axes: 0.8 of the energy needs one direction, 0.85 two.
    covariance = torch.diag(torch.tensor([1.0, 8.0, 1.0], dtype=torch.float64))
    assert input_basis(covariance, 0.79).abs().argmax(dim=0).tolist() == [1]
    assert input_basis(covariance, 0.85).shape == (3, 2)
    basis = input_basis(covariance, 0.95)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-6)


def test_remembered_rows_are_drawn_by_the_step_alone() -> None:
    assert picks(3, 10, "agem", 7, 4) == picks(3, 10, "agem", 7, 4)
    assert picks(3, 10, "agem", 7, 4) != picks(3, 10, "agem", 7, 5)
    assert sorted(picks(5, 3, 0)) == [0, 1, 2]
