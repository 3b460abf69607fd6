"""A token of greedy answers with weights laid out for the processor and without, in CPU time.

    python -m benchmarks.decoding --items-file gsm8k/test.jsonl [--rows 8 32] [--tokens 16] [--repeats 2]

The bundled model in bfloat16 on one thread. Reading the prompts is taken off: what one token more costs is printed.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch

from benchmarks.contest import machine, spread
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward
from evertune.model.open import open_model
from evertune.model.packed_weights import packed_weights
from evertune.probe import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items-file", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(describe(resolve_base("smollm2-135m")), dtype="bfloat16")
    forward = Forward(opened)
    lines = options.items_file.read_text(encoding="utf-8").splitlines()[: max(options.rows)]
    prompts = [list(opened.codec.encode_prompt(json.loads(line)["messages"])) for line in lines]
    generate.packed_weights = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]

    def seconds(count: int, tokens: int) -> float:
        began = time.process_time()
        generate.generate_answers(forward, prompts[:count], max_new_tokens=tokens, stop_ids=frozenset())
        return time.process_time() - began

    print(json.dumps(machine()))
    with torch.no_grad():
        began = time.process_time()
        with packed_weights(opened.model, tokens=options.tokens):
            print(f"laid out in {time.process_time() - began:.2f} CPU s")
        print("| rows | plain, CPU ms a token | laid out |\n|---|---|---|")
        for count in options.rows:
            found: dict[str, list[float]] = {"plain": [], "laid out": []}
            for name in [*found] * options.repeats:
                way = packed_weights(opened.model, tokens=99) if name == "laid out" else contextlib.nullcontext()
                with way:
                    seconds(count, 1)
                    first = seconds(count, 1)
                    found[name].append((seconds(count, 1 + options.tokens) - first) / options.tokens * 1000)
            print(f"| {count} | {spread(found['plain'], 0)} | {spread(found['laid out'], 0)} |", flush=True)


if __name__ == "__main__":
    main()
