"""The configuration of a merge, as written in YAML or in Python, checked in full before a weight is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from evertune.errors import RecipeError
from evertune.merge.methods import METHODS, Method
from evertune.merge.values import Blocks, Match, Value
from evertune.recipe.problems import problem_lines
from evertune.recipe.schema import Config, Name, PlaceText
from evertune.recipe.strict_yaml import Document, Steps, read_yaml

SHOWN_PROBLEMS = 10
MethodName = Literal[
    "linear", "ema", "interpolate", "task_arithmetic", "slerp", "model_stock", "ties", "dare_linear", "dare_ties",
    "della_linear", "della", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "magmax",
]  # fmt: skip
# Settings that only some methods read: name in the file -> field.
METHOD_SETTINGS = {
    "lambda": "scale", "t": "t", "decay": "decay", "density": "density", "normalize": "normalize",
    "epsilon": "epsilon", "gamma": "gamma", "boost": "boost", "boost_limit": "boost_limit",
}  # fmt: skip
DEFAULT_WEIGHT, DEFAULT_SCALE, DEFAULT_T = 1.0, 1.0, 0.5


class MergeModel(Config):
    """One model that goes in."""

    path: PlaceText
    """Folder of a Hugging Face model or of a PEFT adapter, relative to this file."""
    weight: Value | None = None
    """How much it counts; 1 when not given. Below 0 forgets, in methods on task vectors."""
    density: Value | None = None
    """Share of its task vector that stays; the merge's `density` when not given."""


class MergeConfig(Config):
    """A merge: a method, models, and what comes out."""

    method: MethodName
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
    """Of the result; the base's, or the first model's, tensor by tensor, when not given."""
    output: Literal["auto", "model", "adapter"] = "auto"
    """`auto`: an adapter where that is exact (a linear method on adapters over one base), else a model."""
    rank: int | None = Field(None, gt=0)
    """Rank of a resulting adapter: the best of that rank, and the lost energy is reported. All when not given."""
    shard_gb: float = Field(5.0, gt=0.0, allow_inf_nan=False)
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

    @model_validator(mode="after")
    def _fits_method(self) -> "MergeConfig":
        method = METHODS[self.method]
        problems = [*_unread_settings(self, method), *_count_problems(self, method)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def table(self) -> Method:
        """The method's line of the table."""
        return METHODS[self.method]


def load_config(path: Path) -> MergeConfig:
    """Read a merge's YAML: ours, or mergekit's (which has `merge_method`).

    Raises:
        RecipeError: at most ten problems, one a line, with file and line, what was found and what was expected.
    """
    document = read_yaml(path)
    if "merge_method" in document.value:
        from evertune.merge.mergekit_yaml import translate

        return translate(document, path)
    return parse_config(document)


def parse_config(document: Document, *, places: Mapping[Steps, str] | None = None) -> MergeConfig:
    """Check values against the schema.

    Raises:
        RecipeError: as `load_config`.
    """
    try:
        return MergeConfig.model_validate(document.value)
    except ValidationError as error:
        lines = problem_lines(error, document.value, places or document.places, root=MergeConfig)
        more = [f"... and {len(lines) - SHOWN_PROBLEMS} more."] if len(lines) > SHOWN_PROBLEMS else []
        raise RecipeError("\n".join(lines[:SHOWN_PROBLEMS] + more)) from None


def _unread_settings(config: MergeConfig, method: Method) -> Sequence[str]:
    known = ", ".join((*method.parameters, *(f"{one} (of a model)" for one in method.per_model)))
    problems = []
    for written, name in METHOD_SETTINGS.items():
        is_read = written in method.parameters or written in method.per_model
        if getattr(config, name) is not None and not is_read:
            problems.append(f"{written}: '{method.name}' does not read it; it reads: {known or 'no setting'}")
    for model, one in config.models.items():
        for name in ("weight", "density"):
            if getattr(one, name) is not None and name not in method.per_model:
                problems.append(f"models.{model}.{name}: '{method.name}' does not read it; it reads: {known or 'none'}")
    for name, value in _numbers(config):
        if "density" in name and not 0.0 < value <= 1.0:
            problems.append(f"{name}: found {value:g}, expected a number above 0 and at most 1")
        if name == "t" and not 0.0 <= value <= 1.0:
            problems.append(f"{name}: found {value:g}, expected a number from 0 to 1")
    return problems


def _count_problems(config: MergeConfig, method: Method) -> Sequence[str]:
    problems = []
    low, high = method.experts
    if method.base == "optional" and config.base is None:
        low = 2
    if not low <= len(config.models) <= high:
        wanted = str(low) if low == high else f"{low} to {high}" if high < 1000 else f"{low} or more"
        problems.append(f"models: found {len(config.models)}, '{method.name}' merges {wanted}")
    if method.base == "needed" and config.base is None:
        problems.append(f"base: missing; '{method.name}' works on differences from a base model")
    if method.base == "none" and config.base is not None:
        problems.append(f"base: '{method.name}' has no base; list it under models if it is to count")
    if config.config_from is not None and config.config_from not in config.models:
        problems.append(f"config_from: no model '{config.config_from}'; models has: {', '.join(config.models)}")
    return problems


def _numbers(config: MergeConfig) -> list[tuple[str, float]]:
    """Every number of a setting that has a range, by its place."""
    values = {"t": config.t, "density": config.density}
    values |= {f"models.{name}.density": one.density for name, one in config.models.items()}
    return [(name, number) for name, value in values.items() for number in _flat(value)]


def _flat(value: Any) -> list[float]:
    if value is None:
        return []
    if isinstance(value, Blocks):
        return value.blocks
    if isinstance(value, Match):
        return _flat(value.value)
    return [number for one in value for number in _flat(one)] if isinstance(value, list) else [float(value)]


assert set(get_args(MethodName)) == set(METHODS), "the schema names the methods of the table"
