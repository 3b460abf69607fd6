"""What a run costs beside training: the process that orchestrates it, and probes.

    python -m benchmarks.overhead recipes/demo.yaml --workspace NEW

Performs the recipe and prints, of its wall time: the processor time of the run's own process (plan, digests, ledger,
gate; training and scoring are in workers), and the seconds that the ledger has for stages and probes. What is left is
workers: starting them, opening and verifying models, and the scan of an interpolation.
"""

import argparse
import json
import resource
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
    for one in current_events(open_workspace(options.workspace).ledger):
        if one.kind in ("checkpoint", "probe") and "seconds" in one.volatile:
            kind = "stages" if one.kind == "checkpoint" else "probes"
            spent[kind] += one.volatile["seconds"]
            rounds[one.body["label"].split("/")[0]][kind] += one.volatile["seconds"]
    print(json.dumps(facts))
    print(f"| | seconds | share of {whole:.0f} s |\n|---|---|---|")
    for kind, seconds in {"the run's own process, CPU": own, **spent, "left": whole - sum(spent.values())}.items():
        print(f"| {kind} | {seconds:.1f} | {100 * seconds / whole:.1f} % |")
    print("\n| round | stages, s | probes, s | probes, of both |\n|---|---|---|---|")
    for name, told in rounds.items():
        both = told["stages"] + told["probes"]
        print(f"| {name} | {told['stages']:.1f} | {told['probes']:.1f} | {100 * told['probes'] / both:.0f} % |")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
