"""Noise on clients' updates: how far one client moves the mean, how much noise there is, and what it protects."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from evertune.errors import MergeError, TrainingError
from evertune.federated import server
from evertune.federated.client import train_here
from evertune.federated.privacy import epsilon, private_mean, size_of_b
from evertune.federated.server import run_federated
from evertune.model.adapter import Factor
from tests.federated.test_server import make
from tests.train.stage import open_workspace


def _clients(scales: list[float]) -> list[dict[str, Factor]]:
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(2, 5, generator=generator) for name in ("q", "v")}
    return [
        {name: Factor(a[name], one * torch.randn(40, 2, generator=generator), 2.0, False) for name in a}
        for one in scales
    ]


def test_one_client_moves_the_mean_by_no_more_than_its_bound() -> None:
    honest = _clients([0.01, 0.02, 0.01])
    huge = _clients([0.01, 0.02, 0.01, 1000.0])[3]
    assert size_of_b(huge) > 1e4
    with_it = private_mean([*honest, huge], bound=0.5, multiplier=0.0, asked=4).factors
    # Its part is the bound by the number asked, whatever it sent; the sums of the others are the same.
    without = private_mean(honest, bound=0.5, multiplier=0.0, asked=4).factors
    moved = math.sqrt(sum(float((with_it[name].b_OR - without[name].b_OR).square().sum()) for name in with_it))
    assert moved == pytest.approx(0.5 / 4, rel=1e-5)
    small = {name: one.scale * one.b_OR / 4 for name, one in honest[0].items()}
    alone = private_mean(honest[:1], bound=10.0, multiplier=0.0, asked=4).factors
    torch.testing.assert_close(alone["q"].b_OR, small["q"])


def test_the_noise_has_the_deviation_that_the_account_assumes() -> None:
    clients = _clients([0.01] * 5)
    quiet = private_mean(clients, bound=0.5, multiplier=0.0, asked=5).factors
    draws = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        found = private_mean(clients, bound=0.5, multiplier=3.0, asked=5, generator=generator).factors
        draws.append(torch.cat([(found[name].b_OR - quiet[name].b_OR).flatten() for name in found]))
    noise = torch.stack(draws).numpy()
    # 9600 draws of deviation 3 * 0.5 / 5 = 0.3: the estimate is good to 0.7 %.
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    assert abs(float(noise.mean())) < 4 * 0.3 / math.sqrt(noise.size)
    one, other = (private_mean(clients, bound=0.5, multiplier=3.0, asked=5).factors["q"].b_OR for _ in range(2))
    assert not torch.equal(one, other)


def test_clients_of_different_a_have_no_private_mean() -> None:
    one, other = _clients([1.0, 1.0])
    other = {name: Factor(each.a_RI + 1, each.b_OR, each.scale, False) for name, each in other.items()}
    with pytest.raises(MergeError, match="has trained A"):
        private_mean([one, other], bound=1.0, multiplier=1.0, asked=2)


def test_without_the_accountant_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(TrainingError, match=r"evertune\[privacy\]"):
        epsilon(1.0, 1, 1e-5)


@pytest.mark.parametrize(("multiplier", "exchanges"), [(1.0, 1), (2.0, 5), (4.0, 20)])
def test_epsilon_is_that_of_the_gaussian_mechanism(multiplier: float, exchanges: int) -> None:
    pytest.importorskip("dp_accounting")
    # T exchanges of deviation z are one of z / sqrt(T); its exact delta is Balle and Wang 2018, theorem 8.
    s = multiplier / math.sqrt(exchanges)

    def excess(e: float) -> float:
        return float(norm.cdf(1 / (2 * s) - e * s) - np.exp(e) * norm.cdf(-1 / (2 * s) - e * s) - 1e-5)

    assert epsilon(multiplier, exchanges, 1e-5) == pytest.approx(brentq(excess, 1e-3, 50), rel=1e-3)


def test_a_stage_with_noise_records_what_it_protects(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "epsilon", lambda multiplier, exchanges, delta: 10.0 * exchanges / multiplier)
    changes = {"aggregate": "ffa", "weigh": "equal", "norm_bound": 0.05, "too_large": "clip"}
    spec = make(tmp_path, tiny_model, noise={"multiplier": 1.0, "delta": 1e-4}, **changes)
    facts = run_federated(spec, open_workspace(tmp_path / "w"), transport=train_here)["checkpoint"]
    assert facts["privacy"] == {"epsilon": 20.0, "delta": 1e-4, "unit": "client"}
    assert facts["methods"] == ["lora", "ffa_lora", "dp_fedavg"]
    assert facts["exchanges"][0]["error"] > 0.5  # the noise is larger than what so small a bound lets through
    plain = make(tmp_path, tiny_model, **changes)
    assert "privacy" not in run_federated(plain, open_workspace(tmp_path / "p"), transport=train_here)["checkpoint"]
