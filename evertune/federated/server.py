"""A federated stage: the model goes to clients, updates come back, are checked, made one, and go out again.

Each exchange trains a new adapter over the model as it stands, as every stage of Evertune does; the papers keep one
pair of factors going. What the rules say about one aggregation is the same, and no frozen weight is ever written to: a
residual is part of the adapter. In the end the exchanges' updates are one adapter over the start.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from evertune.errors import EvertuneError, TrainingError
from evertune.federated.aggregation import aggregate, aggregation_error, shares, truncated
from evertune.federated.client import Answer, Transport, train_in_process
from evertune.federated.privacy import epsilon, private_mean
from evertune.federated.returns import Ask, AskSum, Late, Returns, staleness_discount
from evertune.federated.spec import FederatedSpec, client_order
from evertune.federated.validation import Checked, Shapes, check_update
from evertune.methods import standing_of
from evertune.model.adapter import Factors, concatenate, read_factors, target_shapes, write_adapter
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.train.distance import drift_or_none
from evertune.train.spec import SftSpec
from evertune.workspace import Workspace

# Recipe word -> row in the table of methods.
METHODS = {
    "fedavg": "fedavg_lora",
    "fedex": "fedex_lora",
    "fed_talora": "fed_talora",
    "ffa": "ffa_lora",
    "flora": "flora_stack",
    "flexlora": "flexlora",
    "median": "robust_mean",
    "trimmed_mean": "robust_mean",
}


@dataclass(frozen=True)
class Exchange:
    """What happened in one exchange; lists are by client, in the order of the recipe. A late update stands behind them,
    as `client, exchange 1`.

    Attributes:
        weights: of each update that was used.
        norms: of each update that came, before clipping; None where it could not be formed, or was not seen.
        refused: why an update was not used; clipped: why it was scaled down.
        error: distance of the aggregate from the mean of the products, relative to that mean; None of a secure sum.
        energy: share of the squared norm that the rule's cut to a rank keeps.
        late: how many exchanges late an update came that was used.
        secure: only the sum of the updates was seen.
    """

    asked: list[str]
    weights: dict[str, float]
    norms: dict[str, float | None]
    losses: dict[str, float]
    refused: dict[str, str]
    clipped: dict[str, str]
    error: float | None
    energy: float
    late: dict[str, int] = field(default_factory=dict)
    secure: bool = False


def run_federated(
    spec: FederatedSpec,
    workspace: Workspace,
    *,
    transport: Transport = train_in_process,
    ask: Ask | None = None,
    ask_sum: AskSum | None = None,
    tell: Callable[[int, Exchange], None] = lambda number, exchange: None,
) -> dict[str, Any]:
    """Perform a federated stage, or what is missing of it, and publish its adapter under `spec.key`.

    Args:
        transport: trains one client; in a process of its own when not given.
        ask: asks all clients of an exchange, instead of one after the other by `transport`.
        ask_sum: of a federation with `secure`: asks all of them for the mean of their updates.
        tell: called after each exchange, with its number from 1.

    Raises:
        MergeError: no update may be used, or the updates do not fit the rule.
        TrainingError: no client has returned.
    """
    began = time.monotonic()
    spent = epsilon(spec.noise["multiplier"], spec.exchanges, spec.noise["delta"]) if spec.noise else None
    folder = workspace.work / spec.key
    # What the server asks for, by its own model: not by what a client says.
    shapes = target_shapes(open_model(spec.start, dtype=spec.dtype).model, "all-linear")
    current, made, told = spec.start, [], []
    for exchange in range(spec.exchanges):
        if spec.secure is not None:
            assert ask_sum is not None, "only a transport that adds up in secret can be asked for a sum"
            factors, facts = _summed_exchange(spec, exchange, current, folder, shapes, ask_sum)
        else:
            factors, facts = _exchange(spec, exchange, current, folder, shapes, ask or _one_by_one(transport))
        made.append(factors)
        told.append(facts)
        tell(exchange + 1, facts)
        place = folder / f"global-{exchange + 1}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_adapter(factors, place, current)
        current = describe(place)
    volatile = {"time": time.time(), "seconds": time.monotonic() - began}
    _publish(spec, workspace, _as_one(made), told, volatile, spent)
    shutil.rmtree(folder, ignore_errors=True)
    manifest = workspace.manifest(spec.key)
    assert manifest is not None, "published and yet not there"
    return {name: manifest.record[name] for name in ("checkpoint", "volatile")}


def participants(spec: FederatedSpec, exchange: int) -> list[str]:
    """The clients of an exchange: at least one, drawn by the seed, in the recipe's order."""
    names = list(spec.clients)
    count = max(1, math.ceil(spec.participation * len(names) - 1e-9))
    ranked = sorted(names, key=lambda name: sha256(f"{spec.seed}/{exchange}/{name}".encode()).digest())
    return [name for name in names if name in ranked[:count]]


def _one_by_one(transport: Transport) -> Ask:
    def ask(_: int, orders: Mapping[str, SftSpec], folder: Path) -> Returns:
        return Returns({name: transport(order, folder / name) for name, order in orders.items()})

    return ask


def _exchange(
    spec: FederatedSpec, exchange: int, current: Checkpoint, folder: Path, shapes: Shapes, ask: Ask
) -> tuple[Factors, Exchange]:
    """Ask the participants, check what comes back, and make it one update."""
    asked = participants(spec, exchange)
    returns = ask(exchange, {name: client_order(spec, name, exchange, current) for name in asked}, folder / "clients")
    late = {late_name(one): one for one in returns.late if "error" not in one.answer}
    answers = {**returns.answers, **{name: one.answer for name, one in late.items()}}
    refused = {name: f"did not return: {one['error']}" for name, one in answers.items() if "error" in one}
    if spec.late is None:
        refused |= {name: f"came {_behind(one, exchange)} late" for name, one in late.items()}
    sent: dict[str, Factors] = {}
    for name in [one for one in answers if one not in refused]:
        try:
            sent[name] = read_factors(Path(answers[name]["folder"]))
        except (EvertuneError, SafetensorError, OSError) as error:
            refused[name] = f"sent no sound adapter: {error}"
    if refused and not sent:
        reasons = "; ".join(f"{name} {reason}" for name, reason in refused.items())
        raise TrainingError(f"{spec.label}, exchange {exchange + 1}: no client has returned: {reasons}")
    checked = {
        name: _checked(spec, factors, shapes, late[name].client if name in late else name)
        for name, factors in sent.items()
    }
    used = {name: one.factors for name, one in checked.items() if one.factors is not None}
    refused |= {name: one.reason for name, one in checked.items() if one.factors is None}
    behind = {name: exchange - late[name].exchange for name in used if name in late}
    weights = shares([_weight(spec, answers[name], behind.get(name, 0)) for name in used]) if used else []
    if spec.noise and used:
        assert spec.norm_bound is not None, "checked with the recipe"
        found = private_mean(
            list(used.values()), bound=spec.norm_bound, multiplier=spec.noise["multiplier"], asked=len(asked)
        )
    else:
        found = aggregate(spec.aggregate, list(used.values()), weights, rank=spec.rank, trim=spec.trim)  # type: ignore[arg-type]
    return found.factors, Exchange(
        asked=asked,
        weights=dict(zip(used, weights, strict=True)),
        norms={name: None if math.isnan(one.norm) else one.norm for name, one in checked.items()},
        losses={name: one["loss"] for name, one in answers.items() if "error" not in one and name not in late},
        refused=refused,
        clipped={name: one.reason for name, one in checked.items() if one.factors is not None and one.reason},
        error=aggregation_error(found.factors, list(used.values()), weights),
        energy=found.energy,
        late=behind,
    )


def late_name(late: Late) -> str:
    """How a late update is called: it may stand beside a newer one of its client."""
    return f"{late.client}, exchange {late.exchange + 1}"


def _behind(late: Late, exchange: int) -> str:
    count = exchange - late.exchange
    return f"{count} exchange{'s' if count > 1 else ''}"


def _weight(spec: FederatedSpec, answer: Answer, exchanges_late: int) -> float:
    whole = float(answer["rows"]) if spec.weigh == "rows" else 1.0
    return whole * (staleness_discount(exchanges_late, spec.late) if spec.late is not None else 1.0)


def _checked(spec: FederatedSpec, factors: Factors, shapes: Shapes, client: str) -> Checked:
    return check_update(
        factors,
        shapes=shapes,
        max_rank=spec.rank_of(client),
        # With noise it is B that is bounded, where the noise is added.
        norm_bound=None if spec.noise else spec.norm_bound,
        clip=spec.too_large == "clip",
    )


def _summed_exchange(
    spec: FederatedSpec, exchange: int, current: Checkpoint, folder: Path, shapes: Shapes, ask: AskSum
) -> tuple[Factors, Exchange]:
    """Ask the participants for the mean of their updates, and check that: of no client's own is anything known."""
    asked = participants(spec, exchange)
    found = ask(exchange, {name: client_order(spec, name, exchange, current) for name in asked}, folder / "clients")
    place = f"{spec.label}, exchange {exchange + 1}"
    try:
        mean = read_factors(found.folder)
    except (EvertuneError, SafetensorError, OSError) as error:
        raise TrainingError(f"{place}: the sum of the updates is no sound adapter: {error}") from error
    checked = _checked(spec, mean, shapes, asked[0])
    if checked.factors is None:
        raise TrainingError(
            f"{place}: the mean of the updates of {', '.join(found.clients)} may not be used: {checked.reason}.",
            remedy="One of them has sent something odd, and a secure sum does not say which.",
        )
    return checked.factors, Exchange(
        asked=asked,
        weights={name: 1.0 / len(found.clients) for name in found.clients},
        norms=dict.fromkeys(found.clients),
        losses=dict(found.losses),
        refused=dict(found.missing),
        clipped={"the mean": checked.reason} if checked.reason else {},
        error=None,
        energy=1.0,
        secure=True,
    )


def _as_one(made: Sequence[Factors]) -> Factors:
    """All exchanges' updates as one adapter; of no higher rank than its matrices have."""
    whole = concatenate(made)
    full = {name for name, one in whole.items() if one.rank > min(one.a_RI.shape[1], one.b_OR.shape[0])}
    cut = truncated({name: whole[name] for name in full}, max((one.rank for one in whole.values()), default=0)).factors
    return {name: cut.get(name, replace(one)) for name, one in whole.items()}


def _publish(
    spec: FederatedSpec,
    workspace: Workspace,
    factors: Factors,
    told: Sequence[Exchange],
    volatile: dict[str, Any],
    spent: float | None,
) -> None:
    def write(folder: Path) -> dict[str, Any]:
        write_adapter(factors, folder, spec.start)
        checkpoint = describe(folder)
        opened = open_model(checkpoint, dtype=spec.dtype)
        methods = ["lora", METHODS[spec.aggregate], *(["fedprox"] if spec.proximal is not None else [])]
        methods += ["dp_fedavg"] if spec.noise else []
        losses = [[i + 1, sum(one.losses.values()) / len(one.losses)] for i, one in enumerate(told) if one.losses]
        facts = {
            "label": spec.label,
            "stage": "federated",
            "standing": standing_of(methods),
            "methods": methods,
            "form": "adapter",
            "stands_on": spec.start.digest,
            "start": spec.start.digest,
            "settings": spec.settings(),
            # Rows stay with their clients; what is known here is whose they are.
            "data": [
                {"source": f"{client}/{ref.source}", "sha256": ref.digest, "rows": 0, "dropped_long": 0, "tokens": 0}
                for client, refs in spec.clients.items()
                for ref in refs
            ],
            "replay": None,
            "anchor": None,
            "steps": spec.exchanges,
            "new_rows": 0,
            "replay_rows": 0,
            "tokens": 0,
            "counted_tokens": 0,
            "losses": losses,
            "final": {"loss": losses[-1][1]} if losses else {},
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "drift": drift_or_none(opened, start=spec.start, base=spec.base),
            "interference": None,
            "exchanges": [asdict(one) for one in told],
        }
        if spec.noise and spent is not None:
            facts["privacy"] = {"epsilon": spent, "delta": spec.noise["delta"], "unit": "client"}
        return {"checkpoint": facts, "volatile": volatile}

    workspace.publish(kind="checkpoint", key=spec.key, record={}, write=write)
