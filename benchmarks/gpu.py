"""Steps on a GPU beside TRL's, with Liger and without, anchored steps beside plain ones, rollouts beside `generate` and
probes beside lm-eval: the second half of `make gpu`.

    python -m benchmarks.gpu --data DATA [--device cuda] [--model smollm2-135m] [--parts steps probes]

DATA has chats (`replay_dolly/`), items with choices (`arc_easy/`) and questions (`gsm8k/`) as JSONL. Wall time with the
GPU waited for, and its highest allocated memory. With `--device cpu` the same commands run without Liger
and torch.compile, in processor time: that shows that they run, and nothing about a GPU.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from evertune.process import ENVIRONMENT

PLAIN = ["evertune", "trl", "loop"]
FUSED = ["evertune-liger", "evertune-compiled", "trl-liger"]
ANCHORED = ["plain", "top64-both", "hidden-both", "live-both"]


def steps(options: argparse.Namespace) -> Iterator[list[str]]:
    names = PLAIN + (FUSED if options.device == "cuda" else [])
    shared = ["--rows", f"{options.data}/replay_dolly/train.jsonl", "--batch", options.batch, "--micro", options.batch]
    shared += ["--steps", options.steps, "--rounds", options.rounds]
    for tune in ("lora", "full"):
        for run, only in (("plain", names), ("anchor", ANCHORED)):
            yield ["benchmarks.step", run, "--tune", tune, "--model", options.model, *shared, "--only", *only]
    yield ["benchmarks.step", "anchor", "--tune", "lora", "--model", "128k", *shared, "--only", *ANCHORED]
    if options.device == "cuda":
        larger = ["--tune", "lora", "--model", "1.7b", *shared]
        yield ["benchmarks.step", "plain", *larger, "--only", "evertune", "evertune-compiled", "trl-liger", "loop"]


def rollouts(options: argparse.Namespace) -> Iterator[list[str]]:
    size = ["--group", "8", "--tokens", "64"] if options.device == "cuda" else ["--tokens", "8", "--repeats", "1"]
    yield ["benchmarks.rollouts", "--model", options.model, *size]


def probes(options: argparse.Namespace) -> Iterator[list[str]]:
    items, part = ("128", "32") if options.device == "cuda" else ("8", "8")
    shared = ["--items", items, "--part", part, "--batch", part]
    choices = ["benchmarks.probes", "choice", "--items-file", f"{options.data}/arc_easy/test.jsonl", *shared]
    for dtype in ("float32", "bfloat16"):
        yield [*choices, "--dtype", dtype]
        yield [*choices, "--dtype", dtype, "--shots", "4"]
    questions = ["--items-file", f"{options.data}/gsm8k/test.jsonl", "--dtype", "bfloat16", *shared]
    yield ["benchmarks.probes", "generate", *questions]


def launches(options: argparse.Namespace) -> Iterator[list[str]]:
    yield ["benchmarks.launches"]


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[list[str]]]] = {
    "launches": launches,
    "steps": steps,
    "rollouts": rollouts,
    "probes": probes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--data", required=True, help="a folder of data sets as JSONL")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", help="32; 4 on a CPU, where several models are in one memory")
    parser.add_argument("--steps", help="6; 2 on a CPU")
    parser.add_argument("--rounds", help="3; 1 on a CPU")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    for name, (on_gpu, on_cpu) in {"batch": ("32", "4"), "steps": ("6", "2"), "rounds": ("3", "1")}.items():
        if getattr(options, name) is None:
            setattr(options, name, on_cpu if options.device == "cpu" else on_gpu)
    for part in options.parts:
        for command in PARTS[part](options):
            print(f"\npython -m {' '.join(command)} --device {options.device}", flush=True)
            whole = [sys.executable, "-m", *command, "--device", options.device]
            subprocess.run(whole, check=True, env={**ENVIRONMENT, **os.environ})


if __name__ == "__main__":
    main()
