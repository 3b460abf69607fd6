"""SFT, then DPO, then RL, each with guards off and on: what the later stages gain and what they wear away; and what one
line of cross-stage distillation brings back. Prints the tables of docs/results/erosion.md.

    python -m benchmarks.erosion --data DATA --folder WORK --seeds 1,2,3
    python -m benchmarks.erosion --data DATA --folder WORK --seeds 2 --sweep      which guard costs the gain

The 135M model. The sft stage teaches snips7 (7 commands, the answer being the command's name) and, one row in three,
7 kinds of things of dbpedia14; the dpo stage has short pairs of AlpacaEval; the rl stage has the kinds of things,
with `exact` as reward. All lines share the sft stage; a guarded one sees as many pairs and questions in as many steps
at the same rates. Its dpo stage also replays sft rows, which have 0.15 of the gradient's norm, and an anchor holds them
to the sft stage. In its rl stage one question in five is about a protected skill, and general rows, which are not
learnt, anchor it to what the dpo stage has made. LINES has three other sorts of guards: `guards-policy` has no such
rows, `guards-replayed` learns sft rows again in the rl stage, and so does `guards-as-they-come`, in whose dpo stage
replayed rows weigh as they come and which is held to the sft stage throughout. The unguarded line ends with
`distill: {teachers: run, route: best}`. Each seed is a run of `evertune run` on a recipe that is left in the folder.
Run again, it does only what is missing.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.distillation import SKILLS, Scores, difference, ledger_events, ledger_scores, share, write_short

RESAMPLES = 10_000
CHARACTERS = 420
"""Of the longest row that teaches, and the longest pair: question and answer together."""
SUPERVISED = 700
"""So many rows of snips are taught and replayed; the others are asked as protected questions."""
TAUGHT_KINDS = 180
"""So many rows of dbpedia14 are taught; the others are the rl stage's questions."""

RECIPE = """\
evertune: 1
name: seed-{seed}
base: smollm2-135m
workspace: run-{seed}
seed: {seed}
data:
  snips: {{path: snips-taught.jsonl}}
  commands: {{path: snips-asked.jsonl, verifier: exact}}
  general: {{path: general-train.jsonl}}
  pairs: {{path: pairs-train.jsonl, format: preference}}
  kinds: {{path: topics-taught.jsonl}}
  topics: {{path: topics-asked.jsonl, format: verifiable, verifier: exact}}
  asked: {{path: topics-rest.jsonl}}
probes:
  snips: {{path: snips-said.jsonl, kind: generate, verifier: exact, max_new_tokens: 8, limit: {items},
           system: Name the command.}}
  pairs: {{path: pairs-test.jsonl, kind: choice, normalise: sum, role: watch, limit: {items}}}
  topics: {{path: topics-said.jsonl, kind: generate, verifier: exact, max_new_tokens: 8, role: watch, limit: {items},
            system: Name the kind of thing.}}
  arc: {{path: {arc}, kind: choice, limit: {items}}}
  chat: {{path: general-test.jsonl, kind: bits_per_byte, limit: {texts}}}
  web: {{path: {web}, kind: bits_per_byte, limit: {texts}}}
defaults: {{tune: {{lora: {{rank: 16}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
gate: {{min_items: 100000}}
rescue: [discard]
numerics: {{threads: 1}}
rounds:
{rounds}"""
UNGUARDED = """\
  - name: guards-off
    start: base
    stages:
      - sft: {sft}
      - dpo: {{data: [pairs], batch_rows: {pairs}, nll: 0.0, {dpo}}}
      - rl: {{data: [topics], batch_rows: {questions}, kl: 0.0, {rl}}}
      - distill: {{data: {{snips: 1, asked: 1}}, teachers: run, route: best, skills: {{asked: topics}}, weight: 1.0,
                  {distill}}}
"""
GUARDED = """\
  - name: {line}
    start: base
    stages:
      - sft: {sft}
      - dpo: {{data: [pairs], batch_rows: {guarded_pairs}, replay: {{share: 0.25, from: [snips, kinds, general]}},
              anchor: {{kl: 0.1, to: sft}}, {dpo_guards}, {dpo}}}
      - rl: {{data: {{topics: 4, commands: 1}}, protect: {{commands: {{at_least: 0.8}}}}, {rl_guards}, {rl}}}
"""
REPLAYED = (
    "batch_rows: 15, replay: {{share: 0.333, from: [snips, kinds, general]}}, replay_ratio: 0.3, "
    "anchor: {{kl: 0.1, to: {to}}}, kl_to: {to}"
)
LINES = {
    "guards-on": (
        "nll: 0.0, replay_ratio: 0.15",
        "batch_rows: 15, replay: {share: 0.333, from: [general]}, replay_weight: 0.0, anchor: {kl: 1.0, to: start}, "
        "kl_to: start",
    ),
    "guards-policy": ("nll: 0.0, replay_ratio: 0.15", "batch_rows: 10, kl_to: start"),
    "guards-replayed": ("nll: 0.0, replay_ratio: 0.3", REPLAYED.format(to="start")),
    "guards-as-they-come": ("nll: 0.2, replay_weight: 1.0", REPLAYED.format(to="sft")),
}
"""Guards of the dpo and of the rl stage."""
SWEPT = """\
  - name: {line}
    start: base
    stages:
      - sft: {sft}
      - dpo: {{data: [pairs], batch_rows: {guarded_pairs}, replay: {{share: 0.25, from: [snips, kinds, general]}},
              {guards}, {dpo}}}
"""
SFT = {
    "data": "{snips: 2, kinds: 1}",
    "replay": "{share: 0.25, from: [general]}",
    "steps": "48",
    "lr": "5.0e-4",
    "batch_rows": "16",
    "micro_batch_rows": "16",
    "max_tokens": "160",
    "too_long": "drop",
    "save_steps": "20",
}
DPO = {"steps": "16", "lr": "1.5e-3", "micro_batch_rows": "8", "save_steps": "8"}
RL = {
    "steps": "24",
    "lr": "3.0e-4",
    "group": "6",
    "micro_batch_rows": "16",
    "max_new_tokens": "8",
    "save_steps": "8",
}
DISTILL = {"steps": "20", "lr": "2.0e-4", "batch_rows": "16", "micro_batch_rows": "16", "save_steps": "10"}
PAIRS, QUESTIONS = 12, 8
GAINED, KEPT = ("pairs", "topics"), ("snips", "arc", "chat", "web")
SPLITS = ("train", "validation", "test")
UNHELD = "guards-off"
MENDED = "guards-off/4-distill"
STAGES = ("1-sft", "2-dpo", "3-rl")
SWEEP = {
    "all": "nll: 0.2, replay_weight: 1.0, anchor: {kl: 0.1, to: sft}",
    "no-likelihood": "nll: 0.0, replay_weight: 1.0, anchor: {kl: 0.1, to: sft}",
    "replay-alone": "nll: 0.0, replay_weight: 1.0",
    "by-norm": "nll: 0.0, anchor: {kl: 0.1, to: sft}, replay_ratio: 0.3",
    "by-norm-likelihood": "nll: 0.2, anchor: {kl: 0.1, to: sft}, replay_ratio: 0.3",
}
"""Guards of a dpo stage, beside the replay of one row in four."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with snips7, dbpedia14, arc_easy and others")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--items", type=int, default=120)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--lines", nargs="*", default=["guards-on"], choices=LINES)
    parser.add_argument("--sweep", action="store_true", help="the dpo stage alone, under five sorts of guards")
    asked = parser.parse_args()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, smollm2-135m in bfloat16", flush=True
    )
    write_rows(asked.data, asked.folder)
    if asked.sweep:
        for seed in asked.seeds:
            run_sweep(asked, seed)
        return
    made: list[Mapping[str, Scores]] = []
    for seed in asked.seeds:
        run_seed(asked, seed)
        made.append(all_scores(asked.folder, seed, f"seed-{seed}.yaml"))
        print_scores(seed, made[-1], asked.lines)
    for stage in STAGES[1:]:
        for line in asked.lines:
            print_changes(made, line, stage)
    print_pairs(made, asked.lines)
    print_mended(made)
    for seed in asked.seeds:
        print_rewards(asked.folder / f"run-{seed}")


def margin(found: Any) -> np.ndarray:
    """Of a pair: how much likelier the better answer is than the other, in nats; its change is the reward margin that
    DPO raises, by beta."""
    return np.zeros(0) if found.gap is None else np.where(found.score == 1.0, found.gap, -found.gap)


def write_rows(data: Path, folder: Path) -> None:
    """What the recipes read; the pairs that are asked are none of those that teach."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill, (task, system) in SKILLS.items():
        for split in ("train", "test"):
            write_short(data / task / f"{split}.jsonl", folder / f"{skill}-{split}.jsonl", system)
        asked = rows_of(folder / f"{skill}-test.jsonl")
        said = [{"id": row["id"], "prompt": row["prompt"], "answer": row["choices"][row["answer"]]} for row in asked]
        write(folder / f"{skill}-said.jsonl", said)
    asked = []
    for row in rows_of(folder / "topics-train.jsonl"):
        *question, answer = row["messages"]
        asked.append({"id": row["id"], "messages": question, "answer": answer["content"]})
    write(folder / "topics-taught.jsonl", rows_of(folder / "topics-train.jsonl")[:TAUGHT_KINDS])
    write(folder / "topics-rest.jsonl", rows_of(folder / "topics-train.jsonl")[TAUGHT_KINDS:])
    write(folder / "topics-asked.jsonl", asked[TAUGHT_KINDS:])
    snips = rows_of(folder / "snips-train.jsonl")
    write(folder / "snips-taught.jsonl", snips[:SUPERVISED])
    write(folder / "snips-asked.jsonl", snips[SUPERVISED:])
    for split, name in (("train", "train"), ("validation", "test")):
        rows = rows_of(data / "replay_dolly" / f"{split}.jsonl")
        write(folder / f"general-{name}.jsonl", [row for row in rows if characters(row) <= CHARACTERS])
    pairs = [row for split in SPLITS for row in rows_of(data / "pref_alpacaeval" / f"{split}.jsonl")]
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row in pairs:  # a question is on one side, whoever answered it
        question = row["prompt"][-1]["content"]
        if characters(row) <= CHARACTERS:
            sides[hashlib.sha256(question.encode()).digest()[0] % 3 == 0].append(row)
    write(folder / "pairs-train.jsonl", sides[False])
    items = [
        {
            "id": row["id"],
            "prompt": row["prompt"][-1]["content"],
            "choices": [row["chosen"][-1]["content"], row["rejected"][-1]["content"]],
            "answer": 0,
        }
        for row in sides[True]
    ]
    write(folder / "pairs-test.jsonl", items)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[Mapping]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def characters(row: Mapping) -> int:
    """Of a row's turns; of a pair's question and its longer answer."""
    asked = sum(len(turn["content"]) for turn in row.get("messages") or row["prompt"])
    return asked + max((len(row[side][-1]["content"]) for side in ("chosen", "rejected") if side in row), default=0)


def run_seed(asked: argparse.Namespace, seed: int) -> None:
    sft = "{" + inline(SFT) + "}"
    rounds = UNGUARDED.format(
        sft=sft, dpo=inline(DPO), rl=inline(RL), distill=inline(DISTILL), pairs=PAIRS, questions=QUESTIONS
    )
    for line in asked.lines:
        dpo_guards, rl_guards = LINES[line]
        rounds += GUARDED.format(
            line=line,
            sft=sft,
            dpo_guards=dpo_guards,
            rl_guards=rl_guards,
            dpo=inline(DPO),
            rl=inline(RL),
            guarded_pairs=PAIRS * 4 // 3,
        )
    run_recipe(asked, seed, f"seed-{seed}", rounds)


def run_sweep(asked: argparse.Namespace, seed: int) -> None:
    """The dpo stage alone under each of the guards, in the workspace of the seed; prints how each probe has changed."""
    sft = "{" + inline(SFT) + "}"
    rounds = "".join(
        SWEPT.format(line=line, sft=sft, guards=guards, dpo=inline(DPO), guarded_pairs=PAIRS * 4 // 3)
        for line, guards in SWEEP.items()
    )
    run_recipe(asked, seed, f"sweep-{seed}", rounds)
    made = all_scores(asked.folder, seed, f"sweep-{seed}.yaml")
    print(f"\nseed {seed}, after dpo less after sft" + "".join(f"{name:>9}" for name in (*GAINED, *KEPT)))
    for line in SWEEP:
        changes = (made[f"{line}/2-dpo"][name] - made[f"{line}/1-sft"][name] for name in (*GAINED, *KEPT))
        print(f"{line:31}" + "".join(f"{change.mean():9.3f}" for change in changes), flush=True)


def run_recipe(asked: argparse.Namespace, seed: int, name: str, rounds: str) -> None:
    recipe = asked.folder / f"{name}.yaml"
    text = RECIPE.format(
        seed=seed,
        items=asked.items,
        texts=asked.texts,
        arc=(asked.data / "arc_easy" / "test.jsonl").resolve(),
        web=(asked.data / "text_c4" / "test.jsonl").resolve(),
        rounds=rounds,
    )
    recipe.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "evertune", "run", str(recipe)], check=False)
    if done.returncode not in (0, 2, 4):
        sys.exit(done.returncode)


def all_scores(folder: Path, seed: int, recipe: str) -> Mapping[str, Scores]:
    """Item scores by checkpoint and probe; of pairs, the margin."""
    found = ledger_scores(folder / f"run-{seed}", recipe)
    margins = ledger_scores(folder / f"run-{seed}", recipe, read=margin)
    return {label: {**one, "pairs": margins[label]["pairs"]} for label, one in found.items()}


def inline(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in settings.items())


def print_scores(seed: int, made: Mapping[str, Scores], guarded: Sequence[str]) -> None:
    names = (*GAINED, *KEPT)
    print(f"\nseed {seed:<21}" + "".join(f"{name:>9}" for name in names))
    for label in ("base", *(f"{line}/{stage}" for line in (UNHELD, *guarded) for stage in STAGES), MENDED):
        print(f"{label:26}" + "".join(f"{made[label][name].mean():9.3f}" for name in names), flush=True)


def print_changes(made: Sequence[Mapping[str, Scores]], guarded: str, stage: str) -> None:
    """After a stage less after the sft stage, over all seeds, and a guarded line as a share of the unguarded one.

    Intervals are 90 %, from items drawn anew (the same ones in every seed, in both lines and at both stages) with the
    seeds as they are; bits per byte are turned round, so that a loss is negative in every row.
    """
    rng = np.random.default_rng(0)
    print(f"\nafter {stage} less after 1-sft, {len(made)} seeds")
    print(f"{'':10}{UNHELD:>26}{guarded:>26}{'on / off':>22}   each seed, off and on")
    for name in (*GAINED, *KEPT):
        sign = -1.0 if name in ("chat", "web") else 1.0
        changes = {
            line: sign * np.stack([one[f"{line}/{stage}"][name] - one[f"{line}/1-sft"][name] for one in made])
            for line in (UNHELD, guarded)
        }
        drawn = rng.integers(0, changes[UNHELD].shape[1], (RESAMPLES, changes[UNHELD].shape[1]))
        means = {line: change.mean(0)[drawn].mean(1) for line, change in changes.items()}
        cells = [interval(change.mean(), means[line], "+.3f") for line, change in changes.items()]
        off = means[UNHELD]
        ratio = means[guarded] / np.where(off == 0.0, np.nan, off)
        ratios = interval(changes[guarded].mean() / changes[UNHELD].mean(), ratio, ".2f")
        each = ", ".join(
            f"{off:+.3f} {on:+.3f}" for off, on in zip(*(change.mean(1) for change in changes.values()), strict=True)
        )
        print(f"{name:10}{cells[0]:>26}{cells[1]:>26}{ratios:>22}   {each}")


def print_pairs(made: Sequence[Mapping[str, Scores]], guarded: Sequence[str]) -> None:
    """Share of held-out pairs whose margin has grown since the sft stage: DPO's reward accuracy."""
    for line in (UNHELD, *guarded):
        for stage in STAGES[1:]:
            grown = [(one[f"{line}/{stage}"]["pairs"] > one[f"{line}/1-sft"]["pairs"]).mean() for one in made]
            print(f"pairs whose margin has grown, {line}/{stage}: " + ", ".join(f"{share:.3f}" for share in grown))


def print_mended(made: Sequence[Mapping[str, Scores]]) -> None:
    """What the distillation brings back of what dpo and rl had worn away of snips, and what it keeps of the rl stage's
    gain in topics: pooled over the seeds, 90 % intervals from items drawn anew."""
    sft, dpo, rl = ([one[f"guards-off/{stage}"] for one in made] for stage in STAGES)
    mended = [one[MENDED] for one in made]

    def pooled(scores: Sequence[Scores], name: str) -> np.ndarray:
        return np.mean([one[name] for one in scores], axis=0)

    back = share(pooled(mended, "snips"), pooled(sft, "snips"), pooled(rl, "snips"))
    kept = share(pooled(mended, "topics"), pooled(rl, "topics"), pooled(dpo, "topics"))
    print(f"\nof what snips lost after its stage, recovered: {back}")
    print(f"of what topics gained in the rl stage, kept:   {kept}")
    print(
        f"topics, after the distillation - after rl:     {difference(pooled(mended, 'topics'), pooled(rl, 'topics'))}"
    )


def interval(estimate: float, draws: np.ndarray, form: str) -> str:
    low, high = np.nanquantile(draws, [0.05, 0.95])
    return f"{estimate:{form}} [{low:{form}}, {high:{form}}]"


def print_rewards(workspace: Path) -> None:
    """What each stage took; the mean reward of each rl stage's first and last eight steps, with Welch's interval."""
    from scipy.stats import ttest_ind

    from evertune.lineage import checkpoint_path, open_workspace

    print(f"\n{workspace.name}")
    opened = open_workspace(workspace)
    for event in ledger_events(workspace, "checkpoint"):
        label, seconds = event.body["label"], event.volatile.get("seconds")
        if seconds is None:  # the base, which no stage has made
            continue
        print(f"{label:20}{event.body['steps']:4} steps, {event.body['tokens']} tokens, {seconds:.0f} s")
        if label.endswith("-rl"):
            reward = [row["reward/topics"] for row in rows_of(checkpoint_path(opened, event) / "metrics.jsonl")]
            found = ttest_ind(reward[-8:], reward[:8], equal_var=False, alternative="two-sided")
            low, high = found.confidence_interval(0.9)
            print(
                f"{'':18}reward, first 8 steps {np.mean(reward[:8]):.3f}, last 8 {np.mean(reward[-8:]):.3f}, "
                f"difference {np.mean(reward[-8:]) - np.mean(reward[:8]):+.3f} [{low:+.3f}, {high:+.3f}], "
                f"p = {found.pvalue:.1e}"
            )


if __name__ == "__main__":
    main()
