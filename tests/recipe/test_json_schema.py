"""An editor that checks against the JSON Schema accepts what the loader accepts, and refuses unknown keys."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from evertune.recipe.json_schema import recipe_json_schema
from evertune.recipe.starter import RECIPE
from evertune.recipe.strict_yaml import read_yaml
from tests.recipe.texts import VALID, changed, load_text

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SHORTHANDS = {
    "one name": changed("data: [tickets]", "data: tickets").replace("from: [general]", "from: general"),
    "weights": changed("data: [tickets]", "data: {tickets: 1, general: 0.5}"),
    "bare tune": changed("lr: 1e-4", "tune: full"),
    "tune without a value": changed("lr: 1e-4", "tune: {lora: }"),
    "bare rungs": "rescue: [interpolate, discard]\n" + VALID,
    "a verifier with an argument": changed("verifier: exact", "verifier: {regex: '[0-9]+'}"),
    "a schema as verifier": changed("verifier: exact", "verifier: {json_schema: {type: object, anything: [1]}}"),
    "targets by name": changed("lr: 1e-4", "tune: {lora: {targets: [q_proj]}}"),
    "no clipping": changed("lr: 1e-4", "clip: null"),
    "a whole number": changed("lr: 1e-4", "lr: 1"),
}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = recipe_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def written(folder: Path, text: str) -> Any:
    """The recipe's plain values, which the loader has accepted."""
    load_text(folder, text)
    return read_yaml(folder / "team.yaml").value


@pytest.mark.parametrize("text", [VALID, RECIPE, *(path.read_text() for path in RECIPES)])
def test_recipes_are_valid(text: str, validator: Any, tmp_path: Path) -> None:
    validator.validate(written(tmp_path, text))


@pytest.mark.parametrize("name", SHORTHANDS)
def test_shorthands_are_valid(name: str, validator: Any, tmp_path: Path) -> None:
    validator.validate(written(tmp_path, SHORTHANDS[name]))


def test_a_resolved_recipe_is_valid(validator: Any, tmp_path: Path) -> None:
    validator.validate(load_text(tmp_path).resolved)


def _mappings(value: Any) -> list[dict[str, Any]]:
    """Every mapping in a recipe, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [found for one in inner for found in _mappings(one)]


def test_an_unknown_key_is_refused_wherever_it_stands(validator: Any, tmp_path: Path) -> None:
    recipe = load_text(tmp_path).resolved
    mappings = _mappings(recipe)
    assert len(mappings) > 20
    for mapping in mappings:
        mapping["Unknown Key"] = 1
        assert not validator.is_valid(recipe), mapping
        del mapping["Unknown Key"]
    validator.validate(recipe)


@pytest.mark.parametrize(
    ("old", "new"),
    [("verifier: exact", "verifier: exactly"), ("lr: 1e-4", "lr: -1"), ("kind: choice", "kind: choise")],
)
def test_wrong_values_are_refused(old: str, new: str, validator: Any, tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text(changed(old, new))
    assert not validator.is_valid(read_yaml(tmp_path / "team.yaml").value)
