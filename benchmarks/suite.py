"""The speed suite: every ratio in one table, and one line of `benchmarks/history.jsonl`, so that a slowdown is seen.

    make bench DATA=folder        or: python -m benchmarks.suite --data folder [--only step probes] [--no-history]

`folder` has chats (`replay_dolly/`), items with choices (`arc_easy/`) and questions (`gsm8k/`) as JSONL. Each line is
a ratio of processor time or memory from one interleaved run of the script it names, on one thread; seconds are those
of `evertune` commands, imports included. The last column is the newest line of the history from such a machine.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.contest import machine
from evertune.model.bundled import home
from evertune.process import ENVIRONMENT

HISTORY = Path(__file__).with_name("history.jsonl")
RECIPES = Path(__file__).parent.parent / "recipes"


def step(data: Path) -> Iterator[tuple[str, list[str]]]:
    rows = ["--rows", str(data / "replay_dolly/train.jsonl"), "--batch", "8", "--micro", "8"]
    rounds = ["--steps", "2", "--rounds", "2"]
    # An anchor's price is a few hundredths: rounds of this size differ by a tenth.
    more = ["--steps", "2", "--rounds", "5"]
    ways = ["--only", "evertune", "trl", "loop", "evertune-compiled", "evertune-apart"]
    # All contestants are in memory at once: not more than hold all weights trained in 24 GiB.
    exact = ["--only", "plain", "top64-both", "hidden-both", "live-both"]
    yield "step, lora", ["benchmarks.step", "plain", *rows, *rounds, "--tune", "lora", *ways]
    yield "anchor, lora", ["benchmarks.step", "anchor", *rows, *more, "--tune", "lora"]
    yield "step, full", ["benchmarks.step", "plain", *rows, *rounds, "--tune", "full"]
    yield "anchor, full", ["benchmarks.step", "anchor", *rows, *more, "--tune", "full", *exact]
    # More steps: oneDNN keeps what it has made for each new shape, which a reference's cache brings early.
    longer = ["--steps", "6", "--rounds", "2", "--tune", "lora", "--model", "128k"]
    yield "anchor, 128k words", ["benchmarks.step", "anchor", *rows, *longer, *exact]


def probes(data: Path) -> Iterator[tuple[str, list[str]]]:
    items = ["--items-file", str(data / "arc_easy/test.jsonl")]
    yield "choice, no shots", ["benchmarks.probes", "choice", *items, "--items", "32"]
    yield "choice, 4 shots", ["benchmarks.probes", "choice", *items, "--items", "16", "--shots", "4"]
    questions = ["--items-file", str(data / "gsm8k/test.jsonl"), "--items", "64", "--part", "64", "--batch", "64"]
    yield "generate", ["benchmarks.probes", "generate", *questions, "--dtype", "bfloat16", "--tokens", "128"]


PARTS: dict[str, Callable[[Path], Iterator[tuple[str, list[str]]]]] = {"step": step, "probes": probes}


def perform(command: list[str]) -> dict[str, float]:
    """The ratios that a script writes."""
    environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ratios.json"
        subprocess.run([sys.executable, "-m", *command, "--out", str(out)], check=True, env=environment)
        found: dict[str, float] = json.loads(out.read_text())
    return found


def start(workspace: Path | None) -> dict[str, float]:
    """CPU seconds of the commands that answer at once, medians of nine; `log` and `report` read a finished workspace. A
    check is asked where nothing is known of the rows, and again."""
    commands = [["--help"], ["methods"]]
    with tempfile.TemporaryDirectory() as folder:
        if workspace is not None:
            commands += [
                ["log", str(workspace)],
                ["report", str(workspace), "--out", str(Path(folder) / "report.html")],
            ]
        found = {f"evertune {one[0]}, CPU s": statistics.median(seconds(one) for _ in range(9)) for one in commands}
        place = home_beside(Path(folder) / "home")
        for name in ("debug.yaml", "demo.yaml"):
            first, again = [], []
            for _ in range(9):
                shutil.rmtree(place / "lengths", ignore_errors=True)
                first.append(seconds(["check", str(RECIPES / name)], place))
                again.append(seconds(["check", str(RECIPES / name)], place))
            found[f"evertune check {name}, CPU s"] = statistics.median(first)
            found[f"evertune check {name} again, CPU s"] = statistics.median(again)
    return found


def home_beside(place: Path) -> Path:
    """A home with the models that are there and what is known of their files, and with nothing known of any rows."""
    place.mkdir()
    (home() / "models").mkdir(parents=True, exist_ok=True)
    (place / "models").symlink_to(home() / "models")
    if (home() / "digests.json").is_file():
        shutil.copy(home() / "digests.json", place)
    return place


def seconds(command: Sequence[str], place: Path | None = None) -> float:
    """Of CPU time, imports included; Python keeps the modules it has compiled, as it does unless told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {} if place is None else {"EVERTUNE_HOME": str(place)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole = [sys.executable, "-m", "evertune", *command]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(results: dict[str, float], before: dict[str, float]) -> Iterator[str]:
    yield "| | now | before |"
    yield "|---|---|---|"
    for name, value in results.items():
        yield f"| {name} | {value:.2f} | {f'{before[name]:.2f}' if name in before else ''} |"


def last_like(cpu: str) -> dict[str, float]:
    """The newest results of the history from such a processor."""
    lines = HISTORY.read_text().splitlines() if HISTORY.is_file() else []
    like = [one for one in map(json.loads, lines) if one["cpu"] == cpu]
    return dict(like[-1]["results"]) if like else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=["start", *PARTS], default=["start", *PARTS])
    parser.add_argument(
        "--workspace", type=Path, help="of a finished run, for log and report; make demo leaves demo-run/run"
    )
    parser.add_argument("--no-history", action="store_true", help="print the table, keep nothing")
    options = parser.parse_args()
    facts, began = machine(), time.monotonic()
    before = last_like(facts["cpu"])
    results = start(options.workspace) if "start" in options.only else {}
    for part in options.only:
        for name, command in PARTS[part](options.data) if part in PARTS else ():
            results |= {f"{name}: {key}": value for key, value in perform(command).items()}
    print(json.dumps({**facts, "minutes": round((time.monotonic() - began) / 60, 1)}))
    print("\n".join(table(results, before)))
    if not options.no_history:
        with HISTORY.open("a") as history:
            history.write(json.dumps({**facts, "results": {key: round(one, 3) for key, one in results.items()}}) + "\n")


if __name__ == "__main__":
    main()
