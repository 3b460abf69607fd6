from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from evertune.model.adapter import add_adapter
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.model.precision import in_float32
from evertune.train.optimizer import Masters


def test_inside_it_computes_what_a_float32_model_with_these_weights_does_and_then_what_it_did(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    ids = torch.arange(30)[None]
    before = model(input_ids=ids).logits
    places = {name: one.data_ptr() for name, one in model.named_parameters()}
    with in_float32(model), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wide(input_ids=ids).logits)
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == places
    assert torch.equal(model(input_ids=ids).logits, before)


def test_adapters_are_widened_with_their_layers(tiny_model: Path) -> None:
    opened = open_model(describe(tiny_model), dtype="bfloat16")
    trained = add_adapter(opened, rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    ids = torch.arange(30)[None]
    with in_float32(opened.model), torch.no_grad():
        found = opened.model(input_ids=ids).logits
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert 0 < (found - opened.model(input_ids=ids).logits.float()).abs().max() < 0.2 * found.abs().max()


def test_an_error_inside_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    seen: list[torch.dtype] = []

    def fail(module: Any, given: Any) -> None:
        seen.extend(one.dtype for one in module.parameters())
        raise InterruptedError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError), in_float32(model):
        model(input_ids=torch.arange(5)[None])
    handle.remove()
    assert set(seen) == {torch.float32}
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_of_an_embedding_only_the_rows_that_are_looked_up_are_widened(tiny_model: Path) -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval()
        embedding = model.get_input_embeddings()
        seen: list[tuple[torch.dtype, torch.dtype]] = []
        with in_float32(model), torch.no_grad():
            embedding.register_forward_hook(
                lambda module, given, rows, seen=seen: seen.append((module.weight.dtype, rows.dtype))
            )
            model.get_decoder()(input_ids=torch.arange(5)[None])
        assert seen == [(dtype, wide)]


def test_a_model_in_training_learns_on_afterwards(tiny_model: Path) -> None:
    """Guards are asked between steps: gradients must still reach the masters."""
    found = []
    for is_asked in (False, True):
        opened = open_model(describe(tiny_model), dtype="bfloat16")
        opened.model.requires_grad_(True)
        masters = Masters(dict(opened.model.named_parameters()))
        for _ in range(2):
            opened.model(input_ids=torch.arange(20)[None]).logits.float().square().mean().backward()
            masters.update(1e-3)
            if is_asked:
                with in_float32(opened.model), torch.no_grad():
                    opened.model(input_ids=torch.arange(5)[None])
        found.append(masters.weights)
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name
