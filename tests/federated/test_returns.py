"""Late updates and secure sums, on plain functions and tiny clients that really train."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.errors import TrainingError
from evertune.federated.client import train_here
from evertune.federated.returns import Late, Orders, Post, Returns, Sum, staleness_discount
from evertune.federated.secure import initial_a, mean_update, summand
from evertune.federated.server import run_federated
from evertune.federated.spec import FederatedSpec
from evertune.federated.validation import shapes_of
from evertune.hashing import digest_json
from evertune.model.adapter import read_factors, write_adapter
from tests.federated.test_server import make
from tests.train.stage import open_workspace, write_rows


def test_a_late_update_counts_less_by_a_power() -> None:
    assert staleness_discount(0, 0.5) == 1.0
    assert staleness_discount(3, 0.5) == pytest.approx(0.5)
    assert staleness_discount(1, 2.0) == pytest.approx(0.25)
    assert staleness_discount(7, 0.0) == 1.0


class Slow:
    """Clients of which paris answers each exchange's order one exchange later."""

    def __init__(self) -> None:
        self._behind: list[Late] = []

    def __call__(self, exchange: int, orders: Orders, folder: Path) -> Returns:
        late, self._behind = self._behind, []
        answers = {"berlin": train_here(orders["berlin"], folder / f"berlin-{exchange}")}
        self._behind.append(Late("paris", exchange, train_here(orders["paris"], folder.parent / f"paris-{exchange}")))
        return Returns({**answers, "paris": {"error": "no answer came within 1 s"}}, late)


def run_late(spec: FederatedSpec, folder: Path) -> list[dict[str, Any]]:
    return list(run_federated(spec, open_workspace(folder), ask=Slow())["checkpoint"]["exchanges"])


def test_a_late_update_is_refused_and_recorded(tmp_path: Path, tiny_model: Path) -> None:
    first, second = run_late(make(tmp_path, tiny_model), tmp_path / "w")
    assert first["refused"] == {"paris": "did not return: no answer came within 1 s"}
    assert second["refused"]["paris, exchange 1"] == "came 1 exchange late"
    assert second["weights"] == {"berlin": 1.0}
    assert second["late"] == {}


def test_a_late_update_is_taken_with_a_smaller_weight_where_asked(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, late=1.0)
    first, second = run_late(spec, tmp_path / "w")
    assert first["weights"] == {"berlin": 1.0}
    # Eight rows in time; four rows one exchange late, which count as two.
    assert second["weights"] == pytest.approx({"berlin": 0.8, "paris, exchange 1": 0.2})
    assert second["late"] == {"paris, exchange 1": 1}
    assert "paris, exchange 1" not in second["refused"]
    assert second["error"] < 1e-6
    # What came of it is the mean of both products.
    again = make(tmp_path, tiny_model, late=None)
    other = run_late(again, tmp_path / "again")[1]
    assert other["norms"]["berlin"] == pytest.approx(second["norms"]["berlin"])
    paths = [open_workspace(tmp_path / name).path(one.key) for name, one in (("w", spec), ("again", again))]
    with_late, without = map(read_factors, paths)
    assert any(not torch.allclose(with_late[name].delta(), one.delta()) for name, one in without.items())


def test_a_late_update_is_checked_like_any(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, late=1.0, norm_bound=1e3)

    class Spoilt(Slow):
        def __call__(self, exchange: int, orders: Orders, folder: Path) -> Returns:
            returns = super().__call__(exchange, orders, folder)
            for one in returns.late:
                place = Path(one.answer["folder"])
                huge = {name: replace(each, scale=each.scale * 1e6) for name, each in read_factors(place).items()}
                spoilt = place.parent / "spoilt"
                spoilt.mkdir()
                write_adapter(huge, spoilt, spec.start)
                one.answer["folder"] = str(spoilt)
            return returns

    facts = run_federated(spec, open_workspace(tmp_path / "w"), ask=Spoilt())["checkpoint"]["exchanges"][1]
    assert "above the bound" in facts["refused"]["paris, exchange 1"]
    assert facts["weights"] == {"berlin": 1.0}


def test_an_exchange_closes_and_its_orders_stay_open() -> None:
    coming: dict[str, str] = {}
    sent: list[tuple[int, list[str]]] = []

    def send(exchange: int, orders: Orders) -> list[str]:
        sent.append((exchange, list(orders)))
        return [f"{exchange}/{name}" for name in orders]

    def collect(keys: Sequence[str]) -> dict[str, str]:
        return {key: coming.pop(key) for key in keys if key in coming}

    def read(reply: str, order: Any, folder: Path) -> dict[str, Any]:
        return {"folder": str(folder), "loss": reply, "order": order}

    post = Post(send=send, collect=collect, read=read, seconds=0.0, pause=0.0)
    orders: Any = {"berlin": "b", "paris": "p"}
    coming["0/berlin"] = "in time"
    first = post.ask(0, orders, Path("x"))
    assert first.answers["berlin"] == {"folder": "x/berlin", "loss": "in time", "order": "b"}
    assert first.answers["paris"] == {"error": "no answer came within 0 s"}
    assert not first.late
    coming |= {"0/paris": "late", "1/berlin": "in time", "1/paris": "in time"}
    second = post.ask(1, {**orders, "paris": "p2"}, Path("x"))
    assert second.answers["paris"]["order"] == "p2"
    assert second.late == [Late("paris", 0, {"folder": "x/paris-1", "loss": "late", "order": "p"})]
    assert sent == [(0, ["berlin", "paris"]), (1, ["berlin", "paris"])]


SHAPES = {"m": (3, 5), "n": (2, 4)}


def _factors(seed: int, entries: float = 0.5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    a = initial_a(SHAPES, rank=2, seed=9, dtype="float32")
    made = mean_update([np.zeros((one[0], 2)) for one in SHAPES.values()], a)
    return {
        name: replace(one, b_OR=entries * (2 * torch.rand(one.b_OR.shape, generator=generator) - 1), scale=2.0)
        for name, one in made.items()
    }


def test_a_sum_of_summands_is_the_mean_of_the_products() -> None:
    clients = [_factors(seed) for seed in range(3)]
    parts = [summand(one, shapes=SHAPES, rank=2, entries=1.0, norm_bound=None, clip=False) for one in clients]
    mean = mean_update(
        [np.mean(one, axis=0) for one in zip(*parts, strict=True)], initial_a(SHAPES, rank=2, seed=9, dtype="float32")
    )
    for name, one in mean.items():
        expected = sum(client[name].delta() for client in clients) / 3
        assert torch.allclose(one.delta(), expected, atol=1e-6)


def test_what_would_spoil_a_sum_is_not_sent() -> None:
    settings = {"shapes": SHAPES, "rank": 2, "norm_bound": None, "clip": False}
    with pytest.raises(TrainingError, match="entries of B up to .*, and the secure sum's range ends at 0.01"):
        summand(_factors(1), entries=0.01, **settings)
    broken = _factors(1)
    broken["m"] = replace(broken["m"], b_OR=broken["m"].b_OR * float("nan"))
    with pytest.raises(TrainingError, match="m: not finite"):
        summand(broken, entries=1.0, **settings)
    with pytest.raises(TrainingError, match="above the bound"):
        summand(_factors(1), entries=1.0, **{**settings, "norm_bound": 1e-3})
    clipped = summand(_factors(1), entries=1.0, **{**settings, "norm_bound": 1e-3, "clip": True})
    whole = summand(_factors(1), entries=1.0, **settings)
    for small, large in zip(clipped, whole, strict=True):
        assert float(np.abs(small).max()) < 0.01 * float(np.abs(large).max())
    with pytest.raises(TrainingError, match="1 arrays, expected 2"):
        mean_update([np.zeros((3, 2))], initial_a(SHAPES, rank=2, seed=9, dtype="float32"))


class Secret:
    """Adds up in the open what a secure protocol adds up under masks; paris drops out of the second exchange."""

    def __call__(self, exchange: int, orders: Orders, folder: Path) -> Sum:
        staying = [name for name in orders if exchange == 0 or name != "paris"]
        answers = {name: train_here(orders[name], folder / f"{name}-{exchange}") for name in staying}
        updates = {name: read_factors(Path(one["folder"])) for name, one in answers.items()}
        shapes = shapes_of(updates["berlin"])
        parts = [
            summand(one, shapes=shapes, rank=4, entries=1.0, norm_bound=None, clip=False) for one in updates.values()
        ]
        order = orders["berlin"]
        place = folder / f"sum-{exchange}"
        place.mkdir(parents=True)
        means = [np.mean(one, axis=0) for one in zip(*parts, strict=True)]
        write_adapter(
            mean_update(means, initial_a(shapes, rank=4, seed=order.seed, dtype="float32")), place, order.start
        )
        losses = {name: one["loss"] for name, one in answers.items()}
        missing = {name: "dropped out of the secure sum" for name in orders if name not in staying}
        return Sum(place, staying, losses, missing)


def test_a_secure_federation_is_ffa_without_a_look_at_one_update(tmp_path: Path, tiny_model: Path) -> None:
    clients = {
        "berlin": [write_rows(tmp_path / "b.jsonl", 8)],
        "paris": [write_rows(tmp_path / "p.jsonl", 4, word="minus", seed=3)],
        "turin": [write_rows(tmp_path / "t.jsonl", 6, word="by", seed=5)],
    }
    own = {"clients": clients, "aggregate": "ffa", "weigh": "equal", "exchanges": 1}
    open_, secret = make(tmp_path, tiny_model, **own), make(tmp_path, tiny_model, **own, secure=1.0)
    workspace = open_workspace(tmp_path / "w")
    run_federated(open_, workspace, transport=train_here)
    facts = run_federated(secret, workspace, ask_sum=Secret())["checkpoint"]
    first, second = (read_factors(workspace.path(one.key)) for one in (open_, secret))
    for name, one in first.items():
        assert torch.allclose(one.delta(), second[name].delta(), atol=1e-6)
    (exchange,) = facts["exchanges"]
    assert exchange["secure"] and exchange["error"] is None
    assert exchange["norms"] == dict.fromkeys(clients)
    assert facts["settings"]["secure"] == 1.0


def test_who_drops_out_of_a_secure_sum_is_recorded(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, aggregate="ffa", weigh="equal", secure=1.0)
    second = run_federated(spec, open_workspace(tmp_path / "w"), ask_sum=Secret())["checkpoint"]["exchanges"][1]
    assert second["refused"] == {"paris": "dropped out of the secure sum"}
    assert second["weights"] == {"berlin": 1.0}


def test_a_sum_that_no_honest_clients_could_have_made_is_not_used(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, aggregate="ffa", weigh="equal", secure=1.0, norm_bound=1e-6)
    with pytest.raises(TrainingError, match="the mean of the updates of berlin, paris may not be used: norm .* bound"):
        run_federated(spec, open_workspace(tmp_path / "w"), ask_sum=Secret())


def test_the_a_that_clients_begin_with_is_known_without_them(tmp_path: Path, tiny_model: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        spec = make(tmp_path, tiny_model, aggregate="ffa", exchanges=1, dtype=dtype)
        spec = replace(spec, key=digest_json(spec.identity()))
        sent: dict[str, Any] = {}

        def ask(exchange: int, orders: Orders, folder: Path, kept: dict[str, Any] = sent) -> Returns:
            kept["order"] = orders["berlin"]
            answers = {name: train_here(order, folder / name) for name, order in orders.items()}
            kept["update"] = read_factors(Path(answers["berlin"]["folder"]))
            return Returns(answers)

        run_federated(spec, open_workspace(tmp_path / dtype), ask=ask)
        a = initial_a(shapes_of(sent["update"]), rank=4, seed=sent["order"].seed, dtype=dtype)
        for name, one in sent["update"].items():
            assert torch.equal(one.a_RI, a[name]), dtype
