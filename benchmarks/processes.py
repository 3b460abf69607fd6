"""One process beside two with copies and two with shards, through `evertune run`: do their loss curves agree, and what
does each process hold?

    python -m benchmarks.processes curves --data folder [--folder processes-run] [--steps 4] [--dtype float32]

The bundled model, two stages: sft of all weights (`replay_dolly`), then dpo with LoRA (`pref_alpacaeval`). Each way is
an ordinary run under --folder; what is done is not done again. `held` is what the runs launch: the worker, which writes
down its memory when it has trained.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contest import machine

WORKER = "-m benchmarks.processes held"
TWO = "-m torch.distributed.run --nproc-per-node 2"
WAYS: dict[str, dict[str, Any]] = {
    "one process": {"command": WORKER},
    "two, copies": {"command": f"{TWO} {WORKER}"},
    "two, shards": {"command": f"{TWO} {WORKER}", "fsdp": True},
}
MIB = 1 << 20


def recipe(data: Path, folder: Path, launch: dict[str, Any], options: argparse.Namespace) -> Path:
    """Write the recipe of one way; returns its place."""
    shared = {"steps": options.steps, "batch_rows": 8, "micro_batch_rows": 2, "replay": {"share": 0.0}}
    stages = [
        {"sft": {"data": ["general"], "tune": "full", "lr": 1e-5, "anchor": {"kl": 0.0}, **shared}},
        {"dpo": {"data": ["pairs"], "tune": {"lora": {"rank": 16, "dropout": 0.0}}, "lr": 1e-4, **shared}},
    ]
    text = {
        "evertune": 1, "name": folder.name, "base": "smollm2-135m", "workspace": "run", "seed": 7, "launch": launch,
        "numerics": {"dtype": options.dtype, "threads": 1, "device": "cpu"},
        "data": {
            "general": {"path": str(data / "replay_dolly/train.jsonl"), "format": "messages", "limit": 200},
            "pairs": {"path": str(data / "pref_alpacaeval/train.jsonl"), "format": "preference", "limit": 200},
        },
        "probes": {
            "general": {
                "path": str(data / "replay_dolly/validation.jsonl"), "kind": "bits_per_byte", "role": "guard",
                "limit": 8,
            },
        },
        "rescue": [], "rounds": [{"name": "update", "stages": stages}],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "recipe.yaml"
    place.write_text(json.dumps(text))  # JSON is YAML
    return place


def curves(place: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of each stage's steps; runs the recipe, or what is missing of it."""
    environment = {**os.environ, "HELD": str(place.parent.absolute()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "evertune", "run", str(place), "--quiet"], env=environment)
    if done.returncode not in (0, 2, 4):
        raise RuntimeError(f"{place} ended with {done.returncode}")
    found = {}
    for manifest in sorted((place.parent / "run/objects").glob("*/MANIFEST.json")):
        record = json.loads(manifest.read_text())["record"].get("checkpoint", {})
        if "stage" in record:
            lines = (manifest.parent / "metrics.jsonl").read_text().splitlines()
            found[record["stage"]] = [json.loads(line) for line in lines]
    return found


def held(job: str) -> int:
    """Perform a job, and write what this process holds between steps and has resident after the last."""
    from evertune import worker
    from evertune.train import sharding, stage
    from evertune.train.optimizer import own

    def train_and_tell(trainer: Any, *args: Any, **kwargs: Any) -> None:
        train(trainer, *args, **kwargs)
        state = trainer.masters.state()
        masters = sum(own(one).numel() * 4 for one in state["weights"].values())
        trained = {id(one) for one in state["weights"].values()}
        copies = sum(id(one) in trained for one in trainer.policy.model.parameters())
        told = {
            "weights": sharding.shard_bytes(trainer.policy.model),
            "masters": 0 if copies else masters,
            "moments": sum(own(one).numel() * 4 for one in state["moments"].values()),
            "resident": int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024,
        }
        kind = json.loads(Path(job).read_text())["kind"]
        (Path(os.environ["HELD"]) / f"{kind}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))

    train, stage.train = stage.train, train_and_tell
    return worker.main(job)


def compare(options: argparse.Namespace) -> None:
    print(json.dumps(machine()))
    found, places = {}, {}
    for way, launch in WAYS.items():
        places[way] = recipe(
            options.data.absolute(), options.folder / way.replace(",", "").replace(" ", "-"), launch, options
        )
        found[way] = curves(places[way])
        print(way, json.dumps({kind: [one["loss"] for one in steps] for kind, steps in found[way].items()}), flush=True)
    print("| | largest difference of a loss | of a gradient's norm | weights | masters | moments | resident |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("sft", "dpo"):
        for way in WAYS:
            pairs = list(zip(found["one process"][kind], found[way][kind], strict=True))
            apart = [max(abs(a[name] / b[name] - 1.0) for a, b in pairs) for name in ("loss", "grad_norm")]
            files = sorted(places[way].parent.glob(f"{kind}-*.json"))
            told = [json.loads(one.read_text()) for one in files]
            most = [max(one[name] for one in told) / MIB for name in ("weights", "masters", "moments", "resident")]
            print(f"| {kind}, {way} | {apart[0]:.1e} | {apart[1]:.1e} | {' | '.join(f'{one:.0f}' for one in most)} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("curves")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--folder", type=Path, default=Path("processes-run"))
    one.add_argument("--steps", type=int, default=4)
    one.add_argument("--dtype", default="float32")
    compare(parser.parse_args())
    return 0


if __name__ == "__main__":
    # As the runner calls it: `... held -m evertune.worker JOB`.
    sys.exit(held(sys.argv[-1]) if sys.argv[1:2] == ["held"] else main())
