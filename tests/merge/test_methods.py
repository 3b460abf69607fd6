"""Every method against its formula in float64, written out again in numpy, and against what must never happen."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.errors import MergeError
from evertune.hashing import digest_bytes
from evertune.merge.engine import run_merge
from evertune.merge.in_memory import apply_into
from evertune.merge.methods import METHODS, stock_share
from evertune.merge.plan import MergePlan, plan_merge
from evertune.merge.reader import sample_runs
from evertune.merge.sources import fingerprint, read_source
from evertune.model.checkpoint import describe
from tests.merge.folders import (
    configure,
    merge,
    random_tensors,
    tensors_of,
    weights_bytes,
    wide,
    write_family,
    write_model,
)

Array = np.ndarray[Any, Any]
NAME = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
WEIGHTS = {"e0": 0.5, "e1": 0.3, "e2": -0.2}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family in float32: its sums are computed in float64."""
    return write_family(tmp_path_factory.mktemp("single"), dtype=torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family in bfloat16: its sums are computed in float32."""
    return write_family(tmp_path_factory.mktemp("half"))


# ---- the formulas


def trimmed(tau: Array, density: float, top: float = 0.0) -> Array:
    """The `density` share of largest magnitude after the `top` share; float32 magnitudes have no ties here."""
    order = np.argsort(-np.abs(tau.ravel().astype(np.float32)), kind="stable")
    dropped, kept = round(top * tau.size), max(1, round(density * tau.size))
    out = np.zeros(tau.size)
    chosen = order[dropped : dropped + kept]
    out[chosen] = tau.ravel()[chosen]
    return out.reshape(tau.shape)


def elected(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    """Mean, by weight, of the task vectors that agree with the sign of their weighted sum."""
    terms = np.stack([w * tau for w, tau in zip(weights, taus, strict=True)])
    sign = np.sign(terms.sum(axis=0))
    agree = (np.sign(terms) == sign) & (terms != 0)
    size = (np.abs(np.array(weights)).reshape(-1, *[1] * (terms.ndim - 1)) * agree).sum(axis=0)
    return np.divide((terms * agree).sum(axis=0), size, out=np.zeros(sign.shape), where=size > 0)


def uniform(seed: int, expert: str, name: str, size: int) -> Array:
    """16 bits of Philox4x32-7 for each element, with Python's integers, keyed and ordered as documented."""
    key = int(digest_bytes(f"{seed}|{expert}|{name}".encode())[:16], 16)
    drawn = np.zeros(-(-size // 2048) * 2048)
    for counter in range(len(drawn) // 8):
        c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
        k = [key & 0xFFFFFFFF, key >> 32]
        for _ in range(7):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        group, j = divmod(counter, 256)
        for word, half in itertools.product(range(4), range(2)):
            drawn[2048 * group + 512 * word + 2 * j + half] = (c[word] >> (16 * half)) & 0xFFFF
    return drawn[:size] / 2**16


def by_rank(tau: Array, density: float, epsilon: float) -> Array:
    """DELLA's keeping probability of each element: by rank of magnitude in its row."""
    ranks = np.argsort(np.argsort(np.abs(tau), axis=1, kind="stable"), axis=1, kind="stable")
    return density - epsilon + 2 * epsilon * ranks / (tau.shape[1] - 1)


def slerped(one: Array, two: Array, t: float) -> Array:
    cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
    angle = np.arccos(cosine)
    result: Array = (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)
    return result


# The share of 65536 numbers that a density of 0.6 is.
KEPT = 39322 / 65536
Oracle = Callable[[Array, list[Array], list[Array], list[Array]], Array]
W = list(WEIGHTS.values())
# name -> (settings, expected from base, task vectors, experts, uniform numbers of each expert)
ORACLES: dict[str, tuple[dict[str, Any], Oracle]] = {
    "linear": ({}, lambda b, ts, es, us: sum(w * e for w, e in zip(W, es, strict=True)) / sum(W)),
    "ema": ({"decay": 0.9}, lambda b, ts, es, us: 0.9 * (0.9 * es[0] + 0.1 * es[1]) + 0.1 * es[2]),
    "interpolate": ({"t": 0.3}, lambda b, ts, es, us: 0.7 * b + 0.3 * es[0]),
    "task_arithmetic": (
        {"lambda": 0.7},
        lambda b, ts, es, us: b + 0.7 * sum(w * t for w, t in zip(W, ts, strict=True)),
    ),
    "slerp": ({"t": 0.3}, lambda b, ts, es, us: b + slerped(ts[0], ts[1], 0.3)),
    "ties": ({"density": 0.3}, lambda b, ts, es, us: b + elected([trimmed(t, 0.3) for t in ts], W)),
    "breadcrumbs": (
        {"density": 0.7, "gamma": 0.05},
        lambda b, ts, es, us: b + sum(w * trimmed(t, 0.7, 0.05) for w, t in zip(W, ts, strict=True)),
    ),
    "breadcrumbs_ties": (
        {"density": 0.7, "gamma": 0.05},
        lambda b, ts, es, us: b + elected([trimmed(t, 0.7, 0.05) for t in ts], W),
    ),
    "dare_linear": (
        {"density": 0.6},
        lambda b, ts, es, us: b + sum(w * t * (u < KEPT) / KEPT for w, t, u in zip(W, ts, us, strict=True)),
    ),
    "dare_ties": (
        {"density": 0.6},
        lambda b, ts, es, us: b + elected([t * (u < KEPT) / KEPT for t, u in zip(ts, us, strict=True)], W),
    ),
    "della_linear": (
        {"density": 0.6, "epsilon": 0.2},
        lambda b, ts, es, us: (
            b
            + sum(w * t * (u < by_rank(t, 0.6, 0.2)) / by_rank(t, 0.6, 0.2) for w, t, u in zip(W, ts, us, strict=True))
        ),
    ),
    "della": (
        {"density": 0.6, "epsilon": 0.2},
        lambda b, ts, es, us: (
            b + elected([t * (u < by_rank(t, 0.6, 0.2)) / by_rank(t, 0.6, 0.2) for t, u in zip(ts, us, strict=True)], W)
        ),
    ),
    "magmax": (
        {},
        lambda b, ts, es, us: b + np.take_along_axis(np.stack(ts), np.abs(np.stack(ts)).argmax(0)[None], 0)[0],
    ),
}


def _expected(folder: Path, method: str, name: str) -> Array:
    base, experts = wide(folder / "base", name), [wide(folder / one, name) for one in WEIGHTS]
    taus = [one - base for one in experts]
    prints = [fingerprint(read_source(one, describe(folder / one))) for one in WEIGHTS]
    drawn = [uniform(7, one, name, base.size).reshape(base.shape) for one in prints]
    return ORACLES[method][1](base, taus, experts, drawn)


def _merged(folder: Path, out: str, method: str, **more: Any) -> Path:
    table = METHODS[method]
    count = {"interpolate": 1, "slerp": 2}.get(method, 3)
    models = {one: {"weight": WEIGHTS[one]} if "weight" in table.per_model else {} for one in list(WEIGHTS)[:count]}
    settings = {**ORACLES[method][0], **({} if table.base == "none" else {"base": "base"}), **more}
    if method in ("dare_linear", "dare_ties", "della", "della_linear"):
        settings["seed"] = 7
    return merge(folder, out, method, models, **settings).checkpoint.path


@pytest.mark.parametrize("method", ORACLES)
def test_a_method_is_its_formula(single: Path, half: Path, method: str) -> None:
    found = wide(_merged(single, f"out-{method}", method), NAME)
    expected = _expected(single, method, NAME)
    assert np.allclose(found, expected, rtol=2**-23, atol=1e-12)
    moved = wide(_merged(half, f"out-{method}", method), NAME)
    in_half = _expected(half, method, NAME)
    if method in ("ties", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "magmax"):
        # On bfloat16's grid many magnitudes are equal and many sums zero; the oracle's choice there is another.
        assert np.mean(np.abs(moved - in_half) <= np.abs(in_half) * 2**-8) > 0.9
    else:
        rounded = torch.tensor(in_half).float().bfloat16().double().numpy()
        # Sums that lie in the middle between two bfloat16 numbers, to float32's precision, may go either way.
        assert np.mean(moved == rounded) > 0.99
        assert np.all(np.abs(moved - rounded) <= np.abs(rounded) * 2**-7)


def test_model_stock_goes_the_papers_share_of_the_way(single: Path) -> None:
    out = merge(single, "stock", "model_stock", dict.fromkeys(WEIGHTS), base="base").checkpoint.path
    base = wide(single / "base", NAME)
    taus = [wide(single / one, NAME) - base for one in WEIGHTS]
    pairs = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(taus, 2)]
    cosine = float(np.mean(pairs))
    share = 3 * cosine / (1 + 2 * cosine)
    assert np.allclose(wide(out, NAME), base + max(0.0, share) * sum(taus) / 3, rtol=2**-23, atol=1e-12)
    # By hand: two at right angles share nothing, two parallel ones everything, opposite ones are held at zero.
    assert stock_share(np.eye(2)) == 0.0
    assert stock_share(np.ones((2, 2))) == 1.0
    assert stock_share(np.array([[1.0, -0.5], [-0.5, 1.0]])) == 0.0
    # Cosine one half of three: 3/2 / (1 + 1) = 3/4.
    assert stock_share(np.full((3, 3), 0.5) + 0.5 * np.eye(3)) == pytest.approx(0.75)


def test_sce_selects_weighs_and_elects(single: Path) -> None:
    out = merge(single, "sce", "sce", dict.fromkeys(WEIGHTS), base="base", density=0.4).checkpoint.path
    base = wide(single / "base", NAME)
    taus = np.stack([wide(single / one, NAME) - base for one in WEIGHTS])
    variance = taus.var(axis=0).ravel().astype(np.float32)
    mask = np.zeros(variance.size, bool)
    mask[np.argsort(-variance, kind="stable")[: round(0.4 * variance.size)]] = True
    taus *= mask.reshape(base.shape)
    energy = np.square(taus).sum(axis=(1, 2))
    expected = base + elected(list(taus), list(energy / energy.sum()))
    assert np.mean(np.isclose(wide(out, NAME), expected, rtol=2**-22, atol=1e-12)) > 0.999


@pytest.mark.parametrize("boost", [0.0, 0.1])
def test_ram_adds_own_changes_whole_and_averages_shared_ones(tmp_path: Path, boost: float) -> None:
    base = random_tensors(0, dtype=torch.float32)
    write_model(tmp_path / "base", base)
    rng = np.random.default_rng(0)
    for k in range(2):
        moved = {
            name: one + torch.tensor(0.01 * (rng.random(one.shape) < 0.5), dtype=torch.float32)
            for name, one in base.items()
        }
        write_model(tmp_path / f"e{k}", moved)
    settings = {"boost": boost} if boost else {}
    out = merge(tmp_path, "out", "ram", {"e0": {}, "e1": {}}, base="base", **settings).checkpoint.path
    theta = wide(tmp_path / "base", NAME)
    taus = [wide(tmp_path / f"e{k}", NAME) - theta for k in range(2)]
    one, two = (np.abs(tau) > 1e-5 for tau in taus)
    shared = int((one & two).sum())
    boosts = [1 + boost * min(shared / int((a & ~b).sum()), 0.2) for a, b in ((one, two), (two, one))]
    expected = theta + np.where(
        one & two, (taus[0] + taus[1]) / 2, boosts[0] * taus[0] * one + boosts[1] * taus[1] * two
    )
    assert np.allclose(wide(out, NAME), expected, rtol=2**-23, atol=1e-9)


# ---- what must never happen


def _settings(method: str) -> dict[str, Any]:
    return {} if METHODS[method].base == "none" else {"base": "base"}


def _names(method: str) -> list[str]:
    return ["e0", "e1", "e2"][: {"interpolate": 1, "slerp": 2}.get(method, 3)]


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_model_with_itself_returns_it_bit_for_bit(tmp_path: Path, method: str) -> None:
    tensors = random_tensors(3)
    tensors[NAME].view(-1)[:2] = torch.tensor([-0.0, 1e-39])
    write_model(tmp_path / "base", tensors)
    models = {name: {"path": "base"} for name in _names(method)}
    out = merge(tmp_path, "out", method, models, **_settings(method)).checkpoint.path
    assert weights_bytes(out) == weights_bytes(tmp_path / "base")


@pytest.mark.parametrize("method", ["linear", "ema", "slerp", "model_stock", "ties", "sce", "magmax"])
def test_copies_of_one_expert_merge_to_that_expert(half: Path, method: str) -> None:
    models = {name: {"path": "e1"} for name in _names(method)}
    density = {"density": 1.0} if method == "ties" else {}
    out = merge(half, f"copies-{method}", method, models, **_settings(method), **density).checkpoint.path
    assert weights_bytes(out) == weights_bytes(half / "e1")


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.ordered and name != "interpolate"])
def test_the_order_of_experts_changes_no_byte(half: Path, method: str) -> None:
    weights = {"e0": 0.5, "e1": 0.3, "e2": 0.2} if "weight" in METHODS[method].per_model else {}
    found = []
    for i, order in enumerate((("e0", "e1", "e2"), ("e2", "e0", "e1"))):
        models = {one: {"weight": weights[one]} if weights else {} for one in order}
        out = merge(half, f"order-{method}-{i}", method, models, **_settings(method)).checkpoint.path
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if "weight" in one.per_model])
def test_an_expert_of_weight_zero_changes_no_byte(half: Path, method: str) -> None:
    two = merge(half, f"two-{method}", method, {"e0": {"weight": 0.6}, "e1": {"weight": 0.4}}, **_settings(method))
    models = {"e2": {"weight": 0.0}, "e0": {"weight": 0.6}, "e1": {"weight": 0.4}}
    three = merge(half, f"three-{method}", method, models, **_settings(method))
    weights = [(one.checkpoint.path / "model.safetensors").read_bytes() for one in (two, three)]
    assert weights[0] == weights[1]


def test_a_negative_weight_forgets_and_is_not_turned_round(single: Path) -> None:
    base, tau = wide(single / "base", NAME), wide(single / "e0", NAME) - wide(single / "base", NAME)
    for method in ("task_arithmetic", "ties", "dare_ties"):
        full = {} if method == "task_arithmetic" else {"density": 1.0}
        out = merge(single, f"forget-{method}", method, {"e0": {"weight": -1.0}}, base="base", **full).checkpoint.path
        assert np.allclose(wide(out, NAME), base - tau, rtol=2**-23, atol=1e-12), method


def test_a_sign_that_nobody_wins_leaves_the_base(tmp_path: Path) -> None:
    # Two experts move by +0.25 and -0.25: PEFT and mergekit would add +0.25.
    base = {"w": torch.ones(4, 4)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "e0", {"w": base["w"] + 0.25})
    write_model(tmp_path / "e1", {"w": base["w"] - 0.25})
    models: dict[str, Any] = {"e0": {"weight": 0.4}, "e1": {"weight": 0.4}}
    ours = merge(tmp_path, "ours", "ties", models, base="base", density=1.0).checkpoint.path
    theirs = merge(tmp_path, "theirs", "ties", models, base="base", density=1.0, compat="mergekit").checkpoint.path
    assert torch.equal(tensors_of(ours)["w"], base["w"])
    assert torch.equal(tensors_of(theirs)["w"], base["w"] + 0.25)


def test_the_density_asked_for_is_kept_where_half_the_magnitudes_are_equal(tmp_path: Path) -> None:
    # All changes have one of two sizes: ">= threshold" would keep 100 % when 20 % are asked for.
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.ones(200, 100)}
    signs = torch.randint(0, 2, (200, 100), generator=generator) * 2.0 - 1
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "e0", {"w": base["w"] + signs * 2**-8})
    done = merge(tmp_path, "out", "ties", {"e0": {}}, base="base", density=0.2)
    kept = tensors_of(done.checkpoint.path)["w"] != 1
    assert float(kept.float().mean()) == pytest.approx(0.2, abs=0.01)
    # No part of the tensor is favoured.
    assert float(kept[:100].float().mean()) == pytest.approx(0.2, abs=0.015)
    assert done.manifest["tensors"]["w"]["density"]["e0"] == pytest.approx(0.2, abs=0.01)


def test_the_largest_are_kept_where_the_sample_says_nothing_of_them(tmp_path: Path) -> None:
    # A sample bounds where the threshold is looked for first. Here what is sampled is tiny and the rest is not.
    shape, rng = (400, 256), np.random.default_rng(0)
    tau = rng.standard_normal(shape).astype(np.float32).ravel()
    plan = plan_of(write_pair(tmp_path, tau.reshape(shape)))
    for begin, end in sample_runs(plan.tensors[0]):
        tau[begin:end] *= 1e-6
    write_pair(tmp_path, tau.reshape(shape))
    done = run_merge(plan_of(tmp_path), tmp_path / "out", threads=1)
    found = wide(done.checkpoint.path, "w").ravel()
    assert np.array_equal(found, trimmed(tau.astype(np.float64), 0.3))
    # And in memory, where a search tries weights.
    model = torch.nn.Module()
    model.register_parameter("w", torch.nn.Parameter(torch.zeros(shape)))
    apply_into(plan_of(tmp_path), model)
    assert np.array_equal(model.w.detach().double().numpy().ravel(), found)


def write_pair(folder: Path, tau: Array) -> Path:
    """A base of zeros and an expert that is a task vector."""
    write_model(folder / "base", {"w": torch.zeros(tau.shape)})
    write_model(folder / "e0", {"w": torch.from_numpy(tau).clone()})
    return folder


def plan_of(folder: Path) -> MergePlan:
    config = configure("ties", {"e0": {}}, base="base", density=0.3, different_starts="allow")
    return plan_merge(config, folder=folder)


def test_dare_keeps_the_mean_of_a_task_vector_and_spares_vectors(single: Path) -> None:
    out = merge(single, "dare", "dare_linear", {"e0": {"weight": 1.0}}, base="base", density=0.1).checkpoint.path
    base = wide(single / "base", NAME)
    tau, left = wide(single / "e0", NAME) - base, wide(out, NAME) - base
    kept = left != 0
    assert kept.mean() == pytest.approx(0.1, abs=0.035)
    assert np.allclose(left[kept], 10 * tau[kept], rtol=1e-4)
    assert np.array_equal(wide(out, NORM), wide(single / "e0", NORM))


def test_weights_that_cancel_are_refused_where_a_mean_divides(half: Path) -> None:
    models: dict[str, Any] = {"e0": {"weight": 1.0}, "e1": {"weight": -1.0}}
    with pytest.raises(MergeError, match=r"model\.embed_tokens\.weight: the weights .* add up to 0"):
        merge(half, "zero", "linear", models)
    merge(half, "zero-sum", "linear", models, normalize=False)
