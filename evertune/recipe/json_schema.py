"""The recipe's JSON Schema, for editors: it accepts what the loader accepts, bare names included."""

from typing import Any

from evertune.recipe.schema import Launch, Recipe, Rung, Tune, Verifier

DIALECT = "https://json-schema.org/draft/2020-12/schema"
BARE_NAMES = {model.__name__: list(model.bare_names) for model in (Verifier, Tune, Rung)}


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema(by_alias=True)
    for name, words in BARE_NAMES.items():
        schema["$defs"][name] = {"anyOf": [{"enum": words}, schema["$defs"][name]]}
    command = schema["$defs"][Launch.__name__]
    schema["$defs"][Launch.__name__] = {"anyOf": [command["properties"]["command"], command]}
    return {"$schema": DIALECT, **_closed(schema), "title": "Evertune recipe"}


def _closed(value: Any) -> Any:
    """With free names held to their pattern: else a misspelt name passes unchecked."""
    if isinstance(value, list):
        return [_closed(one) for one in value]
    if not isinstance(value, dict):
        return value
    closed = {name: _closed(one) for name, one in value.items()}
    if "patternProperties" in closed:
        closed["additionalProperties"] = False
    return closed
