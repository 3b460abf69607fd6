"""The data room beside its peers, in one interleaved run. Prints the tables of docs/data.md.

    python -m benchmarks.data setup PEERS      a virtual environment with datasketch, rensa and datatrove
    python -m benchmarks.data dedup PEERS      near-duplicates among 200,000 rows of real text
    python -m benchmarks.data grow             1 % more rows against an index of the others
    python -m benchmarks.data mix              mixing and random access at a million rows
    python -m benchmarks.data leaks DATA       probe items in training rows of public data sets

Texts are the training rows of four data sets under DATA (where given) and docstrings and code of the installed
Python; one row in five is a copy of another with a few words changed. Every tool gets the same normalised texts and
takes word 3-shingles itself. The truth is exact: all pairs by a sparse matrix product, Jaccard >= 0.8.
"""

import argparse
import ast
import contextlib
import ctypes
import datetime
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PINNED = ("datasketch==2.0.0", "rensa==0.5.0", "datatrove[processing,io]==0.10.1", "numpy", "regex", "spacy")
# Of the shared data sets those that are not one template filled in: there most pairs are the template.
FREE_TEXT = ("replay_dolly", "gsm8k", "pref_alpacaeval", "pref_ultrafeedback")
THRESHOLD = 0.8
WIDTH = 3


def base_texts(data: Path | None, count: int) -> list[str]:
    """Distinct texts: chat rows first, then docstring paragraphs, then stretches of code."""
    from evertune.data.compared import compared_text
    from evertune.data.rows import detect_format, iter_rows

    found: dict[str, None] = {}
    for path in [data / name / "train.jsonl" for name in FREE_TEXT] if data else ():
        for row in iter_rows(path, format=detect_format(path), source="s"):
            found[compared_text(row)] = None
    for make in (_paragraphs, _stretches):
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if len(found) >= count:
                return list(found)[:count]
            try:
                source = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            found |= dict.fromkeys(make(source))
    return list(found)[:count]


def _paragraphs(source: str) -> Iterator[str]:
    from evertune.data.compared import normalise_text

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for one in (ast.get_docstring(node) or "").split("\n\n"):
                if len(one.split()) >= 12:
                    yield normalise_text(one)


def _stretches(source: str) -> Iterator[str]:
    from evertune.data.compared import normalise_text

    lines = source.split("\n")
    for i in range(0, len(lines), 8):
        text = normalise_text("\n".join(lines[i : i + 8]))
        if len(text.split()) >= 12:
            yield text


def texts(data: Path | None, count: int, seed: int = 0) -> list[str]:
    """`count` texts, a fifth of them copies of others with words replaced, removed and added."""
    rng = random.Random(seed)
    base = base_texts(data, count * 4 // 5)
    rows = base + [_changed(rng.choice(base), rng) for _ in range(count - len(base))]
    rng.shuffle(rows)
    return rows


def _changed(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(rng.randint(1, max(1, len(words) // 25))):
        place, draw = rng.randrange(len(words)), rng.random()
        if draw < 0.4:
            words[place] = rng.choice(words)
        elif draw < 0.7 and len(words) > 5:
            del words[place]
        else:
            words.insert(place, rng.choice(words))
    return " ".join(words)


def true_pairs(rows: list[str], looked: int) -> set[tuple[int, int]]:
    """All pairs with an exact Jaccard similarity of 0.8: sets of word tuples, counted by sparse products in blocks.

    Args:
        looked: only pairs of one of the first so many rows, which are shuffled, with any row.
    """
    from scipy.sparse import csr_array

    ids: dict[tuple[str, ...], int] = {}
    starts, columns = [0], []
    for text in rows:
        # Where a script writes no spaces, each character is a word (docs/data.md); the peers have no such rule.
        words = re.sub("([\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff])", r" \1 ", text).split()
        own = {tuple(words[i : i + WIDTH]) for i in range(max(1, len(words) - WIDTH + 1))}
        columns += [ids.setdefault(one, len(ids)) for one in own]
        starts.append(len(columns))
    sizes = np.diff(starts)
    matrix = csr_array(
        (np.ones(len(columns), np.int32), np.array(columns), np.array(starts)), shape=(len(rows), len(ids))
    )
    turned = matrix.T.tocsr()
    found: set[tuple[int, int]] = set()
    for first in range(0, looked, 1000):
        shared = (matrix[first : min(first + 1000, looked)] @ turned).tocoo()
        left, right = shared.row + first, shared.col
        near = (left != right) & (shared.data >= THRESHOLD * (sizes[left] + sizes[right] - shared.data) - 1e-9)
        found |= {(min(pair), max(pair)) for pair in zip(left[near].tolist(), right[near].tolist(), strict=True)}
    return found


# What each peer does, in its own environment: pairs of texts, or rows from a file to a file.
PEER = r"""
import json, resource, sys, time
from pathlib import Path

how, name, source, target = sys.argv[1:5]

def cpu():
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def shingles(text):
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

def datasketch(rows):
    from datasketch import MinHash, MinHashLSH
    sets = [shingles(one) for one in rows]
    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    hashes = MinHash.bulk(([one.encode() for one in each] for each in sets), num_perm=128)
    pairs = set()
    for i, one in enumerate(hashes):
        pairs |= {(j, i) for j in lsh.query(one)}
        lsh.insert(i, one)
    return sets, pairs

def rensa(rows, bands):
    from rensa import RMinHash, RMinHashLSH
    sets = [shingles(one) for one in rows]
    hashes = RMinHash.from_token_sets([list(one) for one in sets], 128, 42)
    lsh = RMinHashLSH(0.8, 128, bands)
    pairs = set()
    for i, one in enumerate(hashes):
        lsh.insert(i, one)
    for i, found in enumerate(lsh.query_all(hashes)):
        pairs |= {(j, i) for j in found if j < i}
    return sets, pairs

def exact(sets, pairs):
    found = set()
    for i, j in pairs:
        shared = len(sets[i] & sets[j])
        if shared >= 0.8 * (len(sets[i]) + len(sets[j]) - shared) - 1e-9:
            found.add((i, j))
    return found

def pairs_of(rows):
    if name == "datasketch":
        return datasketch(rows)[1]
    sets, pairs = rensa(rows, int(name.split("-")[1]))
    return exact(sets, pairs) if name.endswith("exact") else pairs

def datatrove(workers, source, target):
    from loguru import logger
    logger.remove()
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    config = MinhashConfig(n_grams=3, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64))
    reader = lambda: JsonlReader(source)
    stages = [
        ([reader(), MinhashDedupSignature(output_folder="s", config=config)], workers),
        ([MinhashDedupBuckets(input_folder="s", output_folder="b", config=config)], 14),
        ([MinhashDedupCluster(input_folder="b", output_folder="r", config=config)], 1),
        ([reader(), MinhashDedupFilter("r"), JsonlWriter(target, compression=None)], workers),
    ]
    for pipeline, tasks in stages:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=None).run()

if __name__ == "__main__":
    if how == "pairs":
        rows = json.loads(Path(source).read_text())
        began, used = time.time(), cpu()
        pairs = pairs_of(rows)
        facts = {"wall": time.time() - began, "cpu": cpu() - used, "pairs": sorted(pairs)}
        Path(target).write_text(json.dumps(facts))
    elif name.startswith("datatrove"):
        datatrove(int(name.split("-")[1]), source, target)
    else:
        lines = [line for path in sorted(Path(source).glob("*.jsonl")) for line in path.open()]
        removed = set()
        for i, j in sorted(pairs_of([json.loads(line)["text"] for line in lines])):
            if i not in removed:
                removed.add(j)
        Path(target).mkdir()
        with open(Path(target) / "kept.jsonl", "w") as file:
            file.writelines(line for i, line in enumerate(lines) if i not in removed)
"""

OURS = """
import json, sys, time
from pathlib import Path
from evertune.data.shingles import shingle
from evertune.data.similar import pairs_within
rows = json.loads(Path(sys.argv[1]).read_text())
began, used = time.time(), time.process_time()
found = pairs_within(shingle(rows), 0.8)
facts = {"wall": time.time() - began, "cpu": time.process_time() - used}
facts["pairs"] = list(zip(found.left.tolist(), found.right.tolist()))
Path(sys.argv[2]).write_text(json.dumps(facts))
"""

PAIRS = ("evertune", "rensa-32-exact", "rensa-32", "rensa-16", "datasketch")
FILES = ("evertune", "evertune-2", "rensa-32-exact", "datasketch", "datatrove-2")
# Run once: it takes ten minutes.
ONCE = ("datatrove-2",)


def run_pairs(peers: Path, name: str, work: Path) -> dict[str, Any]:
    """CPU and wall seconds from texts to pairs, reading and start not counted, and the pairs."""
    target = work / "out.json"
    if name == "evertune":
        command = [sys.executable, "-c", OURS, str(work / "rows.json"), str(target)]
    else:
        command = [
            str(peers / "bin/python"),
            str(work / "peer.py"),
            "pairs",
            name,
            str(work / "rows.json"),
            str(target),
        ]
    _run(command, work)
    return dict(json.loads(target.read_text()))


def run_files(peers: Path, name: str, work: Path) -> dict[str, Any]:
    """CPU and wall seconds of whole processes, from files to a file of what is kept, and the rows kept."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        if name.startswith("evertune"):
            files = sorted(str(one) for one in (work / "in").iterdir())
            workers = name.partition("-")[2] or "1"
            command = [sys.executable, "-m", "evertune", "data", "dedup", *files, "--out", str(out)]
            command += ["--workers", workers]
        else:
            command = [str(peers / "bin/python"), str(work / "peer.py"), "files", name, str(work / "in"), str(out)]
        adopt_orphans()
        began, used = time.time(), children_cpu()
        _run(command, Path(folder))
        facts: dict[str, Any] = {"wall": time.time() - began, "cpu": children_cpu() - used}
        lines = [line for path in out.glob("*.jsonl") if path.name != "removed.jsonl" for line in path.open()]
        return {**facts, "kept": sorted(int(json.loads(line)["id"]) for line in lines)}


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1]) if command[0] == sys.executable else ""
    # Some peers leave logs where they are run.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    adopt_orphans(wait=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-2000:]}")


def adopt_orphans(*, wait: bool = False) -> None:
    """Processes whose parent ended become ours (Linux), so that their time counts: datatrove's workers are such."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with contextlib.suppress(ChildProcessError):
        while wait:
            os.waitpid(-1, 0)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def prepare(work: Path, data: Path | None, count: int, looked: int) -> None:
    """Texts, the same in two files, and the truth; made once."""
    if not (work / "rows.json").exists():
        (work / "in").mkdir(parents=True, exist_ok=True)
        rows = texts(data, count)
        for part in range(2):
            with (work / "in" / f"{part}.jsonl").open("w") as file:
                for i in range(part, len(rows), 2):
                    file.write(json.dumps({"text": rows[i], "id": str(i)}) + "\n")
        (work / "rows.json").write_text(json.dumps(rows))
    (work / "peer.py").write_text(PEER)
    if not (work / "truth.json").exists():
        rows = json.loads((work / "rows.json").read_text())
        pairs = true_pairs(rows, min(looked, len(rows)))
        words = float(np.mean([len(one.split()) for one in rows]))
        facts = {"rows": len(rows), "looked": min(looked, len(rows)), "words": words, "pairs": sorted(pairs)}
        (work / "truth.json").write_text(json.dumps(facts))


def dedup(peers: Path, work: Path, repeats: int, pieces: int) -> None:
    """Run what has not been run yet, at most so many pieces, tools taking turns; print the tables when all is done."""
    runners = {"pairs": (run_pairs, PAIRS), "files": (run_files, FILES)}
    for turn in range(repeats):
        for how, (runner, names) in runners.items():
            for one in names[turn % len(names) :] + names[: turn % len(names)]:
                place = work / f"{how}-{one}-{turn}.json"
                if place.exists() or (turn and one in ONCE):
                    continue
                if pieces == 0:
                    return
                pieces -= 1
                place.write_text(json.dumps({**runner(peers, one, work), "load": os.getloadavg()[0]}))
                print(f"ran {place.stem}", flush=True)
    truth = json.loads((work / "truth.json").read_text())
    pairs, looked = {(i, j) for i, j in truth["pairs"]}, truth["looked"]
    print(f"{truth['rows']} rows, {truth['words']:.0f} words on average; {len(pairs)} pairs of the first {looked}")
    for how, (_, names) in runners.items():
        quality = "recall | precision" if how == "pairs" else "pairs broken | rows removed that have no near-duplicate"
        print(f"\n| tool, {how} | CPU s | spread | times ours | wall s | {quality} |\n|---|---|---|---|---|---|---|")
        found = {
            one: [_read(work / f"{how}-{one}-{turn}.json") for turn in range(1 if one in ONCE else repeats)]
            for one in names
        }
        ours = statistics.median(one["cpu"] for one in found["evertune"])
        for one, each in found.items():
            used = [run["cpu"] for run in each]
            wall = statistics.median(run["wall"] for run in each)
            print(
                f"| {one} | {statistics.median(used):.1f} | {min(used):.1f} to {max(used):.1f} | "
                f"{statistics.median(used) / ours:.1f} | {wall:.1f} | {_quality(each[-1], pairs, looked)} |"
            )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _quality(run: dict[str, Any], truth: set[tuple[int, int]], looked: int) -> str:
    if "pairs" in run:
        found = {(i, j) for i, j in run["pairs"] if i < looked}
        right = len(found & truth)
        return f"{right / len(truth):.4f} | {right / max(len(found), 1):.4f}"
    kept = set(run["kept"])
    left = sum(i in kept and j in kept for i, j in truth)
    wrong = len(set(range(looked)) - kept - {i for pair in truth for i in pair})
    return f"{1 - left / len(truth):.4f} | {wrong}"


def grow(rows_of: list[str]) -> None:
    """A full build, then 1 % more rows; ratios of CPU time."""
    from evertune.data.dedup import resolve
    from evertune.data.fingerprint import fingerprint
    from evertune.data.index import IndexSettings, open_index
    from evertune.data.rows import Row

    rows = [Row("s", str(i), i, Path("r"), {"text": one}, "text") for i, one in enumerate(rows_of)]
    count = len(rows)
    hundredth = count // 100
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "index"

        def add(part: list[Row]) -> float:
            used = time.process_time()
            index = open_index(place, IndexSettings("both", 3, 0.8), create=True)
            prints = fingerprint(part)
            found = resolve(prints, earlier=index)
            kept = np.flatnonzero(found.stays)
            index.add(prints.take(kept), [part[i].id for i in kept], found.templates)
            return time.process_time() - used

        full = add(rows[hundredth * 5 :])
        print(f"full build of {count - 5 * hundredth} rows: {full:.1f} CPU s")
        for i in range(5):
            more = add(rows[i * hundredth : (i + 1) * hundredth])
            print(f"{hundredth} rows more (1 %): {more:.2f} CPU s, {more / full:.1%} of the full build")


def mix(count: int) -> None:
    """Positions to rows: picks, then access by number, in a process of its own for its memory."""
    for rows in (count // 10, count):
        with tempfile.TemporaryDirectory() as name:
            subprocess.run([sys.executable, "-m", "benchmarks.data", "mixed", name, str(rows)], check=True)


def mixed(folder: Path, count: int) -> None:
    from evertune.data.rows import Row
    from evertune.data.store import RowStore, write_store
    from evertune.data.stream import Stream

    def made(kind: str, size: int) -> Iterator[Row]:
        for i in range(size):
            question, answer = f"{kind} question {i} about things " * 4, f"the answer is {i} " * 8
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield Row(kind, str(i), i, folder, {"messages": turns})

    sizes = {"a": count // 2, "b": count - count // 2}
    used = time.process_time()
    for name, size in {**sizes, "old": count // 4}.items():
        write_store(made(name, size), folder / f"{name}.arrow")
    writing = (count + count // 4) / (time.process_time() - used)
    stream = Stream(sizes, {"a": 1.0, "b": 3.0}, {"old": count // 4}, 0.2, 0)
    stores = {name: RowStore(folder / f"{name}.arrow") for name in ("a", "b", "old")}
    rates: dict[str, Callable[[int, int], object]] = {
        "positions to places, at once": lambda first, size: stream.picks(np.arange(first, first + size)),
        "positions to places, one by one": lambda first, size: [stream.pick(first + i) for i in range(size)],
        "positions to rows": lambda first, size: _rows(stream, stores, first, size),
    }
    print(f"\n{count} new rows, {count // 4} old ones; written to disk at {writing:,.0f} rows/s")
    for label, call in rates.items():
        speeds = []
        for turn in range(5):
            size = 4096 if "one by one" not in label else 1024
            used = time.process_time()
            for k in range(4):
                call((turn * 4 + k) * size * 7 % count, size)
            speeds.append(4 * size / (time.process_time() - used))
        print(f"  {label}: {statistics.median(speeds):,.0f} rows/s ({min(speeds):,.0f} to {max(speeds):,.0f})")
    print(f"  memory of its own at the end, the writing before included: {_anonymous_kib() / 1024:.0f} MiB")


def _rows(stream: Any, stores: dict[str, Any], first: int, size: int) -> list[Any]:
    picks = stream.picks(np.arange(first, first + size))
    found = []
    for i, name in enumerate(picks.names):
        found += stores[name].take(picks.index[picks.source == i])
    return found


def _anonymous_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) for one in lines if one.startswith("RssAnon"))


def leaks(data: Path) -> None:
    """Kinds of leaks between train and test splits, and what counting templates would have added."""
    from evertune.data import leak
    from evertune.data.quality import asked_and_said
    from evertune.data.rows import detect_format, messages_of, read_rows

    print("| task | rows | items | exact, normalised | near-duplicate | contained | overlap | overlap with templates |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in sorted(data.iterdir()):
        train, test = folder / "train.jsonl", folder / "test.jsonl"
        if not train.exists() or not test.exists():
            continue
        rows = read_rows(train, format=detect_format(train), source=folder.name)
        items = []
        for row in read_rows(test, format=detect_format(test), source=folder.name):
            asked = [one["content"] for one in messages_of(row.value) if one["role"] == "user"]
            items.append(leak.ProbeText(folder.name, row.id, asked[-1] if asked else asked_and_said(row)[1]))
        counts = [_kinds(leak.find_leaks(rows, items))]
        kept = leak.ITEM_TEMPLATE
        leak.ITEM_TEMPLATE = (1.0, 10**9)
        counts.append(_kinds(leak.find_leaks(rows, items)))
        leak.ITEM_TEMPLATE = kept
        found, without = counts
        print(
            f"| {folder.name} | {len(rows)} | {len(items)} | {found['equal']} | {found['near-duplicate']} | "
            f"{found['contained']} | {found['overlap']} | {without['overlap'] + without['contained']} |"
        )


def _kinds(found: list[Any]) -> dict[str, int]:
    how = [one.how for one in found]
    return {
        "equal": how.count("exact") + how.count("normalised"),
        **{name: how.count(name) for name in ("near-duplicate", "contained", "overlap")},
    }


def setup(peers: Path) -> None:
    """Make the peers' environment."""
    venv.create(peers, with_pip=True)
    subprocess.run([str(peers / "bin/pip"), "install", "--quiet", *PINNED], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["setup", "dedup", "grow", "mix", "mixed", "leaks"])
    parser.add_argument("place", nargs="?", type=Path)
    parser.add_argument("count", nargs="?", type=int)
    parser.add_argument("--data", type=Path, help="Folder of data sets, each with a train.jsonl.")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--truth-rows", type=int, default=10**9, help="Rows whose pairs are counted; all by default.")
    parser.add_argument("--work", type=Path, help="Texts and results are kept there, and runs go on there.")
    parser.add_argument("--pieces", type=int, default=-1, help="Of dedup: stop after so many runs.")
    given = parser.parse_args()
    if given.part != "mixed":
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        print(f"{datetime.date.today()}, {machine}, numpy {np.__version__}, load {os.getloadavg()[0]:.1f}")
    match given.part:
        case "setup":
            setup(given.place)
        case "dedup":
            with tempfile.TemporaryDirectory() as name:
                work = (given.work or Path(name)).resolve()
                prepare(work, given.data, given.rows or 200_000, given.truth_rows)
                dedup(given.place.resolve(), work, given.repeats, given.pieces)
        case "grow":
            made = given.work / "rows.json" if given.work else None
            known = made is not None and made.exists()
            grow(json.loads(made.read_text()) if known else texts(given.data, given.rows or 200_000))
        case "mix":
            mix(given.rows or 1_000_000)
        case "mixed":
            mixed(given.place, given.count)
        case "leaks":
            leaks(given.place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
