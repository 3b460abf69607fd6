"""docs/recipe.md, written from the schema: `python -m evertune.recipe.reference docs/recipe.md`."""

import sys
from pathlib import Path
from typing import Any

from evertune.recipe import presets
from evertune.recipe.json_schema import recipe_json_schema

INTRODUCTION = """# Recipe reference

Written from the schema; do not edit by hand (`make docs`). Paths are relative to the recipe. Unknown keys are errors.
`evertune schema > evertune.schema.json` gives editors completion: put
`# yaml-language-server: $schema=evertune.schema.json` on the recipe's first line.

Any value can be overridden on the command line: `evertune run recipe.yaml --set rounds[0].stages[0].sft.lr=1e-4`.
"""


def reference_text() -> str:
    """The whole page as Markdown."""
    schema = recipe_json_schema()
    parts = [INTRODUCTION, _section("Recipe", schema)]
    parts += [_section(name, _plain(one)) for name, one in schema["$defs"].items()]
    parts.append("## Presets\n\n" + (presets.__doc__ or "").strip() + "\n")
    return "\n".join(parts)


def write_reference(path: Path) -> None:
    """Write the page."""
    path.write_text(reference_text(), encoding="utf-8")


def _section(name: str, model: dict[str, Any]) -> str:
    lines = [f"## {name}\n", _one_line(model.get("description", "")), ""]
    if "properties" in model:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        required = model.get("required", [])
        for key, one in model["properties"].items():
            default = "**required**" if key in required else f"`{_yaml(one['default'])}`" if "default" in one else ""
            lines.append(f"| `{key}` | {_type(one)} | {default} | {_one_line(one.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines)


def _plain(model: dict[str, Any]) -> dict[str, Any]:
    """A model that also has a bare-name form, without it."""
    for one in model.get("anyOf", []):
        if "properties" in one:
            words = next(other["enum"] for other in model["anyOf"] if "enum" in other)
            return {**one, "description": f"{one.get('description', '')} Bare: {', '.join(words)}."}
    return model


def _type(one: dict[str, Any]) -> str:
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in one:
        return " or ".join(_type(inner) for inner in one["anyOf"] if inner.get("type") != "null")
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "const" in one:
        return f"`{one['const']}`"
    if one.get("type") == "array":
        return f"list of {_type(one['items'])}"
    if one.get("type") == "object" and isinstance(one.get("additionalProperties"), dict):
        return f"mapping to {_type(one['additionalProperties'])}"
    if one.get("type") == "object" and one.get("patternProperties"):
        return f"mapping to {_type(next(iter(one['patternProperties'].values())))}"
    return str(one.get("type", "any")) + _range(one)


def _range(one: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {one[key]:g}" for key, sign in signs.items() if key in one]
    return f", {' and '.join(limits)}" if limits else ""


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(one) for one in value) + "]"
    return "null" if value is None else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
