"""Attention within one row, by blocks of queries, beside torch's fused one: CPU milliseconds, forward and backward
together, and forward alone where no gradient is asked for.

    python -m benchmarks.attention [--repeats 5]

9 query heads on 3 key heads of width 64, bfloat16, one thread; medians of turns taken one after the other.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import machine
from evertune.model.row_attention import RowAttention, Rows

HEADS, KEY_HEADS, WIDTH = 9, 3, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(machine()))
    print("| tokens | fused | by blocks | forward alone: fused | by blocks |\n|---|---|---|---|---|")
    for tokens in (100, 250, 500, 1000, 2000):
        query, key, value, slope = (
            torch.randn(tokens, heads, WIDTH, dtype=torch.bfloat16).transpose(0, 1)
            for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
        )
        inputs = [one.requires_grad_() for one in (query, key, value)]
        ways: dict[str, Callable[[], Tensor]] = {
            "fused": lambda parts=inputs: F.scaled_dot_product_attention(
                *(one.unsqueeze(0) for one in parts), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1),
            "blocks": lambda parts=inputs, t=tokens: RowAttention.apply(*parts, Rows.apart([t]), WIDTH**-0.5, None),
        }
        spent: dict[tuple[bool, str], list[float]] = {(trains, name): [] for trains in (True, False) for name in ways}
        for turn in range(options.repeats + 1):
            for trains, name in spent:
                began = time.process_time()
                with torch.set_grad_enabled(trains):
                    found = ways[name]()
                if trains:
                    torch.autograd.grad(found, inputs, slope.transpose(0, 1))
                if turn:
                    spent[trains, name].append(1000 * (time.process_time() - began))
        print(f"| {tokens} | {' | '.join(f'{statistics.median(one):.1f}' for one in spent.values())} |", flush=True)


if __name__ == "__main__":
    main()
