"""What a recipe may say of each academic method: the entry points of this package lead here. Imports no torch."""

from typing import Literal

from pydantic import ConfigDict, Field

from evertune.recipe.plugins import Plugin
from evertune.recipe.schema import Config, Names, NonNegative, Positive, Share


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


EWC = Plugin("ewc", Ewc, "evertune.academic.quadratic:make_ewc", copies=2.0)
ONLINE_EWC = Plugin("online_ewc", OnlineEwc, "evertune.academic.quadratic:make_ewc", copies=2.0)
MAS = Plugin("mas", Mas, "evertune.academic.quadratic:make_mas", copies=2.0)
L2SP = Plugin("l2sp", L2Sp, "evertune.academic.quadratic:make_l2sp", copies=1.0)
SI = Plugin("si", Si, "evertune.academic.si:make_si", copies=5.0, tunes=("full",))
LWF = Plugin("lwf", Lwf, "evertune.academic.lwf:make_lwf")
OLORA = Plugin("olora", Olora, "evertune.academic.olora:make_olora", tunes=("lora",))
AGEM = Plugin("agem", Agem, "evertune.academic.projection:make_agem", copies=1.0)
GEM = Plugin("gem", Gem, "evertune.academic.projection:make_gem", copies=2.0)
GPM = Plugin("gpm_ogd", Gpm, "evertune.academic.projection:make_gpm", copies=0.5, tunes=("full",))
OGD = Plugin("gpm_ogd", Ogd, "evertune.academic.projection:make_ogd", copies=32.0)
JOINT = Plugin("joint_sft_pref", Joint, "evertune.academic.joint:make_joint", copies=1.0)
