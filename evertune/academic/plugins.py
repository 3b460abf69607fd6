"""What a recipe may say of each academic method: the entry points of this package lead here. Imports no torch."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from evertune.recipe.fields import Config, Names, NonNegative, Positive, Share
from evertune.recipe.plugins import Plugin


class Memory(Config):
    """What a method remembers of earlier tasks: each source is one task."""

    sources: Names = Field(default_factory=lambda: ["history"], alias="from")
    """Data sources, and `history`: the training rows of this run's promoted rounds."""
    memory_rows: int = Field(256, gt=0)
    """Rows of each source that are remembered, the first ones."""

    model_config = ConfigDict(populate_by_name=True)


class Ewc(Memory):
    """Elastic weight consolidation (arXiv:1612.00796)."""

    weight: NonNegative = 1.0
    """Lambda: the penalty is lambda / 2 times the sum of importance * (weight - start)^2, per counted token."""
    fisher: Literal["true", "empirical"] = "true"
    """`true` draws labels from the model, as the Fisher information asks; `empirical` takes the rows' own."""
    normalise: bool = True
    """Divide the importance by its mean: raw Fisher values of language models are tiny and differ by model."""


class OnlineEwc(Ewc):
    """EWC with one decaying Fisher (arXiv:1805.06370)."""

    decay: float = Field(0.95, gt=0.0, le=1.0)
    """Gamma: share of the older tasks' importance that each newer task leaves."""


class Mas(Memory):
    """Memory-aware synapses (arXiv:1711.09601)."""

    weight: NonNegative = 1.0
    """Lambda: the penalty is lambda times the sum of importance * (weight - start)^2."""
    normalise: bool = True
    """Divide the importance by its mean."""


class Si(Config):
    """Synaptic intelligence (arXiv:1703.04200)."""

    weight: NonNegative = 0.1
    """c: the penalty is c times the sum of importance * (weight - start)^2. The authors' CIFAR script: 0.01 to 0.2."""
    damping: Positive = 1e-3
    """xi: added to the squared path of each weight."""


class L2Sp(Config):
    """L2 toward the start (arXiv:1802.01483)."""

    weight: NonNegative = 0.01
    """Alpha: the penalty is alpha / 2 times the squared distance from the start, in weight space for adapters too."""


class Lwf(Config):
    """Learning without forgetting (arXiv:1606.09282)."""

    weight: NonNegative = 1.0
    """Lambda of the distillation term, per counted token of the new rows."""
    temperature: Positive = 2.0
    """Both distributions are raised to 1 / temperature and normalised; the authors take 2."""


class Olora(Config):
    """Orthogonal LoRA (arXiv:2310.14152)."""

    weight: NonNegative = 0.5
    """Lambda 1: weight of the sum of |A_i A_t^T| over the adapters below."""
    norm_weight: NonNegative = 0.0
    """Lambda 2: weight of the norms of the trained factors; the authors' scripts take 0 to 0.3."""


class Agem(Memory):
    """Averaged gradient episodic memory (arXiv:1812.00420)."""

    rows: int = Field(16, gt=0)
    """Remembered rows, drawn anew at each step, whose mean loss must not rise."""


class Gem(Agem):
    """Gradient episodic memory (arXiv:1706.08840)."""

    rows: int = Field(16, gt=0)
    """Remembered rows of each task, drawn anew at each step, whose mean loss must not rise."""
    margin: NonNegative = 0.5
    """Gamma, added to each multiplier: bends the step toward the old tasks. 0.5 in the authors' runs."""


class Gpm(Memory):
    """Gradient projection memory (arXiv:2103.09762)."""

    energy: Share = 0.97
    """Share of the squared norm of a layer's inputs that the protected subspace holds; 0.97 in the authors' script."""


class Ogd(Memory):
    """Orthogonal gradient descent (arXiv:1910.07104)."""

    memory_rows: int = Field(32, gt=0)
    """Gradients kept of each source, one a row: each is as large as the trained weights."""


class Joint(Memory):
    """Supervised and preference losses together (arXiv:2410.15483); in a dpo stage."""

    how: Literal["alternate", "worse"] = "alternate"
    """`alternate`: a step of the supervised loss with probability `sft`. `worse`: a step of the loss that is farther
    from its best, weighed by `sft` and 1 - `sft`."""
    sft: float = Field(0.5, gt=0.0, lt=1.0)
    """Lambda: the supervised share."""
    rows: int = Field(8, gt=0)
    """Remembered rows of a supervised step, drawn anew at each."""
    best: NonNegative = 0.0
    """For `worse`: the stage's loss when trained on it alone, in nats."""
    best_sft: NonNegative = 0.0
    """For `worse`: the supervised loss when trained on it alone, in nats per token."""


class Dft(Config):
    """Dynamic fine-tuning (arXiv:2508.05629): takes no options."""


class Asft(Config):
    """Anchored SFT (arXiv:2509.23753)."""

    kl: NonNegative = 0.05
    """Lambda: weight of KL(start || policy) per counted token of the new rows. 0.05 is in the authors' example."""


class Psft(Config):
    """Proximal SFT (arXiv:2508.17784)."""

    clip_low: float = Field(0.2, gt=0.0, lt=1.0)
    """The ratio's lower bound is 1 - clip_low; it does not bind where every advantage is 1."""
    clip_high: Positive = 0.28
    """Its upper bound is 1 + clip_high; beyond it a token teaches nothing until the old policy is renewed."""
    every: int = Field(4, gt=1)
    """Steps after which the old policy becomes the present one."""


class DerPlusPlus(Config):
    """Dark experience replay (arXiv:2004.07211)."""

    alpha: NonNegative = 0.5
    """Weight of the divergence from the stored outputs, per stored token."""
    beta: NonNegative = 0.5
    """Weight of the cross-entropy of stored rows, per stored token."""
    rows: int = Field(8, gt=0)
    """Stored rows drawn anew at each step, once for each term."""
    memory_rows: int = Field(256, gt=0)
    """Rows kept over all tasks, alike for each."""
    words: int = Field(64, gt=0)
    """Most likely words whose log-probabilities are kept at each position; the rest share one number."""


class InfLora(Memory):
    """Interference-free LoRA (arXiv:2404.00228)."""

    rows: int = Field(64, gt=0)
    """New rows whose inputs say where the adapter reads."""
    energy: Share = 0.95
    """Share of the squared norm of the old tasks' inputs that is closed to it; 0.95 in the authors' configurations."""


class PackNet(Config):
    """Masks that give each task weights of its own (arXiv:1711.05769)."""

    keep: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of each matrix's free entries that the task keeps, those that changed most; the paper prunes 50 to 75 %."""
    retrain: Share = 0.3
    """Share of the steps that train the kept entries alone."""


class Progressive(Config):
    """Progressive networks as adapters (arXiv:1606.04671)."""

    lateral: int = Field(8, gt=0)
    """Rows of the new adapter's A that read what the earlier ones read; the rank's others are the column's own."""


class Osft(Config):
    """Orthogonal-subspace fine-tuning (arXiv:2504.07097)."""

    protected: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of each matrix's singular directions that stay as they are, the leading ones; PEFT's tuner takes half."""


class Copr(Config):
    """Regularisation against earlier policies, after COPR (arXiv:2402.14228); in a dpo stage."""

    slack: NonNegative = 0.01
    """How far the preferences of earlier pairs may move: the constraint of the multiplier, in squared nats."""
    rate: Positive = 1.0
    """How much the multiplier, which begins at 1, rises for each step and unit above the slack."""
    most: float = Field(10.0, ge=1.0)
    """Its upper bound."""
    rows: int = Field(4, gt=0)
    """Earlier pairs drawn anew at each step."""
    memory_rows: int = Field(128, gt=0)
    """Pairs kept over all stages, alike for each."""


class FastSlow(Config):
    """Online fast-slow DPO (arXiv:2406.05534); in a dpo stage."""

    weight: NonNegative = 0.1
    """Gamma: weight of the gap between the two modules' preferences."""
    every: int = Field(4, gt=0)
    """Steps after which the slow module is moved."""
    pace: float = Field(0.5, gt=0.0, le=1.0)
    """How far the slow one then goes toward the fast one: 1 is all the way."""


def _refuses_average(options: PackNet, settings: Any) -> str | None:
    return None if settings.ema is None else "found ema: an average mixes kept weights with those that were given back"


def _refuses_rank(options: Progressive, settings: Any) -> str | None:
    rank = settings.tune.lora.rank if settings.tune.lora is not None else None
    if rank is None or options.lateral < rank:
        return None
    return f"found lateral {options.lateral} and tune.lora.rank {rank}: the new column has no row of its own"


def _stored_outputs(options: DerPlusPlus, tokens: int) -> int:
    """Ids and log-probabilities as they are read back: 8 and 4 bytes a word."""
    return options.memory_rows * tokens * (12 * options.words + 4)


EWC = Plugin("ewc", Ewc, "evertune.academic.quadratic:make_ewc", copies=2.0)
ONLINE_EWC = Plugin("online_ewc", OnlineEwc, "evertune.academic.quadratic:make_ewc", copies=2.0)
MAS = Plugin("mas", Mas, "evertune.academic.quadratic:make_mas", copies=2.0)
L2SP = Plugin("l2sp", L2Sp, "evertune.academic.quadratic:make_l2sp", copies=1.0)
SI = Plugin("si", Si, "evertune.academic.si:make_si", copies=5.0, tunes=("full",), carries=True)
LWF = Plugin("lwf", Lwf, "evertune.academic.lwf:make_lwf", full_copies=1.0)
OLORA = Plugin("olora", Olora, "evertune.academic.olora:make_olora", tunes=("lora",))
AGEM = Plugin("agem", Agem, "evertune.academic.projection:make_agem", copies=1.0)
GEM = Plugin("gem", Gem, "evertune.academic.projection:make_gem", copies=lambda _, tasks: 1.0 + tasks)
GPM = Plugin("gpm_ogd", Gpm, "evertune.academic.projection:make_gpm", copies=0.5, tunes=("full",))
OGD = Plugin(
    "gpm_ogd", Ogd, "evertune.academic.projection:make_ogd",
    copies=lambda options, tasks: float(options.memory_rows * tasks),
)  # fmt: skip
DFT = Plugin("dft", Dft, "evertune.academic.objectives:make_dft", stages=("sft",))
ASFT = Plugin("asft", Asft, "evertune.academic.objectives:make_asft", full_copies=1.0, stages=("sft",))
PSFT = Plugin("psft", Psft, "evertune.academic.objectives:make_psft", copies=2.0, stages=("sft",))
DERPP = Plugin(
    "derpp", DerPlusPlus, "evertune.academic.derpp:make_derpp", copies=1.0, stages=("sft",), more_bytes=_stored_outputs,
    carries=True,
)  # fmt: skip
INFLORA = Plugin("inflora", InfLora, "evertune.academic.subspaces:make_inflora", tunes=("lora",), stages=("sft",))
OSFT = Plugin("osft", Osft, "evertune.academic.subspaces:make_osft", copies=2.0, tunes=("full",))
PACKNET = Plugin(
    "packnet", PackNet, "evertune.academic.isolation:make_packnet", copies=1.5, tunes=("full",),
    refuses=_refuses_average, carries=True,
)  # fmt: skip
PROGRESSIVE = Plugin(
    "prognets", Progressive, "evertune.academic.isolation:make_progressive", tunes=("lora",), refuses=_refuses_rank,
)  # fmt: skip
COPR = Plugin("cppo_copr", Copr, "evertune.academic.preferences:make_copr", copies=1.0, stages=("dpo",), carries=True)
FAST_SLOW = Plugin("ofs_dpo", FastSlow, "evertune.academic.preferences:make_fast_slow", copies=3.0, stages=("dpo",))
JOINT = Plugin("joint_sft_pref", Joint, "evertune.academic.joint:make_joint", copies=1.0)
