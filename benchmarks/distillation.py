"""Two experts into one student, by distillation and by other ways; prints the tables of docs/results/distillation.md.

    python -m benchmarks.distillation experts --data DATA --folder WORK    two experts -> one student, beside merging
                                                                           and training on both at once
    python -m benchmarks.distillation memory --folder WORK                 peak memory with one and with three teachers

The 135M model; snips7 (7 commands) and dbpedia14 (14 kinds of things), texts cut to their first words so that two cores
are enough. Everything is made by `evertune run` on a recipe that is left in the folder; only the merges, which a recipe
need not make for this, are written here. Run again, it does only what is missing.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000
WORDS = 24
SKILLS = {"snips": ("snips7", "Name the command."), "topics": ("dbpedia14", "Name the kind of thing.")}

RECIPE = """\
evertune: 1
name: distillation
base: smollm2-135m
workspace: run
seed: 13
data:
  snips: {{path: snips-train.jsonl}}
  topics: {{path: topics-train.jsonl}}
probes:
  snips: {{path: snips-test.jsonl, kind: choice, role: watch, limit: {items}, system: Name the command.}}
  topics: {{path: topics-test.jsonl, kind: choice, role: watch, limit: {items}, system: Name the kind of thing.}}
  arc: {{path: {arc}, kind: choice, limit: {guards}}}
defaults: {{tune: {{lora: {{rank: 16}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
gate: {{min_items: 50, min_clusters: 30, margin: {{pooled: 0.3, probe: 0.3}}}}
rescue: [discard]
rounds:
  - name: snips
    start: base
    stages: [sft: {{data: [snips], steps: {steps}, {pace}}}]
  - name: topics
    start: base
    stages: [sft: {{data: [topics], steps: {steps}, {pace}}}]
  - name: distilled
    start: base
    stages:
      - distill:
          data: {{snips: 1.0, topics: 1.0}}
          teachers:
            - {{checkpoint: "stage:snips/1-sft", sources: snips}}
            - {{checkpoint: "stage:topics/1-sft", sources: topics}}
          weight: 1.0
          steps: {both}
          {pace_lines}
  - name: multitask
    start: base
    stages: [sft: {{data: {{snips: 1.0, topics: 1.0}}, steps: {both}, {pace}}}]
  - name: eroded
    start: base
    stages:
      - sft: {{data: [snips], steps: {steps}, {pace}}}
      - sft: {{data: [topics], steps: {steps}, {eroding}}}
      - distill:
          data: {{snips: 1.0, topics: 1.0}}
          teachers: ["stage:eroded/1-sft", "stage:eroded/2-sft", base]
          route: best
          weight: 1.0
          steps: {steps}
          {pace_lines}
"""
PACE = {"lr": "5.0e-4", "batch_rows": "16", "micro_batch_rows": "16", "save_steps": "10"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    experts = commands.add_parser("experts")
    experts.add_argument("--data", type=Path, required=True, help="folder with snips7, dbpedia14 and arc_easy")
    experts.add_argument("--folder", type=Path, required=True)
    experts.add_argument(
        "--steps", type=int, default=20, help="optimizer steps of an expert; the student takes twice as many"
    )
    experts.add_argument("--items", type=int, default=150)
    experts.add_argument("--guards", type=int, default=60)
    experts.set_defaults(do=run_experts)
    memory = commands.add_parser("memory")
    memory.add_argument("--folder", type=Path, required=True)
    memory.set_defaults(do=run_memory)
    peak = commands.add_parser("peak", help="one measurement of `memory`")
    peak.add_argument("--folder", type=Path, required=True)
    peak.add_argument("count", type=int)
    peak.add_argument("form", choices=["adapter", "model"])
    peak.set_defaults(do=run_peak)
    asked = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, smollm2-135m in bfloat16")
    asked.do(asked)


# Two experts into one student.


def run_experts(asked: argparse.Namespace) -> None:
    """Train what is missing, merge, probe, print."""
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    for skill, (task, system) in SKILLS.items():
        write_short(asked.data / task / "train.jsonl", folder / f"{skill}-train.jsonl", system)
        write_short(asked.data / task / "test.jsonl", folder / f"{skill}-test.jsonl", system)
    pace = ", ".join(f"{name}: {value}" for name, value in PACE.items())
    recipe = RECIPE.format(
        items=asked.items,
        guards=asked.guards,
        arc=(asked.data / "arc_easy" / "test.jsonl").resolve(),
        steps=asked.steps,
        both=2 * asked.steps,
        pace=pace,
        eroding=pace.replace("5.0e-4", "2.0e-3"),
        pace_lines="\n          ".join(f"{name}: {value}" for name, value in PACE.items()),
    )
    (folder / "recipe.yaml").write_text(recipe)
    done = subprocess.run([sys.executable, "-m", "evertune", "run", str(folder / "recipe.yaml")], check=False)
    if done.returncode not in (0, 2, 4):
        sys.exit(done.returncode)
    print_tables(folder / "run", folder)


def write_short(source: Path, to: Path, system: str) -> None:
    """The rows with the question alone, its first words, and without the list of options."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = row["messages"][0]["content"] if "messages" in row else row["prompt"]
        text = asked.split("\n\n")[1].removeprefix("User: ").replace("\n", ". ")
        text = " ".join(text.split()[:WORDS])
        if "messages" in row:
            turns = [{"role": "system", "content": system}, {"role": "user", "content": text}, row["messages"][-1]]
            lines.append(json.dumps({"id": row["id"], "messages": turns}))
        else:
            lines.append(
                json.dumps({"id": row["id"], "prompt": text, "choices": row["choices"], "answer": row["answer"]})
            )
    to.write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_tables(workspace: Path, folder: Path) -> None:
    """Accuracy of every model, and the share of each expert's gain that each student keeps."""
    scores = {**ledger_scores(workspace), **merged_scores(workspace, folder)}
    base, experts = scores["base"], {"snips": scores["snips/1-sft"], "topics": scores["topics/1-sft"]}
    print(f"\n{'model':24}" + "".join(f"{name:>9}" for name in base))
    for label, found in scores.items():
        print(f"{label:24}" + "".join(f"{found[name].mean():9.3f}" for name in base))
    print(f"\n{'share of the gain kept':24}" + "".join(f"{name:>24}" for name in experts))
    for label, found in scores.items():
        if label == "base" or label.startswith(("snips/", "topics/", "eroded/")):
            continue
        cells = [share(found[name], experts[name][name], base[name]) for name in experts]
        print(f"{label:24}" + "".join(f"{cell:>24}" for cell in cells))
    if "eroded/3-distill" in scores:
        first, eroded, mended = (scores[f"eroded/{one}"] for one in ("1-sft", "2-sft", "3-distill"))
        recovered = share(mended["snips"], first["snips"], eroded["snips"])
        kept = share(mended["topics"], eroded["topics"], first["topics"])
        print(f"\nof what snips lost in the second stage, recovered: {recovered}")
        print(f"of what topics gained in the second stage, kept:   {kept}")
    for event in ledger_events(workspace, "checkpoint"):
        if event.body["stage"] == "distill":
            final, volatile = event.body["final"], event.volatile
            print(
                f"\n{event.body['label']}: covered mass {final['covered_mass']:.4f}, divergence at the end "
                f"{final['distill']:.4f} nats, {volatile['teacher_forwards']} teacher forwards, "
                f"{event.body['tokens']} tokens"
            )


def share(student: np.ndarray, expert: np.ndarray, base: np.ndarray) -> str:
    """(student - base) / (expert - base) on the same items, with a 90 % interval from resampled items."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(base), (RESAMPLES, len(base)))
    gains = expert[drawn].mean(1) - base[drawn].mean(1)
    shares = (student[drawn].mean(1) - base[drawn].mean(1)) / np.where(gains == 0.0, np.nan, gains)
    low, high = np.nanquantile(shares, [0.05, 0.95])
    gain = expert.mean() - base.mean()
    return f"{(student.mean() - base.mean()) / gain:.2f} [{low:.2f}, {high:.2f}]" if gain else "no gain"


def ledger_events(workspace: Path, kind: str) -> Sequence[Any]:
    from evertune.lineage import current_events, open_workspace

    return [event for event in current_events(open_workspace(workspace).ledger) if event.kind == kind]


def ledger_scores(workspace: Path) -> dict[str, dict[str, np.ndarray]]:
    """Item scores of every checkpoint of the run, by label and probe."""
    from evertune.lineage import checkpoint_path, open_workspace
    from evertune.model.checkpoint import describe
    from evertune.plan import make_plan
    from evertune.probe.scores import ItemScores
    from evertune.recipe.load import load_recipe

    plan, opened = make_plan(load_recipe(workspace.parent / "recipe.yaml")), open_workspace(workspace)
    found: dict[str, dict[str, np.ndarray]] = {}
    for event in ledger_events(workspace, "checkpoint"):
        checkpoint = describe(checkpoint_path(opened, event))
        places = {one.name: opened.workspace.path(plan.probe_key(checkpoint, one)) for one in plan.probes}
        if all((place / "scores.parquet").is_file() for place in places.values()):
            found[event.body["label"]] = {
                name: ItemScores.read_parquet(place / "scores.parquet").score for name, place in places.items()
            }
    return found


def merged_scores(workspace: Path, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The experts' adapters added with equal scales, 0.5 each being the soup. Adapters concatenate exactly."""
    from evertune.lineage import find_checkpoint, open_workspace
    from evertune.model.adapter import concatenate, read_factors, write_adapter
    from evertune.model.checkpoint import describe
    from evertune.plan import make_plan
    from evertune.probe.job import run_probes
    from evertune.probe.scores import ItemScores
    from evertune.recipe.load import load_recipe

    plan, opened = make_plan(load_recipe(folder / "recipe.yaml")), open_workspace(workspace)
    experts = [read_factors(find_checkpoint(opened, f"{name}/1-sft")[1].path) for name in SKILLS]
    found = {}
    for label, scale in (("soup", 0.5), ("task arithmetic 0.7", 0.7), ("task arithmetic 1.0", 1.0)):
        place = folder / f"merged-{scale}"
        if not place.is_dir():
            place.mkdir()
            write_adapter(concatenate(experts, [scale, scale]), place, plan.base)
        with opened.workspace.worker_lock():
            keys = run_probes(describe(place), plan.probes, opened.workspace, numerics=plan.numerics)
        paths = {one.name: opened.workspace.path(key) for one, key in zip(plan.probes, keys, strict=True)}
        found[label] = {name: ItemScores.read_parquet(path / "scores.parquet").score for name, path in paths.items()}
    return found


# Memory.

SMALL = """\
evertune: 1
name: memory
base: smollm2-135m
workspace: run-{name}
data: {{rows: {{path: rows.jsonl}}}}
probes: {{rows: {{path: probe.jsonl, kind: choice}}}}
defaults: {{tune: {{lora: {{rank: 16}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
rounds:
  - name: one
    stages:
      - {stage}
"""
SETTINGS = "data: [rows], steps: 2, batch_rows: 4, micro_batch_rows: 4"


def run_memory(asked: argparse.Namespace) -> None:
    """Peak memory of a stage, each in a process of its own: no teacher, one, three; adapters and whole models."""
    kinds = [(0, "adapter"), (1, "adapter"), (3, "adapter"), (1, "model"), (3, "model")]
    peaks: dict[tuple[int, str], float] = {}
    for count, form in kinds:
        command = [sys.executable, "-m", "benchmarks.distillation", "peak", "--folder", str(asked.folder)]
        done = subprocess.run([*command, str(count), form], check=True, capture_output=True, text=True)
        peaks[count, form] = float(done.stdout.split()[-1])
        print(f"{count} teachers ({form}): peak {peaks[count, form]:7.0f} MiB")
    for form in ("adapter", "model"):
        print(f"three {form} teachers / one: {peaks[3, form] / peaks[1, form]:.3f}")


def run_peak(asked: argparse.Namespace) -> None:
    """Perform one small stage in this process and print the most memory it has had, in MiB."""
    from evertune.plan import make_plan
    from evertune.recipe.load import load_recipe
    from evertune.stages import KINDS, Place
    from evertune.workspace import Workspace

    folder, count, form = asked.folder, asked.count, asked.form
    folder.mkdir(parents=True, exist_ok=True)
    said = [(("user", f"Say {i} in words."), ("assistant", f"It is {i}.")) for i in range(8)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in said]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "probe.jsonl").write_text(json.dumps({"prompt": "Yes?", "choices": ["yes", "no"], "answer": 0}) + "\n")
    teachers = [str(write_other(folder, form, number)) for number in range(count)]
    stage = f"distill: {{teachers: [{', '.join(teachers)}], {SETTINGS}}}" if count else f"sft: {{{SETTINGS}}}"
    recipe = folder / f"recipe-{count}-{form}.yaml"
    recipe.write_text(SMALL.format(name=f"{count}-{form}-{time.time_ns()}", stage=stage))
    plan = make_plan(load_recipe(recipe))
    place = Place(plan, plan.recipe.rounds[0], 0, made=[plan.base], champion=plan.base)
    kind = KINDS[place.kind]
    kind.perform(kind.order(place).to_json(), Workspace.open(plan.workspace, create=True))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def write_other(folder: Path, form: str, number: int) -> Path:
    """A model, or an adapter over the base, that says something a little different. Made in a process of its own."""
    place = folder / f"{form}-{number}"
    if not place.is_dir():
        code = f"from benchmarks.distillation import make_other; make_other({str(place)!r}, {form!r}, {number})"
        subprocess.run([sys.executable, "-c", code], check=True)
    return place


def make_other(place: str, form: str, number: int) -> None:
    import torch

    from evertune.model.adapter import add_adapter, save_new
    from evertune.model.bundled import resolve_base
    from evertune.model.checkpoint import describe
    from evertune.model.export import save_dense
    from evertune.model.open import open_model

    base = describe(resolve_base("smollm2-135m", folder=Path()))
    opened, folder = open_model(base, dtype="bfloat16"), Path(place)
    folder.mkdir()
    with torch.no_grad():
        if form == "adapter":
            for name, parameter in add_adapter(
                opened, rank=16, alpha=32, dropout=0.0, targets="all-linear", seed=number
            ).items():
                parameter.add_(0.01 if name.endswith("lora_B") else 0.0)
            save_new(opened, folder, base)
        else:
            for name, parameter in opened.model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.mul_(1.0 + 0.02 * (number + 1))
            save_dense(opened.model, folder, like=base)


if __name__ == "__main__":
    main()
