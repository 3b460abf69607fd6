"""A folder in which everything is right, for the tests of checking: a tiny model, rows, probes and a recipe."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evertune.check import CheckReport, check_recipe
from evertune.recipe.load import load_recipe

RECIPE = """\
evertune: 1
name: team
base: model
workspace: run
data:
  cards: {path: cards.jsonl}
  general: {path: general.jsonl}
probes:
  cards: {path: probe-cards.jsonl, kind: generate, verifier: exact, role: target}
  facts: {path: probe-facts.jsonl, kind: choice}
gate: {min_items: 8, min_clusters: 8, margin: {pooled: 0.4, probe: 0.4, format: 0.4}}
rounds:
  - name: first
    stages:
      - sft: {data: [cards], epochs: 2, lr: 1e-3, batch_rows: 8, replay: {share: 0.2, from: [general]}}
"""


def chat(prompt: str, answer: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_folder(folder: Path, model: Path) -> Path:
    """Write it all; returns the recipe's path."""
    shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    write_rows(folder / "cards.jsonl", [chat(f"card {i}", f"kind {i}") for i in range(24)])
    write_rows(folder / "general.jsonl", [chat(f"say {i}", f"word {i}") for i in range(12)])
    write_rows(folder / "probe-cards.jsonl", [{"prompt": f"asked {i}", "answer": f"kind {i}"} for i in range(10)])
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(12)]
    write_rows(folder / "probe-facts.jsonl", items)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


def check(recipe: Path, *overrides: str, sample: int = 0) -> CheckReport:
    return check_recipe(load_recipe(recipe, overrides=overrides), sample=sample)


def said(report: CheckReport, severity: str) -> list[tuple[str, str]]:
    """Places and messages of the findings of one severity."""
    return [(one.place, one.message) for one in report.findings if one.severity == severity]
