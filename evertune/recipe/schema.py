"""The recipe: a tree of small frozen models, checked in full before any weight is loaded.

A field is here only when code reads it. `None` means "not asked for": the preset or the stage decides. YAML and
Python build the same objects; `problems.py` adds file, line and "did you mean" to what goes wrong here. What the models
are made of is in `fields.py`, a merge in `merging.py`.
"""

import shlex
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from evertune.methods import Method, methods, named
from evertune.recipe.fields import (
    REPLAYABLE,
    Config,
    Name,
    Names,
    NonNegative,
    NoOptions,
    OneKey,
    PlaceText,
    Points,
    Positive,
    RowFormat,
    Share,
    StageSettings,
)
from evertune.recipe.merging import Merge
from evertune.recipe.plugins import Kind, check_options, find_plugin

# Checkpoints that a setting may name by a word; anything else is a path.
NAMED_REFERENCES = ("start", "sft", "base", "champion")
# What a teacher may be beside those: `round:NAME`, `stage:KIND` or `stage:LABEL`, and every checkpoint of the run.
OF_ROUND, OF_STAGE, RUN = "round:", "stage:", "run"
# Words for several sources at once, where a round is consolidated: what it learns from, and the rounds before it too.
OWN_SOURCES, ALL_SOURCES = "round", "rounds"
RESERVED = {
    "history": "the rows of promoted rounds",
    OWN_SOURCES: "the sources of a round, where it is consolidated",
    ALL_SOURCES: "those of a round and of all before it",
}


class DataSource(Config):
    """Training rows: JSONL or Parquet, one file or a glob."""

    path: PlaceText
    """File or glob, relative to the recipe: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet` or `.arrow`; or
    `datasets:NAME` or `datasets:NAME:SPLIT` for what the `datasets` library keeps."""
    format: RowFormat = "messages"
    """Shape of a row: `{"messages"}`, `{"prompt","chosen","rejected"}`, `{"prompt"|"messages","answer"}`,
    `{"prompt","choices","answer"}`, `{"text"}`, or for `episode` a task of docs/agents.md. An sft stage reads
    `messages` and `text`."""
    limit: int | None = Field(None, gt=0)
    """Use only the first rows of the source, in file order."""
    bad_rows: Literal["error", "quarantine"] = "error"
    """A row that cannot be read or has the wrong shape stops the run, or is left out, counted and kept with the reason.
    """
    keep: list[str] = []
    """Quality rules: `words>=3`, `repetition<=0.3`, with a quantile of the source `words<=q0.99`; `defaults` stands for
    the default rules. A row that breaks one is left out, counted and kept with the rule. `evertune data filter
    --signals` lists the signals."""
    verifier: "Verifier | None" = None
    """How answers to the source's questions are checked, where an rl stage learns from it."""


class Verifier(OneKey):
    """How a generated answer is checked: exactly one key."""

    bare_names = ("exact", "contains", "math", "refusal", "ifeval", "python", "tool_call")
    noun = "a verifier"

    exact: NoOptions | None = None
    """The answer equals the item's `answer` after trimming white space."""
    contains: NoOptions | None = None
    """The item's `answer` occurs in the output."""
    math: NoOptions | None = None
    """The final number or expression equals the item's `answer` (math-verify)."""
    refusal: NoOptions | None = None
    """The output refuses where the item's `answer` is `refuse`, and does not where it is `comply`; by words, in
    English."""
    ifeval: NoOptions | None = None
    """The output meets every constraint of the item's `answer`, `{"instruction_id_list", "kwargs"}` (IFEval,
    arXiv:2311.07911)."""
    python: NoOptions | None = None
    """The output's program passes the tests of the item's `answer`, `{"tests": [assert statements], "setup"}`, in a
    sandbox. Linux only; without confinement nothing is run."""
    tool_call: NoOptions | None = None
    """The output makes the tool calls that the item's `answer` makes, with the same arguments; where that makes none,
    the output says the same text (docs/agents.md)."""
    regex: str | None = None
    """A pattern that must match the whole trimmed output. The item's `answer` is not read."""
    json_schema: dict[str, Any] | None = None
    """A JSON Schema the output must satisfy; when the item has an `answer` object, it must equal it too."""
    classifier: "Classifier | None" = None
    """A text classifier puts the output into the class that the item's `answer` names."""
    function: "OwnFunction | None" = None
    """A function of your own, `module:function`: called with the output and the item's `answer`, it returns a number
    from 0 to 1 or a truth value."""
    parts: "Annotated[dict[Name, VerifierPart], Field(min_length=1)] | None" = None
    """Several verifiers of the same answer, by name. The score is their weighted mean; in an rl stage the score of each
    part is logged."""


class OwnFunction(Config):
    """A function of your own that checks outputs, in a child process. It is trusted: nothing confines it."""

    call: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`module:function`. The module is looked for beside the recipe, then among what is installed. Its file's digest is
    part of what a result depends on; of what it imports nothing is known."""
    seconds: Positive = 5.0
    """The longest a call may take. What takes longer has failed, and is counted as such."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"call": value} if isinstance(value, str) else value


class Classifier(Config):
    """A text classifier as a judge of outputs: a folder that transformers' AutoModelForSequenceClassification reads,
    with weights in safetensors. It sees the output alone."""

    path: PlaceText
    """Its folder, relative to the recipe."""
    labels: dict[str, str] = {}
    """Classes by the answers that items have, such as `{refuse: REFUSAL, comply: ANSWER}`; an answer that is not named
    is itself the class."""
    max_tokens: int = Field(512, gt=0)
    """Of a longer output the rest is not read."""


class VerifierPart(Config):
    """One part of a verifier that has several."""

    weight: Positive = 1.0
    """Its weight in the mean."""
    check: Verifier
    """How it checks."""


Role = Literal["guard", "target", "watch"]


class Probe(Config):
    """A fixed set of items with a score per item. Give `path` and `kind`, or `lm_eval`."""

    path: PlaceText | None = None
    """JSONL or Parquet of items, relative to the recipe."""
    kind: Literal["choice", "generate", "bits_per_byte", "episode"] | None = None
    """`choice`: log-likelihood of each choice; `generate`: output checked by a verifier; `bits_per_byte`: likelihood
    of plain text, or of the answers of `messages` rows, in bits per UTF-8 byte (lower is better); `episode`: the model
    acts in a small environment, and its last answer is checked by a verifier (docs/agents.md)."""
    lm_eval: PlaceText | None = None
    """A task name of lm-evaluation-harness, or the path of a task YAML. Needs the `eval` extra."""
    metric: str | None = None
    """The lm-eval metric to record per item; the task's first metric when not given."""
    role: Role = "guard"
    """`guard` must not drop, `target` must rise, `watch` is recorded only."""
    safety: bool = False
    """A guard with the tight `margin.safety`."""
    verifier: Verifier | None = None
    """For `generate` and `episode`."""
    normalise: Literal["sum", "bytes"] = "bytes"
    """For `choice`: compare summed log-likelihoods, or per UTF-8 byte of the choice."""
    system: str | None = None
    """System turn put before every item; the template's own default when not given."""
    max_new_tokens: int = Field(64, gt=0, le=4096)
    """For `generate` and `episode`: the longest answer, or turn, in tokens."""
    max_steps: int = Field(6, gt=0, le=64)
    """For `episode`: turns after which an agent that has not answered has failed."""
    limit: int | None = Field(None, gt=0)
    """Use only the first items, in file order."""
    margin: Points | None = None
    """Overrides the gate's margin for this probe: the drop that must be ruled out."""
    held_out: bool = False
    """Asked only when everything else says PROMOTE, and each look is recorded: items that nobody tunes against."""
    samples: int = Field(1, gt=0, le=64)
    """For `generate`: answers drawn for each item, which counts by their mean. 1 is the likeliest answer."""
    temperature: Annotated[float, Field(gt=0.0, le=4.0, allow_inf_nan=False)] | None = None
    """Of drawn answers. Given with `samples` above 1, and only then."""

    @model_validator(mode="after")
    def _consistent(self) -> "Probe":
        if (self.path is None) == (self.lm_eval is None):
            raise ValueError("give either 'path' with 'kind', or 'lm_eval'")
        if self.path is not None and self.kind is None:
            raise ValueError("'kind' is missing: choice, generate or bits_per_byte")
        if self.lm_eval is not None and self.kind is not None:
            raise ValueError("'kind' does not go with 'lm_eval': the task says what it is")
        if self.lm_eval is None and self.metric is not None:
            raise ValueError("'metric' goes with 'lm_eval' only")
        if (self.kind in ("generate", "episode")) != (self.verifier is not None):
            raise ValueError("'verifier' is needed for the kinds 'generate' and 'episode', and for no other kind")
        if (self.samples > 1) != (self.temperature is not None):
            raise ValueError("'samples' above 1 and 'temperature' go together")
        if self.held_out and self.role == "watch":
            raise ValueError("'held_out: true' needs role 'guard' or 'target': a watched probe decides nothing")
        if self.safety and self.role != "guard":
            raise ValueError("'safety: true' needs role 'guard'")
        self._check_unread()
        return self

    def _check_unread(self) -> None:
        """Raise for a setting that this kind of probe would not read."""
        readers = {
            "normalise": ("choice",),
            "max_new_tokens": ("generate", "episode"),
            "max_steps": ("episode",),
            "samples": ("generate",),
            "system": ("choice", "generate", "bits_per_byte", "episode"),
        }
        kind = self.kind or "lm_eval"
        for name, kinds in readers.items():
            if kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is read by {', '.join(kinds)} only, this probe is of kind {kind}")


class Lora(Config):
    """A low-rank update on frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, gt=0, le=1024)
    """Rank of the update. 16 is the rank of Apple's shipped adapters (arXiv:2407.21075)."""
    alpha: Positive | None = None
    """Scale is alpha / rank; twice the rank when not given."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers to adapt; `all-linear` is every linear layer but the head."""


class Tune(OneKey):
    """What is trained: exactly one key."""

    bare_names = ("lora", "full")
    noun = "tune"

    lora: Lora | None = None
    """A new adapter on frozen weights."""
    full: NoOptions | None = None
    """Every weight."""


# Kinds of stages whose share of replay can rise on the way.
ADAPTING = ("sft", "dpo")


class Adapt(Config):
    """A share of replay that rises while a stage runs: guards are asked at fixed steps, and where one has fallen by
    more than its margin below the best it had in this stage, the share rises. Not a test, but a point estimate: cheap
    insurance, and bounded. In sft and dpo stages; guards of lm-eval and held-out ones are not asked."""

    every: int = Field(gt=0)
    """Optimizer steps between two askings; the first is before the first step."""
    raise_by: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """How much the share rises each time."""
    most: Share = 0.5
    """The share rises no further."""


class GuardStop(Config):
    """End a stage early when a guard falls: guards are asked at fixed steps, and where one stands below the stage's
    start by more than its margin, the stage ends after the next step; what there is then is probed and judged. Not a
    test, but a point estimate. Guards of lm-eval and held-out ones are not asked."""

    every: int = Field(gt=0)
    """Optimizer steps between two askings; the first is before the first step."""


class Replay(Config):
    """Old or general rows mixed into the stream of new ones (rehearsal)."""

    share: Share = 0.2
    """Share of the final stream that is replayed: 0.2 is one row in five. 0 turns replay off. Where no `replay` of the
    stage or of `defaults` gives it, it is the preset's."""
    sources: Names = Field(default_factory=lambda: ["history"], alias="from")
    """Data sources to replay, and `history`: the training rows of this run's promoted rounds. `[history]` when not
    given; in the first round that is nothing, and the share is 0."""
    dedup: bool | Literal["near"] = True
    """Leave out replay rows whose normalised text is also a new row, or an earlier replay row; `near`: those that are
    nearly a new row or another replay row too (docs/data.md)."""
    adapt: Adapt | None = None
    """Raise the share while a stage runs and a guard falls. The stage keeps its number of steps, so that a larger share
    shows fewer new rows."""

    model_config = ConfigDict(populate_by_name=True)


class Anchor(Config):
    """A penalty on divergence from a frozen reference (Ziegler et al. 2019, arXiv:1909.08593)."""

    kl: NonNegative = 0.05
    """Weight of the KL term, per token of the anchored positions. 0 turns the anchor off. Where no `anchor` of the
    stage or of `defaults` gives it, it is the preset's."""
    to: PlaceText = "start"
    """The reference: `start` (what this stage starts from), `sft` (what the newest sft stage of this round has made, or
    what the round starts from), `base`, `champion`, or the path of a checkpoint."""
    on: Literal["replay", "new", "both"] = "replay"
    """Which rows' counted positions are anchored."""
    direction: Literal["forward", "reverse"] = "forward"
    """`forward` is KL(reference || policy), which keeps what the reference could say; `reverse` is
    KL(policy || reference)."""
    cache: Literal["off", "hidden", "top64"] = "off"
    """`off`: the reference runs beside the policy. `hidden`: its last hidden states are stored once, exact.
    `top64`: its 64 largest log-probabilities and one tail bucket are stored, a lower bound of the KL."""


class History(Config):
    """What of a promoted round's new rows is kept for later replay: of each source and round, a budget of rows."""

    rows: int = Field(10_000, gt=0)
    """At most so many rows of a source."""
    bytes: int | None = Field(None, gt=0)
    """At most so many bytes of a source, as JSONL; one row is kept in any case."""
    policy: Literal["reservoir", "class_balanced", "coverage"] = "reservoir"
    """Which rows, where not all can be: each equally likely; classes alike; or those that add new runs of words."""
    by: PlaceText = "answer"
    """Field with a row's class, for `class_balanced`; `answer` is what is said where rows have no such field."""


class Ema(Config):
    """Exponential moving average of the trained weights; the average is the stage's result."""

    decay: float = Field(0.99, gt=0.0, lt=1.0)
    """Kept share of the old average at each step. 0.99 suits runs below 2,000 steps."""


def _plugins_of(kind: Kind) -> BeforeValidator:
    return BeforeValidator(lambda value: check_options(kind, value))


Penalties = Annotated[dict[Name, Any], _plugins_of("penalties")]
GradientRules = Annotated[dict[Name, Any], _plugins_of("gradient_rules")]
OwnObjective = Annotated[dict[Name, Any], _plugins_of("objective"), Field(max_length=1)]


class Mix(Config):
    """How several sources of new rows are mixed; without it each row comes once an epoch, or by the weights of `data`
    as shares of rows."""

    by: Literal["rows", "tokens"] = "rows"
    """What the weights of `data` are shares of."""
    temperature: Positive | None = None
    """Shares in proportion to rows ** (1 / temperature): above 1 smaller sources get more (arXiv:1901.07291)."""
    passes: dict[Name, Positive] | None = None
    """How often each source is shown in an epoch; a source that is not named once."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.temperature is not None and self.passes is not None:
            raise ValueError("give 'temperature' or 'passes', not both")
        return self


class Training(StageSettings):
    """What the stages that train here have in common."""

    data: Names | Annotated[dict[Name, Positive], Field(min_length=1)]
    """Names of new-data sources, each seen once an epoch, or `name: weight` for shares of the new rows."""
    mix: Mix | None = None
    """How the sources of `data` are mixed."""
    epochs: Positive | None = None
    """Passes over the new rows. Give `epochs` or `steps`; the preset's epochs when neither is given."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps."""
    lr: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Peak learning rate; the preset's when not given."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay to 0 after warm-up; `constant` does not decay."""
    warmup: float = Field(0.03, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    batch_rows: int = Field(16, gt=0)
    """Rows in one optimizer step, replay included, over all processes."""
    micro_batch_rows: int = Field(4, gt=0)
    """Rows in one forward pass of one process. Changes speed and memory, not the loss."""
    max_tokens: int = Field(1024, gt=1)
    """Longest row in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """A row longer than `max_tokens` stops the run before training, or is left out and reported. Never cut."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; `null` turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    ema: Ema | None = None
    """Average the weights over the steps."""
    save_steps: int = Field(50, gt=0)
    """Optimizer steps between two resume points."""
    keep_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two checkpoints that are kept beside the one that the stage makes, each as large as that:
    `evertune blame` then sees where in the stage a probe fell."""
    tune: Tune | None = None
    """What is trained here; `defaults.tune` or the preset when not given."""
    replay: Replay | None = None
    """Replay here; what it leaves out comes from `defaults.replay`, then from the preset."""
    anchor: Anchor | None = None
    """Anchor here; what it leaves out comes from `defaults.anchor`, then from the preset."""
    guard_stop: GuardStop | None = None
    """End the stage when a guard has fallen beyond its margin while it trains."""

    penalties: Penalties = {}
    """Further penalties, each with its options, such as `{ewc: {weight: 1.0}}`: plug-ins, with those of
    docs/academic.md among them. `{}` takes the defaults."""
    gradient_rules: GradientRules = {}
    """Rules that change each step's gradient, each with its options, in this order: plug-ins as well."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give 'epochs' or 'steps', not both")
        if self.micro_batch_rows > self.most_rows:
            raise ValueError("'micro_batch_rows' is larger than 'batch_rows'")
        return self

    @model_validator(mode="after")
    def _mix_fits(self) -> Self:
        if self.mix is None:
            return self
        has_weights = isinstance(self.data, dict)
        if self.mix.by == "tokens" and not has_weights:
            raise ValueError("'mix.by: tokens' needs weights: write 'data' as 'name: weight'")
        if has_weights and (self.mix.temperature is not None or self.mix.passes is not None):
            raise ValueError("'mix' has 'temperature' or 'passes', and 'data' has weights: give one of them")
        unknown = sorted(set(self.mix.passes or ()) - set(self.data))
        if unknown:
            raise ValueError(f"'mix.passes' names '{unknown[0]}', which is not in 'data'")
        return self

    @property
    def most_rows(self) -> int:
        """The most rows that one step can show the model."""
        return self.batch_rows

    @property
    def plugins(self) -> Iterator[tuple[Kind, str, Any]]:
        """Kind, name and options of every plug-in it names."""
        for name, options in self.penalties.items():
            yield "penalties", name, options
        for name, options in self.gradient_rules.items():
            yield "gradient_rules", name, options

    @property
    def remembered_sources(self) -> list[str]:
        return list(dict.fromkeys(one for _, _, options in self.plugins for one in getattr(options, "sources", ())))

    @property
    def new_sources(self) -> list[str]:
        return list(self.data)

    @property
    def replayed_sources(self) -> list[str]:
        return _replayed(self.replay)


NormRatio = Annotated[float | None, Field(gt=0.0, le=1.0)]


class Sft(Training):
    """Supervised fine-tuning: cross-entropy on completion tokens."""

    formats = REPLAYABLE

    objective: OwnObjective = {}
    """Another loss than cross-entropy on the new rows, with its options, such as `{dft: {}}`: one plug-in. Replayed
    rows keep cross-entropy."""

    @property
    def plugins(self) -> Iterator[tuple[Kind, str, Any]]:
        yield from super().plugins
        for name, options in self.objective.items():
            yield "objective", name, options


class Dpo(Training):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): the chosen answer gains on the rejected
    one. A pair counts as one row, in batches and in the replay share."""

    formats = ("preference",)

    loss: Literal["sigmoid", "sigmoid_norm", "ipo"] = "sigmoid"
    """`sigmoid` is DPO; `sigmoid_norm` the same on log-ratios per token, which takes a beta of about 5 (Tulu 3,
    arXiv:2411.15124); `ipo` a squared loss that stops at a margin of 1 / (2 beta) per token (arXiv:2310.12036)."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference: a smaller one lets it move further."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round. Not read by `ipo`."""
    nll: NonNegative = 0.2
    """Weight of the negative log-likelihood of the chosen answers, per token; it keeps their probability from falling
    along. 0.2 is Llama 3's (arXiv:2407.21783)."""
    reference: PlaceText = "start"
    """What the log-probabilities are compared with: `start`, `sft`, `base`, `champion`, or the path of a checkpoint."""
    replay_weight: NonNegative = 1.0
    """Weight of the replayed rows' cross-entropy, per token, beside the mean preference loss, where it is given."""
    replay_ratio: NormRatio = None
    """In each step the replayed rows, their anchor included, are weighed so that their gradient has this share of the
    norm of the pairs' gradient. 0.1 to 0.3 is usual; the preset's where neither this nor `replay_weight` is given."""

    @model_validator(mode="after")
    def _read_by_loss(self) -> Self:
        _check_replay_weight(self)
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("'label_smoothing' is read by sigmoid and sigmoid_norm only, this loss is ipo")
        return self


class Protected(Config):
    """A skill that must not fall: a floor under its mean reward, and how hard it is held (a Lagrange multiplier)."""

    at_least: Annotated[float, Field(gt=0.0, le=1.0)]
    """The floor, such as what the start reaches less a margin."""
    rate: Positive = 1.0
    """How much the multiplier, which begins at 1, rises for each step and unit below the floor, and falls above it,
    down to 0."""
    most: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 5.0
    """Its upper bound."""


class RolloutServer(Config):
    """A server of OpenAI's completions protocol that loads LoRA adapters while it runs, such as vLLM's with
    `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING. It must see the workspace under the same path."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s]*[^\s/])?$")]
    """Up to the version and without a slash at the end, such as `http://127.0.0.1:8000/v1`."""
    model: PlaceText
    """What the server calls the recipe's base."""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Environment variable that holds the server's key."""
    seconds: Positive = 600.0
    """The longest wait for one answer."""
    requests: int = Field(32, gt=0, le=4096)
    """Answers asked for at once."""


class Rl(Training):
    """Reinforcement learning with verifiable rewards (GRPO, Shao et al. 2024, arXiv:2402.03300). A question counts as
    one row of `batch_rows` and of the replay share, an answer one of `micro_batch_rows`; `max_tokens` bounds the
    question."""

    formats = ("verifiable", "choice", "messages", "episode")

    group: int = Field(8, ge=2, le=1024)
    """Answers sampled to each question; each is compared with the others of its group."""
    max_new_tokens: int = Field(256, gt=0, le=16384)
    """The longest answer, or turn of an episode, in tokens."""
    max_steps: int = Field(6, gt=0, le=64)
    """Of sources with the format `episode`: turns after which an agent that has not answered has failed. An episode is
    one answer, of all tokens that the agent itself said."""
    temperature: Positive = 1.0
    """Of sampling, which is from the whole distribution, and of the log-probabilities that are trained."""
    rollout_steps: int = Field(1, gt=0)
    """Steps of questions that are answered at once: above 1 the later ones train on answers of an older policy."""
    iterations: int = Field(1, gt=0)
    """Passes over each rollout. `steps` counts optimizer steps, all passes included."""
    scale: bool = True
    """Divide a group's advantages by its standard deviation, as GRPO; false is Dr. GRPO's (arXiv:2503.20783), with
    `average: constant`."""
    average: Literal["answers", "tokens", "constant"] = "tokens"
    """Of the loss: over tokens (DAPO, arXiv:2503.14476); over answers, each the mean of its tokens (GRPO), which makes
    long wrong answers cheap; or over answers, each its sum by `max_new_tokens` (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's probability ratio, or the mean one of an answer (GSPO, arXiv:2507.18071)."""
    clip_low: float = Field(0.2, gt=0.0, lt=1.0)
    """The ratio's lower bound is 1 - clip_low (PPO, arXiv:1707.06347)."""
    clip_high: Positive = 0.28
    """Its upper bound is 1 + clip_high; above clip_low unlikely words have room to grow (DAPO's clip-higher)."""
    kl: NonNegative = 0.01
    """Weight of the KL to the reference, per token, estimated on the sampled tokens (k3, its gradient unbiased). Exact,
    over the whole vocabulary, it is the anchor: `{kl: 0.01, to: sft, on: both, direction: reverse}`."""
    kl_to: PlaceText = "sft"
    """The reference: `sft` (what this round's newest sft stage has made), `start`, `base`, `champion`, or a path."""
    replay_weight: NonNegative = 1.0
    """Weight of the replayed rows' cross-entropy, per token, beside the mean loss of the answers, where it is given."""
    replay_ratio: NormRatio = None
    """In each step the replayed rows, their anchor included, are weighed so that their gradient has this share of the
    norm of the answers' gradient. 0.1 to 0.3 is usual; the preset's where neither this nor `replay_weight` is given."""
    protect: dict[Name, Protected] = {}
    """Sources of `data` whose mean reward must not fall below a floor, each held by a multiplier of its answers'
    advantages. Without an entry a source counts by its share of the questions alone."""
    max_kl: Positive | None = None
    """Budget of drift: the stage ends after a step in which the KL to the reference is above, in nats per token."""
    min_entropy: NonNegative | None = None
    """The stage ends after a step in which the entropy of the answers' tokens is below, in nats."""
    server: RolloutServer | None = None
    """Where the answers are made; in this process when not given. Needs `tune: {lora: ...}`."""

    @property
    def most_rows(self) -> int:
        return self.batch_rows * self.group

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_replay_weight(self)
        absent = [name for name in self.protect if name not in self.new_sources]
        if absent:
            raise ValueError(f"'protect' names '{absent[0]}', which is no source in this stage's 'data'")
        if self.server is not None and self.tune is not None and self.tune.lora is None:
            raise ValueError("'server' needs 'tune: {lora: ...}': whole weights cannot be loaded while it serves")
        if self.max_kl is not None and not self.kl:
            raise ValueError("'max_kl' needs 'kl' above 0: without a reference there is no KL to bound")
        if self.anchor is not None and self.anchor.on != "replay" and self.anchor.cache != "off":
            raise ValueError("an anchor on answers needs 'cache: off': no answer comes twice")
        return self


def _check_replay_weight(stage: Dpo | Rl) -> None:
    if stage.replay_ratio is not None and "replay_weight" in stage.model_fields_set and stage.replay_weight != 1.0:
        raise ValueError("'replay_weight' and 'replay_ratio' do not go together: the ratio sets the weight")


class Teacher(Config):
    """A frozen checkpoint that the student learns from."""

    checkpoint: PlaceText
    """What teaches: the path of a model or adapter folder; `round:NAME`, what an earlier round promoted; `stage:KIND`,
    what the newest stage of that kind made in this round, or `stage:LABEL`, such as `stage:2026-10/1-sft`, any stage
    before this one; `start`, `base` or `champion`; or, for `route: best`, `run`: every checkpoint that this run has
    made so far, the base included. A teacher has the student's tokenizer and vocabulary."""
    sources: Names | None = None
    """The sources of this stage whose rows it teaches; all when not given. Teachers of one source are an ensemble: the
    mean of their probabilities."""
    weight: Positive = 1.0
    """Its weight in an ensemble, relative to the others'."""

    @property
    def is_named(self) -> bool:
        """Whether it is a checkpoint of the run or what the run starts from, and no path."""
        return self.checkpoint in (*NAMED_REFERENCES, RUN) or self.checkpoint.startswith((OF_ROUND, OF_STAGE))


def _as_teachers(value: Any) -> Any:
    written = [value] if isinstance(value, str | dict) else value
    if not isinstance(written, list):
        return value
    return [{"checkpoint": one} if isinstance(one, str) else one for one in written]


class OnPolicy(Config):
    """Rows that the student answers by itself; its teachers say at each of its tokens what they would have said there
    (GKD, arXiv:2306.13649)."""

    share: float = Field(0.5, gt=0.0, le=1.0)
    """Share of the new rows that the student answers, drawn for each step."""
    max_new_tokens: int = Field(64, gt=0, le=4096)
    """The longest answer, in tokens."""
    temperature: float = Field(1.0, ge=0.1, le=2.0)
    """At which the student answers."""
    steps: int = Field(4, gt=0)
    """Steps whose rows are answered at once: an answer is at most so much older than the weights that learn from it.
    Resume points lie between them."""


class Answers(Config):
    """Answers that the teacher writes in place of the rows' own (sequence-level distillation, Kim and Rush 2016,
    arXiv:1606.07947)."""

    keep: Literal["verified", "likeliest"] = "likeliest"
    """`verified`: the likeliest of the answers that the source's `verifier` accepts; a row without one is left out.
    `likeliest`: the answer that the teacher itself finds likeliest per token."""
    samples: int = Field(4, gt=0, le=64)
    """Answers to each row, of which one is kept."""
    max_new_tokens: int = Field(64, gt=0, le=4096)
    """The longest answer, in tokens. One that does not end by then is not kept."""
    temperature: float = Field(0.7, ge=0.1, le=2.0)
    """At which the teacher answers."""


class Demonstration(Config):
    """What the teachers read behind the question and the student does not: it learns to answer as if it had read it
    (self-distillation, SDFT, arXiv:2601.19897)."""

    text: str = Field("An answer that was found good:\n{answer}\n\nNow answer yourself.", min_length=1)
    """Put behind the last question; `{answer}` is the row's own answer. Without it every row gets the same words, such
    as a list of rules: context distillation."""
    rows: int = Field(64, ge=8, le=4096)
    """Rows on which the gain is measured before training: by how much likelier a teacher finds the rows' own answers
    after the demonstration. Where the lower bound of the mean is not above 0, the stage is refused."""


class Distill(Training):
    """Distillation: the student learns the token distributions of one or more teachers (Hinton et al. 2015,
    arXiv:1503.02531), mixed with cross-entropy on the rows' own answers."""

    formats = REPLAYABLE

    teachers: Annotated[
        list[Teacher],
        BeforeValidator(_as_teachers, json_schema_input_type=PlaceText | list[PlaceText | Teacher]),
        Field(min_length=1),
    ]
    """Who teaches: checkpoints, or `{checkpoint, sources, weight}` where not every teacher teaches every row. Each is
    asked once for each row, before training, one after the other; its answers are kept in the workspace's cache."""
    route: Literal["sources", "best"] = "sources"
    """`sources`: each teacher teaches the rows of its `sources`. `best`: of those teachers, the one with the best score
    on the row's skill does, as the run has measured it; of equals the last."""
    skills: dict[Name, Name] = {}
    """For `route: best`: the probe that measures the skill of a source's rows; where not given, the probe that has the
    source's name."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence at each counted token. `forward_kl` is KL(teacher || student): cover all that the teacher says.
    `reverse_kl` is KL(student || teacher): say only what the teacher would. `jsd` lies between (arXiv:2306.13649)."""
    beta: float = Field(0.5, gt=0.0, lt=1.0)
    """For `jsd`: the teacher's weight in the mixture that both are compared with."""
    temperature: float = Field(1.0, ge=0.1, le=20.0)
    """Divides the logits of both before they are compared; the divergence counts its square. Above 1 shows more of what
    the teacher finds unlikely."""
    weight: float = Field(0.5, ge=0.0, le=1.0)
    """Weight of the divergence; cross-entropy with the rows' answers has the rest. 1 leaves the answers unread; 0, with
    `answers`, learns what the teacher has written and nothing else of it."""
    words: Literal["all"] | Annotated[int, Field(gt=0, le=4096)] = 64
    """How many of a teacher's most likely words are kept at each token, all others being one bucket: a lower bound of
    the divergence. The checkpoint's `covered_mass` says how much of the probability they hold. `all` is exact, for
    vocabularies of at most 16384 words."""

    compress: bool = False
    """Make one adapter of `tune.lora.rank` out of the whole stack of adapters that the stage starts from: it begins as
    near to the stack as its rank allows, over the model under the stack, and is taught from there. Name `start` as a
    teacher to keep what the stack can do."""

    on_policy: OnPolicy | None = None
    """Let the student answer some rows; only their divergence counts. Needs rows of format `messages`, and memory for
    one teacher beside the student while it trains."""

    answers: Answers | None = None
    """Let the teacher write the answers. Needs rows of format `messages`, and one teacher for each source."""

    demonstration: Demonstration | None = None
    """Let the teachers read more than the student, who may be his own: `teachers: start`. Only the last answer of a row
    is taught. Needs rows of format `messages`."""

    @model_validator(mode="after")
    def _whose_answers(self) -> Self:
        if self.answers is not None and self.demonstration is not None:
            raise ValueError("give 'answers' or 'demonstration', not both: no answer is known before it is written")
        if self.weight == 0.0 and self.demonstration is not None:
            raise ValueError("'demonstration' needs a 'weight' above 0: only the divergence knows of it")
        if self.weight == 0.0 and self.answers is None:
            raise ValueError("'weight: 0' learns nothing of a teacher, unless its 'answers' are learnt")
        if self.answers is not None and self.on_policy is not None:
            raise ValueError("give 'answers' or 'on_policy', not both: either the teacher answers or the student")
        shared = [name for name in self.data if sum(name in (one.sources or self.data) for one in self.teachers) > 1]
        if self.answers is not None and shared and self.route != "best":
            raise ValueError(f"several teachers cannot write one answer: give '{shared[0]}' one, or 'route: best'")
        return self

    @model_validator(mode="after")
    def _routes(self) -> Self:
        unknown = [name for one in self.teachers for name in one.sources or [] if name not in self.data]
        unknown += [name for name in self.skills if name not in self.data]
        if unknown:
            raise ValueError(f"found '{unknown[0]}', expected a source of this stage's 'data': {', '.join(self.data)}")
        if self.skills and self.route != "best":
            raise ValueError("'skills' goes with 'route: best' only")
        if self.route != "best" and any(one.checkpoint == RUN for one in self.teachers):
            raise ValueError("the teacher 'run' goes with 'route: best' only, which chooses among its checkpoints")
        if self.compress and self.tune is not None and self.tune.lora is None:
            raise ValueError("'compress' makes an adapter: it goes with 'tune: lora' only")
        untaught = [name for name in self.data if not any(name in (one.sources or self.data) for one in self.teachers)]
        if untaught:
            raise ValueError(
                f"no teacher teaches the rows of '{untaught[0]}': name it in a teacher's 'sources', or leave it out of "
                "'data'"
            )
        return self

    def skill(self, source: str) -> str:
        """The probe that measures the skill of a source's rows."""
        return self.skills.get(source, source)


PLACEHOLDERS = ("model", "data", "output", "seed")


def _check_command(command: str) -> str:
    try:
        words = shlex.split(command)
        named = [name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"found a command that cannot be read ({error}), expected words, with quotes in pairs"
        ) from None
    unknown = [name for name in named if name not in PLACEHOLDERS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"found the placeholder {{{unknown[0]}}}, expected {known}; write {{{{ and }}}} for braces")
    if "output" not in named:
        raise ValueError("found no {output}, expected it: the folder where the command leaves the model")
    return command


class External(StageSettings):
    """Another trainer's command. What it writes is checked, digested, probed and judged like any checkpoint."""

    formats = ("messages", "preference", "verifiable", "episode", "choice", "text")

    command: Annotated[PlaceText, AfterValidator(_check_command)]
    """The command, in the recipe's folder, without a shell. `{model}` is a folder with the start as whole weights,
    `{data}` one with `<source>.jsonl` for each source, `{output}` an empty one for the result (a model, or a LoRA
    adapter of `{model}`), `{seed}` the recipe's seed; `{{` and `}}` are braces."""
    data: Names | None = None
    """Names of the sources it trains on, of any format: they are checked, searched for probe items, and kept for replay
    where their format can be replayed."""
    files: Annotated[list[PlaceText], Field(min_length=1)] | None = None
    """Files that decide what the command does, such as its script: when one changes, the stage is done anew."""
    hours: Positive = 24.0
    """The command is stopped, and the stage has failed, after this time."""

    @property
    def new_sources(self) -> list[str]:
        return self.data or []


class Noise(Config):
    """Gaussian noise on the sum of clients' updates (DP-FedAvg, arXiv:1710.06963). Needs `aggregate: ffa`,
    `norm_bound`, `weigh: equal`, and the extra `privacy`. The noise is drawn from the system: the same recipe gives
    another model."""

    multiplier: Positive
    """Deviation of the noise of the sum, in units of `norm_bound`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    """The account's delta: well below 1 / clients."""


# Share of the clients that `trimmed_mean` leaves out at each end when a file does not say.
TRIM = 0.2


def check_updates(settings: Any) -> None:
    """Raise ValueError where settings of a federated stage or server would not do what they say.

    By their values, not by what was written: with all defaults filled in they are settings too.
    """
    if settings.noise is not None and (
        settings.aggregate != "ffa" or settings.norm_bound is None or settings.weigh != "equal"
    ):
        raise ValueError(
            "'noise' needs aggregate: ffa, norm_bound, and weigh: equal: else nothing bounds a client's part"
        )
    if settings.too_large == "clip" and settings.norm_bound is None:
        raise ValueError("'too_large' is what is done above norm_bound, and there is none")
    if settings.trim != TRIM and settings.aggregate != "trimmed_mean":
        raise ValueError(f"'trim' is read by aggregate: trimmed_mean; found {settings.aggregate}")


class Federated(StageSettings):
    """Rounds over clients that keep their rows (docs/federated.md). Academic: needs `academic: allow`."""

    formats = REPLAYABLE
    is_private = True

    clients: Annotated[dict[Name, Names], Field(min_length=1)]
    """Clients by name, each with the names of its data sources. The rows are not kept for later replay."""
    exchanges: int = Field(2, gt=0)
    """Times that clients get the model, train, and send an update."""
    aggregate: Literal["fedavg", "fedex", "fed_talora", "ffa", "flora", "flexlora", "median", "trimmed_mean"] = "flora"
    """How updates become one. `flora`, `fedex`, `fed_talora` and `ffa` are the exact mean of the products; `flexlora`
    is that mean cut back to `rank`; `fedavg` averages the factors, which is another thing; `median` and `trimmed_mean`
    bound what one client can do."""
    rank: int = Field(16, gt=0, le=1024)
    """Rank of the clients' updates; their scale is 2."""
    ranks: dict[Name, Annotated[int, Field(gt=0, le=1024)]] = {}
    """Ranks of clients that differ, with a rule that averages products."""
    participation: float = Field(1.0, gt=0.0, le=1.0)
    """Share of the clients that are asked in each exchange, drawn by the seed; at least one."""
    weigh: Literal["rows", "equal"] = "rows"
    """Weight of a client in the mean: its rows, or 1."""
    proximal: Positive | None = None
    """Mu of FedProx: mu / 2 times the squared distance of a client's weights from what it got."""
    norm_bound: Positive | None = None
    """Largest norm of a client's update; any when not given."""
    too_large: Literal["refuse", "clip"] = "refuse"
    """What is done with an update above `norm_bound`."""
    trim: float = Field(TRIM, gt=0.0, lt=0.5)
    """Share of the clients that `trimmed_mean` leaves out at each end of every entry."""
    noise: Noise | None = None
    """Noise that hides whether a client took part; `norm_bound` then bounds the norm of B, and larger ones are clipped.
    The epsilon of all exchanges together is in the ledger."""
    epochs: Positive | None = None
    """Passes over a client's rows in each exchange; 1 when neither this nor `steps` is given."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps of a client in each exchange."""
    lr: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Learning rate of the clients, constant; the preset's when not given."""
    batch_rows: int = Field(16, gt=0)
    """Rows in one optimizer step."""
    micro_batch_rows: int = Field(4, gt=0)
    """Rows in one forward pass."""
    max_tokens: int = Field(1024, gt=1)
    """Longest row in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """Whether a row that is longer keeps a client from returning, or is left out."""

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give 'epochs' or 'steps', not both")
        check_updates(self)
        unknown = sorted(set(self.ranks) - set(self.clients))
        if unknown:
            raise ValueError(f"ranks: found no client '{unknown[0]}'; clients has: {', '.join(self.clients)}")
        if self.ranks and self.aggregate in ("fedavg", "fedex", "fed_talora", "ffa"):
            raise ValueError(f"'ranks' needs a rule that averages products, such as flora; found {self.aggregate}")
        return self

    @property
    def new_sources(self) -> list[str]:
        return list(dict.fromkeys(name for sources in self.clients.values() for name in sources))


class Stage(OneKey):
    """One step that makes a checkpoint: exactly one key, the kind."""

    noun = "a stage"

    sft: Sft | None = None
    """Supervised fine-tuning."""
    dpo: Dpo | None = None
    """Direct preference optimisation."""
    rl: Rl | None = None
    """Reinforcement learning with verifiable rewards."""
    distill: Distill | None = None
    """Distillation from one or more teachers."""
    external: External | None = None
    """Another trainer's command."""
    merge: Merge | None = None
    """Several models become one."""
    federated: Federated | None = None
    """Rounds over clients that keep their rows."""

    @property
    def settings(self) -> StageSettings:
        """The settings of the one kind that is given."""
        settings: StageSettings = getattr(self, self.kind)
        return settings


class Defaults(Config):
    """What a stage gets when it does not say otherwise."""

    tune: Tune | None = None
    """What is trained; the preset's when not given."""
    replay: Replay | None = None
    """Replay of every stage, field by field."""
    anchor: Anchor | None = None
    """Anchor of every stage, field by field."""


class Margins(Config):
    """The drops a promotion must rule out."""

    pooled: Points = 0.01
    """Item-weighted mean over all guards scored in [0, 1]: 1 point."""
    probe: Points = 0.03
    """Each guard alone: 3 points."""
    safety: Points = 0.01
    """Each guard marked `safety: true`: 1 point."""
    loss: Points = 0.005
    """Each `bits_per_byte` guard: relative rise of 0.5 %."""
    format: Points = 0.01
    """Form of the answers of each generating probe, the share that parses and the share that ends: 1 point."""
    ratchet: Points = 0.02
    """Over all rounds, against the best promoted score of each guard: 2 points, or the guard's own margin where that
    is larger. A `bits_per_byte` guard has its own margin only."""


class Gate(Config):
    """When a candidate is promoted. Formulas and reasons: docs/gate.md."""

    alpha: float = Field(0.05, gt=0.0, le=0.5)
    """One-sided error of each test: of a false promote and of a false hold."""
    margin: Margins = Margins()
    """By what is compared."""
    min_gain: float = Field(0.0, ge=0.0, lt=1.0)
    """The target's mean gain must reach this; its lower bound must be above 0."""
    min_items: int = Field(200, gt=0)
    """A guard or target with fewer items cannot promote."""
    min_clusters: int = Field(30, gt=0)
    """A guard or target with fewer clusters cannot promote."""
    spend_alpha: bool = False
    """Spend alpha over the run: the k-th verdict is taken at 6 alpha / (pi k)^2, so that the chance of ever promoting a
    bad candidate, or ever holding an unharmed one, stays alpha over all rounds and rescues together."""


class Interpolate(Config):
    """Between the reference and the candidate: (1 - a) reference + a candidate (WiSE-FT, arXiv:2109.01903)."""

    alphas: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default=[0.9, 0.8, 0.7, 0.5, 0.3], min_length=1)
    """Shares of the candidate to try, applied in memory; only the winner is written."""
    toward: Literal["start", "before", "champion"] = "start"
    """The reference: what the round started from, what its last stage started from, or the last promoted model."""
    blocks: int = Field(1, ge=1, le=16)
    """With more than one, the layers are cut into as many blocks, and each share is tried on one block at a time, the
    others staying whole: what was lost may lie in one part of the network. Tries blocks times shares."""


class MoreReplay(Config):
    """The round's stages again, with more replay."""

    factor: float = Field(2.0, gt=1.0, allow_inf_nan=False)
    """Times the share of replay; times 0.2 where nothing was replayed."""
    most: Share = 0.5
    """The largest share."""
    by_probe: dict[Name, Names] = {}
    """Sources that are replayed too where this probe fell: rows of the skill that was lost."""


class Scaled(Config):
    """The round's stages again, with one setting multiplied."""

    factor: Positive


class LowerLr(Scaled):
    """The round's stages again, with a lower learning rate."""

    factor: float = Field(0.3, gt=0.0, lt=1.0)
    """Times the learning rate."""


class FewerEpochs(Scaled):
    """The round's stages again, for a shorter time."""

    factor: float = Field(0.5, gt=0.0, lt=1.0)
    """Times the epochs, or the steps."""


class StrongerAnchor(Scaled):
    """The round's stages again, held closer to their reference."""

    factor: float = Field(4.0, gt=1.0, allow_inf_nan=False)
    """Times the anchor's weight; 0.05 where it was off."""


class DistilBack(Config):
    """One more stage after the round's own: what the round started from teaches back the skill that fell, while the
    candidate is held to itself on the round's new rows."""

    by_probe: dict[Name, Names] = {}
    """Rows of each probe's skill, on which the start is asked; of a probe that is not named here, the sources that the
    round replays."""
    epochs: Positive = 1.0
    """Passes over these rows."""
    lr: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Learning rate; the preset's when not given."""


class Rung(OneKey):
    """One rung of the rescue ladder: exactly one key."""

    bare_names = (
        "interpolate",
        "drop_stage",
        "distil_back",
        "more_replay",
        "stronger_anchor",
        "lower_lr",
        "fewer_epochs",
        "discard",
    )
    noun = "a rescue rung"

    interpolate: Interpolate | None = None
    """Between the reference and the candidate."""
    drop_stage: NoOptions | None = None
    """The round without the stage after which the failing guards fell most."""
    distil_back: DistilBack | None = None
    """The round with one more stage, in which its start teaches back the skill that fell."""
    more_replay: MoreReplay | None = None
    """The round again, with more replay, of the skill that fell where `by_probe` says so."""
    stronger_anchor: StrongerAnchor | None = None
    """The round again, held closer to its reference."""
    lower_lr: LowerLr | None = None
    """The round again, with a lower learning rate."""
    fewer_epochs: FewerEpochs | None = None
    """The round again, for a shorter time."""
    discard: NoOptions | None = None
    """Set the candidate aside; the champion stays, bit for bit."""


class Consolidation(Config):
    """Weights of what a round is made of."""

    method: Literal["linear", "slerp"] = "linear"
    """`linear` is what published pipelines use."""
    weights: dict[Literal["candidate", "champion", "base", "origin"], Positive] = Field(
        {"candidate": 0.5, "champion": 0.5}, min_length=2
    )
    """By what: `candidate` is what the stages made, `origin` what the round starts from. Half and half is what WiSE-FT
    (arXiv:2109.01903) recommends where nothing is known."""

    def as_stage(self) -> "Stage":
        """The same as a stage."""
        weights = self.weights
        paths = {name: "start" if name == "candidate" else name for name in weights}
        if self.method == "slerp":
            first, second = weights
            share = weights[second] / (weights[first] + weights[second])
            models: dict[str, Any] = {name: {"path": path} for name, path in paths.items()}
            return Stage.model_validate({"merge": {"method": "slerp", "t": share, "models": models}})
        models = {name: {"path": path, "weight": float(weights[name])} for name, path in paths.items()}  # type: ignore[index]
        return Stage.model_validate({"merge": {"method": "linear", "models": models}})


class Retrain(Sft):
    """The rows of all stages in one supervised stage, from a model that none of them has touched."""

    start: PlaceText = "base"
    """What it starts from: `base`, `champion`, or the path of a checkpoint."""

    def as_stage(self) -> "Stage":
        """The same as a stage, wherever it starts."""
        return Stage(sft=Sft.model_validate(self.model_dump(exclude_unset=True, exclude={"start"})))


def _distills_back(value: Any) -> Any:
    """Without teachers of its own a way distils back what the round's checkpoints were best at."""
    if not isinstance(value, dict):
        return value
    teachers = {} if "teachers" in value else {"teachers": RUN, "route": "best"}
    return {"data": [OWN_SOURCES], **teachers, **value}


def _retrains(value: Any) -> Any:
    return {"data": [ALL_SOURCES], **value} if isinstance(value, dict) else value


class Way(OneKey):
    """One way to consolidate a round: exactly one key."""

    bare_names = ("merge", "distill", "retrain")
    noun = "a way to consolidate"

    merge: Consolidation | None = None
    """A weighted merge of the candidate."""
    distill: Annotated[Distill | None, BeforeValidator(_distills_back)] = None
    """A distillation into the candidate: without `teachers` from the run's checkpoint that was best at each source's
    skill, without `data` on the sources of the round's stages."""
    retrain: Annotated[Retrain | None, BeforeValidator(_retrains)] = None
    """One supervised stage from the base; without `data` on the sources of this round and of all before it."""

    @property
    def settings(self) -> Consolidation | Distill | Retrain:
        """The settings of the one way that is given."""
        settings: Consolidation | Distill | Retrain = getattr(self, self.kind)
        return settings

    def with_sources(self, known: Mapping[str, list[str]]) -> Self:
        """The same with `round` and `rounds` in its `data` replaced by the sources that they stand for."""
        own = self.settings
        if isinstance(own, Consolidation) or not any(name in known for name in own.data):
            return self
        named = list(dict.fromkeys(one for name in own.data for one in known.get(name) or [name]))
        filled = type(own).model_validate({**own.model_dump(exclude_unset=True), "data": named})
        return type(self).model_validate({self.kind: filled})


class Consolidate(OneKey):
    """The last step of a round: exactly one key."""

    bare_names = ("merge",)
    noun = "consolidate"

    merge: Consolidation | None = None
    """A weighted merge."""
    best_of: Annotated[list[Way], Field(min_length=2)] | None = None
    """Several ways, each tried on the same candidate and judged by the same probes, every bound at alpha divided by
    their number; the one that passes with the largest gain is the round's candidate. What each has cost is recorded.
    """


class RescueBudget(Config):
    """What a round's rescue may cost."""

    attempts: int = Field(6, gt=0)
    """Rungs that are tried at most."""
    training: Positive = 3.0
    """Optimizer steps of all attempts, in multiples of the round's own; no rung that trains begins beyond it."""
    order: Literal["written", "gain_for_cost"] = "written"
    """`written`: rungs are tried in the recipe's order. `gain_for_cost`: those that only score first, then by expected
    gain over the steps they train; see docs/gate.md."""


class Monitor(Config):
    """When monitoring asks for something to be done: heuristics, not facts. None acts by itself."""

    forgetting: Points = 0.02
    """Relative loss of a skill since it was learnt: 0.02 is 2 %."""
    new_skill: float = Field(0.8, gt=0.0, le=1.0)
    """Least share of what a retrained model gains on a taught skill (`evertune advise baseline`)."""
    safety: Points = 0.01
    """Loss on a safety probe since the base, in score: 0.01 is one point."""
    cost: Positive = 1.0
    """Tokens of all updates since the base over those of one retrain on all the data."""
    drift: Positive = 0.05
    """Relative L2 distance of the champion's weights from the base."""
    kl_nats: Positive = 0.1
    """Mean KL in nats per token from the base on general text (`evertune audit`)."""


class Round(Config):
    """One update of the model: stages in order, from a start checkpoint to a candidate."""

    name: Name
    """Of the round; its checkpoints are called `<name>/1-sft` and so on."""
    start: PlaceText = "champion"
    """`champion` (the base before any promotion), `base`, or the path of a checkpoint."""
    stages: list[Stage] = Field(min_length=1)
    """Done one after the other; the last one's checkpoint is the candidate."""
    consolidate: Consolidate | None = None
    """A last step before the verdict: a merge of what the stages made, which is a `merge` stage written otherwise; or
    the best of several ways."""
    roles: dict[Name, Role] = {}
    """Roles of probes in this round where they differ from the probe's own: a skill is the `target` of the round that
    teaches it and a `guard` in later ones."""
    rescue: list[Rung] | None = None
    """What is tried when this round is not promoted; the recipe's `rescue` when not given."""

    @model_validator(mode="after")
    def _consolidate_is_a_stage(self) -> Self:
        if self.consolidate is not None and self.consolidate.merge is not None:
            stages = [*self.stages, self.consolidate.merge.as_stage()]
            object.__setattr__(self, "stages", stages)  # frozen from here on
            object.__setattr__(self, "consolidate", None)
        return self

    @property
    def ways(self) -> list[Way]:
        """The ways of `best_of`; none where there is nothing to choose."""
        return (self.consolidate.best_of or []) if self.consolidate is not None else []

    def written_out(self) -> "dict[str, Round]":
        """The round as each of its ways completes it, by the way's name: with its stage behind the others, and for
        `retrain` in their place."""
        found: dict[str, Round] = {}
        for j, way in enumerate(self.ways):
            number = sum(one.kind == way.kind for one in self.ways[:j])
            own = way.settings
            if isinstance(own, Retrain):
                change: dict[str, Any] = {"start": own.start, "stages": [own.as_stage()]}
            else:
                last = own.as_stage() if isinstance(own, Consolidation) else Stage(distill=own)
                change = {"stages": [*self.stages, last]}
            name = way.kind if not number else f"{way.kind}-{number + 1}"
            found[name] = self.model_copy(update={"consolidate": None, **change})
        return found


def kept_sources(one: Round) -> list[str]:
    """Names of the sources whose rows are kept once the round is promoted."""
    return list(
        dict.fromkeys(
            name for stage in one.stages if not stage.settings.is_private for name in stage.settings.new_sources
        )
    )


class Numerics(Config):
    """How numbers are computed. Bits repeat on the same machine class only."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations; trained weights keep a float32 master copy. Where every weight is trained, that copy
    is stored if the start is stored in float32, as a merge's master is; otherwise it is rounded to this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    threads: int | None = Field(None, gt=0)
    """CPU threads; all available cores when not given."""
    kernels: Literal["torch", "liger"] = "torch"
    """Of a trained stage's cross-entropy where no anchor is added to it. `liger`: fused Triton kernels on a GPU, from
    the extra `gpu`."""
    compile: bool = False
    """Put norms, rotations and gates of trained stages through torch.compile. Needs a C++ compiler, and half a minute
    the first time on a machine; other last bits than without it."""
    versions: Literal["recorded", "strict"] = "recorded"
    """What results of other package versions are worth. `recorded`: they stand, and the ledger names the versions.
    `strict`: versions are part of every key, and what other ones made is made anew."""


class Launch(Config):
    """How trained stages start on several processes."""

    command: Annotated[str, Field(min_length=1)]
    """Put before `-m evertune.worker JOB`, such as `torchrun --nproc-per-node 2`."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes (torch's FSDP2), where a model does not fit one
    device. Else each process holds the whole model. Not with plug-ins."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"command": value} if isinstance(value, str) else value


Tracker = Literal["trackio", "tensorboard", "mlflow", "wandb"]


class Recipe(Config):
    """One YAML file: base model, data, probes, rounds, gate."""

    evertune: Literal[1]
    """Version of this schema."""
    name: Name
    """Of the run, in the ledger and the report."""
    base: PlaceText
    """Bundled name (`smollm2-135m`), folder of a Hugging Face model or PEFT adapter, or a `.gguf` file."""
    workspace: PlaceText
    """Folder of this run's checkpoints, ledger and cache, relative to the recipe."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds the order of rows, new adapters and dropout: the same recipe gives the same model."""
    academic: Literal["refuse", "allow"] = "refuse"
    """`allow` lets the recipe use academic methods, which nobody has validated in production (docs/methods.md)."""
    preset: Literal["gentle", "balanced", "full"] = "balanced"
    """Where values come from that neither a stage nor `defaults` gives: docs/recipe.md lists each number's source."""
    data: dict[Name, DataSource] = Field(min_length=1)
    """Sources of training rows, by the name that stages use."""
    probes: dict[Name, Probe] = Field(min_length=1)
    """What every checkpoint is asked."""
    leaks: Literal["error", "remove"] = "error"
    """A training row that holds a probe item stops the run, or is left out of training, replay and history, and
    counted. What holds an item: docs/data.md."""
    history: History = History()
    """What is kept of promoted rounds for replay."""
    defaults: Defaults = Defaults()
    """What stages have in common."""
    gate: Gate = Gate()
    """What a promotion must show."""
    rescue: list[Rung] = Field(default_factory=lambda: [Rung(interpolate=Interpolate()), Rung(discard=NoOptions())])
    """Tried in order after a round that is not promoted; each attempt is probed and judged like any candidate.
    `[interpolate, discard]` when not given. All bounds are taken at alpha divided by the number that is tried."""
    rescue_budget: RescueBudget = RescueBudget()
    """When climbing ends."""
    monitor: Monitor = Monitor()
    """When monitoring over rounds asks for something to be done."""
    rounds: list[Round] = Field(min_length=1)
    """Updates, in order; each starts where the promoted ones before it lead."""
    numerics: Numerics = Numerics()
    """Precision, device and threads."""
    launch: Launch | None = None
    """How trained stages start on several processes: a command such as `torchrun --nproc-per-node 2`, alone or with
    options."""
    track: list[Tracker] = []
    """Trackers that get the metrics beside the JSONL file, through their own libraries."""

    @model_validator(mode="after")
    def _names_resolve(self) -> "Recipe":
        for i, one in enumerate(self.rounds):
            if one.ways:
                known = {OWN_SOURCES: _readable(self, [one]), ALL_SOURCES: _readable(self, self.rounds[: i + 1])}
                ways = [way.with_sources(known) for way in one.ways]
                object.__setattr__(one, "consolidate", Consolidate(best_of=ways))  # frozen from here on
        _check_references(self)
        return self


def _readable(recipe: Recipe, rounds: Sequence[Round]) -> list[str]:
    """Sources that these rounds' stages learn from and that a stage with cross-entropy can read."""
    names = dict.fromkeys(name for one in rounds for name in kept_sources(one))
    return [name for name in names if name in recipe.data and recipe.data[name].format in REPLAYABLE]


def _check_references(recipe: Recipe) -> None:
    """Raise for names that name nothing, names that stand twice, and sources of the wrong format: one line each."""
    problems = [
        *_round_problems(recipe),
        *_source_problems(recipe),
        *_adapt_problems(recipe),
        *_teacher_problems(recipe),
        *_episode_problems(recipe),
    ]
    if recipe.launch is not None and recipe.launch.fsdp:
        problems += [
            f"{one.place}.{kind}.{name}: found a plug-in with 'launch.fsdp'; expected none: plug-ins see whole weights "
            "and gradients"
            for one in placed_stages(recipe)
            if isinstance(one.stage.settings, Training)
            for kind, name, _ in one.stage.settings.plugins
        ]
    if recipe.launch is not None and recipe.launch.fsdp and recipe.numerics.compile:
        problems.append(
            "numerics.compile: found true with 'launch.fsdp'; expected one of them: shards are not compiled"
        )
    if recipe.academic == "refuse":
        problems += [
            f"{place}: found an academic method, {method}, which is not production-validated; expected "
            "'academic: allow' at the top of the recipe, if that is what you want"
            for place, method in academic_choices(recipe)
        ]
    for name, meaning in RESERVED.items():
        if name in recipe.data:
            problems.append(f"data.{name}: '{name}' is a reserved name: {meaning}")
    if problems:
        raise ValueError("\n".join(problems))


def _round_problems(recipe: Recipe) -> Iterator[str]:
    names = [one.name for one in recipe.rounds]
    for i, one in enumerate(recipe.rounds):
        if one.name in names[:i]:
            first = names.index(one.name)
            yield f"rounds[{i}].name: '{one.name}' is also the name of rounds[{first}]; names must differ"
        for name, role in one.roles.items():
            if name not in recipe.probes:
                yield f"rounds[{i}].roles.{name}: no probe '{name}'; probes has: {', '.join(recipe.probes)}"
            elif recipe.probes[name].safety and role != "guard":
                yield f"rounds[{i}].roles.{name}: found '{role}', expected 'guard': the probe has 'safety: true'"


def _source_problems(recipe: Recipe) -> Iterator[str]:
    named = [("defaults.replay.from", name, "replay", REPLAYABLE) for name in _replayed(recipe.defaults.replay)]
    for one in placed_stages(recipe):
        place, stage, settings = one.place, one.stage, one.stage.settings
        named += [(f"{place}.data", name, stage.kind, settings.formats) for name in settings.new_sources]
        named += [(f"{place}.replay.from", name, "replay", REPLAYABLE) for name in settings.replayed_sources]
        named += [(place, name, "a memory", REPLAYABLE) for name in settings.remembered_sources if name != "history"]
    ladders = [("rescue", recipe.rescue), *((f"rounds[{i}].rescue", one.rescue) for i, one in enumerate(recipe.rounds))]
    for place, rungs in ladders:
        for k, rung in enumerate(rungs or ()):
            aimed = rung.more_replay or rung.distil_back
            for probe, names in aimed.by_probe.items() if aimed else ():
                where = f"{place}[{k}].{rung.kind}.by_probe"
                if probe not in recipe.probes:
                    yield f"{where}: no probe '{probe}'; probes has: {', '.join(recipe.probes)}"
                named += [(f"{where}.{probe}", name, "rescue", REPLAYABLE) for name in names if name != "history"]
    for place, name, reader, formats in named:
        source = recipe.data.get(name)
        if source is None and name in (OWN_SOURCES, ALL_SOURCES):
            yield f"{place}: no stage before it learns from {' or '.join(REPLAYABLE)}; expected the names of sources"
        elif source is None:
            yield f"{place}: no data source '{name}'; data has: {', '.join(recipe.data)}"
        elif source.format not in formats:
            yield f"{place}: '{name}' has format '{source.format}'; {reader} reads {' and '.join(formats)}"
        elif reader == "rl" and source.verifier is None:
            yield f"{place}: '{name}' has no verifier; rl needs data.{name}.verifier, such as 'exact' or 'math'"


def _adapt_problems(recipe: Recipe) -> Iterator[str]:
    for i, one in enumerate(recipe.rounds):
        for k, stage in enumerate(one.stages):
            own = getattr(stage.settings, "replay", None)
            if own is not None and own.adapt is not None and stage.kind not in ADAPTING:
                yield (
                    f"rounds[{i}].stages[{k}].{stage.kind}.replay.adapt: found it in a stage of kind {stage.kind}, "
                    f"expected {' or '.join(ADAPTING)}, whose rows come straight from the stream"
                )


def _episode_problems(recipe: Recipe) -> Iterator[str]:
    for one in placed_stages(recipe):
        if one.stage.rl is None or one.stage.rl.server is None:
            continue
        for name in one.stage.rl.new_sources:
            if name in recipe.data and recipe.data[name].format == "episode":
                # A server is asked by all processes at once, and their episodes have different numbers of turns.
                yield f"{one.place}.server: '{name}' has format 'episode'; episodes are played in this process"


def _teacher_problems(recipe: Recipe) -> Iterator[str]:
    for one in placed_stages(recipe):
        place, settings = one.place, one.stage.distill
        if settings is None:
            continue
        for j, teacher in enumerate(settings.teachers):
            known = known_teachers(recipe, one.round_index, one.index)
            if teacher.checkpoint.startswith((OF_ROUND, OF_STAGE)) and teacher.checkpoint not in known:
                told = ", ".join(known) or "nothing comes before this stage"
                yield f"{place}.teachers[{j}].checkpoint: found '{teacher.checkpoint}', expected one of: {told}"
            elif settings.route == "best" and not teacher.is_named:
                yield (
                    f"{place}.teachers[{j}].checkpoint: 'route: best' goes by the scores of this run, which has none "
                    f"of '{teacher.checkpoint}'; expected a checkpoint of the run, or 'sources' for each teacher"
                )
        yield from _answer_problems(recipe, settings, place)
        for source in settings.data if settings.route == "best" else ():
            if settings.skill(source) not in recipe.probes:
                yield (
                    f"{place}.skills: no probe '{settings.skill(source)}' measures '{source}'; probes has: "
                    f"{', '.join(recipe.probes)}"
                )


def _answer_problems(recipe: Recipe, settings: Distill, place: str) -> Iterator[str]:
    """Rows that the student or a teacher cannot answer, and answers that cannot be verified."""
    ways = ("on_policy", "answers", "demonstration")
    asked = next((name for name in ways if getattr(settings, name) is not None), None)
    for name in settings.data if asked else ():
        source = recipe.data.get(name)
        if source is None:
            continue
        if source.format != "messages":
            yield f"{place}.{asked}: '{name}' has format '{source.format}', expected messages: a question to answer"
        elif settings.answers and settings.answers.keep == "verified" and source.verifier is None:
            yield f"{place}.answers.keep: '{name}' has no verifier, expected one in data.{name}"


def known_teachers(recipe: Recipe, round_index: int, stage_index: int) -> list[str]:
    """What `round:` and `stage:` may name at a stage: what comes before it in this recipe."""
    earlier, own = recipe.rounds[:round_index], recipe.rounds[round_index].stages[:stage_index]
    labels = [label for one in earlier for label in stage_labels(one)]
    labels += stage_labels(recipe.rounds[round_index])[:stage_index]
    kinds = dict.fromkeys(stage.kind for stage in own)
    return [
        *(f"{OF_ROUND}{one.name}" for one in earlier),
        *(f"{OF_STAGE}{name}" for name in (*kinds, *labels)),
    ]


@dataclass(frozen=True)
class PlacedStage:
    """A stage that a run may perform, where the recipe says so, and the round that it is in as its way completes it;
    `way` is "" where it does not depend on one."""

    place: str
    round_index: int
    round: Round
    index: int
    stage: Stage
    way: str = ""


def placed_stages(recipe: Recipe) -> Iterator[PlacedStage]:
    """The stages of all rounds, and behind those of a round the last one of each way to consolidate it."""
    for i, one in enumerate(recipe.rounds):
        for k, stage in enumerate(one.stages):
            yield PlacedStage(f"rounds[{i}].stages[{k}].{stage.kind}", i, one, k, stage)
        for j, (name, whole) in enumerate(one.written_out().items()):
            place, last = f"rounds[{i}].consolidate.best_of[{j}].{one.ways[j].kind}", len(whole.stages) - 1
            yield PlacedStage(place, i, whole, last, whole.stages[last], name)


def stage_labels(one: Round) -> list[str]:
    """What people call the checkpoints of a round's stages."""
    return [f"{one.name}/{k + 1}-{stage.kind}" for k, stage in enumerate(one.stages)]


def academic_choices(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Place and method of everything academic that a recipe chooses: plug-ins, and keys of the table of methods."""
    chosen = {key: one for one in methods().values() if one.standing == "academic" for key in one.keys}
    yield from _chosen(recipe, chosen, "")
    for one in placed_stages(recipe):
        if isinstance(one.stage.settings, Training):
            for kind, name, _ in one.stage.settings.plugins:
                plugin = find_plugin(kind, name)
                if plugin.standing == "academic":
                    yield f"{one.place}.{kind}.{name}", named([plugin.method], "academic")[0]


def _chosen(value: Any, chosen: Mapping[str, Method], place: str) -> Iterator[tuple[str, str]]:
    """Where a setting of the recipe is one of these keys: `Model.field`, or `Model.field=value`."""
    if isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _chosen(one, chosen, f"{place}[{i}]")
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _chosen(one, chosen, f"{place}.{key}".lstrip("."))
    elif isinstance(value, Config):
        owners = [one.__name__ for one in type(value).__mro__]
        for name, one in value:
            inner = f"{place}.{name}".lstrip(".")
            keys = [key for owner in owners for key in (f"{owner}.{name}", f"{owner}.{name}={one}") if key in chosen]
            if keys and one is not None:
                yield inner, f"{chosen[keys[0]].name} ({chosen[keys[0]].id})"
            yield from _chosen(one, chosen, inner)


def _replayed(replay: Replay | None) -> list[str]:
    return [name for name in replay.sources if name != "history"] if replay else []
