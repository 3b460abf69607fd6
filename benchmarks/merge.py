"""Merging against mergekit and against the cost of moving the bytes: time, memory, and the same numbers.

    python benchmarks/merge.py setup                      mergekit in an environment of its own
    python benchmarks/merge.py generate --size 0.3b       a base and three experts, synthetic Llama checkpoints in bf16
    python benchmarks/merge.py time --size 0.3b           interleaved rounds: floor, evertune, mergekit
    python benchmarks/merge.py table --size 0.3b          the table of all rounds so far
    python benchmarks/merge.py kill --size 0.3b           twenty times SIGKILL, and the bytes at the end
    python benchmarks/merge.py parity                     the same numbers as mergekit, on a small model
    python benchmarks/merge.py clean

Everything lies under --folder (default: ~/.cache/evertune/benchmarks). A round runs each program once, one after the
other, on the same files in the page cache; and is added to FOLDER/times-SIZE.jsonl; the table shows medians over all
rounds and the range. CPU seconds are user and system time of the process and its children; anonymous memory is
sampled every 20 ms from /proc.

floor: read every input once and write one output, in blocks of 1 MiB, nothing computed, in one thread; so are the
others by default (--threads), and three seconds pass before each: on a virtual machine pages that were freed a moment
ago cost a third less, which would favour whoever follows a large process.
after imports: without Python's start, imports, and what numba imports at the first call of a kernel.
The digests of inputs are known, as they are after any earlier look at them; the first look costs 0.6 CPU seconds a GB.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 20
SETTLE_SECONDS = 3.0
SIZES: dict[str, dict[str, int]] = {
    "5m": {"hidden": 128, "inter": 512, "layers": 4, "heads": 4, "kv": 2, "vocab": 32000},
    "0.3b": {"hidden": 1024, "inter": 4096, "layers": 17, "heads": 16, "kv": 8, "vocab": 32000},
    "1.2b": {"hidden": 2048, "inter": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256},
}
SHARDS = 3
BASE_STD, DELTA_STD = 0.02, 5e-4
MERGEKIT = "mergekit==0.1.5"
TORCH = "torch==2.13.0"
MERGEKIT_NEEDS = (
    "transformers>=5,<6", "tqdm", "click<9", "safetensors<1", "accelerate<2", "pydantic<3", "immutables<1",
    "tokenizers", "huggingface_hub", "peft", "typing-extensions", "sentencepiece", "protobuf", "scipy", "datasets",
)  # fmt: skip

OURS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "base": True},
    "slerp": {"method": "slerp", "base": True, "experts": 1, "t": 0.4},
    "model_stock": {"method": "model_stock", "base": True},
    "ties": {"method": "ties", "base": True, "density": 0.5},
    "dare_ties": {"method": "dare_ties", "base": True, "density": 0.5},
}
WEIGHTS = (0.5, 0.3, 0.2)


def setup(folder: Path) -> None:
    """An environment with mergekit: torch first, then mergekit without its pins, then what it needs."""
    place = folder / "mergekit"
    if not (place / "bin" / "mergekit-yaml").is_file():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [str(place / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, "--no-deps", MERGEKIT], check=True)
        subprocess.run([*pip, *MERGEKIT_NEEDS], check=True)
    print(place)


def generate(folder: Path, size: str) -> Path:
    """A base and three experts: base N(0, 0.02), experts base + N(0, 5e-4), all rounded to bf16, in three shards."""
    out = folder / size
    shape = SIZES[size]
    for k, name in enumerate(("base", "e0", "e1", "e2")):
        if not (out / name / "config.json").is_file():
            _write_llama(out / name, shape, expert=None if k == 0 else k)
    return out


def _write_llama(folder: Path, shape: dict[str, int], expert: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _llama_tensors(shape)
    per_shard = -(-len(tensors) // SHARDS)
    weight_map, total = {}, 0
    for i in range(SHARDS):
        part = tensors[i * per_shard : (i + 1) * per_shard]
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for key, dims in part:
            header[key] = {"dtype": "BF16", "shape": dims, "data_offsets": [place, place + 2 * int(np.prod(dims))]}
            place = header[key]["data_offsets"][1]
            weight_map[key] = name
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for j, (_, dims) in enumerate(part):
                seed = 1000 * i + j
                for begin in range(0, int(np.prod(dims)), 1 << 22):
                    count = min(1 << 22, int(np.prod(dims)) - begin)
                    file.write(_bf16(_values(seed, begin, count, expert)).tobytes())
        total += place
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape["hidden"],
        "intermediate_size": shape["inter"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv"], "vocab_size": shape["vocab"],
        "tie_word_embeddings": True, "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "head_dim": shape["hidden"] // shape["heads"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _values(seed: int, begin: int, count: int, expert: int | None) -> np.ndarray[Any, Any]:
    values = np.random.default_rng((seed, begin)).standard_normal(count, np.float32) * np.float32(BASE_STD)
    if expert is not None:
        values = _float(_bf16(values))
        values += np.random.default_rng((seed, begin, expert)).standard_normal(count, np.float32) * np.float32(
            DELTA_STD
        )
    return values


def _bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _float(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _llama_tensors(shape: dict[str, int]) -> list[tuple[str, list[int]]]:
    hidden, inter = shape["hidden"], shape["inter"]
    kv = hidden // shape["heads"] * shape["kv"]
    found: list[tuple[str, list[int]]] = [("model.embed_tokens.weight", [shape["vocab"], hidden])]
    for i in range(shape["layers"]):
        at = f"model.layers.{i}"
        found += [
            (f"{at}.input_layernorm.weight", [hidden]),
            (f"{at}.mlp.down_proj.weight", [hidden, inter]),
            (f"{at}.mlp.gate_proj.weight", [inter, hidden]),
            (f"{at}.mlp.up_proj.weight", [inter, hidden]),
            (f"{at}.post_attention_layernorm.weight", [hidden]),
            (f"{at}.self_attn.k_proj.weight", [kv, hidden]),
            (f"{at}.self_attn.o_proj.weight", [hidden, hidden]),
            (f"{at}.self_attn.q_proj.weight", [hidden, hidden]),
            (f"{at}.self_attn.v_proj.weight", [kv, hidden]),
        ]
    return [*found, ("model.norm.weight", [hidden])]


# ---- one program, measured


def run_floor(inputs: Sequence[Path], out: Path) -> dict[str, float]:
    """Read all inputs, write the size of one, in this process."""
    buffer = bytearray(BLOCK)
    files = [file for folder in inputs for file in sorted(folder.glob("*.safetensors"))]
    sizes = [file.stat().st_size for file in files]
    before, wall = _cpu(resource.RUSAGE_SELF), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as opened:
        for _ in range(sum(sizes) // len(inputs) // BLOCK):
            opened.write(buffer)
    after = _cpu(resource.RUSAGE_SELF)
    wall = time.perf_counter() - wall
    out.unlink()
    return {"wall": wall, "cpu": after - before}


def run_program(command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds and peak anonymous memory of a command; raises when it fails."""
    before, wall = _cpu(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    output, error = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{error.decode()[-2000:]}")
    result = {
        "wall": time.perf_counter() - wall,
        "cpu": _cpu(resource.RUSAGE_CHILDREN) - before,
        "anonymous_mb": peak[0] / 1e6,
    }
    for line in output.decode().splitlines():
        if line.startswith("{"):
            result |= json.loads(line)
    return result


def _watch(process: Any, peak: list[int]) -> None:
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        if found:
            peak[0] = max(peak[0], int(found[0].split()[1]) * 1024)
        time.sleep(0.02)


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


# A merge through the package's front functions, which prints where its CPU seconds went.
DRIVER = """
import gc, json, sys, time
started = time.process_time()
gc.disable()  # as the command does
from pathlib import Path
import numpy as np
from evertune.merge.config import load_config
from evertune.merge.engine import run_merge
from evertune.merge.plan import plan_merge
from evertune.merge.kernels import is_finite
config, out, cache, threads = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
is_finite(np.zeros(8, np.uint8), 0)
imported = time.process_time()
plan = plan_merge(load_config(config), folder=config.parent, cache=cache)
planned = time.process_time()
assert not {"torch", "transformers"} & set(sys.modules)
merged = run_merge(plan, out, threads=threads)
parts = vars(merged.seconds)
print(json.dumps({"imports": imported - started, "planning": planned - imported,
                  "after_imports": time.process_time() - imported, **parts}))
gc.freeze()
"""


def our_command(folder: Path, method: str, out: Path, threads: int) -> list[str]:
    facts = OURS[method]
    count = facts.get("experts", 3)
    lines = [f"method: {facts['method']}", "models:"]
    for k in range(count):
        lines.append(f"  e{k}: {{path: e{k}" + (f", weight: {WEIGHTS[k]}" if _weighs(method) else "") + "}")
    lines += ["base: base"] if facts.get("base") else []
    lines += [f"{key}: {facts[key]}" for key in ("t", "density") if key in facts]
    config = folder / f"{method}.yaml"
    config.write_text("\n".join(lines) + "\n")
    return [sys.executable, "-c", DRIVER, str(config), str(out), str(folder / "digests.json"), str(threads)]


def mergekit_command(folder: Path, method: str, out: Path, threads: int, *, dtype: str = "bfloat16") -> list[str]:
    facts = OURS[method]
    count = facts.get("experts", 3)
    lines = [f"merge_method: {facts['method']}", f"dtype: {dtype}"]
    lines += ["out_dtype: bfloat16"] if dtype != "bfloat16" else []
    lines += [f"base_model: {folder / 'base'}"] if facts.get("base") else []
    lines += ["parameters:", f"  t: {facts['t']}"] if "t" in facts else []
    lines += ["models:"]
    if method == "slerp":
        lines += [f"  - model: {folder / 'base'}"]
    for k in range(count):
        lines.append(f"  - model: {folder / f'e{k}'}")
        settings = {"weight": WEIGHTS[k]} if _weighs(method) else {}
        settings |= {"density": facts["density"]} if "density" in facts else {}
        if settings:
            lines.append("    parameters: " + json.dumps(settings))
    config = folder / f"mergekit-{method}.yaml"
    config.write_text("\n".join(lines) + "\n")
    program = folder.parent / "mergekit" / "bin" / "mergekit-yaml"
    flags = ["--lazy-unpickle", "--low-cpu-memory", "--num-threads", str(threads), "--quiet"]
    return [str(program), str(config), str(out), *flags]


def _weighs(method: str) -> bool:
    return method not in ("slerp", "model_stock")


def time_all(folder: Path, size: str, methods: Sequence[str], rounds: int, threads: int, *, mergekit: bool) -> None:
    """Interleaved rounds of every method, each kept; prints the table of all that were ever kept."""
    data = generate(folder, size)
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_root())}
    out = data / "out"
    for number in range(rounds):
        for method in methods:
            count = OURS[method].get("experts", 3)
            inputs = [*(data / f"e{k}" for k in range(count)), *([data / "base"] if OURS[method].get("base") else [])]
            programs: dict[str, Callable[[], dict[str, float]]] = {
                "floor": lambda inputs=inputs: run_floor(inputs, data / "floor.bin"),  # type: ignore[misc]
                "evertune": lambda method=method: run_program(our_command(data, method, out, threads), quiet),  # type: ignore[misc]
            }
            if mergekit:
                programs["mergekit"] = lambda method=method: run_program(  # type: ignore[misc]
                    mergekit_command(data, method, out, threads), quiet
                )
            shutil.rmtree(out, ignore_errors=True)
            if number == 0:
                programs["evertune"]()  # fills the caches: pages, digests of inputs, machine code
            one_round: dict[str, Any] = {"method": method, "threads": threads}
            for name, program in programs.items():
                shutil.rmtree(out, ignore_errors=True)
                time.sleep(SETTLE_SECONDS)
                one_round[name] = program()
                print(size, number, method, name, {k: round(v, 2) for k, v in one_round[name].items()}, flush=True)
            shutil.rmtree(out, ignore_errors=True)
            with (folder / f"times-{size}.jsonl").open("a") as file:
                file.write(json.dumps(one_round) + "\n")
    print_table(folder, size)


def print_table(folder: Path, size: str) -> None:
    """The rounds so far as a Markdown table."""
    rounds = [json.loads(line) for line in (folder / f"times-{size}.jsonl").read_text().splitlines()]
    print(f"\n{time.strftime('%Y-%m-%d')}, {_machine()}; median [range]\n")
    print(
        f"| {size} | rounds | floor CPU s | evertune CPU s | after imports | of it SHA-256 | after imports / floor "
        "| without SHA-256 / floor | wall s | anonymous MB | mergekit CPU s | wall s | anonymous MB "
        "| mergekit / evertune CPU | wall |"
    )
    print("|" + "---|" * 15)
    for method in OURS:
        ours = [one for one in rounds if one["method"] == method]
        both = [one for one in ours if "mergekit" in one]
        if not ours:
            continue
        unhashed = [one["evertune"]["after_imports"] - one["evertune"]["digest"] for one in ours]
        cells = [
            method, str(len(ours)), _spread(one["floor"]["cpu"] for one in ours),
            *(_spread(one["evertune"][key] for one in ours) for key in ("cpu", "after_imports", "digest")),
            _spread(one["evertune"]["after_imports"] / one["floor"]["cpu"] for one in ours),
            _spread(net / one["floor"]["cpu"] for net, one in zip(unhashed, ours, strict=True)),
            _spread(one["evertune"]["wall"] for one in ours),
            _spread((one["evertune"]["anonymous_mb"] for one in ours), 0),
        ]  # fmt: skip
        if both:
            cells += [
                _spread((one["mergekit"]["cpu"] for one in both), 1),
                _spread((one["mergekit"]["wall"] for one in both), 1),
                _spread((one["mergekit"]["anonymous_mb"] for one in both), 0),
                _spread((one["mergekit"]["cpu"] / one["evertune"]["cpu"] for one in both), 1),
                _spread((one["mergekit"]["wall"] / one["evertune"]["wall"] for one in both), 1),
            ]
        print("| " + " | ".join(cells) + " |")


def _spread(given: Iterable[float], digits: int = 2) -> str:
    values = list(given)
    middle = statistics.median(values)
    return f"{middle:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {model}"


def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup", "generate", "time", "table", "kill", "parity", "clean"))
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "evertune" / "benchmarks")
    parser.add_argument("--size", choices=tuple(SIZES), default="0.3b")
    parser.add_argument("--methods", nargs="+", default=list(OURS), choices=tuple(OURS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-mergekit", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.command == "setup":
        setup(given.folder)
    elif given.command == "generate":
        print(generate(given.folder, given.size))
    elif given.command == "time":
        time_all(
            given.folder, given.size, given.methods, given.rounds, given.threads, mergekit=not given.without_mergekit
        )
    elif given.command == "table":
        print_table(given.folder, given.size)
    elif given.command == "kill":
        kill(given.folder, given.size, given.methods[0])
    elif given.command == "parity":
        parity(given.folder)
    else:
        for size in SIZES:
            shutil.rmtree(given.folder / size, ignore_errors=True)


def kill(folder: Path, size: str, method: str, seed: int = 11) -> None:
    """Kill `evertune merge` twenty times at instants drawn from a run's length, let it end, and compare all bytes."""
    data, place = generate(folder, size), folder / "kill"
    shutil.rmtree(place, ignore_errors=True)
    our_command(data, method, place, 1)  # writes the configuration

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "evertune", "merge", str(data / f"{method}.yaml"), "--out", str(out), "--json"]

    def digests(out: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(out.iterdir())}

    began = time.monotonic()
    subprocess.run(command(place / "whole"), check=True, stdout=subprocess.DEVNULL)
    length, expected, out = time.monotonic() - began, digests(place / "whole"), place / "out"
    rng, killed = random.Random(seed), []
    while len(killed) < 20:
        process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL)
        after = rng.uniform(0.2, 1.0) * length
        try:
            process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            journals = list(place.glob("out.partial-*/journal.jsonl"))
            killed.append((round(after, 1), sum(len(one.read_text().splitlines()) for one in journals)))
        if out.exists():  # it ended, or was killed after its last step
            assert digests(out) == expected
            shutil.rmtree(out)
    last = subprocess.run(command(out), check=True, stdout=subprocess.PIPE, text=True).stdout
    assert digests(out) == expected
    print("seconds until each kill, and lines of the journal then:", killed)
    print(f"the last run went on from {json.loads(last)['resumed_segments']} segments; all bytes are the same")
    shutil.rmtree(place)


# ---- the same numbers

# Of mergekit's merge: in float32, rounded once to bf16, as ours.
PARITY: dict[str, dict[str, Any]] = {
    "linear": {"models": {"e0": {"weight": 0.5}, "e1": {"weight": 0.3}, "e2": {"weight": 0.2}}},
    "slerp": {"base": True, "models": {"e0": {}}, "t": 0.4},
    "task_arithmetic": {"base": True, "models": {"e0": {"weight": 0.6}, "e1": {"weight": -0.3}}, "lambda": 0.8},
    "ties": {
        "base": True,
        "models": {"e0": {"weight": 0.5}, "e1": {"weight": 0.5}, "e2": {"weight": 0.3}},
        "density": 0.4,
    },
    "model_stock": {"base": True, "models": {"e0": {}, "e1": {}}},
}
PARITY_SHAPE = {"hidden": 16, "inter": 48, "layers": 2, "heads": 4, "kv": 2, "vocab": 64}


def parity(folder: Path) -> None:
    """Merge a small model with mergekit and write inputs and results to tests/merge/mergekit.safetensors."""
    from safetensors.torch import load_file, save_file

    place = folder / "parity"
    shutil.rmtree(place, ignore_errors=True)
    for k, name in enumerate(("base", "e0", "e1", "e2")):
        _write_llama(place / name, PARITY_SHAPE, expert=None if k == 0 else k)
    kept = {}
    for name in ("base", "e0", "e1", "e2"):
        kept |= {f"{name}/{key}": one for key, one in _load(place / name, load_file).items()}
    for method, facts in PARITY.items():
        config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "out_dtype": "bfloat16"}
        if facts.get("base"):
            config["base_model"] = str(place / "base")
        listed = [{"model": str(place / "base")}] if method == "slerp" else []
        listed += [
            {
                "model": str(place / name),
                "parameters": {**one, **({"density": facts["density"]} if "density" in facts else {})},
            }
            for name, one in facts["models"].items()
        ]
        config["models"] = listed
        config["parameters"] = {key: facts[key] for key in ("t", "lambda") if key in facts}
        (place / f"{method}.yaml").write_text(json.dumps(config))
        program = folder / "mergekit" / "bin" / "mergekit-yaml"
        subprocess.run([program, place / f"{method}.yaml", place / method, "--quiet"], check=True)
        kept |= {f"{method}/{key}": one for key, one in _load(place / method, load_file).items()}
    out = _root() / "tests" / "merge" / "mergekit.safetensors"
    save_file(kept, out, metadata={"mergekit": MERGEKIT, "settings": json.dumps(PARITY)})
    print(f"wrote {out}, {out.stat().st_size:,} bytes; tests/merge/test_mergekit.py compares with it")


def _load(folder: Path, load_file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


if __name__ == "__main__":
    main()
