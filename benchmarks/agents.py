"""A new tool without losing the old ones: recipes/agents.yaml over seeds, as the page docs/results/agents.md.

    python -m benchmarks.agents --folder WORK --seeds 7 --page docs/results/agents.md
    python -m benchmarks.agents --folder WORK --smoke

Each seed is a run of `evertune run` in a workspace of its own; run again, it does only what is missing. Success is of
whole episodes, by greedy decoding, on tasks that nothing was trained on. `--smoke` takes a random model.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import machine
from benchmarks.distillation import Scores, difference, ledger_events
from evertune.comparison_table import READING

RECIPE = Path(__file__).parent.parent / "recipes" / "agents.yaml"
TOOLS = ("calculator", "files", "lookup")
STEPS = {
    "base": "the base",
    "old-tools/1-sft": "the old tools are taught",
    "new-tool-plain/1-sft": "the new tool, plainly",
    "new-tool/1-sft": "the new tool, with replay and anchor",
    "new-tool/2-rl": "and rl on whole episodes",
}
COMPARED = (
    ("new-tool-plain/1-sft", "old-tools/1-sft"),
    ("new-tool/1-sft", "old-tools/1-sft"),
    ("new-tool/2-rl", "old-tools/1-sft"),
    ("new-tool/2-rl", "new-tool-plain/1-sft"),
    ("new-tool/2-rl", "new-tool/1-sft"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the workspaces go")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[7])
    parser.add_argument("--page", type=Path, help="write the page there too; a section Reading stays")
    parser.add_argument("--smoke", action="store_true", help="a random model; the numbers mean nothing")
    asked = parser.parse_args()
    made = []
    for seed in asked.seeds:
        workspace = asked.folder / f"seed-{seed}"
        run(workspace, seed, smoke=asked.smoke)
        made.append(read(workspace))
        print(f"seed {seed}: done", flush=True)
    text = page_of(made, asked.seeds)
    print(text)
    if asked.page:
        before = asked.page.read_text(encoding="utf-8") if asked.page.is_file() else ""
        _, found, reading = before.partition(f"\n{READING}\n")
        asked.page.write_text(text + found + reading, encoding="utf-8")


def run(workspace: Path, seed: int, *, smoke: bool) -> None:
    """The recipe with a seed, or what is missing of it."""
    command = [sys.executable, "-m", "evertune", "run", str(RECIPE), "--quiet"]
    changes = {"workspace": workspace.absolute(), "seed": seed, **({"base": "tiny-random"} if smoke else {})}
    for name, value in changes.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 2, 4):
        raise SystemExit(f"{RECIPE}: evertune ended with {done.returncode}")


def read(workspace: Path) -> dict[str, Any]:
    """Item scores and shares in form by label and tool; decisions by label; rewards and seconds of the rl stage."""
    from evertune.lineage import open_workspace
    from evertune.probe.scores import ItemScores

    opened = open_workspace(workspace)
    by_place = {
        (one.record["probe"]["checkpoint"], one.record["probe"]["probe"]): opened.workspace.path(one.key)
        for one in opened.workspace.manifests()
        if one.kind == "probe"
    }
    scores: dict[str, Scores] = {}
    form: dict[str, dict[str, float]] = {}
    for event in ledger_events(workspace, "checkpoint"):
        label, digest = event.body["label"], event.body["digest"]
        found = {
            tool: ItemScores.read_parquet(by_place[digest, tool] / "scores.parquet")
            for tool in TOOLS
            if (digest, tool) in by_place
        }
        if len(found) == len(TOOLS):
            scores[label] = {tool: np.asarray(one.score) for tool, one in found.items()}
            form[label] = {tool: float(np.mean(one.valid)) for tool, one in found.items() if one.valid is not None}
    costs = {
        one.body["label"]: (one.body["steps"], one.body["tokens"], one.volatile["seconds"])
        for one in ledger_events(workspace, "checkpoint")
        if one.body["label"] != "base"
    }
    decisions = {one.body["label"]: one.body["decision"] for one in ledger_events(workspace, "verdict")}
    return {"scores": scores, "form": form, "decisions": decisions, "costs": costs}


def page_of(made: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The page in Markdown."""
    items, facts = len(made[0]["scores"]["base"][TOOLS[0]]), machine()
    lines = [
        "# Agents: a new tool without losing the old ones",
        "",
        f"    python -m benchmarks.agents --folder WORK --seeds {','.join(map(str, seeds))}",
    ]
    lines += [
        "",
        f"[recipes/agents.yaml](../../recipes/agents.yaml) on SmolLM2-135M, {facts['date']}, {facts['cpu']}, "
        f"{facts.get('gpu', 'no GPU, one thread')}; seeds: {', '.join(map(str, seeds))}.",
        f"Success of whole episodes, {items} tasks a tool; in brackets the share of tasks in which every step was in",
        "form.",
        "",
        f"| checkpoint | {' | '.join(TOOLS)} | verdict |",
        f"|{'---|' * (len(TOOLS) + 2)}",
    ]
    for label, told in STEPS.items():
        cells = [_cell(made, label, tool) for tool in TOOLS]
        verdict = ", ".join(one["decisions"].get(label, "") for one in made)
        lines.append(f"| `{label}`: {told} | {' | '.join(cells)} | {verdict.strip(', ')} |")
    lines += [
        "",
        "Differences on the same tasks, 90 % intervals from resampled tasks"
        + (" (all seeds' tasks together)" if len(seeds) > 1 else "")
        + ":",
        "",
        f"| | {' | '.join(TOOLS)} |",
        f"|{'---|' * (len(TOOLS) + 1)}",
    ]
    for after, before in COMPARED:
        cells = [difference(_joined(made, after, tool), _joined(made, before, tool)) for tool in TOOLS]
        lines.append(f"| `{after}` less `{before}` | {' | '.join(cells)} |")
    lines += ["", "| stage | steps | tokens | seconds |", "|---|---|---|---|"]
    for label in list(STEPS)[1:]:
        steps, tokens, seconds = np.mean([one["costs"][label] for one in made], axis=0)
        lines.append(f"| `{label}` | {steps:.0f} | {tokens:,.0f} | {seconds:,.0f} |")
    return "\n".join([*lines, ""])


def _joined(made: Sequence[Mapping[str, Any]], label: str, tool: str) -> np.ndarray:
    return np.concatenate([one["scores"][label][tool] for one in made])


def _cell(made: Sequence[Mapping[str, Any]], label: str, tool: str) -> str:
    form = np.mean([one["form"][label][tool] for one in made])
    return f"{_joined(made, label, tool).mean():.3f} ({form:.2f})"


if __name__ == "__main__":
    main()
