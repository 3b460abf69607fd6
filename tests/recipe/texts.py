"""A small valid recipe, and ways to change it, for the tests of the recipe room."""

from pathlib import Path
from typing import Any

from evertune.recipe.load import LoadedRecipe, load_recipe

# Line numbers matter: the malformed recipes below are this text with one thing changed.
VALID = """\
evertune: 1
name: team
base: smollm2-135m
workspace: run
data:
  tickets: {path: tickets.jsonl}
  general: {path: general.jsonl}
  prefs: {path: prefs.jsonl, format: preference}
probes:
  tickets: {path: p.jsonl, kind: generate, verifier: exact, role: target}
  facts: {path: q.jsonl, kind: choice}
rounds:
  - name: first
    stages:
      - sft:
          data: [tickets]
          lr: 1e-4
          replay: {share: 0.2, from: [general]}
"""


def changed(old: str, new: str) -> str:
    """The valid recipe with one piece of text replaced."""
    assert VALID.count(old) == 1, f"{old!r} stands {VALID.count(old)} times in the recipe"
    return VALID.replace(old, new)


def load_text(folder: Path, text: str = VALID, *, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    """Load a recipe from its text."""
    path = folder / "team.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides=overrides)


def first_sft(loaded: LoadedRecipe) -> Any:
    """The first stage of the first round."""
    return loaded.recipe.rounds[0].stages[0].sft
