"""Does `evertune blame` name the source that was planted? `python -m benchmarks.blame --data DATA --folder FOLDER`

SmolLM2-135M-Instruct, tuned to name the command of a sentence (SNIPS, 7 commands), is trained on five sources of 24
short rows each, one pass, LoRA. Four are clean: general questions (Dolly), science questions (ARC-Easy), sums (SVAMP),
word problems with solutions (GSM8K). One is planted, made from other sentences with a command:

    shifted     each sentence has the next command's name, as after a column that slipped by one
    one         every sentence has the same name
    refusals    each answer is "I'm sorry, but I can't help with that."
    swapped     each sentence has the name of another command, drawn at random (only with --plants swapped)

The probe is the choice among the seven names for sentences that nobody was trained on. `named` says whether the source
with the largest push is the planted one. With --retrain a trial performs the stage again without the source that was
named. A trial is written as soon as it is done, and not made again. Some five minutes of CPU a trial.
"""

import argparse
import datetime
import json
import os
import platform
import random
from pathlib import Path
from typing import Any

from benchmarks.distillation import write_short
from evertune.blame import blame
from evertune.recipe.load import load_recipe
from evertune.run import run_recipe

SORRY = "I'm sorry, but I can't help with that."
SYSTEM = "Name the command."
ROWS, TAUGHT, ITEMS, LONGEST = 24, 480, 100, 340
FILES = {
    "general": "replay_dolly/train.jsonl",
    "science": "arc_easy/train.jsonl",
    "sums": "svamp/train.jsonl",
    "problems": "gsm8k/train.jsonl",
}
PLANTS = ("shifted", "one", "refusals")
PROBE = "commands"


RECIPE = """\
evertune: 1
name: blame
base: smollm2-135m
workspace: {folder}/run
seed: 1
data:
  taught: {{path: {folder}/taught.jsonl}}
{sources}
probes:
  commands: {{path: {folder}/commands.jsonl, kind: choice, system: Name the command.}}
gate: {{min_items: 10, min_clusters: 10}}
rescue: [discard]
rounds:
  - name: trial-{number}
    start: base
    stages:
      - sft: {{data: [taught], epochs: 1, lr: 5.0e-4, batch_rows: 16, micro_batch_rows: 16,
               tune: {{lora: {{rank: 8}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
      - sft: {{data: [{names}], epochs: 1, lr: 5.0e-4, batch_rows: 8, micro_batch_rows: 8, tune: {{lora: {{rank: 8}}}},
               replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
numerics: {{threads: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trials", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--rows", type=int, default=24, help="Rows sampled of each source.")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--retrain", type=int, nargs="*", default=[])
    parser.add_argument("--plants", nargs="*", default=PLANTS, help="Trial i has the i-th, over and over.")
    given = parser.parse_args()
    data, folder = given.data.absolute(), given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_probe(data, folder)
    for number in given.trials:
        place = folder / f"trial-{number}.json"
        if not place.is_file() or number in given.retrain:
            place.write_text(json.dumps(trial(number, data, folder, given)), encoding="utf-8")
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, one thread; "
          f"{given.rows} rows a source, {given.items} items\n")  # fmt: skip
    heads = ["trial", "planted", "the probe's change", "named", "push of it", "share of all that pushes up",
             "next", "push of the next over it", "without it"]  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    found = [json.loads(one.read_text(encoding="utf-8")) for one in sorted(folder.glob("trial-*.json"))]
    for one in sorted(found, key=lambda one: int(one["trial"])):
        print(f"| {' | '.join(_row(one))} |")
    named = sum(one["named"] for one in found)
    print(f"\nnamed in {named} of {len(found)} trials")


def write_probe(data: Path, folder: Path) -> None:
    """Sentences with seven names to choose from; those that all trials are taught first; and the rest, to be spoilt."""
    for split in ("train", "test"):
        write_short(data / "snips7" / f"{split}.jsonl", folder / f"snips-{split}.jsonl", SYSTEM)
    lines = (folder / "snips-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "taught.jsonl").write_text("".join(lines[:TAUGHT]), encoding="utf-8")
    (folder / "rest.jsonl").write_text("".join(lines[TAUGHT:]), encoding="utf-8")
    lines = (folder / "snips-test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / f"{PROBE}.jsonl").write_text("".join(lines[:ITEMS]), encoding="utf-8")


def trial(number: int, data: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One planted source, found or not."""
    rng = random.Random(number)
    plant = given.plants[number % len(given.plants)]
    home = folder / f"trial-{number}"
    home.mkdir(exist_ok=True)
    rows = {name: draw(data / file, rng) for name, file in FILES.items()}
    rows["suspect"] = spoil(plant, draw(folder / "rest.jsonl", rng), rng)
    names = sorted(rows)
    for name in names:
        write(home / f"{name}.jsonl", rows[name])
    recipe = home / "recipe.yaml"
    values = {"sources": "\n".join(f"  {name}: {{path: {home}/{name}.jsonl}}" for name in names)}
    text = RECIPE.format(folder=folder, number=number, names=", ".join(names), **values)
    recipe.write_text(text, encoding="utf-8")
    loaded = load_recipe(recipe)
    run_recipe(loaded)
    found = blame(
        loaded,
        PROBE,
        label=f"trial-{number}/2-sft",
        rows=given.rows,
        items=given.items,
        retrain=number in given.retrain,
    )
    is_named = bool(found["stage"]) and found["sources"][0]["source"] == "suspect"
    return {"trial": number, "plant": plant, "named": is_named, "found": found}


def spoil(plant: str, rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The rows as the plant has them."""
    names = sorted({one["messages"][-1]["content"] for one in rows})
    same = rng.choice(names)
    spoilt = []
    for one in rows:
        *asked, last = one["messages"]
        others = [name for name in names if name != last["content"]]
        following = names[(names.index(last["content"]) + 1) % len(names)]
        said = {"swapped": rng.choice(others), "shifted": following, "one": same, "refusals": SORRY}[plant]
        spoilt.append({"messages": [*asked, {"role": "assistant", "content": said}]})
    return spoilt


def draw(path: Path, rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"messages": one["messages"]} for one in rng.sample([one for one in read(path) if size(one) < LONGEST], ROWS)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for one in rows:
        if one["messages"][-1]["role"] != "assistant":
            one["messages"].append({"role": "assistant", "content": one.get("solution") or one["answer"]})
    return rows


def size(row: dict[str, Any]) -> int:
    """Characters of a row."""
    return sum(len(one["content"]) for one in row["messages"])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def _row(one: dict[str, Any]) -> list[str]:
    found = one["found"]
    step = found["steps"][-1]
    unit = {"points": " points", "percent": " %"}[step["unit"]]
    change = f"{100 * step['difference']:+.1f}{unit}"
    if not found["stage"]:
        return [str(one["trial"]), one["plant"], change, "it did not fall", *[""] * 5]
    own = next(each for each in found["sources"] if each["source"] == "suspect")
    others = [each for each in found["sources"] if each["source"] != "suspect"]
    without = found["without"]
    checked = "" if without is None else f"{100 * without['difference']:+.1f}{unit}"
    return [
        str(one["trial"]),
        one["plant"],
        change,
        "yes" if one["named"] else f"no: {found['sources'][0]['source']}",
        f"{own['push']:+.3g}",
        f"{own['share']:.0%}",
        others[0]["source"],
        f"{others[0]['push'] / own['push']:+.2f}" if own["push"] else "",
        checked,
    ]


if __name__ == "__main__":
    main()
