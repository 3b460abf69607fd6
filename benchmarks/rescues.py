"""What each rung of the rescue ladder gained and lost; prints the tables of docs/results/rescue.md from a run's ledger.

evertune run recipes/six-rounds.yaml
python -m benchmarks.rescues runs/six-rounds
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.distillation import ledger_events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    workspace = parser.parse_args().workspace
    rungs = ledger_events(workspace, "rescue")
    seconds = {
        event.body["label"]: event.volatile.get("seconds") or 0.0 for event in ledger_events(workspace, "checkpoint")
    }
    for verdict in ledger_events(workspace, "verdict"):
        body = verdict.body
        if body["decision"] == "PROMOTE":
            continue
        probes = [one["probe"] for one in body["probes"] if one["reference"] == "champion"]
        heads = ["", "verdict", *probes, "all guards", "seconds of training"]
        print(f"\n{body['round']}, against {body['champion_label']}, points [90 %]\n")
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        # A workspace may hold rungs of an earlier verdict, on other items.
        mine = [one for one in rungs if one.body["round"] == body["round"] and one.seq > verdict.seq]
        for event in (verdict, *mine):
            print(f"| {' | '.join(row(event.body, probes, seconds))} |")


def row(body: Mapping[str, Any], probes: list[str], seconds: Mapping[str, float]) -> list[str]:
    """Of one candidate: how far each probe is from the champion's, and what its last stage took."""
    found = {one["probe"]: one for one in body["probes"] if one["reference"] == "champion"}
    cells = [
        f"{100 * one['difference']:+.1f} [{100 * one['ci90'][0]:+.1f}, {100 * one['ci90'][1]:+.1f}]"
        for one in (*(found[probe] for probe in probes), body["pooled"])
    ]
    stands = body["label"] if "rung" not in body else f"{body['rung']}: {body['label']}"
    return [stands, body["decision"], *cells, f"{seconds[body['label']]:.0f}"]


if __name__ == "__main__":
    main()
