"""What a run costs beside training: the process that orchestrates it, and probes.

    python -m benchmarks.overhead recipes/demo.yaml --workspace NEW

Performs the recipe and prints, of its wall time: the processor time of the run's own process (plan, digests, ledger,
gate; training and scoring are in workers), and the seconds of stages' steps and of probes, those of every scanned point
of an interpolation among them. What is left is workers: starting them, opening and writing models, what a stage does
beside its steps. A round's time is that from the end of the one before, or of the base's probes, to its own end; one
probing is the median over the checkpoints that it made, of which a rescue makes more.
"""

import argparse
import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.contest import machine
from evertune.display import Display
from evertune.lineage import current_events, open_workspace
from evertune.recipe.load import load_recipe
from evertune.run import run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--workspace", type=Path, required=True)
    options = parser.parse_args()
    facts, began, own = machine(), time.monotonic(), cpu_seconds()
    run_recipe(
        load_recipe(options.recipe, overrides=[f"workspace={json.dumps(str(options.workspace.absolute()))}"]),
        display=Display(quiet=True),
    )
    whole, own = time.monotonic() - began, cpu_seconds() - own
    spent, rounds = defaultdict[str, float](float), defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    probings = defaultdict[str, float](float)
    end, durations = 0.0, {}
    for one in current_events(open_workspace(options.workspace).ledger):
        name = one.body.get("label", "").split("/")[0]
        stage, probe = ("seconds", "") if one.kind == "checkpoint" else ("", "seconds")
        for kind, key in (("stages", stage), ("probes", probe), ("probes", "scan_seconds")):
            spent[kind] += one.volatile.get(key, 0.0)
            rounds[name][kind] += one.volatile.get(key, 0.0)
        if one.kind == "probe":
            probings[one.body["label"]] += one.volatile["seconds"]
        if one.kind == "settled":
            durations[one.body["round"]] = one.volatile["time"] - end
        if one.kind == "settled" or name == "base":
            end = one.volatile["time"]
    print(json.dumps(facts))
    print(f"| | seconds | share of {whole:.0f} s |\n|---|---|---|")
    for kind, seconds in {"the run's own process, CPU": own, **spent, "left": whole - sum(spent.values())}.items():
        print(f"| {kind} | {seconds:.1f} | {100 * seconds / whole:.1f} % |")
    print("\n| round | its time, s | stages, s | one probing, s | of its time | all probes, s | of its time |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds in durations.items():
        told = rounds[name]
        probing = statistics.median(took for label, took in probings.items() if label.startswith(f"{name}/"))
        cells = [f"{one:.1f} | {100 * one / seconds:.1f} %" for one in (probing, told["probes"])]
        print(f"| {name} | {seconds:.0f} | {told['stages']:.1f} | {cells[0]} | {cells[1]} |")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
