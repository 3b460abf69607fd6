"""What starting a matrix product costs the processor, with the GPU's own time hidden behind it.

    python -m benchmarks.launches [--device cuda] [--width 576] [--calls 30]

A step of a small model starts thousands of products that the GPU is done with at once, so their starts are the step.
In processes of their own: as torch is; with deterministic algorithms and the variable CUBLAS_WORKSPACE_CONFIG, which
they ask for; and as a stage of training asks for the same bits each time, where the variable is set for the first
product alone. For each number of rows: the first product of that shape, and the mean of the others.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks.contest import machine, spread

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WAYS = ("plain", "deterministic", "training")
# New to the process; again; multiples of 64, new; again.
ROWS = {
    "any number": [3317, 3401, 3557, 3129, 3781],
    "the same again": [3317, 3401, 3557, 3129, 3781],
    "multiples of 64": [3328, 3392, 3520, 3136, 3776],
    "these again": [3328, 3392, 3520, 3136, 3776],
}


def measure(options: argparse.Namespace) -> None:
    import torch
    from torch.nn import functional as F

    from evertune.train.loop import prefer_same_bits

    if options.way == "deterministic":
        os.environ[VARIABLE] = ":4096:8"
    if options.way in ("deterministic", "training") and options.device == "cuda":
        prefer_same_bits()

    weight = torch.randn((options.width, options.width), device=options.device, dtype=torch.bfloat16)
    x = torch.randn((4096, options.width), device=options.device, dtype=torch.bfloat16)

    def calls(rows: int) -> list[float]:
        found = []
        for _ in range(options.calls):
            began = time.perf_counter()
            F.linear(x[:rows], weight)
            found.append((time.perf_counter() - began) * 1e6)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return found

    calls(64)
    print(f"| {options.way} | first, microseconds | others |\n|---|---|---|")
    for name, counts in ROWS.items():
        first, *others = zip(*(calls(count) for count in counts), strict=True)
        means = [sum(each) / len(each) for each in zip(*others, strict=True)]
        print(f"| {name} | {spread(first, 0)} | {spread(means, 0)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options)
        return
    print(json.dumps(machine()), flush=True)
    environment = {key: one for key, one in os.environ.items() if key != VARIABLE}
    for way in WAYS:
        subprocess.run([sys.executable, *sys.orig_argv[1:], "--way", way], check=True, env=environment)


if __name__ == "__main__":
    main()
