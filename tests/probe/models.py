"""Tiny models for the probe tests, and the slow and obvious way to score them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from evertune.model.checkpoint import describe
from evertune.model.forward import Forward, Tokens
from evertune.model.open import OpenModel, open_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# What each does between hidden state and logits, or in attention, that a plain head or a plain mask would get wrong.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mamba": {"state_size": 4},
}


def opened_tiny(folder: Path) -> OpenModel:
    """The tiny model in float32 with its random weights made three times larger, so that tokens differ clearly."""
    opened = open_model(describe(folder), dtype="float32", device="cpu")
    sharpen(opened.model)
    return opened


def architecture(name: str, **changes: Any) -> tuple[Any, Forward]:
    """A random model of an architecture, and its Forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **changes})).eval()
    sharpen(model)
    opened: Any = SimpleNamespace(model=model, device=torch.device("cpu"), codec=SimpleNamespace(pad_id=0))
    return model, Forward(opened)


def sharpen(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)


@torch.no_grad()
def naive_log_probabilities(model: Any, row: Tokens) -> list[float]:
    """One row, no padding, no cache, all logits."""
    logp_TV = model(input_ids=torch.tensor([row.ids])).logits[0].float().log_softmax(dim=-1)
    return [float(logp_TV[i - 1, row.ids[i]]) for i in range(1, len(row.ids)) if row.counted[i]]


@torch.no_grad()
def naive_greedy(model: Any, prompt: Sequence[int], limit: int, stop_ids: set[int]) -> tuple[tuple[int, ...], bool]:
    """One prompt, the whole text read anew for each token."""
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop_ids:
            return tuple(ids[len(prompt) :]), True
        ids.append(token)
    return tuple(ids[len(prompt) :]), False


def random_groups(seed: int = 1) -> list[list[Tokens]]:
    """Prompts of several lengths, each with three continuations of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, SIZES["vocab_size"], (count,), generator=generator).tolist()

    groups = []
    for length in (5, 17, 30, 9):
        prompt = draw(length)
        tails = [draw(count) for count in (1, 4, 6)]
        groups.append([Tokens((*prompt, *tail), (False,) * length + (True,) * len(tail)) for tail in tails])
    return groups
