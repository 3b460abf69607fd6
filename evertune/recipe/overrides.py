"""`--set rounds[-1].stages[0].sft.lr=1e-4`: one value changed before the recipe is checked like any other."""

import re
from typing import Any

from evertune.errors import RecipeError
from evertune.recipe.strict_yaml import Steps, parse_value, spell

_PART = re.compile(r"([^\[\]\s]+)((?:\[-?[0-9]{1,6}\])*)")


def override(value: dict[str, Any], places: dict[Steps, str], text: str) -> None:
    """Set one value in place; mappings on the way are made where they are missing.

    Args:
        value: the recipe as read.
        places: where each value stands; what is set stands at the flag from now on.
        text: `path=value`. The value is YAML, on the rules of a recipe; negative indexes count from the end.

    Raises:
        RecipeError: the text is no path and value, or the path leads through something else than the recipe has.
    """
    flag = f"--set {text!r}"
    written, sign, new = text.partition("=")
    if not sign:
        raise RecipeError(f"{flag}: found no '=', expected PATH=VALUE, such as rounds[0].stages[0].sft.lr=1e-4.")
    *inner, last = _steps(written.strip(), flag)
    target: Any = value
    path: Steps = ()
    for step in inner:
        key = _key_in(target, step, path, flag)
        path = (*path, key)
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
            places[path] = flag
        target = target[key]
    key = _key_in(target, last, path, flag)
    target[key] = parse_value(new, flag)
    path = (*path, key)
    for below in [one for one in places if one[: len(path)] == path]:
        del places[below]
    places[path] = flag


def _key_in(target: Any, step: str | int, path: Steps, flag: str) -> Any:
    """The step as a key of the target, an index counted from 0."""
    here = spell(path) or "the recipe"
    if isinstance(step, int):
        if not isinstance(target, list):
            raise RecipeError(f"{flag}: {here} is no list, so it has no entry [{step}].")
        if not -len(target) <= step < len(target):
            raise RecipeError(f"{flag}: {here} has {len(target)} entries, so there is no [{step}].")
        return step % len(target)
    if not isinstance(target, dict):
        # A bare name, such as `tune: lora`, has no keys yet.
        hint = f"Set the whole of it: {here}={{{target}: {{{step}: ...}}}}" if isinstance(target, str) else ""
        raise RecipeError(f"{flag}: {here} is no mapping, so it has no key '{step}'.", remedy=hint)
    return step


def _steps(written: str, flag: str) -> list[str | int]:
    steps: list[str | int] = []
    for part in written.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            raise RecipeError(f"{flag}: found the path {written!r}, expected one such as rounds[0].stages[0].sft.lr.")
        steps.append(match.group(1))
        steps += [int(one) for one in re.findall(r"-?[0-9]+", match.group(2))]
    return steps
