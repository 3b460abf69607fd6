"""Whether a cheap anchor retains as well as the exact one: the same update under four anchors, three seeds each.

    python -m benchmarks.retention --data folder [--seeds 1 2 3] [--steps 40] [--only none exact]

The bundled model first learns one skill (`banking20`), once for all. Then it learns another (`snips7`), a fifth of the
rows general ones (`replay_dolly`), so that nothing but the anchor, to the model that this update starts from, holds the
first skill. LoRA of rank 16 and a high rate, so that there is something to lose. Anchors: none, exact on all rows
(`cache: hidden`), top 64 words on all rows, top 64 words on the replayed rows only. Asked before and after: bits per
byte of held-out answers of both skills and of general ones, and the choice among the first skill's twenty. Each run is
an ordinary recipe; those of an anchor share a workspace under --folder, where what is done is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contest import machine

EVERTUNE = [sys.executable, "-m", "evertune"]
KL = 0.5
ANCHORS: dict[str, dict[str, Any]] = {
    "none": {"kl": 0.0},
    "exact": {"kl": KL, "to": "start", "on": "both", "cache": "hidden"},
    "top64": {"kl": KL, "to": "start", "on": "both", "cache": "top64"},
    "top64-replay": {"kl": KL, "to": "start", "on": "replay", "cache": "top64"},
}


STAGE = {"batch_rows": 8, "micro_batch_rows": 8, "lr": 1e-3, "tune": {"lora": {"rank": 16}}}


def taught(data: Path, folder: Path) -> Path:
    """A folder with the model that has learnt the first skill; made when it is not there."""
    made = folder / "taught"
    if not made.is_dir():
        stage = {**STAGE, "data": ["skill"], "steps": 60, "replay": {"share": 0.0}, "anchor": {"kl": 0.0}}
        probe = {"path": str(data / "replay_dolly/validation.jsonl"), "kind": "bits_per_byte", "role": "watch"}
        rows = {"path": str(data / "banking20/train.jsonl"), "format": "messages"}
        place = write(folder / "first.yaml", "smollm2-135m", 1, {"skill": rows}, {"general": probe}, stage)
        perform(place)
        subprocess.run([*EVERTUNE, "export", str(folder / "first"), "update/1-sft", "--out", str(made)], check=True)
    return made


def second(data: Path, folder: Path, base: Path, anchor: dict[str, Any], seed: int, steps: int) -> Path:
    """Write the recipe of one update; returns its place."""
    stage = {
        **STAGE, "data": ["skill"], "steps": steps, "replay": {"share": 0.2, "from": ["general"]}, "anchor": anchor
    }  # fmt: skip
    rows = {
        name: {"path": str(data / place / "train.jsonl"), "format": "messages"}
        for name, place in (("skill", "snips7"), ("general", "replay_dolly"))
    }
    probes = {
        "new-skill": {"path": str(answers(data, folder.parent, "snips7")), "kind": "bits_per_byte", "role": "target"},
        "old-skill": {"path": str(answers(data, folder.parent, "banking20")), "kind": "bits_per_byte"},
        "old-choice": {"path": str(data / "banking20/validation.jsonl"), "kind": "choice", "limit": 100},
        "general": {"path": str(data / "replay_dolly/validation.jsonl"), "kind": "bits_per_byte", "limit": 100},
    }
    return write(folder / f"seed-{seed}.yaml", str(base), seed, rows, probes, stage)


def answers(data: Path, folder: Path, task: str) -> Path:
    """Held-out questions of a task with their right answers, as chats; written when they are not there."""
    place = folder / f"{task}.jsonl"
    if not place.is_file():
        with (data / task / "validation.jsonl").open(encoding="utf-8") as lines:
            items = [json.loads(line) for line in lines]
        chats = [
            [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["choices"][one["answer"]]},
            ]
            for one in items
        ]
        place.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return place


def write(place: Path, base: str, seed: int, data: Any, probes: Any, stage: Any) -> Path:
    """A recipe of one round with one sft stage; its workspace stands beside it, `run` or by the file's name."""
    place.parent.mkdir(parents=True, exist_ok=True)
    workspace = "first" if place.stem == "first" else "run"
    rounds = [{"name": "update", "stages": [{"sft": stage}]}]
    text = {
        "evertune": 1, "name": place.parent.name, "base": base, "workspace": workspace, "seed": seed, "data": data,
        "probes": probes, "rescue": [], "rounds": rounds,
    }  # fmt: skip
    place.write_text(json.dumps(text))  # JSON is YAML
    return place


def perform(place: Path) -> None:
    """Run a recipe, or what is missing of it; whatever the gate says of it."""
    done = subprocess.run([*EVERTUNE, "run", str(place), "--quiet"])
    if done.returncode not in (0, 2, 4):
        raise RuntimeError(f"{place} ended with {done.returncode}")


def values(place: Path) -> dict[str, float]:
    """The change of each probe from the base to the update; runs the recipe, or what is missing of it."""
    perform(place)
    command = [*EVERTUNE, "log", str(place.parent / "run"), "--json"]
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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=ANCHORS, default=list(ANCHORS), help="these anchors")
    options = parser.parse_args()
    data, folder = options.data.absolute(), options.folder.absolute()
    print(json.dumps(machine()))
    base = taught(data, folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            place = second(data, folder / name, base, ANCHORS[name], seed, options.steps)
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
