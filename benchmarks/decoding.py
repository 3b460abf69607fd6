"""What each part of reading prompts and of one more token of greedy answers saves, in CPU time.

    python -m benchmarks.decoding --items-file gsm8k/test.jsonl [--rows 16] [--tokens 60] [--rounds 3]

The bundled model in bfloat16 on one thread. Every way generates the same number of tokens, a token of each in turn, so
that a slower minute of the machine is in all of them; ratios are medians over the tokens. Prompts likewise, in rounds.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from benchmarks.contest import machine, spread
from evertune.model import forward as forward_module
from evertune.model import packed_weights as packing_module
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward
from evertune.model.open import open_model
from evertune.model.packed_weights import packed_weights

WAYS = (
    "as it is",
    "transformers' attention",
    "a cache that is copied",
    "a product for each layer",
    "weights as stored",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items-file", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(describe(resolve_base("smollm2-135m")), dtype="bfloat16")
    forward = Forward(opened)
    lines = options.items_file.read_text(encoding="utf-8").splitlines()[: options.rows]
    prompts = [list(opened.codec.encode_prompt(_turns(json.loads(line)))) for line in lines]
    print(json.dumps(machine()))
    with torch.no_grad():
        _prompts(forward, prompts, options.rounds)
        _tokens(forward, prompts, options.tokens)


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return [one for one in turns if one["role"] != "assistant"]


def _prompts(forward: Forward, prompts: list[list[int]], rounds: int) -> None:
    found: dict[str, list[float]] = {"as a tree": [], "padded": []}
    for name in list(found) * (rounds + 1):
        forward.can_pack = name == "as a tree"
        began = time.process_time()
        forward.read_prompts(prompts)
        found[name].append(time.process_time() - began)
    forward.can_pack = True
    print("| prompts | CPU s |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {spread(seconds[1:])} |")


def _tokens(forward: Forward, prompts: list[list[int]], tokens: int) -> None:
    began = time.process_time()
    layouts = {name: _layout(forward.model, name) for name in WAYS}
    made = sum(map(bool, layouts.values()))
    print(f"\nweights are laid out in {(time.process_time() - began) / made:.2f} CPU s")
    states = {}
    for name in WAYS:
        outputs, last_BH, mask_BT, cache = forward.read_prompts(prompts)
        if name == "a cache that is copied":
            cache = _plain(cache)
        states[name] = (forward.logits(outputs, last_BH).argmax(dim=-1), mask_BT, cache)
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    for i in range(tokens):
        for name in WAYS if i % 2 else WAYS[::-1]:
            next_B, mask_BT, cache = states[name]
            _set(forward.model, layouts[name])
            # The step's own attention is for such caches; transformers' is asked for by saying that this is none.
            holds = forward_module.holds_all_tokens
            if name == "transformers' attention":
                forward_module.holds_all_tokens = lambda cache: False
            elif name == "a cache that is copied":
                forward_module.holds_all_tokens = lambda cache: True
            began = time.process_time()
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            outputs = forward.read_on(next_B.unsqueeze(1), mask_BT, cache)
            next_B = forward.logits(outputs, outputs.last_hidden_state[:, -1]).argmax(dim=-1)
            spent[name].append(time.process_time() - began)
            forward_module.holds_all_tokens = holds
            states[name] = (next_B, mask_BT, cache)
    print(f"\n| a token of {len(prompts)} rows | CPU ms, median | of the way without the part, times |\n|---|---|---|")
    whole = spent[WAYS[0]]
    for name, seconds in spent.items():
        ratio = statistics.median(own / other for own, other in zip(whole, seconds, strict=True))
        print(f"| {name} | {1000 * statistics.median(seconds):.0f} | {ratio:.2f} |")


def _plain(cache: Any) -> DynamicCache:
    return DynamicCache([(one.keys.contiguous(), one.values.contiguous()) for one in cache.layers])


def _layout(model: nn.Module, name: str) -> dict[nn.Module, Any]:
    """The forwards of the model's linear layers in one way."""
    if name == "weights as stored":
        return {}
    together = () if name == "a product for each layer" else packing_module._SIBLINGS
    with _siblings(together), packed_weights(model, tokens=packing_module.LEAST_TOKENS):
        return {one: vars(one)["forward"] for one in model.modules() if isinstance(one, nn.Linear)}


@contextlib.contextmanager
def _siblings(names: Any) -> Iterator[None]:
    before, packing_module._SIBLINGS = packing_module._SIBLINGS, names
    try:
        yield
    finally:
        packing_module._SIBLINGS = before


def _set(model: nn.Module, layout: dict[nn.Module, Any]) -> None:
    for one in model.modules():
        if isinstance(one, nn.Linear):
            vars(one).pop("forward", None)
            if one in layout:
                one.forward = layout[one]  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
