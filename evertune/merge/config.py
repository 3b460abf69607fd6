"""The configuration of a merge, as written in YAML or in Python, checked in full before a weight is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError, model_validator

from evertune.errors import RecipeError
from evertune.merge.methods import METHODS, Method
from evertune.recipe.merging import Blocks, Match, Merge, MergeMethod
from evertune.recipe.problems import problem_lines
from evertune.recipe.strict_yaml import Document, Steps, read_yaml

SHOWN_PROBLEMS = 10
# Settings that only some methods read: name in the file -> field.
METHOD_SETTINGS = {
    "lambda": "scale", "t": "t", "decay": "decay", "density": "density", "normalize": "normalize",
    "epsilon": "epsilon", "gamma": "gamma", "boost": "boost", "boost_limit": "boost_limit",
}  # fmt: skip
DEFAULT_WEIGHT, DEFAULT_SCALE, DEFAULT_T = 1.0, 1.0, 0.5


class MergeConfig(Merge):
    """A merge that stands alone, or a stage's, with what its method needs and nothing that it does not read."""

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


assert set(get_args(MergeMethod)) == set(METHODS), "the schema names the methods of the table"
