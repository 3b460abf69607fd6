"""Attention within rows, by blocks of queries, beside torch's fused one: CPU milliseconds.

    python -m benchmarks.attention [--repeats 5]

Of one row, forward and backward; and of four rows behind 30 tokens that they share, forward alone, as a reference
beside the policy reads them. 9 query heads on 3 key heads of width 64, bfloat16, one thread; medians of turns taken one
after the other.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import machine
from evertune.model.row_attention import RowAttention, Rows
from evertune.model.tree import ByRuns, grow

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
SCALE = WIDTH**-0.5
ROWS, SHARED = 4, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(machine()))
    print("| tokens | fused | by blocks | four rows, forward alone: fused | by blocks |\n|---|---|---|---|---|")
    for tokens in (100, 250, 500, 1000, 2000):
        found = [*_both_ways(tokens, options.repeats), *_forward(tokens, options.repeats)]
        print(f"| {tokens} | {' | '.join(f'{one:.1f}' for one in found)} |", flush=True)


def _both_ways(tokens: int, repeats: int) -> list[float]:
    *inputs, slope = _heads(tokens)
    inputs = [one.requires_grad_() for one in inputs]
    rows = Rows.apart([tokens])
    ways: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: F.scaled_dot_product_attention(
            *(one.unsqueeze(0) for one in inputs), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1),
        "blocks": lambda: RowAttention.apply(*inputs, rows, SCALE, None),
    }
    return _medians(
        {name: lambda way=way: torch.autograd.grad(way(), inputs, slope.transpose(0, 1)) for name, way in ways.items()},
        repeats,
    )


@torch.no_grad()
def _forward(tokens: int, repeats: int) -> list[float]:
    shared = list(range(SHARED))
    (tree,) = grow([[*shared, *[100 + i] * (tokens - SHARED)] for i in range(ROWS)], budget=10**9)
    query, key, value, _ = _heads(len(tree.ids))
    rows, runs = Rows.along(tree), ByRuns(tree)
    return _medians(
        {
            "fused": lambda: runs.attend(query, key, value, SCALE, None),
            "blocks": lambda: RowAttention.apply(query, key, value, rows, SCALE, None),
        },
        repeats,
    )


def _heads(tokens: int) -> list[Tensor]:
    """Query, key, value and the slope of what is found."""
    return [
        torch.randn(tokens, heads, WIDTH, dtype=torch.bfloat16).transpose(0, 1)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]


def _medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> list[float]:
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if turn:
                spent[name].append(1000 * (time.process_time() - began))
    return [statistics.median(one) for one in spent.values()]


if __name__ == "__main__":
    main()
