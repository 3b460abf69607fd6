"""Several teachers, several stages or several adapters into one student; prints the tables of
docs/results/distillation.md.

    python -m benchmarks.distillation experts --data DATA --folder WORK      two experts -> one student, beside merging
                                                                             and training on both at once
    python -m benchmarks.distillation cross-stage --data DATA --folder WORK  SFT -> DPO -> RL, then what they wore away
    python -m benchmarks.distillation compress --data DATA --folder WORK     the stack of those stages at smaller ranks
    python -m benchmarks.distillation memory --folder WORK                   peak memory, one and three teachers

The 135M model; snips7 (7 commands) and 7 of the 14 kinds of things of dbpedia14, texts cut to their first words so that
one core is enough. The snips expert takes twice the steps of the other, as its labels are longer; a student of both
takes as many as the longer one, and begins where task arithmetic ends. Everything is trained and probed by
`evertune run` on recipes that are left in the folder; only the merges and the exact compressions, which no stage makes
by itself, are written here. Run again, it does only what is missing.
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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000
WORDS = 20
SKILLS = {"snips": ("snips7", "Name the command."), "topics": ("dbpedia14", "Name the kind of thing.")}
KINDS = ("Album", "Animal", "Athlete", "Building", "Film", "Plant", "Village")
RANKS = (2, 4, 8, 16)
STUDENTS = {
    "distilled": "distilled/2-distill",
    "task arithmetic 0.7": "distilled/1-merge",
    "trained on both": "multitask/1-sft",
}
Scores = Mapping[str, np.ndarray]
"""Item scores by probe."""

# No round can be promoted, so that each starts from the base or says where it does.
COMMON = """\
evertune: 1
name: {name}
base: smollm2-135m
workspace: run
seed: 13
data:
  snips: {{path: snips-train.jsonl}}
  topics: {{path: topics-train.jsonl}}
  pairs: {{path: topics-pairs.jsonl, format: preference}}
  asked: {{path: topics-asked.jsonl, format: verifiable, verifier: exact}}
probes:
  snips: {{path: snips-test.jsonl, kind: choice, role: watch, limit: {items}, system: Name the command.}}
  topics: {{path: topics-test.jsonl, kind: choice, role: watch, limit: {items}, system: Name the kind of thing.}}
  arc: {{path: {arc}, kind: choice, limit: {guards}}}
defaults: {{tune: {{lora: {{rank: 16}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
gate: {{min_items: 100000}}
rescue: [discard]
numerics: {{threads: 1}}
rounds:
"""
EXPERTS = """\
  - name: snips
    start: base
    stages: [sft: {{data: [snips], steps: {twice}, {pace}}}]
  - name: topics
    start: base
    stages: [sft: {{data: [topics], steps: {steps}, {pace}}}]
  - name: distilled
    start: base
    stages:
      - merge:
          method: task_arithmetic
          base: base
          models: {{snips: {{path: snips/1-sft, weight: 0.7}}, topics: {{path: topics/1-sft, weight: 0.7}}}}
      - distill:
          data: {{snips: 1.0, topics: 1.0}}
          teachers:
            - {{checkpoint: "stage:snips/1-sft", sources: snips}}
            - {{checkpoint: "stage:topics/1-sft", sources: topics}}
          weight: 1.0
          steps: {twice}
          {pace_lines}
  - name: multitask
    start: base
    stages: [sft: {{data: {{snips: 1.0, topics: 1.0}}, steps: {twice}, {pace}}}]
"""
CROSS_STAGE = """\
  - name: eroded
    start: base
    stages:
      - sft: {{data: [snips], steps: {twice}, {pace}}}
      - dpo: {{data: [pairs], steps: {few}, nll: 0.5, {eroding}}}
      - rl: {{data: [asked], steps: {few}, batch_rows: 8, group: 4, micro_batch_rows: 16, max_new_tokens: 8, kl: 0.0,
             lr: 5.0e-4, save_steps: 10}}
      - distill:
          data: {{snips: 2.0, topics: 1.0}}
          teachers: run
          route: best
          weight: 1.0
          steps: {most}
          {pace_lines}
"""
COMPRESS = """\
  - name: rank-{rank}
    start: {stack}
    stages:
      - distill:
          data: {{snips: 1.0, topics: 1.0}}
          teachers: start
          compress: true
          tune: {{lora: {{rank: {rank}}}}}
          weight: 1.0
          steps: {half}
          {pace_lines}
"""
PACE = {"lr": "5.0e-4", "batch_rows": "16", "micro_batch_rows": "16", "save_steps": "10"}
STACK = "eroded/4-distill"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, do in (("experts", run_experts), ("cross-stage", run_cross_stage), ("compress", run_compress)):
        one = commands.add_parser(name)
        one.add_argument("--data", type=Path, required=True, help="folder with snips7, dbpedia14 and arc_easy")
        one.add_argument("--folder", type=Path, required=True)
        one.add_argument("--steps", type=int, default=20, help="optimizer steps of the topics expert")
        one.add_argument("--items", type=int, default=200)
        one.add_argument("--guards", type=int, default=60)
        one.set_defaults(do=do)
    memory = commands.add_parser("memory")
    memory.add_argument("--folder", type=Path, required=True)
    memory.set_defaults(do=run_memory)
    peak = commands.add_parser("peak", help="one measurement of `memory`")
    peak.add_argument("--folder", type=Path, required=True)
    peak.add_argument("count", type=int)
    peak.add_argument("form", choices=["adapter", "model"])
    peak.set_defaults(do=run_peak)
    asked = parser.parse_args()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, smollm2-135m in bfloat16", flush=True
    )
    asked.do(asked)


# What all three runs have in common.


def run_recipe(asked: argparse.Namespace, name: str, rounds: str) -> None:
    """Write the rows and the recipe, and run it."""
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    for skill, (task, system) in SKILLS.items():
        write_short(asked.data / task / "train.jsonl", folder / f"{skill}-train.jsonl", system)
        write_short(asked.data / task / "test.jsonl", folder / f"{skill}-test.jsonl", system)
    write_stages(folder / "topics-train.jsonl", folder)
    arc = (asked.data / "arc_easy" / "test.jsonl").resolve()
    common = COMMON.format(name=name, items=asked.items, guards=asked.guards, arc=arc)
    recipe = folder / f"{name}.yaml"
    recipe.write_text(common + rounds)
    done = subprocess.run([sys.executable, "-m", "evertune", "run", str(recipe)], check=False)
    if done.returncode not in (0, 2, 4):
        sys.exit(done.returncode)


def written(asked: argparse.Namespace, rounds: str, **more: object) -> str:
    """Rounds of a recipe with the lengths and the pace that were asked for."""
    pace = ", ".join(f"{name}: {value}" for name, value in PACE.items())
    return rounds.format(
        steps=asked.steps,
        half=asked.steps // 2,
        few=max(1, 3 * asked.steps // 10),
        most=4 * asked.steps // 5,
        twice=2 * asked.steps,
        pace=pace,
        eroding=pace.replace("5.0e-4", "2.0e-3"),
        pace_lines="\n          ".join(f"{name}: {value}" for name, value in PACE.items()),
        **more,
    )


def write_short(source: Path, to: Path, system: str) -> None:
    """The rows with the question alone, its first words, and without the list of options; some kinds of things only."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = row.get("messages", [])
        kinds = KINDS if row["task"] == "dbpedia14" else tuple(row.get("choices", ()))
        answer = turns[-1]["content"] if turns else row["choices"][row["answer"]]
        if kinds and answer not in kinds:
            continue
        asked = turns[0]["content"] if turns else row["prompt"]
        text = asked.split("\n\n")[1].removeprefix("User: ").replace("\n", ". ")
        text = " ".join(text.split()[:WORDS])
        if turns:
            said = [{"role": "system", "content": system}, {"role": "user", "content": text}, turns[-1]]
            lines.append({"id": row["id"], "messages": said})
        else:
            lines.append({"id": row["id"], "prompt": text, "choices": list(kinds), "answer": kinds.index(answer)})
    to.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")


def write_stages(source: Path, folder: Path) -> None:
    """The same questions for a DPO stage, the right kind against another one, and for an RL stage, with the answer."""
    pairs, asked = [], []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        *question, answer = row["messages"]
        others = [one for one in KINDS if one != answer["content"]]
        pair = {"chosen": answer["content"], "rejected": others[number % len(others)]}
        pairs.append({"id": row["id"], "prompt": question, **pair})
        asked.append({"id": row["id"], "messages": question, "answer": answer["content"]})
    for name, rows in (("pairs", pairs), ("asked", asked)):
        (folder / f"topics-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def print_scores(scores: Mapping[str, Scores]) -> None:
    """Accuracy on each probe."""
    names = list(next(iter(scores.values())))
    print(f"\n{'model':26}" + "".join(f"{name:>9}" for name in names))
    for label, found in scores.items():
        print(f"{label:26}" + "".join(f"{found[name].mean():9.3f}" for name in names))


def print_costs(workspace: Path, labels: Sequence[str]) -> None:
    for event in ledger_events(workspace, "checkpoint"):
        if event.body["label"] in labels:
            final = {name: round(value, 4) for name, value in event.body["final"].items()}
            volatile = event.volatile
            print(
                f"{event.body['label']}: {event.body['steps']} steps, {event.body['tokens']} tokens, "
                f"{volatile['seconds']:.0f} s, {volatile.get('teacher_forwards', 0)} teacher forwards, {final}"
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


def difference(after: np.ndarray, before: np.ndarray) -> str:
    """Mean difference on the same items, with a 90 % interval from resampled items."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(after), (RESAMPLES, len(after)))
    low, high = np.quantile((after - before)[drawn].mean(1), [0.05, 0.95])
    return f"{(after - before).mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def ledger_events(workspace: Path, kind: str) -> Sequence[Any]:
    from evertune.lineage import current_events, open_workspace

    return [event for event in current_events(open_workspace(workspace).ledger) if event.kind == kind]


def item_score(found: Any) -> np.ndarray:
    return np.asarray(found.score)


def ledger_scores(
    workspace: Path, recipe: str, read: Callable[[Any], np.ndarray] = item_score
) -> dict[str, dict[str, np.ndarray]]:
    """Item scores of every checkpoint of the run, by label and probe, or what else is read of `ItemScores`."""
    from evertune.lineage import checkpoint_path, open_workspace
    from evertune.model.checkpoint import describe
    from evertune.plan import make_plan
    from evertune.probe.scores import ItemScores
    from evertune.recipe.load import load_recipe

    plan, opened = make_plan(load_recipe(workspace.parent / recipe)), open_workspace(workspace)
    found: dict[str, dict[str, np.ndarray]] = {}
    for event in ledger_events(workspace, "checkpoint"):
        checkpoint = describe(checkpoint_path(opened, event))
        places = {one.name: opened.workspace.path(plan.probe_key(checkpoint, one)) for one in plan.probes}
        if all((place / "scores.parquet").is_file() for place in places.values()):
            found[event.body["label"]] = {
                name: read(ItemScores.read_parquet(place / "scores.parquet")) for name, place in places.items()
            }
    return found


def adapter_scores(folder: Path, recipe: str, adapters: Mapping[str, Callable[[], Any]]) -> dict[str, Scores]:
    """Item scores of adapters over the base that no stage has made, each written once: by name, its factors."""
    from evertune.lineage import open_workspace
    from evertune.model.adapter import write_adapter
    from evertune.model.checkpoint import describe
    from evertune.plan import make_plan
    from evertune.probe.job import run_probes
    from evertune.probe.scores import ItemScores
    from evertune.recipe.load import load_recipe

    plan, opened = make_plan(load_recipe(folder / recipe)), open_workspace(folder / "run")
    found: dict[str, Scores] = {}
    for label, factors in adapters.items():
        place = folder / label.replace(" ", "-")
        if not place.is_dir():
            unfinished = folder / "unfinished"
            unfinished.mkdir(exist_ok=True)
            write_adapter(factors(), unfinished, plan.base)
            unfinished.rename(place)
        with opened.workspace.worker_lock():
            keys = run_probes(describe(place), plan.probes, opened.workspace, numerics=plan.numerics)
        paths = {one.name: opened.workspace.path(key) for one, key in zip(plan.probes, keys, strict=True)}
        found[label] = {name: ItemScores.read_parquet(path / "scores.parquet").score for name, path in paths.items()}
    return found


# Two experts into one student.


def run_experts(asked: argparse.Namespace) -> None:
    """Accuracy of every model, and the share of each expert's gain that each student keeps."""
    from evertune.lineage import find_checkpoint, open_workspace
    from evertune.model.adapter import concatenate, read_factors

    run_recipe(asked, "experts", written(asked, EXPERTS))
    workspace = asked.folder / "run"

    def soup() -> Any:
        opened = open_workspace(workspace)
        experts = [read_factors(find_checkpoint(opened, f"{name}/1-sft")[1].path) for name in SKILLS]
        return concatenate(experts, [0.5, 0.5])  # adapters concatenate exactly

    made = ledger_scores(workspace, "experts.yaml")
    students = {name: made[label] for name, label in STUDENTS.items()}
    experts = {name: made[f"{name}/1-sft"] for name in SKILLS}
    students |= adapter_scores(asked.folder, "experts.yaml", {"soup": soup})
    print_scores({"base": made["base"], **{f"expert {name}": one for name, one in experts.items()}, **students})
    print(f"\n{'share of the gain kept':26}" + "".join(f"{name:>24}" for name in experts))
    for label, found in students.items():
        cells = [share(found[name], expert[name], made["base"][name]) for name, expert in experts.items()]
        print(f"{label:26}" + "".join(f"{cell:>24}" for cell in cells))
    print()
    print_costs(workspace, [*(f"{name}/1-sft" for name in SKILLS), *STUDENTS.values()])


# What three stages wore away.


def run_cross_stage(asked: argparse.Namespace) -> None:
    """Accuracy after each stage; of what a skill lost after its best stage, the share that came back; what the last
    stage before the distillation had gained, and how much of it stays."""
    run_recipe(asked, "cross-stage", written(asked, CROSS_STAGE))
    workspace = asked.folder / "run"
    made = ledger_scores(workspace, "cross-stage.yaml")
    labels = [f"eroded/{one}" for one in ("1-sft", "2-dpo", "3-rl", "4-distill")]
    sft, dpo, rl, mended = (made[label] for label in labels)
    print_scores({label: made[label] for label in ("base", *labels)})
    print(f"\nof what snips lost after its stage, recovered:    {share(mended['snips'], sft['snips'], rl['snips'])}")
    print(f"of what topics gained in the RL stage, kept:      {share(mended['topics'], rl['topics'], dpo['topics'])}")
    print(f"topics, after the distillation - after RL:        {difference(mended['topics'], rl['topics'])}\n")
    print_costs(workspace, labels)


# A stack of adapters as one adapter.


def run_compress(asked: argparse.Namespace) -> None:
    """Size, retention and gain of the stack, of its nearest adapters of smaller rank, and of those after distilling."""
    from evertune.lineage import find_checkpoint, open_workspace
    from evertune.model.adapter import read_factors
    from evertune.model.lowrank import compress

    workspace = asked.folder / "run"
    stack = find_checkpoint(open_workspace(workspace), STACK)[1].path
    rounds = [written(asked, COMPRESS, rank=rank, stack=stack.relative_to(asked.folder)) for rank in RANKS]
    run_recipe(asked, "compress", "".join(rounds))
    made = ledger_scores(workspace, "compress.yaml")
    opened = open_workspace(workspace)
    _, whole = find_checkpoint(opened, STACK)
    factors = [read_factors(one.path) for one in whole.stack[1:]]
    nearest = {f"nearest of rank {rank}": partial(lambda rank: compress(factors, rank).factors, rank) for rank in RANKS}
    exact = adapter_scores(asked.folder, "compress.yaml", nearest)
    base, best = made["base"], ledger_scores(workspace, "cross-stage.yaml")[STACK]
    sizes = [sum(file.stat().st_size for file in one.path.glob("*.safetensors")) for one in whole.stack[1:]]
    ranks = sum(next(iter(one.values())).rank for one in factors)
    print(f"\nthe stack: {len(factors)} adapters, rank {ranks} together, {sum(sizes) / 2**20:.1f} MiB")
    print(f"{'':26}{'MiB':>7}{'held':>8}{'arc':>8}" + "".join(f"{f'gain in {name} kept':>26}" for name in SKILLS))
    for rank in RANKS:
        label = f"rank-{rank}/1-distill"
        event, found = find_checkpoint(opened, label)
        size = sum(file.stat().st_size for file in found.path.glob("*.safetensors")) / 2**20
        for name, one in ((f"nearest of rank {rank}", exact[f"nearest of rank {rank}"]), (label, made[label])):
            cells = [share(one[skill], best[skill], base[skill]) for skill in SKILLS]
            held = event.body["final"]["held"]
            print(f"{name:26}{size:7.1f}{held:8.3f}{one['arc'].mean():8.3f}" + "".join(f"{cell:>26}" for cell in cells))
    print()
    print_costs(workspace, [f"rank-{rank}/1-distill" for rank in RANKS])


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
