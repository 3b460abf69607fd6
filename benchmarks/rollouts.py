"""Answers sampled in groups, beside transformers' `generate` on the same prompts: tokens per second of processor time.

    python -m benchmarks.rollouts [--prompts 4] [--group 4] [--tokens 24] [--repeats 3] [--device cuda]

Both sample from the whole distribution at temperature 1, to the same length (no answer may stop earlier), in bfloat16
on one thread, in turns, each a warm-up before. `generate` is called as TRL's GRPO trainer calls it without vLLM: each
prompt repeated `group` times, padded on the left. The last line is the ratio of the medians and the range of the ratios
of single turns. On a GPU it is the time of the clock, with the GPU waited for.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.contest import machine
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward
from evertune.model.open import OpenModel, open_model
from evertune.train.rollout import answer_seed
from evertune.train.sample import sample_answers

QUESTION = "A farmer has {0} sheep and buys {1} more. He sells a third of them, and {2} are lost. How many are left?"


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    opened = open_model(describe(resolve_base(options.model)), dtype="bfloat16", device=options.device)
    clock, unit = (time.process_time, "CPU second") if options.device == "cpu" else (_gpu_clock, "second")
    prompts = [
        opened.codec.encode_prompt([{"role": "user", "content": QUESTION.format(12 + i, 30 + 2 * i, 3)}])
        for i in range(options.prompts)
    ]
    wanted = options.prompts * options.group * options.tokens
    print(json.dumps(machine()))
    print(
        f"{options.prompts} prompts of {len(prompts[0])} tokens, {options.group} answers each, {options.tokens} tokens"
    )
    ways: dict[str, Callable[[], int]] = {
        "evertune": lambda: _ours(opened, prompts, options),
        "generate": lambda: _theirs(opened, prompts, options),
    }
    for way in ways.values():
        assert way() == wanted, "an answer stopped early"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = clock()
            way()
            seconds[name].append(clock() - began)
    for name, found in seconds.items():
        print(f"{name:<10} {wanted / statistics.median(found):7.1f} tokens per {unit}")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    medians = statistics.median(seconds["generate"]) / statistics.median(seconds["evertune"])
    print(f"ratio {medians:.2f} (single turns {min(ratios):.2f} to {max(ratios):.2f})")


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.monotonic()


def _ours(opened: OpenModel, prompts: list[list[int]], options: argparse.Namespace) -> int:
    seeds = [[answer_seed(0, 0, i, g) for g in range(options.group)] for i in range(len(prompts))]
    said = sample_answers(
        Forward(opened), prompts, seeds=seeds, max_new_tokens=options.tokens, temperature=1.0, stop_ids=frozenset()
    )
    return sum(len(answer.ids) for group in said for answer in group)


@torch.no_grad()
def _theirs(opened: OpenModel, prompts: list[list[int]], options: argparse.Namespace) -> int:
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(options.group)]
    ids = torch.full((len(rows), longest), opened.codec.pad_id)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, longest - len(row) :], mask[b, longest - len(row) :] = torch.tensor(row), 1
    made = opened.model.generate(
        input_ids=ids.to(opened.device), attention_mask=mask.to(opened.device),
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=options.tokens, max_new_tokens=options.tokens, pad_token_id=opened.codec.pad_id,
    )  # fmt: skip
    return int((made.shape[1] - longest) * made.shape[0])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, value in (("prompts", 4), ("group", 4), ("tokens", 24), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


if __name__ == "__main__":
    main()
