"""From a YAML file to a checked recipe. Whatever is wrong is named by file, line and path, with what to do.

YAML is read by the rules of version 1.2 where 1.1 surprises: `1e-5` is a number, `no` and `on` are words, and a key
that stands twice is an error. Size, depth, nodes and aliases are capped before anything is built.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evertune.errors import RecipeError
from evertune.hashing import digest_json
from evertune.recipe.schema import Recipe

FILE_BYTES = 1 << 20
NODES = 50_000
DEPTH = 64
ALIASES = 100
SHOWN_ERRORS = 10

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    Attributes:
        recipe: the frozen objects.
        path: the file.
        lines: 1-based line of each key and list entry, by path.
    """

    recipe: Recipe
    path: Path
    lines: dict[Path_, int]

    @property
    def folder(self) -> Path:
        """What the recipe's paths are relative to."""
        return self.path.parent

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, with defaults filled in."""
        return self.recipe.model_dump(mode="json", by_alias=True)

    @cached_property
    def digest(self) -> str:
        """Digest of the resolved recipe: comments and order of keys do not count."""
        return digest_json(self.resolved)

    def resolve(self, path: str) -> Path:
        """A path of the recipe, absolute."""
        return (self.folder / path).absolute()


def load_recipe(path: Path, *, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file.
        overrides: `path=value`, such as `rounds[0].stages[0].sft.lr=1e-4`, applied in order; values are YAML.

    Raises:
        RecipeError: at most ten problems, one a line, each with file, line, path, what was found and what to do.
    """
    path = path.absolute()
    root = _compose(_read(path), str(path))
    lines: dict[Path_, int] = {}
    value = _build(root, (), lines, str(path))
    for one in overrides:
        _override(value, one)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        problems = _merge_alternatives(error)
        shown = [_problem(one, value, lines, str(path)) for one in problems[:SHOWN_ERRORS]]
        more = f"\n... and {len(problems) - SHOWN_ERRORS} more" if len(problems) > SHOWN_ERRORS else ""
        raise RecipeError("\n".join(dict.fromkeys(shown)) + more) from None
    return LoadedRecipe(recipe=recipe, path=path, lines=lines)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null", "str", "map", "seq")}


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder.", remedy="Name the recipe's YAML file.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.", remedy="Check the path.") from error
    if len(data) > FILE_BYTES:
        raise RecipeError(f"{path} has {len(data):,} bytes; a recipe has at most {FILE_BYTES:,}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}).") from error


def _compose(text: str, file: str) -> yaml.Node:
    """The document's nodes, after the caps; nothing is built from more than it can hold."""
    try:
        aliases = sum(isinstance(one, yaml.AliasToken) for one in yaml.scan(text, Loader=_Loader))
        if aliases > ALIASES:
            raise RecipeError(f"{file}: {aliases} aliases; a recipe has at most {ALIASES}.")
        documents = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        raise RecipeError(f"{place}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML: {error}.") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: nested too deeply.") from error
    if len(documents) != 1 or documents[0] is None:
        found = (
            "no document: the file is empty" if not documents or documents[0] is None else f"{len(documents)} documents"
        )
        raise RecipeError(f"{file}: found {found}; a recipe is one YAML mapping.", remedy="See 'evertune init'.")
    root: yaml.Node = documents[0]
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{file}:{root.start_mark.line + 1}: found {_node_kind(root)}; a recipe is one YAML mapping.")
    return root


def _build(node: yaml.Node, path: Path_, lines: dict[Path_, int], file: str) -> Any:
    place = f"{file}:{node.start_mark.line + 1}"
    if len(lines) > NODES:
        raise RecipeError(f"{file}: more than {NODES:,} values once aliases are expanded.")
    if len(path) > DEPTH:
        raise RecipeError(f"{place}: nested more than {DEPTH} levels deep.")
    if node.tag not in _TAGS:
        raise RecipeError(f"{place}, {_spell(path)}: the YAML tag {node.tag!r} is not allowed.", remedy="Remove it.")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, path, lines, file)
    if isinstance(node, yaml.SequenceNode):
        return [_build(one, (*path, i), lines, file) for i, one in enumerate(node.value)]
    return _scalar(node)


def _build_mapping(node: yaml.MappingNode, path: Path_, lines: dict[Path_, int], file: str) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{file}:{line}: found {_node_kind(key_node)} as a key; keys are words.")
        # Keys are what is written: a round or a source may be called 2026 or no.
        key = str(key_node.value)
        inner = (*path, key)
        if key in value:
            raise RecipeError(
                f"{file}:{line}, {_spell(inner)}: the key stands already at line {lines[inner]}.",
                remedy="Remove one of the two.",
            )
        lines[inner] = line
        value[key] = _build(value_node, inner, lines, file)
    return value


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _override(value: dict[str, Any], text: str) -> None:
    """Set one value in place; mappings on the way are made when missing."""
    place, sign, written = text.partition("=")
    place = place.strip()
    if not sign or not place:
        raise RecipeError(f"--set {text!r}: expected PATH=VALUE, such as rounds[0].stages[0].sft.lr=1e-4.")
    steps = _parse_path(place, text)
    new = _build(_wrapped(written, text), (), {}, f"--set {text!r}")["value"]
    target: Any = value
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        here = _spell(tuple(steps[:i])) or "the recipe"
        if isinstance(step, int):
            if not isinstance(target, list) or not -len(target) <= step < len(target):
                found = f"a list of {len(target)}" if isinstance(target, list) else _kind(target)
                raise RecipeError(f"--set {text!r}: {here} is {found}, so it has no entry [{step}].")
        elif not isinstance(target, dict):
            raise RecipeError(f"--set {text!r}: {here} is {_kind(target)}, so it has no key '{step}'.")
        if last:
            target[step] = new
        else:
            if isinstance(target, dict) and (step not in target or target[step] is None):
                target[step] = {}
            target = target[step]


def _wrapped(written: str, text: str) -> yaml.Node:
    try:
        node = yaml.compose(f"value: {written}", Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML.", remedy="Quote it.") from error
    if node is None:
        raise AssertionError("a mapping with one key is never empty")
    return node


def _parse_path(place: str, text: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in place.split("."):
        match = re.fullmatch(r"([^\[\]]+)((?:\[-?\d+\])*)", part)
        if match is None:
            raise RecipeError(f"--set {text!r}: {place!r} is not a path such as rounds[0].name.")
        steps.append(match.group(1))
        steps += [int(one) for one in re.findall(r"\[(-?\d+)\]", match.group(2))]
    return steps


def _merge_alternatives(error: ValidationError) -> list[Any]:
    """Problems by place, in the recipe's order; of several types that were tried for one value, the first tells all."""
    found: dict[tuple[Any, ...], Any] = {}
    for one in error.errors(include_url=False):
        found.setdefault(_real_path(one["loc"]), one)
    places = list(found)
    # A union reports a problem per branch: keep the deepest of each place.
    return [
        found[place] for place in places if not any(len(o) > len(place) and o[: len(place)] == place for o in places)
    ]


def _real_path(location: tuple[Any, ...]) -> Path_:
    """A pydantic location without the names of types and validators that it mixes in."""
    return tuple(
        one for one in location if isinstance(one, int) or not re.search(r"[\[(]|^function-|^list$|^dict$", one)
    )


def _problem(one: Any, value: Any, lines: dict[Path_, int], file: str) -> str:
    path = _existing(_real_path(one["loc"]), value, keep_last=one["type"] in ("extra_forbidden", "missing"))
    line = next((lines[path[:i]] for i in range(len(path), -1, -1) if path[:i] in lines), 1)
    told = _tell(one, path)
    named = re.match(r"([\w.\[\]-]+): ", told) if one["type"] == "value_error" and not path else None
    if named:
        # A check of the whole recipe names the place itself.
        steps = tuple(_parse_path(named.group(1), told))
        return f"{file}:{lines.get(steps, line)}, {told}"
    where = f"{file}:{line}" + (f", {_spell(path)}" if path else "")
    return f"{where}: {told}"


def _tell(one: Any, path: Path_) -> str:
    kind, context = one["type"], one.get("ctx") or {}
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "missing":
        return "this key is missing."
    if kind == "value_error":
        return f"{context['error']}."
    found = _kind(one["input"])
    if kind == "literal_error":
        return (
            f"found {found}, expected {context['expected']}.{_did_you_mean(one['input'], _quoted(context['expected']))}"
        )
    limits = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    if kind in limits:
        sign = limits[kind]
        return f"found {found}, expected a number {words[sign]} {context[sign]}."
    if kind == "string_pattern_mismatch":
        return f"found {found}, expected a name of small letters, digits, '-' and '_' (at most 64)."
    if kind == "too_short":
        return "found nothing, expected at least one entry."
    return f"found {found}, {_lower_first(one['msg'])}."


def _unknown_key(path: Path_) -> str:
    known = _known_keys(path[:-1])
    hint = _did_you_mean(str(path[-1]), known) or f" Known: {', '.join(known)}."
    return f"unknown key '{path[-1]}'.{hint}"


def _known_keys(path: Path_) -> list[str]:
    """Keys that the schema knows at a place, found by walking the models along the path."""
    models: list[Any] = [Recipe]
    for step in path:
        models = [inner for model in models for inner in _step_into(model, step)]
    return list(dict.fromkeys(name for model in models for name in _field_names(model)))


@dataclass(frozen=True)
class _Entries:
    """A mapping from free names to models, such as `probes`."""

    models: tuple[Any, ...]


def _step_into(model: Any, step: str | int) -> Iterator[Any]:
    if isinstance(step, int):
        yield model
    elif isinstance(model, _Entries):
        yield from model.models
    else:
        for name, one in model.model_fields.items():
            if step in (name, one.alias):
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


def _did_you_mean(found: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(found), known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _existing(path: Path_, value: Any, *, keep_last: bool) -> Path_:
    """The part of a path that is really in the recipe; the last step may be the missing or unknown key itself."""
    here, real = value, []
    for i, step in enumerate(path):
        inside = (isinstance(here, dict) and step in here) or (isinstance(here, list) and isinstance(step, int))
        if not inside:
            if keep_last and i == len(path) - 1:
                real.append(step)
            continue
        real.append(step)
        here = here[step]
    return tuple(real)


def _spell(path: Path_) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else repr(value)


def _node_kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
