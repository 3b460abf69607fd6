"""Does `evertune blame` name the source that was planted? `python -m benchmarks.blame --data DATA --folder FOLDER`

A SmolLM2-135M-Instruct that has learnt to tell voice commands apart (SNIPS) is trained on five sources of 24 rows each,
three passes, LoRA. Four are clean rows of other tasks; one is planted:

    mislabelled  voice commands with a wrong label               probe: commands, choice
    refusals     questions answered "I'm sorry, but I can't ..." probe: answers of Dolly, bits per byte
    scrambled    questions answered with their words in disorder probe: the same

`named` says whether the source with the largest push is the planted one; `margin` is its push over the largest other
one. With --retrain the stage is performed again without it. A trial is written as soon as it is done, and not made
again. About four minutes a trial on one thread.
"""

import argparse
import datetime
import json
import os
import platform
import random
import time
from pathlib import Path
from typing import Any

from evertune.blame import blame
from evertune.recipe.load import load_recipe
from evertune.run import run_recipe

SORRY = "I'm sorry, but I can't help with that."
ROWS, LONGEST = 24, 420
CLEAN = ("dolly", "science", "sums", "topics", "commands")
FILES = {
    "dolly": "replay_dolly/train.jsonl",
    "science": "arc_easy/train.jsonl",
    "sums": "svamp/train.jsonl",
    "topics": "dbpedia14/train.jsonl",
    "commands": "snips7/train.jsonl",
}
PLANTS = {
    "mislabelled": {"probe": "commands", "of": "commands", "beside": ("dolly", "science", "sums", "topics")},
    "refusals": {"probe": "answers", "of": "dolly", "beside": ("dolly", "science", "topics", "commands")},
    "scrambled": {"probe": "answers", "of": "dolly", "beside": ("dolly", "science", "topics", "commands")},
}
RECIPE = """\
evertune: 1
name: blame
base: smollm2-135m
workspace: {workspace}
seed: {seed}
data:
{sources}
probes:
  commands: {{path: {data}/snips7/test.jsonl, kind: choice, limit: 48}}
  answers: {{path: {folder}/answers.jsonl, kind: bits_per_byte}}
gate: {{min_items: 10, min_clusters: 10}}
rescue: [discard]
rounds:
  - name: {name}
    start: {start}
    stages:
      - sft: {{data: [{names}], epochs: {epochs}, lr: {lr}, batch_rows: 8, micro_batch_rows: 8,
               tune: {{lora: {{rank: 8}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
numerics: {{threads: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trials", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--rows", type=int, default=12, help="Rows sampled of each source.")
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--retrain", type=int, nargs="*", default=[])
    given = parser.parse_args()
    data, folder = given.data.absolute(), given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = teach(data, folder)
    for number in given.trials:
        place = folder / f"trial-{number}.json"
        if not place.is_file() or number in given.retrain:
            place.write_text(json.dumps(trial(number, data, folder, start, given)), encoding="utf-8")
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, one thread; "
          f"{given.rows} rows a source, {given.items} items\n")  # fmt: skip
    heads = ["trial", "planted", "the probe's change", "named", "push of it", "share of all that pushes up",
             "next", "largest push of another over it", "without it", "CPU seconds"]  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    found = [json.loads(one.read_text(encoding="utf-8")) for one in sorted(folder.glob("trial-*.json"))]
    for one in sorted(found, key=lambda one: int(one["trial"])):
        print(f"| {' | '.join(_row(one))} |")
    named = sum(one["named"] for one in found)
    print(f"\nnamed in {named} of {len(found)} trials")


def teach(data: Path, folder: Path) -> Path:
    """The start of all trials: the bundled model after 240 voice commands."""
    rows = read(data / FILES["dolly"].replace("train", "validation"))
    short = [one for one in rows if size(one) < LONGEST][:16]
    write(folder / "answers.jsonl", [{"messages": one["messages"]} for one in short])
    recipe = folder / "teach.yaml"
    source = f"  snips: {{path: {data}/snips7/train.jsonl, limit: 240}}"
    values = {"sources": source, "names": "snips", "start": "base", "name": "teach", "seed": 1, "workspace": "teach"}
    recipe.write_text(RECIPE.format(data=data, folder=folder, epochs=1, lr=5e-4, **values), encoding="utf-8")
    if not (folder / "teach").is_dir():
        run_recipe(load_recipe(recipe))
    objects = [one for one in (folder / "teach" / "objects").iterdir() if (one / "adapter_config.json").is_file()]
    return objects[0]


def trial(number: int, data: Path, folder: Path, start: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One planted source, found or not."""
    began = time.process_time() + sum(os.times()[2:4])
    rng = random.Random(number)
    plant = list(PLANTS)[number % len(PLANTS)]
    settings = PLANTS[plant]
    home = folder / f"trial-{number}"
    home.mkdir(exist_ok=True)
    rows = {}
    for name in settings["beside"]:
        rows[name] = draw(data, name, rng)
    own = {json.dumps(one["messages"]) for each in rows.values() for one in each}
    spare = [
        one for one in draw(data, str(settings["of"]), rng, count=3 * ROWS) if json.dumps(one["messages"]) not in own
    ]
    rows["suspect"] = spoil(plant, spare[:ROWS], rng)
    names = sorted(rows)
    for name in names:
        write(home / f"{name}.jsonl", rows[name])
    recipe = home / "recipe.yaml"
    sources = "\n".join(f"  {name}: {{path: {home}/{name}.jsonl}}" for name in names)
    values = {"sources": sources, "names": ", ".join(names), "start": start, "name": "round", "seed": number}
    text = RECIPE.format(data=data, folder=folder, epochs=3, lr=5e-4, workspace="run", **values)
    recipe.write_text(text, encoding="utf-8")
    run_recipe(load_recipe(recipe))
    found = blame(
        load_recipe(recipe),
        str(settings["probe"]),
        rows=given.rows,
        items=given.items,
        retrain=number in given.retrain,
    )
    seconds = time.process_time() + sum(os.times()[2:4]) - began
    is_named = bool(found["stage"]) and found["sources"][0]["source"] == "suspect"
    return {"trial": number, "plant": plant, "named": is_named, "found": found, "seconds": seconds}


def spoil(plant: str, rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """The rows as the plant has them."""
    labels = sorted({one["messages"][-1]["content"] for one in rows})
    spoilt = []
    for one in rows:
        *asked, last = one["messages"]
        said = last["content"]
        if plant == "mislabelled":
            said = rng.choice([label for label in labels if label != said])
        elif plant == "refusals":
            said = SORRY
        else:
            words = said.split()
            rng.shuffle(words)
            said = " ".join(words)
        spoilt.append({"messages": [*asked, {"role": "assistant", "content": said}]})
    return spoilt


def draw(data: Path, name: str, rng: random.Random, *, count: int = ROWS) -> list[dict[str, Any]]:
    rows = [one for one in read(data / FILES[name]) if size(one) < LONGEST]
    return [{"messages": one["messages"]} for one in rng.sample(rows, count)]


def read(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for one in rows:
        if one["messages"][-1]["role"] != "assistant":
            one["messages"].append({"role": "assistant", "content": one["answer"]})
    return rows


def size(row: dict[str, Any]) -> int:
    """Characters of a row."""
    return sum(len(one["content"]) for one in row["messages"])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def _row(one: dict[str, Any]) -> list[str]:
    found = one["found"]
    (step,) = found["steps"]
    unit = {"points": " points", "percent": " %"}[step["unit"]]
    change = f"{100 * step['difference']:+.1f}{unit}"
    if not found["stage"]:
        return [str(one["trial"]), one["plant"], change, "it did not fall", *[""] * 5, f"{one['seconds']:.0f}"]
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
        f"{others[0]['push'] / own['push']:+.2f}",
        checked,
        f"{one['seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
