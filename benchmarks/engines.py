"""Deduplication over engines, two local workers each: Ray Data, which the package uses, beside datatrove's executor.

    pip install 'evertune[scale]' 'datatrove[processing]'
    python -m benchmarks.engines DATA [--rows 200000] [--files 8] [--repeats 3]

All decide by the same functions, so that only how parts are sent about differs; each row of the table is a process of
its own, its start included. The rows are those of `benchmarks.data dedup`.
"""

import argparse
import datetime
import json
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.data import adopt_orphans, children_cpu, texts
from evertune.data import sift
from evertune.data.engine import Engine, Piece, RayEngine
from evertune.data.spread import Spread
from evertune.hashing import digest_bytes

ENGINES = ("one process", "two processes", "ray", "datatrove")


class DatatroveEngine:
    """Each part a task of datatrove's local executor; results travel through files, as its own steps' do."""

    def map(self, work: Callable[[Any], Iterable[Any]], parts: Sequence[Any]) -> Iterator[Piece]:
        from datatrove.executor import LocalPipelineExecutor
        from loguru import logger

        logger.remove()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)

            def perform(data: Any, rank: int = 0, world_size: int = 1) -> Any:
                with (folder / f"{rank}.pickle").open("wb") as file:
                    for one in work(parts[rank]):
                        pickle.dump(one, file)
                return data

            LocalPipelineExecutor([perform], tasks=len(parts), workers=2, logging_dir=f"{folder}/logs").run()
            for i in range(len(parts)):
                with (folder / f"{i}.pickle").open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    while file.tell() < size:
                        yield Piece(i, pickle.load(file))


def dedup(name: str, pattern: Path, out: Path) -> None:
    engines: dict[str, Callable[[], Engine]] = {"ray": lambda: RayEngine(2), "datatrove": DatatroveEngine}
    reader: sift.Reader = Spread(engines[name]()) if name in engines else sift.Here()
    settings = sift.DedupSettings(workers=2 if name == "two processes" else 1)
    sources = [sift.Source("rows", pattern, "text")]
    decide, _ = sift.dedup(sources, settings, reader=reader)
    sift.sift(sources, decide, out, operation="dedup", settings={}, bad=sift.BadRows(), reader=reader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="Texts and results are kept there, and runs go on there.")
    parser.add_argument("--pieces", type=int, default=-1, help="Stop after so many runs.")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        dedup(given.one[0], Path(given.one[1]), Path(given.one[2]))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{datetime.date.today()}, {machine}, load {os.getloadavg()[0]:.1f}", flush=True)
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = (given.work or Path(name)).resolve()
        prepare(folder, given.data, given.rows, given.files)
        for turn in range(given.repeats):
            for one in ENGINES[turn % len(ENGINES) :] + ENGINES[: turn % len(ENGINES)]:
                place = folder / f"engine-{one}-{turn}.json"
                if place.exists():
                    continue
                if given.pieces == 0:
                    return
                given.pieces -= 1
                out = folder / f"{one}-{turn}"
                began, cpu = time.time(), children_cpu()
                command = [sys.executable, "-m", "benchmarks.engines", str(given.data)]
                subprocess.run(
                    [*command, "--one", one, str(folder / "parts/*.jsonl"), str(out)], check=True, capture_output=True
                )
                wall = time.time() - began
                adopt_orphans(wait=True)
                parts = sorted(out.glob("rows/*.jsonl")) or [out / "rows.jsonl"]
                kept = digest_bytes(b"".join(part.read_bytes() for part in parts))
                place.write_text(json.dumps({"cpu": children_cpu() - cpu, "wall": wall, "kept": kept}))
                shutil.rmtree(out)
                print(f"ran {place.stem}", flush=True)
        used = {
            one: [json.loads((folder / f"engine-{one}-{turn}.json").read_text()) for turn in range(given.repeats)]
            for one in ENGINES
        }
    print("| engine | CPU s | spread | wall s | spread | same rows stay |\n|---|---|---|---|---|---|")
    for one, each in used.items():
        cpus, walls = ([run[name] for run in each] for name in ("cpu", "wall"))
        is_same = "yes" if {run["kept"] for run in each} == {used["one process"][0]["kept"]} else "NO"
        print(
            f"| {one} | {statistics.median(cpus):.1f} | {min(cpus):.1f} to {max(cpus):.1f} | "
            f"{statistics.median(walls):.1f} | {min(walls):.1f} to {max(walls):.1f} | {is_same} |"
        )


def prepare(folder: Path, data: Path, count: int, files: int) -> None:
    """The rows of `benchmarks.data dedup` in so many files, made once."""
    if (folder / "parts").exists():
        return
    made = folder / "rows.json"
    rows = json.loads(made.read_text()) if made.exists() else texts(data, count)
    (folder / "parts").mkdir(parents=True)
    for k in range(files):
        part = (json.dumps({"text": one}) for one in rows[k::files])
        (folder / "parts" / f"{k:02d}.jsonl").write_text("".join(f"{line}\n" for line in part))


if __name__ == "__main__":
    main()
