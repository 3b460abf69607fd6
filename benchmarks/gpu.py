"""Steps on a GPU beside TRL with and without Liger, anchored steps beside plain ones: the second half of `make gpu`.

    python -m benchmarks.gpu --rows replay_dolly/train.jsonl [--device cuda] [--model smollm2-135m] [--batch 32]

Wall time with the GPU waited for, and its highest allocated memory. With `--device cpu` the same commands run without
Liger and in processor time: that shows that they run, and nothing about a GPU.
"""

import argparse
import os
import subprocess
import sys

from benchmarks.contest import ENVIRONMENT

PLAIN = ["evertune", "trl", "loop"]
LIGER = ["evertune-liger", "trl-liger"]
ANCHORED = ["plain", "top64-both", "hidden-both", "live-both"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", required=True, help="a JSONL of chats, beside a validation.jsonl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", default="32")
    parser.add_argument("--steps", default="6")
    parser.add_argument("--rounds", default="3")
    options = parser.parse_args()
    shared = [f"--{name}={value}" for name, value in vars(options).items()] + [f"--micro={options.batch}"]
    names = PLAIN + (LIGER if options.device == "cuda" else [])
    for tune in ("lora", "full"):
        for run, only in (("plain", names), ("anchor", ANCHORED)):
            print(f"\n{run}, {tune}, {options.device}", flush=True)
            command = ["benchmarks.step", run, "--tune", tune, *shared, "--only", *only]
            subprocess.run([sys.executable, "-m", *command], check=True, env={**os.environ, **ENVIRONMENT})


if __name__ == "__main__":
    main()
