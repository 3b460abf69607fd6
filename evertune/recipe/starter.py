"""What `evertune init` writes: a commented recipe that runs, with starter rows and probes."""

import json
from pathlib import Path
from typing import Any

from evertune.errors import RecipeError

RECIPE = """\
# A first update: teach a convention, replay general rows, judge the result. Run it:
#   evertune model get smollm2-135m
#   evertune check recipe.yaml
#   evertune run recipe.yaml
evertune: 1
name: first-update
base: smollm2-135m              # or the folder of a Hugging Face model, a PEFT adapter, a .gguf
workspace: run                  # checkpoints, ledger and report go here; paths are relative to this file
seed: 1

data:
  orders: {path: orders.jsonl}      # {"messages": [{"role": ..., "content": ...}, ...]}
  general: {path: general.jsonl}    # rows of what the model can do already, for replay

probes:                         # fixed items with a score each; every checkpoint answers all of them
  orders:    {path: probe-orders.jsonl, kind: generate, verifier: exact, max_new_tokens: 16, role: target}
  knowledge: {path: probe-knowledge.jsonl, kind: choice, role: guard}

gate:                           # the defaults ask for 200 items a probe; this starter has few, so its margins are wide
  min_items: 10
  min_clusters: 10
  margin: {pooled: 0.30, probe: 0.30, format: 0.30, ratchet: 0.30}

rounds:
  - name: first
    stages:
      - sft:
          data: [orders]
          tune: lora            # or: full
          epochs: 3
          batch_rows: 8
          replay: {share: 0.2, from: [general]}         # one row in five
          anchor: {kl: 0.05, to: start, on: replay}     # stay close to the start on replayed rows
"""
ITEMS = (
    "lamp",
    "chair",
    "desk",
    "shelf",
    "clock",
    "mirror",
    "basket",
    "carpet",
    "pillow",
    "ladder",
    "bottle",
    "kettle",
)
COLOURS = ("red", "blue", "green", "white", "black")
CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
          "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo", "Russia": "Moscow", "China": "Beijing",
          "Portugal": "Lisbon", "Poland": "Warsaw", "Sweden": "Stockholm", "Finland": "Helsinki",
          "Denmark": "Copenhagen", "Ireland": "Dublin", "Austria": "Vienna", "Hungary": "Budapest",
          "Belgium": "Brussels", "Turkey": "Ankara", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
          "Kenya": "Nairobi"}  # fmt: skip
# Orders are trained but for the last items of the list, which are asked.
TRAINED_ORDERS = 40


def write_starter(folder: Path) -> list[Path]:
    """Write the recipe, its data and its probes; nothing is overwritten.

    Raises:
        RecipeError: one of the files exists, or the folder is a file.
    """
    files = {"recipe.yaml": RECIPE, **{name: _lines(rows) for name, rows in _rows().items()}}
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file, expected a folder.", remedy="Choose a new folder.")
    present = [name for name in files if (folder / name).exists()]
    if present:
        raise RecipeError(f"{folder / present[0]} exists; nothing was written.", remedy="Choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def _rows() -> dict[str, list[dict[str, Any]]]:
    orders = [(f"Order: {count} {colour} {item}", f"{item}/{colour}/{count}")
              for i, item in enumerate(ITEMS) for colour in COLOURS for count in (i % 4 + 2,)]  # fmt: skip
    trained, asked = orders[:TRAINED_ORDERS], orders[TRAINED_ORDERS:]
    cities = list(CITIES.values())
    return {
        "orders.jsonl": [_chat(prompt, answer) for prompt, answer in trained],
        "general.jsonl": [_chat(f"Write the word {item}.", item) for item in ITEMS],
        "probe-orders.jsonl": [{"prompt": prompt, "answer": answer} for prompt, answer in asked],
        "probe-knowledge.jsonl": [
            {"prompt": f"What is the capital of {land}?", "choices": _four(cities, i), "answer": city}
            for i, (land, city) in enumerate(CITIES.items())
        ],
    }


def _four(cities: list[str], i: int) -> list[str]:
    """City i and three others; each place is the right one equally often."""
    others = [cities[(i + 5 * k) % len(cities)] for k in (1, 2, 3)]
    return [*others[: i % 4], cities[i], *others[i % 4 :]]


def _chat(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
