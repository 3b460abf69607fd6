"""The recipe's JSON Schema, for editors: it accepts what the loader accepts, bare names included."""

from typing import Any

from evertune.recipe.schema import Recipe

# Models that may be written as a bare name, and which names.
BARE_NAMES = {
    "Verifier": ["exact", "contains", "math"],
    "Tune": ["full", "lora"],
    "Rung": ["interpolate", "discard"],
}


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    for name, words in BARE_NAMES.items():
        if name in schema["$defs"]:
            schema["$defs"][name] = {"anyOf": [{"enum": words}, schema["$defs"][name]]}
    data = schema["$defs"]["Sft"]["properties"]["data"]
    data["anyOf"].append({"type": "string"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Evertune recipe", **schema}
