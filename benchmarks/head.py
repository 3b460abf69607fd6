"""The head with its loss and gradients on counted positions, alone and with an exact anchor: CPU time by way.

    python -m benchmarks.head [--positions 1024] [--rounds 9]
    MALLOC_TRIM_THRESHOLD_=67108864 python -m benchmarks.head

Random hidden states and a frozen head of the bundled model's size, in bfloat16 on one thread, in the environment of a
worker but for what is set from outside. Ways take turns; medians with the least and the largest.
"""

import argparse
import json
import os
import sys
import time
from unittest import mock

from evertune.process import ENVIRONMENT

VOCABULARY, HIDDEN = 49_152, 576


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if os.environ.keys() < {**os.environ, **ENVIRONMENT}.keys():  # the allocator reads it before Python starts
        command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:]]
        os.execve(sys.executable, command, {**ENVIRONMENT, **os.environ})
    _measure(options.positions, options.rounds)


def _measure(positions: int, rounds: int) -> None:
    import torch

    from benchmarks.contest import machine, spread
    from evertune.model import packed_weights
    from evertune.train.head import Head, PositionTerm, head_loss
    from evertune.train.reference import ForwardFull

    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = Head((0.05 * torch.randn(VOCABULARY, HIDDEN)).bfloat16(), None)
    hidden_NH = torch.randn(positions, HIDDEN).bfloat16().requires_grad_()
    reference_NH = (hidden_NH.detach().float() + 0.05 * torch.randn(positions, HIDDEN)).bfloat16()
    targets_N = torch.randint(0, VOCABULARY, (positions,))
    anchor = PositionTerm(
        "kl", torch.ones(positions, dtype=torch.bool), 0.1 / positions, ForwardFull(reference_NH, head)
    )
    spent: dict[tuple[str, str], list[float]] = {
        (terms, way): [] for terms in ("alone", "anchored") for way in ("laid out", "as stored")
    }
    for i in range(rounds + 1):
        for (terms, way), seconds in spent.items():
            with mock.patch.object(packed_weights, "_can_lay_out", lambda weight, way=way: way == "laid out"):
                began = time.process_time()
                chosen = [anchor] if terms == "anchored" else []
                head_loss(hidden_NH, targets_N, head=head, ce_weight=1 / positions, terms=chosen).loss.backward()
                seconds += [time.process_time() - began] * (i > 0)
    print(json.dumps({**machine(), "trim": os.environ["MALLOC_TRIM_THRESHOLD_"], "positions": positions}))
    print("| the head | its weights | CPU ms |\n|---|---|---|")
    for (terms, way), seconds in spent.items():
        print(f"| {terms} | {way} | {spread([1000 * one for one in seconds], 0)} |")


if __name__ == "__main__":
    main()
