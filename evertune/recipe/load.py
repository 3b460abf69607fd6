"""From a YAML file to a checked recipe. Whatever is wrong is named by file, line and path, with what to do.

strict_yaml.py  text to values      overrides.py  --set      schema.py  values to a recipe      problems.py  or not
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evertune.errors import RecipeError
from evertune.hashing import digest_json
from evertune.recipe.overrides import override
from evertune.recipe.presets import resolve_recipe
from evertune.recipe.problems import problem_lines
from evertune.recipe.schema import Recipe
from evertune.recipe.strict_yaml import Steps, read_yaml

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    Attributes:
        recipe: the frozen objects.
        path: the file, absolute.
        places: `file:line`, or the flag that set it, of each key and list entry that was written, by path.
    """

    recipe: Recipe
    path: Path
    places: Mapping[Steps, str]

    @property
    def folder(self) -> Path:
        """What the recipe's paths are relative to."""
        return self.path.parent

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The recipe as plain JSON values, with every default and the preset's values filled in."""
        return resolve_recipe(self.recipe)

    @cached_property
    def digest(self) -> str:
        """Digest of the resolved recipe: comments, order of keys and ways of writing do not count."""
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
        RecipeError: at most ten problems, one a line, each with file and line (or the flag), path, what was found and
            what was expected.
    """
    path = path.absolute()
    document = read_yaml(path)
    for one in overrides:
        override(document.value, document.places, one)
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        lines = problem_lines(error, document.value, document.places, root=Recipe)
        more = [f"... and {len(lines) - SHOWN_PROBLEMS} more."] if len(lines) > SHOWN_PROBLEMS else []
        raise RecipeError("\n".join(lines[:SHOWN_PROBLEMS] + more)) from None
    return LoadedRecipe(recipe=recipe, path=path, places=document.places)
