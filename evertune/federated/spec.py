"""The order for one federated stage, and for one client's training in it: plain values. Imports no torch."""

from dataclasses import dataclass, fields
from typing import Any

from evertune.hashing import digest_json
from evertune.model.checkpoint import Checkpoint
from evertune.train.spec import PluginSpec, RowsRef, SftSpec

# What the ledger shows of a federated stage's settings.
SETTINGS = (
    "exchanges", "aggregate", "rank", "ranks", "participation", "weigh", "proximal", "norm_bound", "too_large", "trim",
    "noise", "late", "secure", "lr", "epochs", "steps", "batch_rows", "micro_batch_rows", "max_tokens", "too_long",
    "seed", "dtype", "device",
)  # fmt: skip


@dataclass(frozen=True)
class FederatedSpec:
    """Everything a federated stage needs. Meanings and ranges: the recipe's `federated`.

    `late` and `secure` are of rounds over a network, and in a server's file (flower/files.py): the power by which a
    late update's weight falls, None where it is refused; and the range of B's entries in a secure sum, None without.
    """

    key: str
    label: str
    start: Checkpoint
    base: Checkpoint
    clients: dict[str, list[RowsRef]]
    exchanges: int
    aggregate: str
    rank: int
    ranks: dict[str, int]
    participation: float
    weigh: str
    proximal: float | None
    norm_bound: float | None
    too_large: str
    trim: float
    noise: dict[str, float] | None
    lr: float
    epochs: float | None
    steps: int | None
    batch_rows: int
    micro_batch_rows: int
    max_tokens: int
    too_long: str
    seed: int
    dtype: str
    device: str
    threads: int | None
    late: float | None = None
    secure: float | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        clients = {name: [ref.to_json() for ref in refs] for name, refs in self.clients.items()}
        return {**plain, "start": self.start.to_json(), "base": self.base.to_json(), "clients": clients}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "FederatedSpec":
        clients = {name: [RowsRef.from_json(ref) for ref in refs] for name, refs in value["clients"].items()}
        ends = {name: Checkpoint.from_json(value[name]) for name in ("start", "base")}
        return cls(**{**value, **ends, "clients": clients})

    def settings(self) -> dict[str, Any]:
        """What a reader of the ledger wants to see: no paths."""
        return {name: getattr(self, name) for name in SETTINGS}

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        clients = {name: [[ref.source, ref.digest] for ref in refs] for name, refs in self.clients.items()}
        ends = {"start": self.start.digest, "base": self.base.digest}
        return {**self.settings(), **ends, "clients": clients}

    def rank_of(self, client: str) -> int:
        """The rank of a client's update."""
        return self.ranks.get(client, self.rank)


def client_order(spec: FederatedSpec, client: str, exchange: int, start: Checkpoint) -> SftSpec:
    """One client's training: a new adapter over the model that all clients got, on the client's own rows.

    All clients draw the adapter's A from the same seed, as if the server had sent it.
    """
    rank = spec.rank_of(client)
    plugins = []
    if spec.proximal is not None:
        make = "evertune.academic.quadratic:make_l2sp"
        plugins.append(_plugin("penalties", "proximal", "fedprox", make, {"weight": spec.proximal}))
    if spec.aggregate == "ffa":
        plugins.append(_plugin("gradient_rules", "frozen_a", "ffa_lora", "evertune.federated.client:make_frozen_a", {}))
    values: dict[str, Any] = {
        "label": f"{spec.label}/{client}/{exchange + 1}",
        "start": start,
        "base": spec.base,
        "new": spec.clients[client],
        "weights": None,
        "mix": None,
        "replay": [],
        "share": 0.0,
        "dedup": False,
        "tune": {"lora": {"rank": rank, "dropout": 0.0, "targets": "all-linear"}},
        "lr": spec.lr,
        "epochs": spec.epochs,
        "steps": spec.steps,
        "schedule": "constant",
        "warmup": 0.0,
        "batch_rows": spec.batch_rows,
        "micro_batch_rows": spec.micro_batch_rows,
        "max_tokens": spec.max_tokens,
        "too_long": spec.too_long,
        "weight_decay": 0.0,
        "clip": 1.0,
        "gradient_checkpointing": False,
        "ema_decay": None,
        "save_steps": 1_000_000,
        "anchor": None,
        "plugins": plugins,
        "seed": int(digest_json([spec.seed, exchange])[:7], 16),
        "dtype": spec.dtype,
        "device": spec.device,
        "threads": spec.threads,
        "track": [],
    }
    key = digest_json({"client": client, "exchange": exchange, "stage": spec.identity(), "start": start.digest})
    return SftSpec(key=key, **values)


def _plugin(kind: Any, name: str, method: str, make: str, options: dict[str, Any]) -> PluginSpec:
    return PluginSpec(
        kind=kind,
        name=name,
        method=method,
        make=make,
        version=1,
        options=options,
        memory=[],
        carried=None,
        carried_digest=None,
    )
