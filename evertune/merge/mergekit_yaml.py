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
from evertune.model.checkpoint import read_json
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
_NORMALIZED = {"linear", "ties", "della"}
# What it scales up after dropping when the file does not say; ours do it or not, as these.
_RESCALED = {"dare_linear", "dare_ties", "della", "della_linear"}
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
    if not isinstance(name, str) or name not in _METHODS:
        raise refuse("merge_method", f"'{name}' is not among: {', '.join(_METHODS)}.")
    if value.get("tokenizer_source") not in (None, "base"):
        raise refuse("tokenizer_source", "tokens of several models are not mixed.", "See vocabulary: by_token.")
    if value.get("chat_template") not in (None, "auto"):
        raise refuse(
            "chat_template", "the result has the template of its base, or of its first model.", "Leave it out."
        )
    method = _METHODS[name]
    entries, of_slice = _entries(value, refuse)
    _check_layers(entries, path.parent, refuse)
    shared = {**_parameters(value.get("parameters"), method, refuse), **_parameters(of_slice, method, refuse)}
    base = value.get("base_model")
    models = _models(entries, base, method, refuse)
    config: dict[str, Any] = {"method": method, "models": models, "compat": "mergekit"}
    if base is not None and METHODS[method].base != "none":
        config["base"] = base
    elif base is not None and not any(entry.get("model") == base for entry in entries):
        raise refuse("base_model", f"'{name}' has no base.", "List it under models.")
    elif base is not None:
        own = next(one.get("parameters") for one in entries if one.get("model") == base)
        models["base-model"] = {"path": base, **_parameters(own, method, refuse)}
        config["config_from"] = "base-model"
    for key, one in shared.items():
        if key == "weight":
            models.update({each: {"weight": one, **settings} for each, settings in models.items()})
        else:
            config[key] = one
    if name == "nuslerp":
        _nuslerp_share(models, config, refuse)
    if "normalize" in METHODS[method].parameters:
        config.setdefault("normalize", method in _NORMALIZED)
    if "density" in METHODS[method].per_model:
        config.setdefault("density", 1.0)  # where the file does not say, mergekit keeps all
    for key in ("density", "weight"):
        if key not in METHODS[method].per_model:
            for settings in models.values():
                settings.pop(key, None)
    dtype = value.get("out_dtype") or value.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise refuse("dtype", f"found '{dtype}', expected one of {', '.join(sorted(_DTYPES))}.")
    return _checked(config if dtype is None else {**config, "dtype": dtype}, path)


def _models(entries: Sequence[Mapping[str, Any]], base: Any, method: str, refuse: Refuse) -> dict[str, Any]:
    """The merged models, all but the base, by a short name of their own."""
    models: dict[str, Any] = {}
    for i, entry in enumerate(entries):
        model = entry.get("model")
        if not isinstance(model, str):
            raise refuse("models", f"entry {i + 1} has no 'model'.")
        if "+" in model:
            raise refuse("models", f"'{model}' is a model with an adapter.", "Name the adapter's folder alone.")
        if model != base:
            own = _parameters(entry.get("parameters"), method, refuse)
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


def _entries(value: Mapping[str, Any], refuse: Refuse) -> tuple[list[Mapping[str, Any]], Any]:
    """The models of a file, and None; of `slices`, those of one slice that takes whole models, and its parameters."""
    if "slices" not in value:
        return _mappings(value.get("models"), "models", refuse), None
    slices = _mappings(value["slices"], "slices", refuse)
    if len(slices) != 1:
        raise refuse("slices", "layers from several ranges are stacked, which makes another architecture.")
    unknown = sorted(set(slices[0]) - {"sources", "parameters"})
    if unknown:
        raise refuse("slices", f"'{unknown[0]}' of a slice has no counterpart here.")
    return _mappings(slices[0].get("sources"), "slices", refuse), slices[0].get("parameters")


def _mappings(value: Any, key: str, refuse: Refuse) -> list[Mapping[str, Any]]:
    found = [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise refuse(key, "found something else, expected a list of entries with 'model', 'sources' or 'parameters'.")
    return found


def _check_layers(entries: Sequence[Mapping[str, Any]], folder: Path, refuse: Refuse) -> None:
    """Raise RecipeError where a range of layers is not the whole model."""
    ranges = [(one.get("model"), one["layer_range"]) for one in entries if one.get("layer_range") is not None]
    for model, given in ranges:
        config = folder / str(model) / "config.json"
        layers = read_json(config).get("num_hidden_layers") if config.is_file() else None
        is_whole = isinstance(given, list) and len(given) == 2 and given[0] == 0 and layers in (None, given[1])
        if not is_whole or given != ranges[0][1]:
            raise refuse("slices", f"found the layers {given} of '{model}', expected all: others make another model.")


def _parameters(parameters: Any, method: str, refuse: Refuse) -> dict[str, Any]:
    if not isinstance(parameters or {}, dict):
        raise refuse("parameters", f"found {parameters}, expected settings by name.")
    found = {}
    for key, value in (parameters or {}).items():
        if key == "weight" or key in _PARAMETERS:
            found[_PARAMETERS.get(key, key)] = _value(value, refuse)
        elif key not in ("int8_mask", "rescale", "nuslerp_flatten", "nuslerp_row_wise"):
            raise refuse("parameters", f"'{key}' has no counterpart here.")
        elif key != "int8_mask" and value is not (
            method in _RESCALED if key == "rescale" else key == "nuslerp_flatten"
        ):
            raise refuse("parameters", f"'{key}: {str(value).lower()}' has no counterpart here.")
    return found


def _value(value: Any, refuse: Refuse) -> Any:
    """A number, a gradient, or filters: a filter is a part of a tensor's name."""
    if not isinstance(value, list) or not any(isinstance(one, dict) for one in value):
        return value
    if not all(isinstance(one, dict) and "value" in one for one in value):
        raise refuse("parameters", f"found {value}, expected numbers, or entries with 'value' and maybe 'filter'.")
    return [
        {"match": f"*{one['filter']}*", "value": one["value"]} if one.get("filter") not in (None, "*")
        else {"value": one["value"]}
        for one in value
    ]  # fmt: skip


def _nuslerp_share(models: dict[str, Any], config: dict[str, Any], refuse: Refuse) -> None:
    """nuslerp weighs its two models; the arc's share is the second's part of the sum."""
    weights = [one.pop("weight", None) for one in models.values()]
    if len(weights) != 2 or not all(isinstance(one, int | float) for one in weights) or not sum(weights):
        raise refuse("models", "nuslerp needs two models with one number as weight each, whose sum is not 0.")
    config["t"] = weights[1] / (weights[0] + weights[1])


def _short(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:40] or "model"
