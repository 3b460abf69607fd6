"""mergekit's YAML as a configuration of ours, so that an old merge can be made again.

Written from its documentation. Lists are gradients over depth in both; its filters are substrings, ours are globs.
`compat: mergekit` is set, so that its conventions are followed where they differ; in an imported file, remove it to
get ours. What has no counterpart (stacking of layers, tokens from several models) is an error that says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evertune.errors import RecipeError
from evertune.merge.config import MergeConfig
from evertune.merge.methods import METHODS
from evertune.recipe.strict_yaml import Document

# (key, what was found, remedy) -> the error, with the line of the file.
Refuse = Callable[..., RecipeError]

_METHODS = {name: name for name in METHODS if name not in ("ema", "interpolate", "magmax")} | {"nuslerp": "slerp"}
_TOP_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "chat_template", "name",
}  # fmt: skip
_DTYPES = {"bfloat16", "float16", "float32"}
# What mergekit's methods divide by when the file does not say.
_NORMALIZED = {"linear", "ties"}
_PARAMETERS = {"lambda": "lambda", "t": "t", "density": "density", "normalize": "normalize", "epsilon": "epsilon",
               "gamma": "gamma", "select_topk": "density"}  # fmt: skip


def translate(document: Document, path: Path) -> MergeConfig:
    """The same merge in our words.

    Raises:
        RecipeError: the file asks for something that has no counterpart, or is malformed.
    """
    value = document.value

    def refuse(key: str, found: str, remedy: str = "") -> RecipeError:
        where = document.places.get((key,), str(path))
        return RecipeError(f"{where}, {key}: {found}", remedy=remedy)

    unknown = sorted(set(value) - _TOP_KEYS)
    if unknown:
        raise refuse(unknown[0], "this mergekit setting has no counterpart here.")
    name = value["merge_method"]
    if name not in _METHODS:
        raise refuse("merge_method", f"'{name}' is not among: {', '.join(_METHODS)}.")
    if value.get("tokenizer_source") not in (None, "base"):
        raise refuse("tokenizer_source", "tokens of several models are not mixed.", "See vocabulary: by_token.")
    method = _METHODS[name]
    shared = _parameters(value.get("parameters") or {}, refuse)
    entries = _entries(value, refuse)
    base = value.get("base_model")
    models = _models(entries, base, refuse)
    config: dict[str, Any] = {"method": method, "models": models, "compat": "mergekit"}
    if base is not None and METHODS[method].base != "none":
        config["base"] = base
    elif base is not None and not any(entry.get("model") == base for entry in entries):
        raise refuse("base_model", f"'{name}' has no base.", "List it under models.")
    elif base is not None:
        models["base-model"] = {"path": base, **_own_parameters(entries, base, refuse)}
    for key, one in shared.items():
        if key == "weight":
            models.update({each: {"weight": one, **settings} for each, settings in models.items()})
        else:
            config[key] = one
    if name == "nuslerp":
        _nuslerp_share(models, config, refuse)
    if "normalize" in METHODS[method].parameters:
        config.setdefault("normalize", method in _NORMALIZED)
    for key in ("density", "weight"):
        if key not in METHODS[method].per_model:
            for settings in models.values():
                settings.pop(key, None)
    dtype = value.get("out_dtype") or value.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise refuse("dtype", f"found '{dtype}', expected one of {', '.join(sorted(_DTYPES))}.")
    return _checked(config if dtype is None else {**config, "dtype": dtype}, path)


def _models(entries: Sequence[Mapping[str, Any]], base: Any, refuse: Refuse) -> dict[str, Any]:
    """The merged models, all but the base, by a short name of their own."""
    models: dict[str, Any] = {}
    for i, entry in enumerate(entries):
        model = entry.get("model")
        if not isinstance(model, str):
            raise refuse("models", f"entry {i + 1} has no 'model'.")
        if "+" in model:
            raise refuse("models", f"'{model}' is a model with an adapter.", "Name the adapter's folder alone.")
        if model != base:
            own = _parameters(entry.get("parameters") or {}, refuse)
            models[f"m{len(models)}-{_short(model)}"] = {"path": model, **own}
    return models


def _checked(config: dict[str, Any], path: Path) -> MergeConfig:
    try:
        return MergeConfig.model_validate(config)
    except ValidationError as error:
        told = "; ".join(
            str(one.get("ctx", {}).get("error", one["msg"])) for one in error.errors(include_url=False)
        ).replace("\n", "; ")
        raise RecipeError(f"{path}: read as mergekit's configuration: {told}.") from None


def _entries(value: Mapping[str, Any], refuse: Refuse) -> list[dict[str, Any]]:
    """The models of a file; of `slices`, those of one slice that takes whole models."""
    if "slices" not in value:
        found: list[dict[str, Any]] = value.get("models") or []
        return found
    slices = value["slices"]
    if not isinstance(slices, list) or len(slices) != 1:
        raise refuse("slices", "layers from several ranges are stacked, which makes another architecture.")
    sources: list[dict[str, Any]] = slices[0].get("sources") or []
    ranges = {tuple(one.get("layer_range") or ()) for one in sources}
    if len(ranges) > 1 or any(len(one) == 2 and one[0] != 0 for one in ranges):
        raise refuse("slices", "its models give different layers, which makes another architecture.")
    return sources


def _parameters(parameters: Mapping[str, Any], refuse: Refuse) -> dict[str, Any]:
    found = {}
    for key, value in parameters.items():
        if key == "weight" or key in _PARAMETERS:
            found[_PARAMETERS.get(key, key)] = _value(value)
        elif key not in ("int8_mask", "rescale", "nuslerp_flatten", "nuslerp_row_wise"):
            raise refuse("parameters", f"'{key}' has no counterpart here.")
        elif (key, value) in (("rescale", False), ("nuslerp_flatten", False), ("nuslerp_row_wise", True)):
            raise refuse("parameters", f"'{key}: {str(value).lower()}' has no counterpart here.")
    return found


def _own_parameters(entries: list[dict[str, Any]], model: str, refuse: Refuse) -> dict[str, Any]:
    return next(_parameters(one.get("parameters") or {}, refuse) for one in entries if one.get("model") == model)


def _value(value: Any) -> Any:
    """A number, a gradient, or filters: a filter is a part of a tensor's name."""
    if not isinstance(value, list) or not any(isinstance(one, dict) for one in value):
        return value
    return [
        {"match": f"*{one['filter']}*", "value": one["value"]} if one.get("filter") not in (None, "*")
        else {"value": one["value"] if isinstance(one, dict) else one}
        for one in value
    ]  # fmt: skip


def _nuslerp_share(models: dict[str, Any], config: dict[str, Any], refuse: Refuse) -> None:
    """nuslerp weighs its two models; the arc's share is the second's part of the sum."""
    weights = [one.pop("weight", None) for one in models.values()]
    if len(weights) != 2 or not all(isinstance(one, int | float) for one in weights):
        raise refuse("models", "nuslerp needs two models with one number as weight each.")
    config["t"] = weights[1] / (weights[0] + weights[1])


def _short(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:40] or "model"
