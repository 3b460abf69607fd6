"""What a recipe says of a merge, in a stage or in a file of its own; it is read without the rest of the recipe."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from evertune.recipe.fields import Config, Name, PlaceText, StageSettings

MergeMethod = Literal[
    "linear", "ema", "interpolate", "task_arithmetic", "slerp", "model_stock", "ties", "dare_linear", "dare_ties",
    "della_linear", "della", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "magmax",
]  # fmt: skip
# Beyond these, sums of weights would overflow.
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Gradient = Annotated[list[Number], Field(min_length=1)]


class Blocks(Config):
    """One value for each of equally many layers, in order of depth."""

    blocks: list[Number] = Field(min_length=1)
    """Values; the layers are divided among them."""


class Match(Config):
    """A value for the tensors whose name matches."""

    match: str | None = None
    """A glob for the whole name of a tensor; without one, every tensor."""
    value: Number | Gradient | Blocks
    """For these tensors."""


def _number(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Matches = Annotated[list[Match], Field(min_length=1)]
Value = Annotated[Number | Gradient | Matches | Blocks, BeforeValidator(_number, json_schema_input_type=object)]


class MergeModel(Config):
    """One model that goes in."""

    path: PlaceText
    """Folder of a Hugging Face model or of a PEFT adapter, relative to this file. In a stage also `start` (what the
    stage starts from), `origin` (what the round starts from), `sft`, `base`, `champion`, or the label of an earlier
    stage, such as `maths/1-sft`: experts trained in rounds that start from the base."""
    weight: Value | None = None
    """How much it counts; 1 when not given. Below 0 forgets, in methods on task vectors."""
    density: Value | None = None
    """Share of its task vector that stays; the merge's `density` when not given."""


class Merge(StageSettings):
    """Several models become one. Methods, their papers and what they are worth: docs/merging.md."""

    method: MergeMethod
    """`evertune merge methods` lists them with paper and standing."""
    base: PlaceText | None = None
    """Folder of the model that all others were trained from: task vectors are differences from it."""
    models: dict[Name, MergeModel] = Field(min_length=1)
    """What goes in, by a name for messages. The order counts for `ema` and `slerp` only."""
    scale: Value | None = Field(None, alias="lambda")
    """The merged task vector counts this many times; 1 when not given."""
    t: Value | None = None
    """Share of the second model, for `slerp` and `interpolate`; 0.5 when not given."""
    decay: float | None = Field(None, ge=0.0, lt=1.0)
    """For `ema`: share of the old average that each next model keeps; 0.5 when not given."""
    density: Value | None = None
    """Share of each task vector that stays."""
    normalize: bool | None = None
    """Divide by the sum of weights; what the method's paper does when not given."""
    epsilon: float | None = Field(None, ge=0.0, le=0.5)
    """For `della`: keeping probabilities run from density - epsilon to density + epsilon; 0.15 when not given."""
    gamma: float | None = Field(None, ge=0.0, lt=1.0)
    """For `breadcrumbs`: share of the largest changes that is left out; 0.01 when not given."""
    boost: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    """For `ram`: how much an expert's own changes gain for what it shares; 0 when not given, 0.1 in RAM+."""
    boost_limit: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    """For `ram`: the largest ratio of shared to own changes that counts; 0.2 when not given."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds what is drawn: dropped elements, and which of equally large ones stay."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the result; the base's, or the first model's, tensor by tensor, when not given. A stage writes `float32` when
    not given: what is merged again and again must not be rounded each time."""
    output: Literal["auto", "model", "adapter"] = "auto"
    """`auto`: an adapter where that is exact (a linear method on adapters over one base), else a model."""
    rank: int | None = Field(None, gt=0)
    """Rank of a resulting adapter: the best of that rank, and the lost energy is reported. All when not given."""
    shard_gb: float = Field(5.0, gt=0.0, le=1e6)
    """Largest weights file, in 10^9 bytes."""
    config_from: Name | None = None
    """Model whose config, tokenizer and template the result gets; the base, or the first model, when not given."""
    vocabulary: Literal["same", "by_token"] = "same"
    """`same` refuses differing tokenizers. `by_token` takes, for each token of the result's tokenizer, the row of the
    model that has it; a model without it does not change it."""
    different_starts: Literal["refuse", "allow"] = "refuse"
    """Models whose weights are as good as unrelated do not merge; `allow` tries."""
    compat: Literal["mergekit"] | None = None
    """Follow mergekit where it differs: sign ties count as plus, division by signed weights, DARE scaled to the L1
    norm, SLERP straight above a cosine of 0.9995, Model Stock's share unbounded."""
