"""Whether a cheap anchor retains as well as the exact one: the same update under four anchors, three seeds each.

    python -m benchmarks.retention --data folder [--seeds 1 2 3] [--steps 60]

The bundled model learns one skill (`banking20`), a fifth of the rows general ones (`replay_dolly`), LoRA of rank 16,
a high rate so that there is something to lose. Anchors: none, exact on all rows (`cache: hidden`), top 64 words on all
rows, top 64 words on the replayed rows only. Asked afterwards: the skill, and what should stay (ARC-Easy; bits per byte
of held-out general answers). Each run is an ordinary recipe under --folder; what is done is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contest import machine

ANCHORS: dict[str, dict[str, Any]] = {
    "none": {"kl": 0.0},
    "exact": {"kl": 0.1, "to": "start", "on": "both", "cache": "hidden"},
    "top64": {"kl": 0.1, "to": "start", "on": "both", "cache": "top64"},
    "top64 on replay": {"kl": 0.1, "to": "start", "on": "replay", "cache": "top64"},
}


def recipe(data: Path, folder: Path, anchor: dict[str, Any], seed: int, steps: int) -> Path:
    """Write the recipe of one run; returns its place."""
    stage = {
        "data": ["skill"], "steps": steps, "batch_rows": 8, "micro_batch_rows": 8, "lr": 1e-3,
        "tune": {"lora": {"rank": 16}}, "replay": {"share": 0.2, "from": ["general"]}, "anchor": anchor,
    }  # fmt: skip
    text = {
        "evertune": 1, "name": folder.name, "base": "smollm2-135m", "workspace": "run", "seed": seed,
        "data": {
            "skill": {"path": str(data / "banking20/train.jsonl"), "format": "messages"},
            "general": {"path": str(data / "replay_dolly/train.jsonl"), "format": "messages"},
        },
        "probes": {
            "skill": {"path": str(data / "banking20/validation.jsonl"), "kind": "choice", "role": "target"},
            "arc": {"path": str(data / "arc_easy/validation.jsonl"), "kind": "choice", "role": "guard"},
            "general": {"path": str(data / "replay_dolly/validation.jsonl"), "kind": "bits_per_byte", "role": "guard"},
        },
        "rescue": [], "rounds": [{"name": "update", "stages": [{"sft": stage}]}],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "recipe.yaml"
    place.write_text(json.dumps(text))  # JSON is YAML
    return place


def values(place: Path) -> dict[str, float]:
    """The change of each probe from the base to the update; runs the recipe, or what is missing of it."""
    done = subprocess.run([sys.executable, "-m", "evertune", "run", str(place), "--quiet"])
    if done.returncode not in (0, 2, 4):
        raise RuntimeError(f"{place} ended with {done.returncode}")
    command = [sys.executable, "-m", "evertune", "log", str(place.parent / "run"), "--json"]
    log = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    scores: dict[str, dict[str, float]] = {}
    for event in log["events"]:
        if event["kind"] == "probe":
            scores.setdefault(event["body"]["label"], {})[event["body"]["probe"]] = event["body"]["value"]
    base, update = scores["base"], scores["update/1-sft"]
    return {name: update[name] - base[name] for name in base}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("retention-run"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(json.dumps(machine()))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ANCHORS}
    for seed in options.seeds:
        for name, anchor in ANCHORS.items():
            folder = options.folder / f"{name.replace(' ', '-')}-{seed}"
            place = recipe(options.data.absolute(), folder, anchor, seed, options.steps)
            found[name].append(values(place))
            print(f"seed {seed}, {name}: {json.dumps(found[name][-1])}", flush=True)
    names = list(next(iter(found.values()))[0])
    print(f"| anchor | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for anchor_name, runs in found.items():
        cells = [[run[name] for run in runs] for name in names]
        shown = [f"{statistics.mean(cell):+.3f} [{min(cell):+.3f}, {max(cell):+.3f}]" for cell in cells]
        print(f"| {anchor_name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
