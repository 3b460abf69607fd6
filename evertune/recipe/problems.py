"""What is wrong with a recipe, a line each, such as

    team.yaml:9, rounds[0].stages[0].sft: unknown key 'lrr'. Did you mean 'lr'?

pydantic finds the problems; here they are joined (a value that fits none of three types is one problem, not three),
placed in the file, and told in the recipe's words.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from evertune.recipe.plugins import GROUPS, Kind, find_plugin
from evertune.recipe.strict_yaml import Steps, spell

_TYPES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_LIMITS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}
_ABOUT_KEYS = ("extra_forbidden", "missing")
_NAMED = re.compile(r"([\w.\[\]-]+): ")
FOUND_CHARACTERS = 60


@dataclass(frozen=True)
class _Problem:
    """pydantic's `kind`, `context`, `found` input and `message` at a path of the recipe."""

    path: Steps
    kind: str
    context: Mapping[str, Any]
    found: Any
    message: str


def problem_lines(
    error: ValidationError, value: Any, places: Mapping[Steps, str], *, root: type[BaseModel]
) -> list[str]:
    """One line per problem: where it stands, its path, what was found, what was expected.

    Args:
        value: the recipe as read.
        places: `file:line` or flag of every path of it.
        root: the model that the value was checked against.
    """
    found: dict[Steps, list[_Problem]] = {}
    for one in error.errors(include_url=False):
        path = _real_path(one["loc"], value, keep_last=one["type"] in _ABOUT_KEYS)
        found.setdefault(path, []).append(_Problem(path, one["type"], one.get("ctx") or {}, one["input"], one["msg"]))
    # Of the types that were tried for one value, the one that got furthest was meant.
    paths = [path for path in found if not any(other[: len(path)] == path != other for other in found)]
    misspelt = {_meant(path, root) for path in paths if found[path][0].kind == "extra_forbidden"}
    paths = [path for path in paths if found[path][0].kind != "missing" or path not in misspelt]
    lines = [line for path in paths for line in _lines(path, found[path], places, root)]
    return list(dict.fromkeys(lines))


def _lines(path: Steps, problems: Sequence[_Problem], places: Mapping[Steps, str], root: Any) -> Iterator[str]:
    first = next((one for one in problems if one.kind not in _TYPES), problems[0])
    if first.kind == "value_error" and not path:
        # Checks of the whole recipe name their places themselves.
        for told in str(first.context["error"]).split("\n"):
            named = _NAMED.match(told)
            yield f"{_place(_steps(named.group(1)) if named else (), places)}, {told}."
        return
    named_path = path[:-1] if first.kind in _ABOUT_KEYS else path
    where = f"{_place(path, places)}, {spell(named_path)}" if named_path else _place(path, places)
    yield f"{where}: {_told(first, problems, root)}"


def _place(path: Steps, places: Mapping[Steps, str]) -> str:
    """Where a path stands, or else what is around it."""
    return next(places[path[:i]] for i in range(len(path), -1, -1) if path[:i] in places)


def _told(one: _Problem, alternatives: Sequence[_Problem], root: Any) -> str:
    if one.kind == "extra_forbidden":
        return _unknown_key(one.path, root)
    if one.kind == "missing":
        return f"the key '{one.path[-1]}' is missing."
    if one.kind == "value_error":
        return f"{one.context['error']}."
    found = f"found {_found(one.found)}"
    if one.kind in _LIMITS:
        return f"{found}, expected {_expected(one)}."
    if one.kind == "string_pattern_mismatch":
        return f"{found}, expected a name of at most 64 small letters, digits, '-' and '_'."
    if one.kind == "string_too_short":
        return "found nothing, expected a text."
    if one.kind == "too_long":
        actual, most = one.context["actual_length"], one.context["max_length"]
        return f"found {actual} of them, expected {'one entry' if most == 1 else f'{most} entries'} at most."
    if one.kind == "too_short":
        # Only what has two or more at least can have one and still be too short.
        actual, least = one.context["actual_length"], one.context["min_length"]
        few = f"{actual} of them" if actual else "nothing"
        return f"found {few}, expected {'one entry' if least == 1 else f'{least} entries'} or more."
    if one.kind not in _TYPES and one.kind != "literal_error":
        return f"{found}: {one.message}."
    expected = [_expected(each) for each in alternatives]
    return f"{found}, expected {' or '.join(dict.fromkeys(expected))}.{_hint(one, expected)}"


def _expected(one: _Problem) -> str:
    if one.kind == "literal_error":
        return str(one.context["expected"])
    if one.kind in _LIMITS:
        return f"a number {_LIMITS[one.kind]} {next(iter(one.context.values()))}"
    return _TYPES.get(one.kind, one.message)


def _hint(one: _Problem, expected: Sequence[str]) -> str:
    if one.kind == "literal_error":
        return _did_you_mean(one.found, re.findall(r"'([^']*)'", expected[0]))
    if expected == ["a text"] and isinstance(one.found, bool | int | float):
        return " Put it in quotes."
    return ""


def _meant(path: Steps, root: Any) -> Steps:
    """The path of the key that an unknown one is most like; its own where there is none."""
    near = _nearest(path[-1], _known_keys(path[:-1], root))
    return (*path[:-1], *near) if near else path


def _unknown_key(path: Steps, root: Any) -> str:
    known = _known_keys(path[:-1], root)
    listed = f" Known: {', '.join(known)}." if known else " It takes no options."
    return f"unknown key '{path[-1]}'.{_did_you_mean(path[-1], known) or listed}"


def _did_you_mean(found: Any, known: Sequence[str]) -> str:
    near = _nearest(found, known)
    return f" Did you mean '{near[0]}'?" if near else ""


def _nearest(found: Any, known: Sequence[str]) -> list[str]:
    """The known word most like the found one, if one is."""
    return difflib.get_close_matches(str(found), known, n=1, cutoff=0.6)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= FOUND_CHARACTERS else f"{text[:FOUND_CHARACTERS]}..."


def _real_path(location: Sequence[str | int], value: Any, *, keep_last: bool) -> Steps:
    """pydantic's location without what is not in the recipe: names of types that were tried, `[key]`.

    The last step of a missing or unknown key is kept.
    """
    path: list[str | int] = []
    for i, step in enumerate(location):
        is_key, is_index = isinstance(value, dict) and step in value, isinstance(value, list) and isinstance(step, int)
        if is_key or is_index:
            value = value[step]
            path.append(step)
        elif keep_last and i == len(location) - 1:
            path.append(step)
    return tuple(path)


def _steps(written: str) -> Steps:
    found = re.findall(r"\[(\d+)\]|([^.\[\]]+)", written)
    return tuple(int(index) if index else key for index, key in found)


def _known_keys(path: Steps, root: Any) -> list[str]:
    """Keys that the schema knows at a place, found by walking the models along the path."""
    models: list[Any] = [root]
    for step in path:
        models = [inner for model in models for inner in _step_into(model, step)]
    return list(dict.fromkeys(name for model in models for name in _field_names(model)))


@dataclass(frozen=True)
class _Entries:
    """A mapping from free names to models, such as `probes`."""

    models: tuple[Any, ...]


@dataclass(frozen=True)
class _Named:
    """A mapping from names of plug-ins to their options."""

    kind: Kind


def _step_into(model: Any, step: str | int) -> Iterator[Any]:
    if isinstance(step, int):
        yield model
    elif isinstance(model, _Named):
        yield find_plugin(model.kind, step).options
    elif isinstance(model, _Entries):
        yield from model.models
    else:
        for name, one in model.model_fields.items():
            if step in (name, one.alias) and name in GROUPS:
                yield _Named(name)
            elif step in (name, one.alias):
                yield from _models_in(one.annotation)


def _models_in(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
        return
    inner = [model for one in getattr(annotation, "__args__", ()) for model in _models_in(one)]
    if getattr(annotation, "__origin__", None) is dict:
        yield _Entries(tuple(inner))
    else:
        yield from inner


def _field_names(model: Any) -> Iterator[str]:
    for name, one in getattr(model, "model_fields", {}).items():
        yield one.alias or name
