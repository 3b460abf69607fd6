"""mergekit's YAML as a configuration of ours, so that an old merge can be made again.

Written from its documentation. Lists are gradients over depth in both; its filters are substrings, ours are globs.
`compat: mergekit` is set, so that its conventions are followed where they differ; in an imported file, remove it to
get ours. What has no counterpart (stacking of layers, tokens from several models) is an error that says so.
"""

import difflib
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evertune.errors import RecipeError
from evertune.merge.config import MergeConfig, parse_config
from evertune.merge.methods import METHODS
from evertune.model.checkpoint import read_json
from evertune.recipe.strict_yaml import Document, Steps, spell

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
_PARAMETERS = {"weight": "weight", "lambda": "lambda", "t": "t", "density": "density", "normalize": "normalize",
               "epsilon": "epsilon", "gamma": "gamma", "select_topk": "density"}  # fmt: skip
# Of ours, what each model can have for itself.
_PER_MODEL = ("weight", "density")


@dataclass(frozen=True)
class _Setting:
    """A value of ours, and where the file has it."""

    value: Any
    steps: Steps


@dataclass
class _File:
    """A file under translation.

    places: of our settings, by their path, for the messages of what checks them.
    """

    document: Document
    path: Path
    method: str = ""
    places: dict[Steps, str] = field(default_factory=dict)

    def refuse(self, steps: Steps, found: str, remedy: str = "") -> RecipeError:
        """The error that names the place of a path of the file, or of what is around it."""
        known = self.document.places
        where = next((known[steps[:i]] for i in range(len(steps), 0, -1) if steps[:i] in known), str(self.path))
        return RecipeError(f"{where}, {spell(steps)}: {found}", remedy=remedy)

    def put(self, config: dict[str, Any], ours: Steps, theirs: Steps, value: Any) -> None:
        """Set a value of ours, and remember where it and what is in it stand in the file."""
        inner: Any = config
        for step in ours[:-1]:
            inner = inner.setdefault(step, {})
        inner[ours[-1]] = value
        for steps, place in self.document.places.items():
            if steps[: len(theirs)] == theirs:
                rest = tuple("match" if one == "filter" else one for one in steps[len(theirs) :])
                self.places[(*ours, *rest)] = place


def translate(document: Document, path: Path) -> MergeConfig:
    """The same merge in our words.

    Raises:
        RecipeError: the file asks for something that has no counterpart, or is malformed.
    """
    file = _File(document, path)
    file.places[()] = str(path)
    value = document.value
    name = _check_top(value, file)
    file.method = method = _METHODS[name]
    entries, of_slice = _entries(value, file)
    _check_layers(entries, file)
    base = value.get("base_model")
    if base is not None and not isinstance(base, str):
        raise file.refuse(("base_model",), f"found {base!r}, expected a model's folder.")
    config: dict[str, Any] = {}
    for key, one in (("method", method), ("compat", "mergekit"), ("models", {})):
        file.put(config, (key,), ("merge_method" if key == "method" else key,), one)
    shared = {
        **_parameters(value.get("parameters"), ("parameters",), file),
        **_parameters(of_slice, ("slices", 0, "parameters"), file),
    }
    _put_models(config, entries, base, file, shared)
    if base is not None and METHODS[method].base != "none":
        file.put(config, ("base",), ("base_model",), base)
    elif base is not None and not any(entry.get("model") == base for _, entry in entries):
        raise file.refuse(("base_model",), f"'{name}' has no base.", "List it under models.")
    for key, setting in shared.items():
        if key != "weight":
            file.put(config, (key,), setting.steps, setting.value)
    if name == "nuslerp":
        _nuslerp_share(config, file)
    if "normalize" in METHODS[method].parameters:
        config.setdefault("normalize", method in _NORMALIZED)
    if "density" in METHODS[method].per_model:
        config.setdefault("density", 1.0)  # where the file does not say, mergekit keeps all
    for key in _PER_MODEL:
        if key not in METHODS[method].per_model:
            for settings in config["models"].values():
                settings.pop(key, None)
    for key in ("dtype", "out_dtype"):
        if value.get(key) is not None:
            if value[key] not in _DTYPES:
                raise file.refuse((key,), f"found {value[key]!r}, expected one of {', '.join(sorted(_DTYPES))}.")
            file.put(config, ("dtype",), (key,), value[key])
    return parse_config(Document(config, file.places))


def _check_top(value: Mapping[str, Any], file: _File) -> str:
    """The method's name, where nothing at the top of the file stands against a translation."""
    unknown = sorted(set(value) - _TOP_KEYS)
    if unknown:
        raise file.refuse(
            (unknown[0],), f"this mergekit setting has no counterpart here.{_near(unknown[0], _TOP_KEYS)}"
        )
    name = value["merge_method"]
    if not isinstance(name, str) or name not in _METHODS:
        known = f"'{name}' is not among: {', '.join(_METHODS)}.{_near(name, _METHODS)}"
        raise file.refuse(("merge_method",), known)
    if value.get("tokenizer_source") not in (None, "base"):
        raise file.refuse(("tokenizer_source",), "tokens of several models are not mixed.", "See vocabulary: by_token.")
    if value.get("chat_template") not in (None, "auto"):
        raise file.refuse(
            ("chat_template",), "the result has the template of its base, or of its first model.", "Leave it out."
        )
    return name


def _near(found: Any, known: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(found), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


Entries = Sequence[tuple[Steps, Mapping[str, Any]]]
"""The models of a file, each with its place."""


def _entries(value: Mapping[str, Any], file: _File) -> tuple[Entries, Any]:
    """The models of a file, and None; of `slices`, those of one slice that takes whole models, and its parameters."""
    if "slices" not in value:
        return _mappings(value.get("models"), ("models",), {"model", "parameters"}, file), None
    slices = _mappings(value["slices"], ("slices",), {"sources", "parameters"}, file)
    if len(slices) != 1:
        raise file.refuse(("slices",), "layers from several ranges are stacked, which makes another architecture.")
    one = slices[0][1]
    known = {"model", "parameters", "layer_range"}
    return _mappings(one.get("sources"), ("slices", 0, "sources"), known, file), one.get("parameters")


def _mappings(value: Any, steps: Steps, known: set[str], file: _File) -> Entries:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise file.refuse(steps, f"found {_shown(value)}, expected a list of entries with {_or(known)}.")
    for i, one in enumerate(value):
        for key in one:
            if key not in known:
                remedy = "Put it under 'parameters'." if key in _PARAMETERS else ""
                near = "" if remedy else _near(key, known)
                raise file.refuse((*steps, i, key), f"entry {i + 1} has '{key}', expected {_or(known)}.{near}", remedy)
    return [((*steps, i), one) for i, one in enumerate(value)]


def _or(words: set[str]) -> str:
    return " or ".join(f"'{one}'" for one in sorted(words))


def _shown(value: Any) -> str:
    return "nothing" if value is None or value == [] else repr(value)


def _check_layers(entries: Entries, file: _File) -> None:
    """Raise RecipeError where a range of layers is not the whole model."""
    ranges = [(one.get("model"), one["layer_range"]) for _, one in entries if one.get("layer_range") is not None]
    for model, given in ranges:
        config = file.path.parent / str(model) / "config.json"
        layers = read_json(config).get("num_hidden_layers") if config.is_file() else None
        is_whole = isinstance(given, list) and len(given) == 2 and given[0] == 0 and layers in (None, given[1])
        if not is_whole or given != ranges[0][1]:
            raise file.refuse(
                ("slices",), f"found the layers {given} of '{model}', expected all: others make another model."
            )


def _put_models(config: dict[str, Any], entries: Entries, base: Any, file: _File, shared: dict[str, _Setting]) -> None:
    """The merged models by a short name of their own; the base among them where the method has none."""
    further: dict[str, list[_Setting]] = {}
    counted = 0
    for steps, entry in entries:
        model = entry.get("model")
        if not isinstance(model, str):
            raise file.refuse(steps, f"entry {steps[-1] + 1 if isinstance(steps[-1], int) else ''} has no 'model'.")
        if "+" in model:
            raise file.refuse(steps, f"'{model}' is a model with an adapter.", "Name the adapter's folder alone.")
        if model == base and METHODS[file.method].base != "none":
            continue
        name = "base-model" if model == base else f"m{counted}-{_short(model)}"
        counted += model != base
        own = _parameters(entry.get("parameters"), (*steps, "parameters"), file)
        file.put(config, ("models", name, "path"), (*steps, "model"), model)
        if model == base:
            config["config_from"] = name
        for key in _PER_MODEL:
            setting = own.pop(key, shared.get(key) if key == "weight" else None)
            if setting is not None:
                file.put(config, ("models", name, key), setting.steps, setting.value)
        for key, setting in own.items():
            further.setdefault(key, []).append(setting)
    # What only the whole merge can have here stands where all models have the same.
    for key, settings in further.items():
        if len(settings) < counted or any(one.value != settings[0].value for one in settings):
            told = f"'{key}' is one for all models here, and the entries have different ones."
            raise file.refuse(settings[0].steps, told, "Give it under the merge's own 'parameters'.")
        shared.setdefault(key, settings[0])


def _parameters(parameters: Any, steps: Steps, file: _File) -> dict[str, _Setting]:
    if parameters is not None and not isinstance(parameters, dict):
        raise file.refuse(steps, f"found {parameters!r}, expected settings by name.")
    found = {}
    for key, value in (parameters or {}).items():
        inner = (*steps, key)
        if key in _PARAMETERS:
            found[_PARAMETERS[key]] = _Setting(_value(value, inner, file), inner)
        elif key not in ("int8_mask", "rescale", "nuslerp_flatten", "nuslerp_row_wise"):
            raise file.refuse(inner, f"'{key}' has no counterpart here.{_near(key, _PARAMETERS)}")
        elif key != "int8_mask" and value not in (
            [file.method in _RESCALED] if key == "rescale" else [key == "nuslerp_flatten"]
        ):
            raise file.refuse(inner, f"'{key}: {str(value).lower()}' has no counterpart here.")
    return found


def _value(value: Any, steps: Steps, file: _File) -> Any:
    """A number, a gradient, or filters: a filter is a part of a tensor's name."""
    if not isinstance(value, list) or not any(isinstance(one, dict) for one in value):
        return value
    if not all(isinstance(one, dict) and "value" in one and not set(one) - {"value", "filter"} for one in value):
        raise file.refuse(steps, f"found {value}, expected numbers, or entries with 'value' and maybe 'filter'.")
    return list(_matches(value))


def _matches(filters: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in filters:
        is_for_all = one.get("filter") in (None, "*")
        named = {} if is_for_all else {"match": f"*{glob.escape(str(one['filter']))}*"}
        yield {**named, "value": one["value"]}


def _nuslerp_share(config: dict[str, Any], file: _File) -> None:
    """nuslerp weighs its two models; the arc's share is the second's part of the sum."""
    weights = [one.pop("weight", None) for one in config["models"].values()]
    is_right = len(weights) == 2 and all(isinstance(one, int | float) for one in weights)
    if not is_right or not sum(weights):
        raise file.refuse(("models",), "nuslerp needs two models with one number as weight each, whose sum is not 0.")
    config["t"] = weights[1] / (weights[0] + weights[1])


def _short(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:40] or "model"
