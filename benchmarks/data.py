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
import datetime
import json
import os
import platform
import random
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
        words = text.split()
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


# What each peer does, in its own environment: texts from a file, pairs and CPU seconds to another.
PEER = r"""
import json, resource, sys, time
from pathlib import Path

name, source, target = sys.argv[1:4]
rows = json.loads(Path(source).read_text())

def cpu():
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def shingles(text):
    words = text.split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

def datasketch():
    from datasketch import MinHash, MinHashLSH
    sets = [shingles(one) for one in rows]
    lsh = MinHashLSH(threshold=0.8, num_perm=128)
    hashes = MinHash.bulk(([one.encode() for one in each] for each in sets), num_perm=128)
    pairs = set()
    for i, one in enumerate(hashes):
        pairs |= {(j, i) for j in lsh.query(one)}
        lsh.insert(i, one)
    return sets, pairs

def rensa(bands):
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

def datatrove(workers):
    import logging, tempfile
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
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "in").mkdir()
        for part in range(workers):
            with open(base / "in" / f"{part}.jsonl", "w") as file:
                for i in range(part, len(rows), workers):
                    file.write(json.dumps({"text": rows[i], "id": str(i)}) + "\n")
        reader = lambda: JsonlReader(str(base / "in"))
        stages = [
            ([reader(), MinhashDedupSignature(output_folder=f"{base}/s", config=config)], workers),
            ([MinhashDedupBuckets(input_folder=f"{base}/s", output_folder=f"{base}/b", config=config)], 14),
            ([MinhashDedupCluster(input_folder=f"{base}/b", output_folder=f"{base}/r", config=config)], 1),
            ([reader(), MinhashDedupFilter(f"{base}/r"), JsonlWriter(f"{base}/out", compression=None)], workers),
        ]
        for pipeline, tasks in stages:
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(workers, tasks), logging_dir=None).run()
        return {int(json.loads(line)["id"]) for path in (base / "out").glob("*.jsonl") for line in path.open()}

if __name__ == "__main__":
    began, used = time.time(), cpu()
    kept, pairs = None, None
    if name == "datasketch":
        pairs = datasketch()[1]
    elif name.startswith("rensa"):
        sets, pairs = rensa(int(name.split("-")[1]))
        pairs = exact(sets, pairs) if name.endswith("exact") else pairs
    else:
        kept = datatrove(int(name.split("-")[1]))
    facts = {"wall": time.time() - began, "cpu": cpu() - used}
    facts["kept"] = sorted(kept) if kept is not None else None
    facts["pairs"] = sorted(pairs) if pairs is not None else None
    Path(target).write_text(json.dumps(facts))
"""


def run_peer(peers: Path, name: str, source: Path, folder: Path) -> dict[str, Any]:
    script, target = folder / "peer.py", folder / f"{name}.json"
    script.write_text(PEER)
    command = [str(peers / "bin/python"), str(script), name, str(source), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Some peers leave logs where they are run.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(target.read_text()))


OURS = """
import json, resource, sys, time
from pathlib import Path
from evertune.data.shingles import shingle
from evertune.data.similar import pairs_within
rows = json.loads(Path(sys.argv[1]).read_text())
began, used = time.time(), time.process_time()
found = pairs_within(shingle(rows), 0.8)
facts = {"wall": time.time() - began, "cpu": time.process_time() - used, "kept": None}
facts["pairs"] = sorted(zip(found.left.tolist(), found.right.tolist()))
Path(sys.argv[2]).write_text(json.dumps(facts))
"""


def run_ours(source: Path, folder: Path) -> dict[str, Any]:
    target = folder / "ours.json"
    subprocess.run([sys.executable, "-c", OURS, str(source), str(target)], check=True)
    return dict(json.loads(target.read_text()))


TOOLS = ("evertune", "rensa-32-exact", "rensa-32", "rensa-16", "datasketch", "datatrove-2")


def dedup(peers: Path, data: Path | None, count: int, repeats: int, names: list[str], looked: int) -> None:
    rows = texts(data, count)
    looked = min(looked, count)
    truth = true_pairs(rows, looked)
    in_pair = {i for pair in truth for i in pair}
    words = np.mean([len(one.split()) for one in rows])
    print(f"{len(rows)} rows, {words:.0f} words on average; {len(truth)} pairs of the first {looked}\n")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.json"
        source.write_text(json.dumps(rows))
        for turn in range(repeats):
            for one in names[turn % len(names) :] + names[: turn % len(names)]:
                found = run_ours(source, folder) if one == "evertune" else run_peer(peers, one, source, folder)
                results[one].append(found)
    ours = statistics.median(one["cpu"] for one in results["evertune"])
    print("| tool | CPU s | spread | times ours | wall s | recall | precision |\n|---|---|---|---|---|---|---|")
    for one, runs in results.items():
        used = [run["cpu"] for run in runs]
        wall = statistics.median(run["wall"] for run in runs)
        quality = _quality(runs[-1], truth, in_pair, looked)
        print(
            f"| {one} | {statistics.median(used):.1f} | {min(used):.1f} to {max(used):.1f} | "
            f"{statistics.median(used) / ours:.1f} | {wall:.1f} | {quality} |"
        )


def _quality(run: dict[str, Any], truth: set[tuple[int, int]], in_pair: set[int], looked: int) -> str:
    if run["kept"] is None:
        found = {(i, j) for i, j in run["pairs"] if i < looked}
        right = len(found & truth)
        return f"{right / len(truth):.4f} | {right / max(len(found), 1):.4f}"
    kept = set(run["kept"])
    left = sum(i in kept and j in kept for i, j in truth)
    wrong = len(set(range(looked)) - kept - in_pair)
    return f"{1 - left / len(truth):.4f} of pairs broken | {wrong} rows without a duplicate removed"


def grow(data: Path | None, count: int) -> None:
    """A full build, then 1 % more rows; ratios of CPU time."""
    from evertune.data.dedup import resolve
    from evertune.data.fingerprint import fingerprint
    from evertune.data.index import IndexSettings, open_index
    from evertune.data.rows import Row

    rows = [Row("s", str(i), i, Path("r"), {"text": one}, "text") for i, one in enumerate(texts(data, count))]
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
    parser.add_argument("--tools", default=",".join(TOOLS), help="Of dedup, with commas; evertune is one.")
    parser.add_argument("--truth-rows", type=int, default=10**9, help="Rows whose pairs are counted; all by default.")
    given = parser.parse_args()
    if given.part != "mixed":
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        print(f"{datetime.date.today()}, {machine}, numpy {np.__version__}, load {os.getloadavg()[0]:.1f}")
    match given.part:
        case "setup":
            setup(given.place)
        case "dedup":
            tools = given.tools.split(",")
            dedup(given.place, given.data, given.rows or 200_000, given.repeats, tools, given.truth_rows)
        case "grow":
            grow(given.data, given.rows or 200_000)
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
