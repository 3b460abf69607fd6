from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evertune.model.adapter import add_adapter
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.model.precision import in_float32


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
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(30)[None]
    with in_float32(opened.model), torch.no_grad():
        found = opened.model(input_ids=ids).logits
    assert found.dtype == torch.float32
    with torch.no_grad():
        assert 0 < (found - opened.model(input_ids=ids).logits.float()).abs().max() < 0.2 * found.abs().max()


def test_an_error_inside_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    with pytest.raises(IndexError), in_float32(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
