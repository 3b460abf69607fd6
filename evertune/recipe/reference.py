"""docs/recipe.md, written from the schema: `python -m evertune.recipe.reference docs/recipe.md`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evertune.methods import methods
from evertune.recipe import merging
from evertune.recipe import schema as recipe_schema
from evertune.recipe.json_schema import recipe_json_schema
from evertune.recipe.presets import PRESETS, SOURCES, Preset

INTRODUCTION = """# Recipe reference

Written from the schema; do not edit by hand (`make docs`). A recipe is one YAML file. Paths are relative to it, unknown
keys and keys that stand twice are errors, and numbers such as `1e-5` are numbers.

`evertune schema > evertune.schema.json` gives editors completion: put
`# yaml-language-server: $schema=evertune.schema.json` on the recipe's first line. Any value can be overridden on the
command line: `evertune run recipe.yaml --set rounds[0].stages[0].sft.lr=1e-4`; negative indexes count from the end.
"""
PRESETS_BEFORE = """## Presets

`preset: gentle`, `balanced` (when none is named) or `full` gives what neither a stage nor `defaults` says.
"""
_TYPES = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping"}
_SIGNS = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}


def reference_text() -> str:
    """The whole page as Markdown: every model in the order a recipe meets them, then the presets."""
    schema = recipe_json_schema()
    models = {"Recipe": schema, **{name: _without_bare_names(schema["$defs"][name]) for name in _met(schema, schema)}}
    sections = [_section(name, model) for name, model in models.items()]
    return "\n".join([INTRODUCTION, *sections, _presets()])


def write_reference(path: Path) -> None:
    """Write the page."""
    path.write_text(reference_text(), encoding="utf-8")


def _section(name: str, model: dict[str, Any]) -> str:
    lines = [f"## {name}\n", _one_line(model.get("description", "")), ""]
    if model.get("properties"):
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        required = model.get("required", [])
        for key, one in model["properties"].items():
            default = "**required**" if key in required else _default(one)
            meaning = " ".join([_one_line(one.get("description", "")), *_method_links(name, key)])
            lines.append(f"| `{key}` | {_type(one)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _method_links(model: str, key: str) -> Iterator[str]:
    """A link to the row of each method that a key selects; a model has the keys of those it is derived from."""
    lineage = {one.__name__ for one in (vars(merging) | vars(recipe_schema))[model].__mro__}
    for method in methods().values():
        places = [place.partition("=")[0].split(".") for place in method.keys]
        if any(owner in lineage and field == key for owner, field in places):
            yield f"Method: [{method.id}](methods.md#{method.id}), {method.standing}."


def _presets() -> str:
    table = [f"| | {' | '.join(PRESETS)} |", "|---" * (len(PRESETS) + 1) + "|"]
    for name in SOURCES:
        cells = [_preset_value(preset, name) for preset in PRESETS.values()]
        table.append(f"| `{name}` | {' | '.join(cells)} |")
    what = [f"- `{name}`: {preset.summary}." for name, preset in PRESETS.items()]
    sources = [f"- `{name}`: {source}" for name, source in SOURCES.items()]
    return "\n".join([PRESETS_BEFORE, *what, "", *table, "", "Where the numbers come from:\n", *sources, ""])


def _preset_value(preset: Preset, name: str) -> str:
    if name == "tune":
        return f"LoRA, rank {preset.tune.lora.rank}" if preset.tune.lora else "full"
    return f"{getattr(preset, name):g}"


def _met(value: Any, schema: dict[str, Any], met: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the models that a part of the schema leads to, in order of their first mention."""
    for name in _references({**value, "$defs": {}}):
        if name not in met:
            met = _met(schema["$defs"][name], schema, (*met, name))
    return met


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].rpartition("/")[2]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _references(one)


def _without_bare_names(model: dict[str, Any]) -> dict[str, Any]:
    """A model that may stand as a bare name: the mapping, with the names in its description."""
    for one in model.get("anyOf", []):
        if "properties" in one:
            words: list[str] = next((other["enum"] for other in model["anyOf"] if "enum" in other), [])
            names = ", ".join(f"`{word}`" for word in words)
            told = f" Bare names: {names}." if words else ""
            return {**one, "description": f"{one['description']}{told}"}
    return model


def _type(one: dict[str, Any]) -> str:
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in one:
        kinds = [_type(inner) for inner in one["anyOf"] if inner.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    if one.get("type") == "array":
        return f"list of {_type(one['items'])}"
    if one.get("type") == "object":
        inner = [*one.get("patternProperties", {}).values(), one.get("additionalProperties")]
        return f"mapping to {_type(inner[0])}" if isinstance(inner[0], dict) else "mapping"
    kind = str(one.get("type", "any"))
    return _TYPES.get(kind, kind) + _range(one)


def _range(one: dict[str, Any]) -> str:
    limits = [f"{word} {_number(one[key])}" for key, word in _SIGNS.items() if key in one]
    return f" {' '.join(limits)}" if limits else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(one: dict[str, Any]) -> str:
    if "$ref" in one:
        return "its own"
    return f"`{_yaml(one['default'])}`" if one.get("default") is not None else ""


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(one) for one in value) + "]"
    return "null" if value is None else str(value).replace("\n", "\\n").replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
