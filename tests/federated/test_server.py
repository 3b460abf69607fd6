"""Federated stages on a tiny model: clients really train, updates are checked, the published adapter is their mean."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evertune.errors import MergeError, TrainingError
from evertune.federated.client import Answer, train_here, train_in_process
from evertune.federated.server import participants, run_federated
from evertune.federated.spec import FederatedSpec, client_order
from evertune.hashing import digest_json
from evertune.model.adapter import read_factors
from evertune.model.checkpoint import describe
from evertune.train.sft import run_sft
from evertune.train.spec import SftSpec
from tests.train.stage import open_workspace, write_rows

EXACT = ("flora", "fedex", "fed_talora", "ffa")


def make(folder: Path, model: Path, **changes: Any) -> FederatedSpec:
    start = describe(model)
    values: dict[str, Any] = {
        "label": "round/1-federated",
        "start": start,
        "base": start,
        "clients": {
            "berlin": [write_rows(folder / "berlin.jsonl", 8)],
            "paris": [write_rows(folder / "paris.jsonl", 4, word="minus", seed=3)],
        },
        "exchanges": 2,
        "aggregate": "flora",
        "rank": 4,
        "ranks": {},
        "participation": 1.0,
        "weigh": "rows",
        "proximal": None,
        "norm_bound": None,
        "too_large": "refuse",
        "trim": 0.2,
        "noise": None,
        "lr": 0.01,
        "epochs": None,
        "steps": 3,
        "batch_rows": 4,
        "micro_batch_rows": 4,
        "max_tokens": 256,
        "too_long": "error",
        "seed": 7,
        "dtype": "float32",
        "device": "cpu",
        "threads": None,
        **changes,
    }
    spec = FederatedSpec(key="0" * 64, **values)
    return replace(spec, key=digest_json(spec.identity()))


def run(spec: FederatedSpec, folder: Path, transport: Callable[..., Answer] = train_here) -> dict[str, Any]:
    return run_federated(spec, open_workspace(folder), transport=transport)["checkpoint"]


@pytest.mark.parametrize("rule", ["fedavg", *EXACT, "flexlora", "median", "trimmed_mean"])
def test_every_rule_makes_a_checkpoint_and_says_how_exact_it_was(rule: str, tmp_path: Path, tiny_model: Path) -> None:
    facts = run(make(tmp_path, tiny_model, aggregate=rule), tmp_path / "w")
    assert facts["standing"] == "academic"
    assert facts["form"] == "adapter"
    assert len(facts["exchanges"]) == 2
    for one in facts["exchanges"]:
        assert list(one["weights"].values()) == pytest.approx([2 / 3, 1 / 3])
        assert all(norm > 0 for norm in one["norms"].values())
        if rule in EXACT:
            assert one["error"] < 1e-6
    if rule == "fedavg":
        assert facts["exchanges"][0]["error"] > 1e-3
    assert facts["losses"][1][1] < facts["losses"][0][1]
    assert facts["drift"]["to_start"] > 0


def test_one_exchange_is_the_weighted_mean_of_what_the_clients_learnt_alone(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, exchanges=1)
    workspace = open_workspace(tmp_path / "w")
    run_federated(spec, workspace, transport=train_here)
    found = read_factors(workspace.path(spec.key))
    alone = []
    for name in spec.clients:
        order, own = client_order(spec, name, 0, spec.start), open_workspace(tmp_path / name)
        run_sft(order, own)
        alone.append(read_factors(own.path(order.key)))
    for name, factor in found.items():
        expected = 2 / 3 * alone[0][name].delta() + 1 / 3 * alone[1][name].delta()
        assert torch.allclose(factor.delta(), expected, atol=1e-6)


def test_the_rows_stay_where_they_are(tmp_path: Path, tiny_model: Path) -> None:
    workspace = open_workspace(tmp_path / "w")
    spec = make(tmp_path, tiny_model)
    run_federated(spec, workspace, transport=train_here)
    assert not (workspace.work / spec.key).exists()
    assert not list(workspace.path(spec.key).rglob("*.jsonl"))


def _spoil(who: str, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[..., Answer]:
    """A transport in which one client sends something else than it has learnt."""

    def transport(order: SftSpec, folder: Path) -> Answer:
        answer = train_here(order, folder)
        if folder.name == who:
            place = Path(answer["folder"]) / "adapter_model.safetensors"
            tensors = how(load_file(place))
            place.chmod(0o644)
            save_file(tensors, place)
        return answer

    return transport


def _not_a_number(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(one, float("nan")) for name, one in tensors.items()}


def _huge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one * 1e4 for name, one in tensors.items()}


def _other_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one[:-1] if "lora_A" in name else one for name, one in tensors.items()}


@pytest.mark.parametrize(
    ("how", "told"),
    [(_not_a_number, "holds NaN or Inf"), (_other_shape, "which do not multiply"), (_huge, "above the bound 5")],
)
def test_a_client_that_sends_what_would_spoil_the_mean_is_left_out(
    how: Callable[..., Any], told: str, tmp_path: Path, tiny_model: Path
) -> None:
    spec = make(tmp_path, tiny_model, exchanges=1, norm_bound=5.0)
    # Also when it is the first one: what is expected comes from the server's own model.
    facts = run(spec, tmp_path / "w", _spoil("berlin", how))
    assert told in facts["exchanges"][0]["refused"]["berlin"]
    assert facts["exchanges"][0]["weights"] == {"paris": 1.0}


def test_a_large_update_is_clipped_where_asked(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, exchanges=1, norm_bound=1e-3, too_large="clip")
    facts = run(spec, tmp_path / "w")
    assert set(facts["exchanges"][0]["clipped"]) == {"berlin", "paris"}
    assert facts["drift"]["to_start"] > 0


def test_a_client_that_does_not_return_is_left_out_and_none_is_an_error(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, exchanges=1)
    Path(spec.clients["paris"][0].path).unlink()
    facts = run(spec, tmp_path / "w")
    assert facts["exchanges"][0]["refused"]["paris"].startswith("did not return: ")
    Path(spec.clients["berlin"][0].path).unlink()
    with pytest.raises(TrainingError, match=r"exchange 1: no client has returned: berlin did not return"):
        run(spec, tmp_path / "again")


def test_no_usable_update_is_an_error(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(MergeError, match="no client has sent an update that may be used"):
        run(make(tmp_path, tiny_model, exchanges=1, norm_bound=1e-9), tmp_path / "w")


def test_clients_of_different_ranks_and_partial_participation(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, ranks={"paris": 2}, participation=0.5, exchanges=4)
    asked = [participants(spec, exchange) for exchange in range(4)]
    assert all(len(one) == 1 for one in asked)
    assert {name for one in asked for name in one} == {"berlin", "paris"}
    facts = run(spec, tmp_path / "w")
    assert [one["asked"] for one in facts["exchanges"]] == asked


def test_a_proximal_term_keeps_clients_nearer_to_what_they_got(tmp_path: Path, tiny_model: Path) -> None:
    norms = []
    for mu in (None, 100.0):
        facts = run(make(tmp_path, tiny_model, exchanges=1, proximal=mu, steps=6), tmp_path / "w")
        norms.append(facts["exchanges"][0]["norms"]["berlin"])
    assert "fedprox" in facts["methods"]
    assert norms[1] < 0.9 * norms[0]


def test_the_same_order_gives_the_same_bytes(tmp_path: Path, tiny_model: Path) -> None:
    spec, trees = make(tmp_path, tiny_model), []
    for name in ("one", "other"):
        workspace = open_workspace(tmp_path / name)
        run_federated(spec, workspace, transport=train_here)
        manifest = workspace.manifest(spec.key)
        assert manifest is not None
        trees.append(manifest.tree)
    assert trees[0] == trees[1]


@pytest.mark.slow
def test_clients_in_processes_of_their_own_learn_the_same(tmp_path: Path, tiny_model: Path) -> None:
    spec = make(tmp_path, tiny_model, exchanges=1)
    here, apart = run(spec, tmp_path / "here"), run(spec, tmp_path / "apart", train_in_process)
    assert here["exchanges"] == apart["exchanges"]
