"""The same merge with and without a GPU: is it faster than the engine's kernels, and are the bytes the same?

    python -m benchmarks.merge_gpu [--device cuda] [--threads N] [--tensors 16] [--rows 2048] [--columns 4096]
    python -m benchmarks.merge_gpu --device cpu --tensors 3 --rows 256 --columns 512      all of it, without a GPU

A base and three experts, synthetic, in bfloat16, in --folder (/dev/shm where it has room): files in memory are the best
case for whoever computes fast. Medians of interleaved rounds, after one that warms up; with one thread and with N.

floor: read every input and write one output of the same size; nothing computed.
evertune: `run_merge`, the plan known; with its checks for NaN, SHA-256, journal, and statistics of each tensor.
GPU: the same reads, into pinned memory; copied, computed in float32 by plain torch operations, rounded once, copied
    back, written. Sums in pieces of 4 M elements, TIES in whole tensors, whose thresholds it needs. Each thread has a
    stream and buffers of its own; one alone has two of each, and reads while the GPU works. Of what else the engine
    does it does only the SHA-256 of the output, by the engine's own class; `bare` not even that.
GPU copies, GPU computing: of the piece in its buffers, waited for, one after the other; no file is read in that time.
CPU seconds are those that the engine counts of one thread: what of it a GPU could take over is `compute`.
Importing torch, the device's start and pinned memory, once for each process, are printed and in none of the numbers.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import machine, spread
from benchmarks.merge import BASE_STD, DELTA_STD, OURS, WEIGHTS
from evertune.merge.config import MergeConfig
from evertune.merge.engine import run_merge
from evertune.merge.kernels import GOLDEN, Array, sign_tie
from evertune.merge.methods import Settings
from evertune.merge.output import OutputFiles
from evertune.merge.plan import MergePlan, TensorPlan, plan_merge
from evertune.merge.reader import stored_in
from evertune.merge.sources import Files

METHODS = ("linear", "task_arithmetic", "ties")
NAMES = ("e0", "e1", "e2", "base")
PIECE = 1 << 22


class Piece(NamedTuple):
    """Elements [begin, end) of a tensor."""

    of: TensorPlan
    begin: int
    end: int


def generate(folder: Path, tensors: int, rows: int, columns: int, threads: int) -> None:
    """Base N(0, 0.02), experts base + N(0, 5e-4), all rounded to bfloat16, a file each."""
    names = [f"model.layers.{i:02d}.mlp.up_proj.weight" for i in range(tensors)]
    size = 2 * rows * columns
    header = {name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [i * size, (i + 1) * size]}
              for i, name in enumerate(names)}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
        (folder / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name / "model.safetensors", 8 + len(text) + tensors * size)

    def write(i: int) -> None:
        drawn = torch.Generator().manual_seed(i)
        base = (BASE_STD * torch.randn(rows, columns, generator=drawn)).bfloat16()
        for name in NAMES:
            moved = base.float() + DELTA_STD * torch.randn(rows, columns, generator=drawn)
            words = (base if name == "base" else moved.bfloat16()).view(torch.int16).numpy()
            with (folder / name / "model.safetensors").open("r+b") as file:
                file.seek(8 + len(text) + i * size)
                file.write(words.data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(tensors)))


def planned(folder: Path, method: str) -> MergePlan:
    """The merge of benchmarks/merge.py, for the folders here."""
    models = {name: {"path": name, "weight": weight} for name, weight in zip(NAMES, WEIGHTS, strict=False)}
    facts = {**OURS[method], "base": "base"} if OURS[method].get("base") else OURS[method]
    config = MergeConfig.model_validate({**facts, "models": models})
    return plan_merge(config, folder=folder, cache=folder / "digests.json")


# ---- what evertune/merge/kernels.py computes, by plain torch operations


def merged(method: str, given: Settings, models_MN: Tensor) -> Tensor:
    """The result for models in bfloat16, the base last if there is one. TIES: a whole tensor."""
    if method == "ties":
        return elected(given, models_MN[-1].float(), models_MN[:-1])
    weights = given.weights / math.fsum(given.weights) if given.normalize else given.weights
    if method == "linear":
        anchor, terms, weights = models_MN[0].float(), models_MN[1:], weights[1:]
    else:
        anchor, terms, weights = models_MN[-1].float(), models_MN[:-1], given.scale * weights
    total = torch.zeros_like(anchor)
    for term, weight in zip(terms, weights, strict=True):
        total += float(np.float32(weight)) * (term.float() - anchor)
    return torch.where(total == 0, anchor, anchor + total).bfloat16()


def elected(given: Settings, start: Tensor, experts_KN: Tensor) -> Tensor:
    """TIES: the largest of each task vector, of these the sign that outweighs the other, of that the mean."""
    up, down, up_share, down_share = (torch.zeros_like(start) for _ in range(4))
    places = torch.arange(len(start), dtype=torch.int32, device=start.device) * (GOLDEN - (1 << 32))  # modulo 2^32
    for expert, weight, density, key in zip(experts_KN, given.weights, given.densities, given.keys, strict=True):
        tau = expert.float() - start
        size, kept = tau.abs(), max(1, round(float(density) * len(start)))
        low = size.topk(kept, sorted=False).values.amin()
        # Of those at the threshold, as many as are missing, spread as `kernels.stays` spreads them.
        share = (kept - (size > low).sum()).double() / (size == low).sum()
        place = ((places + (int(key) + (1 << 31)) % (1 << 32) - (1 << 31)) >> 8) & 0xFFFFFF
        leaves = (size < low) | ((size == low) & (place >= torch.round(share * (1 << 24))))
        term = float(np.float32(weight)) * tau.masked_fill_(leaves, 0.0)
        rise = term.clamp(min=0.0)
        up += rise
        down += term - rise
        up_share += abs(float(np.float32(weight))) * (term > 0)
        down_share += abs(float(np.float32(weight))) * (term < 0)
    total = up + down
    is_tied = total.abs() <= float(np.float32(sign_tie(len(experts_KN), np.empty(0, np.float32)))) * (up - down)
    chosen = torch.where(total > 0, up, down).masked_fill_(is_tied, 0.0)
    share = torch.where(total > 0, up_share, down_share)
    chosen = chosen / share.masked_fill_(share == 0, 1.0)
    return torch.where(chosen == 0, start, start + given.scale * chosen).bfloat16()


# ---- pieces through a device


class Slot:
    """Buffers of one piece on both sides, and the stream that works on it."""

    def __init__(self, device: str, models: int, elements: int) -> None:
        is_gpu = device == "cuda"
        self._stream = torch.cuda.Stream() if is_gpu else None
        self._host = torch.empty(models * elements, dtype=torch.bfloat16, pin_memory=is_gpu)
        self._result = torch.empty(elements, dtype=torch.bfloat16, pin_memory=is_gpu)
        self._there = torch.empty(models * elements, dtype=torch.bfloat16, device=device)
        self.piece: Piece
        self.models = 0

    def read(self, plan: MergePlan, files: Files, piece: Piece, *, send: bool) -> None:
        """Fill the host's side from the files; each model is sent as soon as it is there."""
        self.piece, count = piece, piece.end - piece.begin
        sources = [plan.sources[i] for i in piece.of.experts] + ([plan.base] if plan.base else [])
        self.models = len(sources)
        for i, source in enumerate(sources):
            stored, row = stored_in(source, piece.of.name), slice(i * count, (i + 1) * count)
            files.read(stored.file, stored.begin + 2 * piece.begin, _bytes(self._host[row]))
            if send:
                self.send(row)

    def send(self, row: slice) -> None:
        with self._at_work():
            self._there[row].copy_(self._host[row], non_blocking=True)

    def compute(self, method: str) -> Tensor:
        count, settings = self.piece.end - self.piece.begin, self.piece.of.settings
        assert settings is not None
        with self._at_work(), torch.inference_mode():
            return merged(method, settings, self._there[: self.models * count].view(self.models, count))

    def fetch(self, result: Tensor) -> None:
        with self._at_work():
            self._result[: len(result)].copy_(result, non_blocking=True)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def write(self, outputs: OutputFiles, *, digest: bool) -> None:
        """Wait for the result of what was read, and put it in its place."""
        self.wait()
        tensor, begin, end = self.piece
        data = _bytes(self._result[: end - begin])
        outputs.write(tensor.file, tensor.begin + 2 * begin, data)
        if digest:
            outputs.digest(tensor.file, tensor.begin + 2 * begin, data)

    def _at_work(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


def _bytes(numbers: Tensor) -> Array:
    return numbers.view(torch.uint8).numpy()


def pieces(plan: MergePlan) -> list[Piece]:
    """All of a merge; the last one first, as they are taken from the end."""
    size = max(one.elements for one in plan.tensors) if plan.config.method == "ties" else PIECE
    return [
        Piece(one, begin, min(begin + size, one.elements))
        for one in reversed(plan.tensors)
        for begin in reversed(range(0, one.elements, size))
    ]


@contextmanager
def opened(plan: MergePlan) -> Iterator[Files]:
    files = Files()
    for file in {at.file for source in plan.sources for at in source.tensors.values()}:
        files.add(file)
    yield files
    files.close()


def move(plan: MergePlan, out: Path, slots: Sequence[Sequence[Slot]], *, compute: bool, digest: bool) -> None:
    """Every piece read, merged if it is to be, and written: a thread for each group of slots."""
    todo, method = pieces(plan), plan.config.method
    out.mkdir()
    outputs = OutputFiles(out, plan.files)

    def work(mine: Sequence[Slot]) -> None:
        at_work: deque[Slot] = deque()
        for slot in itertools.cycle(mine):
            if len(at_work) == len(mine):
                at_work.popleft().write(outputs, digest=digest)
            try:
                piece = todo.pop()
            except IndexError:
                break
            slot.read(plan, files, piece, send=compute)
            if compute:
                slot.fetch(slot.compute(method))
            at_work.append(slot)
        for slot in at_work:
            slot.write(outputs, digest=digest)

    with opened(plan) as files, ThreadPoolExecutor(len(slots)) as pool:
        list(pool.map(work, slots))
    if digest:
        outputs.close()
    else:
        outputs.abandon()


def resident(plan: MergePlan, slot: Slot) -> dict[str, float]:
    """Seconds of copying all pieces there and back, and of computing them, each waited for."""
    spent = {"copies": 0.0, "computing": 0.0}
    with opened(plan) as files:
        for piece in pieces(plan):
            slot.read(plan, files, piece, send=False)
            begun = time.perf_counter()
            slot.send(slice(0, slot.models * (piece.end - piece.begin)))
            slot.wait()
            there = time.perf_counter()
            result = slot.compute(plan.config.method)
            slot.wait()
            computed = time.perf_counter()
            slot.fetch(result)
            slot.wait()
            spent["copies"] += there - begun + time.perf_counter() - computed
            spent["computing"] += computed - there
    return spent


# ---- rounds and tables


def measure(folder: Path, device: str, threads: int, rounds: int, elements: int) -> dict[str, dict[str, Any]]:
    """Of each method, lists of seconds by way, and how the last outputs of the GPU and of the engine differ."""
    started = time.perf_counter()
    slots = [Slot(device, len(NAMES), elements) for _ in range(max(2, threads))]
    print(f"buffers of {len(slots)} threads: {time.perf_counter() - started:.1f} s")
    plans = {method: planned(folder, method) for method in METHODS}
    found: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    for turn in range(rounds + 1):
        for method, plan in plans.items():
            spent: dict[str, float] = {}
            for name, (out, way) in ways(plan, folder, slots[:threads], slots[:2], spent).items():
                if turn == 0 and name == "evertune 1":
                    continue  # the kernels are compiled for any number of threads
                shutil.rmtree(folder / out, ignore_errors=True)
                begun = time.perf_counter()
                way()
                spent[name] = time.perf_counter() - begun
            spent |= resident(plan, slots[0])
            for name, value in spent.items():
                if turn:
                    found[method].setdefault(name, []).append(value)
            if turn == rounds:
                found[method] |= differences(plan, folder)
        print(f"round {turn}: {time.perf_counter() - started:.1f} s", flush=True)
    return found


def ways(
    plan: MergePlan, folder: Path, many: Sequence[Slot], two: Sequence[Slot], spent: dict[str, float]
) -> dict[str, tuple[str, Callable[[], None]]]:
    """What is timed, by its name in the tables: the folder that it writes, and a call of it."""

    def merge(threads: int) -> None:
        seconds = run_merge(plan, folder / "evertune", threads=threads).seconds
        if threads == 1:
            spent.update({f"CPU {name}": value for name, value in vars(seconds).items()})

    def through(name: str, slots: Sequence[Sequence[Slot]], *, digest: bool) -> tuple[str, Callable[[], None]]:
        return name, lambda: move(plan, folder / name, slots, compute=name == "gpu", digest=digest)

    each = [[one] for one in many]
    return {
        "floor 1": through("floor", [two], digest=False),
        "floor N": through("floor", each, digest=False),
        "evertune 1": ("evertune", lambda: merge(1)),
        "evertune N": ("evertune", lambda: merge(len(many))),
        "GPU 1": through("gpu", [two], digest=True),
        "GPU N": through("gpu", each, digest=True),
        "GPU N bare": through("gpu", each, digest=False),
    }


def differences(plan: MergePlan, folder: Path) -> dict[str, int]:
    """Elements, how many have the same bytes, and the largest distance in bfloat16's numbers."""
    elements = equal = largest = 0
    for one in plan.tensors:
        ours, theirs = (
            np.fromfile(folder / name / plan.files[one.file].name, np.int16, one.elements, offset=one.begin).astype(
                np.int32
            )
            for name in ("evertune", "gpu")
        )
        # In order of the numbers: the negative ones count down from zero.
        steps = np.abs(np.where(ours < 0, -(ours & 0x7FFF), ours) - np.where(theirs < 0, -(theirs & 0x7FFF), theirs))
        elements, equal = elements + one.elements, equal + int(np.count_nonzero(ours == theirs))
        largest = max(largest, int(steps.max()))
    return {"elements": elements, "equal": equal, "largest": largest}


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Seconds, ratios and differences as Markdown."""
    first = ["floor 1", "evertune 1", "GPU 1", "floor N", "evertune N", "GPU N", "GPU N bare"]
    parts = ["copies", "computing", *(f"CPU {name}" for name in ("read", "compute", "write", "digest"))]
    lines = ["", _row("wall s", *first), _row(*["---"] * 8)]
    lines += [_row(method, *(spread(one[name], 3) for name in first)) for method, one in found.items()]
    lines += ["", _row("s", *(f"GPU {name}" for name in parts[:2]), *(f"evertune 1, {name}" for name in parts[2:]))]
    lines += [_row(*["---"] * 7)]
    lines += [_row(method, *(spread(one[name], 3) for name in parts)) for method, one in found.items()]
    ratios = [("evertune 1", "GPU 1"), ("evertune N", "GPU N"), ("evertune N", "GPU N bare"), ("evertune N", "floor N")]
    lines += ["", _row("times", *(" / ".join(pair) for pair in ratios), "elements", "same bytes", "largest ulp")]
    lines += [_row(*["---"] * 8)]
    for method, one in found.items():
        times = [spread([a / b for a, b in zip(one[x], one[y], strict=True)]) for x, y in ratios]
        lines.append(_row(method, *times, f"{one['elements']:,}", f"{one['equal']:,}", str(one["largest"])))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


START = """
import time
begun = time.perf_counter()
import torch
imported = time.perf_counter()
torch.zeros(1, device="{device}").cpu()
print(f"import torch: {{imported - begun:.1f}} s; device: {{time.perf_counter() - imported:.1f}} s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--folder", type=Path, help="where a folder is made for the files, and removed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="N of the tables")
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("tensors", 16), ("rows", 2048), ("columns", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    needed = given.tensors * given.rows * given.columns * 2 * (len(NAMES) + 3)
    memory = Path("/dev/shm")
    place = given.folder or (memory if memory.is_dir() and shutil.disk_usage(memory).free > needed else None)
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", START.format(device=given.device)], check=True)
        generate(folder, given.tensors, given.rows, given.columns, given.threads)
        found = measure(folder, given.device, given.threads, given.rounds, max(PIECE, given.rows * given.columns))
        facts = {**machine(), "gpu": torch.cuda.get_device_name() if given.device == "cuda" else "none: --device cpu"}
        print(json.dumps({**facts, "folder": name, **{k: str(v) for k, v in vars(given).items() if k != "folder"}}))
        print(tables(found))


if __name__ == "__main__":
    main()
