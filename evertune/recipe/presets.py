"""Values that neither a stage nor `defaults` gives, and where each number comes from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydantic import BaseModel

from evertune.recipe.fields import Config, NoOptions, StageSettings
from evertune.recipe.merging import Merge
from evertune.recipe.schema import (
    Anchor,
    Answers,
    Demonstration,
    Distill,
    Dpo,
    Ema,
    External,
    Federated,
    GuardStop,
    Lora,
    Mix,
    Noise,
    OnPolicy,
    Protected,
    Recipe,
    Replay,
    Retrain,
    Rl,
    RolloutServer,
    Sft,
    Teacher,
    Training,
    Tune,
)


@dataclass(frozen=True)
class Preset:
    """One row of the table. Rates for `lora` and `full` apply by what is trained, those of `dpo` and `rl` there."""

    summary: str
    tune: Tune
    lora_lr: float
    full_lr: float
    dpo_lora_lr: float
    dpo_full_lr: float
    rl_lora_lr: float
    rl_full_lr: float
    epochs: float
    replay_share: float
    dpo_replay_ratio: float
    rl_replay_ratio: float
    anchor_kl: float


_LORA = Tune(lora=Lora(rank=16))
_FULL = Tune(full=NoOptions())

PRESETS = {
    "gentle": Preset(
        "the smallest change: half the learning rate, one epoch, more replay, a stronger anchor",
        _LORA, lora_lr=1e-4, full_lr=1e-5, dpo_lora_lr=1e-5, dpo_full_lr=5e-7, rl_lora_lr=1e-5, rl_full_lr=5e-7,
        epochs=1.0, replay_share=0.3, dpo_replay_ratio=0.3, rl_replay_ratio=0.3, anchor_kl=0.1,
    ),
    "balanced": Preset(
        "the recommendation: an adapter, two epochs, one replayed row in five",
        _LORA, lora_lr=2e-4, full_lr=2e-5, dpo_lora_lr=2e-5, dpo_full_lr=1e-6, rl_lora_lr=2e-5, rl_full_lr=1e-6,
        epochs=2.0, replay_share=0.2, dpo_replay_ratio=0.3, rl_replay_ratio=0.1, anchor_kl=0.05,
    ),
    "full": Preset(
        "as balanced, but every weight is trained: for skills that an adapter cannot hold",
        _FULL, lora_lr=2e-4, full_lr=2e-5, dpo_lora_lr=2e-5, dpo_full_lr=1e-6, rl_lora_lr=2e-5, rl_full_lr=1e-6,
        epochs=2.0, replay_share=0.2, dpo_replay_ratio=0.3, rl_replay_ratio=0.1, anchor_kl=0.05,
    ),
}  # fmt: skip

# Field of a preset -> where its numbers come from. docs/recipe.md prints this.
SOURCES = {
    "tune": "Rank 16 on all linear layers: the rank of Apple's shipped adapters (arXiv:2407.21075); alpha twice the "
    "rank. Low rank forgets less and learns less than full fine-tuning (arXiv:2405.09673).",
    "lora_lr": "About ten times the rate of full fine-tuning (Schulman et al. 2025, LoRA Without Regret).",
    "full_lr": "The lower half of 1e-5 to 5e-5, for models below 2B parameters: a heuristic. From 8B on use 5e-6 and "
    "less, as Tulu 3 (arXiv:2411.15124).",
    "dpo_lora_lr": "A tenth of the supervised rate: a heuristic; preferences need, and bear, far smaller steps.",
    "dpo_full_lr": "5e-7 is Tulu 3's (arXiv:2411.15124) and Zephyr's (arXiv:2310.16944), for 7B and 8B models; twice "
    "that for small ones: a heuristic. One epoch where none is given, as Tulu 3.",
    "rl_lora_lr": "About ten times the rate of full training (Schulman et al. 2025, LoRA Without Regret): a heuristic.",
    "rl_full_lr": "1e-6 is GRPO's (arXiv:2402.03300), for a 7B model; one epoch where none is given.",
    "epochs": "Two, as in Tulu 3 (arXiv:2411.15124), where longer did not help; one where little change is wanted.",
    "replay_share": "0.2 of the stream, to be swept over 0.05, 0.1, 0.2 and 0.3: a heuristic. That old data must come "
    "along is reported by Llama 2 (arXiv:2307.09288); the share is found by watching retention.",
    "dpo_replay_ratio": "Unweighed replay took three fifths of the gain, 0.3 of the norm a fifth, and kept "
    "most of what the stage would wear away: docs/results/erosion.md, one line of stages on a small model.",
    "rl_replay_ratio": "0.1 kept more of what a dpo stage before had made than 0.3 did: one seed of that "
    "measurement. An rl stage wears away less by itself than the others, where its KL and its protected skills hold.",
    "anchor_kl": "0.05 and 0.1: the weights used with supervised KL anchors (arXiv:2509.23753), there on new rows. A "
    "research method: validate it on your own probes.",
}


class Resolved:
    """A stage with every value given: the stage's, else the defaults', else the preset's."""

    @property
    def replay_sources(self) -> list[str]:
        """Names of what it replays, `history` among them; nothing where replay is off."""
        return []

    @property
    def references(self) -> dict[str, str]:
        """Checkpoints it names, by the place in its settings: `start`, `base`, `champion`, or a path."""
        return {}


@dataclass(frozen=True)
class ResolvedTraining(Resolved):
    """What stages that train here have in common.

    Exactly one of `epochs` and `steps` is a number. Replay share 0 and anchor kl 0 mean "off".
    """

    tune: Tune
    mix: Mix | None
    replay: Replay
    anchor: Anchor
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
    ema: Ema | None
    save_steps: int
    keep_steps: int | None
    guard_stop: GuardStop | None
    penalties: dict[str, Any]
    gradient_rules: dict[str, Any]

    @property
    def replay_sources(self) -> list[str]:
        return list(self.replay.sources) if self.replay.share else []

    @property
    def references(self) -> dict[str, str]:
        return {"anchor.to": self.anchor.to} if self.anchor.kl else {}


@dataclass(frozen=True)
class ResolvedSft(ResolvedTraining):
    """An sft stage."""

    objective: dict[str, Any]


@dataclass(frozen=True)
class ResolvedDpo(ResolvedTraining):
    """A dpo stage."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo"]
    beta: float
    label_smoothing: float
    nll: float
    reference: str
    replay_weight: float
    replay_ratio: float | None

    @property
    def references(self) -> dict[str, str]:
        return {**super().references, "reference": self.reference}


@dataclass(frozen=True)
class ResolvedRl(ResolvedTraining):
    """An rl stage."""

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
    kl_to: str
    replay_weight: float
    replay_ratio: float | None
    protect: dict[str, Protected]
    max_kl: float | None
    min_entropy: float | None
    server: RolloutServer | None

    @property
    def references(self) -> dict[str, str]:
        return {**super().references, **({"kl_to": self.kl_to} if self.kl else {})}


@dataclass(frozen=True)
class ResolvedDistill(ResolvedTraining):
    """A distill stage; every teacher's `sources` are given."""

    teachers: list[Teacher]
    route: Literal["sources", "best"]
    skills: dict[str, str]
    loss: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float
    temperature: float
    weight: float
    words: int | Literal["all"]
    compress: bool
    on_policy: OnPolicy | None
    answers: Answers | None
    demonstration: Demonstration | None

    @property
    def members(self) -> dict[str, int]:
        """At most how many teachers answer for a row of each source."""
        taught = [name for one in self.teachers for name in one.sources or []]
        return {name: 1 if self.route == "best" else taught.count(name) for name in dict.fromkeys(taught)}


@dataclass(frozen=True)
class ResolvedExternal(Resolved):
    """An external stage."""

    command: str
    data: list[str] | None
    files: list[str] | None
    hours: float


@dataclass(frozen=True)
class ResolvedFederated(Resolved):
    """A federated stage."""

    clients: dict[str, list[str]]
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
    noise: Noise | None
    epochs: float | None
    steps: int | None
    lr: float
    batch_rows: int
    micro_batch_rows: int
    max_tokens: int
    too_long: Literal["error", "drop"]


@dataclass(frozen=True)
class ResolvedMerge(Resolved):
    """A merge stage: its settings, which the merge's method completes.

    labels: of the recipe's stages, which it may name as models.
    """

    settings: Merge
    labels: frozenset[str] = frozenset()

    @property
    def references(self) -> dict[str, str]:
        not_paths = self.labels | {"origin"}
        named = {f"models.{name}.path": one.path for name, one in self.settings.models.items()}
        named = {place: written for place, written in named.items() if written not in not_paths}
        return named | ({"base": self.settings.base} if self.settings.base is not None else {})


def resolve_stage(recipe: Recipe, stage: StageSettings) -> Resolved:
    """Fill in what a stage leaves open."""
    return RESOLVERS[type(stage)](recipe, stage)


def resolve_sft(recipe: Recipe, stage: Sft) -> ResolvedSft:
    """Fill in what an sft stage leaves open."""
    preset = PRESETS[recipe.preset]
    rates = {"lora_lr": preset.lora_lr, "full_lr": preset.full_lr}
    return ResolvedSft(**_training(recipe, stage, **rates, epochs=preset.epochs), **_own(stage, ResolvedSft))


def resolve_dpo(recipe: Recipe, stage: Dpo) -> ResolvedDpo:
    """Fill in what a dpo stage leaves open."""
    preset = PRESETS[recipe.preset]
    rates = {"lora_lr": preset.dpo_lora_lr, "full_lr": preset.dpo_full_lr}
    own = _own(stage, ResolvedDpo) | _weighed(stage, preset.dpo_replay_ratio)
    return ResolvedDpo(**_training(recipe, stage, **rates, epochs=1.0), **own)


def resolve_rl(recipe: Recipe, stage: Rl) -> ResolvedRl:
    """Fill in what an rl stage leaves open."""
    preset = PRESETS[recipe.preset]
    rates = {"lora_lr": preset.rl_lora_lr, "full_lr": preset.rl_full_lr}
    own = _own(stage, ResolvedRl) | _weighed(stage, preset.rl_replay_ratio)
    return ResolvedRl(**_training(recipe, stage, **rates, epochs=1.0), **own)


def resolve_distill(recipe: Recipe, stage: Distill) -> ResolvedDistill:
    """Fill in what a distill stage leaves open."""
    preset = PRESETS[recipe.preset]
    sources = list(stage.data)
    own = (
        "route",
        "loss",
        "beta",
        "temperature",
        "weight",
        "words",
        "compress",
        "on_policy",
        "answers",
        "demonstration",
    )
    return ResolvedDistill(
        **_training(recipe, stage, lora_lr=preset.lora_lr, full_lr=preset.full_lr, epochs=preset.epochs),
        **{name: getattr(stage, name) for name in own},
        teachers=[one.model_copy(update={"sources": one.sources or sources}) for one in stage.teachers],
        skills={name: stage.skill(name) for name in sources} if stage.route == "best" else {},
    )


def resolve_external(recipe: Recipe, stage: External) -> ResolvedExternal:
    """An external stage leaves nothing open."""
    return ResolvedExternal(stage.command, stage.data, stage.files, stage.hours)


def resolve_federated(recipe: Recipe, stage: Federated) -> ResolvedFederated:
    """Fill in what a federated stage leaves open: one pass over a client's rows, the preset's rate for adapters."""
    given = {field.name: getattr(stage, field.name) for field in fields(ResolvedFederated)}
    is_timed = stage.epochs is not None or stage.steps is not None
    return ResolvedFederated(
        **{
            **given,
            "epochs": stage.epochs if is_timed else 1.0,
            "lr": stage.lr if stage.lr is not None else PRESETS[recipe.preset].lora_lr,
        }
    )


def resolve_merge(recipe: Recipe, stage: Merge) -> ResolvedMerge:
    """A merge stage keeps a float32 master where no dtype is given."""
    labels = frozenset(f"{one.name}/{i + 1}-{each.kind}" for one in recipe.rounds for i, each in enumerate(one.stages))
    return ResolvedMerge(stage if stage.dtype else stage.model_copy(update={"dtype": "float32"}), labels)


RESOLVERS: dict[type[StageSettings], Callable[[Recipe, Any], Resolved]] = {
    Sft: resolve_sft,
    Retrain: resolve_sft,
    Dpo: resolve_dpo,
    Rl: resolve_rl,
    Distill: resolve_distill,
    External: resolve_external,
    Merge: resolve_merge,
    Federated: resolve_federated,
}


def resolve_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values with nothing left open. It is itself a recipe, and resolves to itself."""
    body = recipe.model_dump(mode="json", by_alias=True)
    for source in body["data"].values():
        if source["verifier"] is None:
            del source["verifier"]
    for one, written in zip(recipe.rounds, body["rounds"], strict=True):
        for stage, inner in zip(one.stages, written["stages"], strict=True):
            resolved: Any = resolve_stage(recipe, stage.settings)
            if isinstance(resolved, ResolvedMerge):
                inner[stage.kind] = resolved.settings.model_dump(mode="json", by_alias=True)
                continue
            inner[stage.kind] |= {name: _plain(value) for name, value in asdict(resolved).items()}
        for j, way in enumerate(one.ways):
            if isinstance(way.settings, Training):
                filled: Any = resolve_stage(recipe, way.settings)
                inner = written["consolidate"]["best_of"][j][way.kind]
                inner |= {name: _plain(value) for name, value in asdict(filled).items()}
    return body


def _own(stage: Training, kind: type[ResolvedTraining]) -> dict[str, Any]:
    """The fields that this kind of stage has beside those of every trained one, as they are given."""
    shared = {field.name for field in fields(ResolvedTraining)}
    return {field.name: getattr(stage, field.name) for field in fields(kind) if field.name not in shared}


def _weighed(stage: Dpo | Rl, ratio: float) -> dict[str, float | None]:
    """How replayed rows are weighed: by the preset's ratio, where the stage says neither a ratio nor a weight."""
    is_given = {"replay_ratio", "replay_weight"} & stage.model_fields_set
    return {"replay_ratio": stage.replay_ratio if is_given else ratio}


def _training(recipe: Recipe, stage: Training, *, lora_lr: float, full_lr: float, epochs: float) -> dict[str, Any]:
    """The fields of `ResolvedTraining`.

    `tune`, `lr` and `epochs` are taken whole. `replay` and `anchor` are filled field by field, so that
    `replay: {share: 0.3}` in a stage keeps the sources of `defaults.replay`.
    """
    preset, defaults = PRESETS[recipe.preset], recipe.defaults
    tune = stage.tune or defaults.tune or preset.tune
    is_timed = stage.epochs is not None or stage.steps is not None
    given = {field.name: getattr(stage, field.name) for field in fields(ResolvedTraining)}
    return {
        **given,
        "tune": tune,
        "replay": Replay.model_validate(_layered({"share": preset.replay_share}, defaults.replay, stage.replay)),
        "anchor": Anchor.model_validate(_layered({"kl": preset.anchor_kl}, defaults.anchor, stage.anchor)),
        "lr": stage.lr if stage.lr is not None else (lora_lr if tune.lora else full_lr),
        "epochs": stage.epochs if is_timed else epochs,
    }


def _layered(values: dict[str, Any], *layers: Config | None) -> dict[str, Any]:
    """The values, under what each layer says explicitly."""
    for layer in layers:
        if layer is not None:
            values = {**values, **{name: getattr(layer, name) for name in layer.model_fields_set}}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
