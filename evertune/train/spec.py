"""The orders for trained stages: plain values, written as JSON for the child process that trains. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

from evertune.model.checkpoint import Checkpoint, is_stored_wide

# Settings that a result depends on and that a reader of the ledger wants to see.
_SETTINGS = (
    "tune",
    "lr",
    "epochs",
    "steps",
    "schedule",
    "warmup",
    "batch_rows",
    "micro_batch_rows",
    "max_tokens",
    "too_long",
    "weight_decay",
    "clip",
    "gradient_checkpointing",
    "ema_decay",
    "dedup",
    "seed",
    "dtype",
    "device",
)


# Folder of a checkpoint in which plug-ins leave what the next stage's go on from.
CARRIED = "carried"


@dataclass(frozen=True)
class RowsRef:
    """Where one source's rows are, the digest of their bytes, and what was removed from them before (see
    `data/cleaned.py`)."""

    source: str
    path: str
    format: str
    limit: int | None
    digest: str
    removed: dict[str, Any] = field(default_factory=lambda: {"leaks": {}, "bad": 0})

    def to_json(self) -> dict[str, Any]:
        return _plain_fields(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RowsRef":
        return cls(**value)


@dataclass(frozen=True)
class AnchorSpec:
    """The KL anchor: weight per token, anchored rows, direction, and where the reference's outputs come from."""

    kl: float
    on: Literal["replay", "new", "both"]
    direction: Literal["forward", "reverse"]
    cache: Literal["off", "hidden", "top64"]
    reference: Checkpoint

    def to_json(self) -> dict[str, Any]:
        return {**_plain_fields(self), "reference": self.reference.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "AnchorSpec":
        return cls(**{**value, "reference": Checkpoint.from_json(value["reference"])})


@dataclass(frozen=True)
class AdaptSpec:
    """A share of replay that rises when a guard falls.

    Attributes:
        every: steps between two askings.
        guards: by name, `{"margin", "lower", "digest"}`: how far it may fall, in points, or relative where lower is
            better; and the identity of its items.
        probes: what is needed to load each guard.
    """

    every: int
    raise_by: float
    most: float
    guards: dict[str, dict[str, Any]]
    probes: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return _plain_fields(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "AdaptSpec":
        return cls(**value)


@dataclass(frozen=True)
class GuardStopSpec:
    """A stage that ends when a guard has fallen; `every`, `guards` and `probes` as in `AdaptSpec`."""

    every: int
    guards: dict[str, dict[str, Any]]
    probes: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return _plain_fields(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "GuardStopSpec":
        return cls(**value)


@dataclass(frozen=True)
class PluginSpec:
    """A penalty, gradient rule or objective from another package: what it is, remembers, and goes on from.

    Attributes:
        kind: `penalties`, `gradient_rules` or `objective`.
        method: id in the table of methods.
        make: `module:function` that makes it.
        options: its options, plain.
        memory: rows that it remembers; each is one earlier task.
        carried: file in which the stage before left this plug-in's own state; None where there is none.
    """

    kind: Literal["penalties", "gradient_rules", "objective"]
    name: str
    method: str
    make: str
    version: int
    options: dict[str, Any]
    memory: list[RowsRef]
    carried: str | None
    carried_digest: str | None

    def to_json(self) -> dict[str, Any]:
        return {**_plain_fields(self), "memory": [ref.to_json() for ref in self.memory]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PluginSpec":
        return cls(**{**value, "memory": [RowsRef.from_json(ref) for ref in value["memory"]]})

    def identity(self) -> dict[str, Any]:
        """What a result depends on: no paths."""
        memory = [[ref.source, ref.digest] for ref in self.memory]
        return {**_plain_fields(self), "make": None, "memory": memory, "carried": None}


@dataclass(frozen=True)
class TrainingSpec:
    """What every trained stage needs. Meanings and ranges of the settings: the recipe's stages.

    `key` names the object it publishes, `label` the stage for people. `weights` are shares of the new rows by source,
    `share` the replayed share of the stream; exactly one of `epochs` and `steps` is given. `folder` is the recipe's,
    where the modules of verifiers are looked for. `fsdp` shards the model over the processes of the stage.
    """

    key: str
    label: str
    start: Checkpoint
    base: Checkpoint
    new: list[RowsRef]
    weights: dict[str, float] | None
    mix: dict[str, Any] | None = field(default=None, kw_only=True)
    folder: str = field(default="", kw_only=True)
    keep_steps: int | None = field(default=None, kw_only=True)
    fsdp: bool = field(default=False, kw_only=True)
    kernels: Literal["torch", "liger"] = field(default="torch", kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    replay: list[RowsRef]
    share: float
    adapt: AdaptSpec | None = field(default=None, kw_only=True)
    guard_stop: GuardStopSpec | None = field(default=None, kw_only=True)
    dedup: bool | Literal["near"]
    tune: dict[str, Any]
    lr: float
    epochs: float | None
    steps: int | None
    schedule: Literal["linear", "cosine", "constant"]
    warmup: float
    batch_rows: int
    micro_batch_rows: int
    max_tokens: int
    too_long: Literal["error", "drop"]
    weight_decay: float
    clip: float | None
    gradient_checkpointing: bool
    ema_decay: float | None
    save_steps: int
    anchor: AnchorSpec | None
    plugins: list[PluginSpec]
    seed: int
    dtype: Literal["bfloat16", "float32"]
    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    track: list[str]

    kind: ClassVar[str]
    own_settings: ClassVar[tuple[str, ...]] = ()

    @property
    def is_lora(self) -> bool:
        return "lora" in self.tune

    @property
    def keeps_master(self) -> bool:
        """Whether every weight is trained in bfloat16 from a start that is stored in float32, such as a merge's master.
        It trains on from the stored numbers then, and stores as wide ones: rounding must not add up over rounds."""
        return not self.is_lora and self.dtype == "bfloat16" and is_stored_wide(self.start)

    def to_json(self) -> dict[str, Any]:
        return {
            **_plain_fields(self),
            "start": self.start.to_json(),
            "base": self.base.to_json(),
            "new": [ref.to_json() for ref in self.new],
            "replay": [ref.to_json() for ref in self.replay],
            "anchor": self.anchor.to_json() if self.anchor else None,
            "adapt": self.adapt.to_json() if self.adapt else None,
            "guard_stop": self.guard_stop.to_json() if self.guard_stop else None,
            "plugins": [one.to_json() for one in self.plugins],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(
            **{
                **value,
                "start": Checkpoint.from_json(value["start"]),
                "base": Checkpoint.from_json(value["base"]),
                "new": [RowsRef.from_json(ref) for ref in value["new"]],
                "replay": [RowsRef.from_json(ref) for ref in value["replay"]],
                "anchor": AnchorSpec.from_json(value["anchor"]) if value["anchor"] else None,
                "adapt": AdaptSpec.from_json(value["adapt"]) if value.get("adapt") else None,
                "guard_stop": GuardStopSpec.from_json(value["guard_stop"]) if value.get("guard_stop") else None,
                "plugins": [PluginSpec.from_json(one) for one in value["plugins"]],
            }
        )

    def settings(self) -> dict[str, Any]:
        """The settings as the ledger keeps them: no paths, nothing that a result does not depend on."""
        return {name: getattr(self, name) for name in (*self.own_settings, *_SETTINGS)}


@dataclass(frozen=True)
class SftSpec(TrainingSpec):
    """A supervised stage."""

    kind: ClassVar[str] = "sft"


@dataclass(frozen=True)
class DpoSpec(TrainingSpec):
    """A preference stage; `reference` is what the log-probabilities are compared with."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo"]
    beta: float
    label_smoothing: float
    nll: float
    replay_weight: float
    replay_ratio: float | None
    reference: Checkpoint

    kind: ClassVar[str] = "dpo"
    own_settings: ClassVar[tuple[str, ...]] = (
        "loss",
        "beta",
        "label_smoothing",
        "nll",
        "replay_weight",
        "replay_ratio",
    )

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "reference": self.reference.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return super().from_json({**value, "reference": Checkpoint.from_json(value["reference"])})


@dataclass(frozen=True)
class RlSpec(TrainingSpec):
    """A stage with verifiable rewards.

    `verifiers` has one for each source of new rows, as a recipe writes it. `rollout_steps` steps of prompts are
    answered at once and passed over `iterations` times; `steps` counts optimizer steps; `max_steps` bounds the turns of
    an episode. `protect` has `at_least`, `rate` and `most` for each protected source; `server` is where rollouts are
    made, None for here.
    """

    verifiers: dict[str, dict[str, Any]]
    group: int
    max_new_tokens: int
    max_steps: int
    temperature: float
    rollout_steps: int
    iterations: int
    scale: bool
    average: Literal["answers", "tokens", "constant"]
    ratio: Literal["token", "sequence"]
    clip_low: float
    clip_high: float
    kl: float
    kl_to: Checkpoint
    replay_weight: float
    replay_ratio: float | None
    protect: dict[str, dict[str, float]]
    max_kl: float | None
    min_entropy: float | None
    server: dict[str, Any] | None

    kind: ClassVar[str] = "rl"
    own_settings: ClassVar[tuple[str, ...]] = (
        "verifiers",
        "group",
        "max_new_tokens",
        "max_steps",
        "temperature",
        "rollout_steps",
        "iterations",
        "scale",
        "average",
        "ratio",
        "clip_low",
        "clip_high",
        "kl",
        "replay_weight",
        "replay_ratio",
        "protect",
        "max_kl",
        "min_entropy",
    )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "server": self.server["model"] if self.server else None}

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "kl_to": self.kl_to.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return super().from_json({**value, "kl_to": Checkpoint.from_json(value["kl_to"])})


def _plain_fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
