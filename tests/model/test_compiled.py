"""What torch.compile makes of norms, gates and rotations is what they were, and nothing else is touched."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

from evertune.errors import TrainingError
from evertune.model.adapter import add_adapter
from evertune.model.checkpoint import describe
from evertune.model.compiled import compile_between_products
from evertune.model.open import open_model
from evertune.model.packing import enable_packing, packed_hidden
from evertune.train.sft import run_sft
from tests.train.stage import make_spec, open_workspace, published_weights, same_bits
from tests.train.test_resume import interrupted_as_whole

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
ROTATE = modeling_llama.apply_rotary_pos_emb
ROWS = [torch.arange(3, 3 + length) % 250 for length in (7, 1, 150, 12)]


@pytest.fixture(autouse=True)
def rotation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' own again for the tests after this one."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", ROTATE)
    yield
    torch.compiler.reset()


@needs_compiler
def test_hidden_states_and_gradients_are_those_of_the_model(tiny_model: Path) -> None:
    plain, compiled = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    layers = plain.config.num_hidden_layers
    assert compile_between_products(compiled) == {"norms": 2 * layers + 1, "gates": layers, "rotations": 1}
    found = []
    for model, rotate in ((plain, ROTATE), (compiled, modeling_llama.apply_rotary_pos_emb)):
        modeling_llama.apply_rotary_pos_emb = rotate
        assert enable_packing(model)
        hidden = packed_hidden(model.get_decoder(), ROWS)
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


@needs_compiler
def test_an_adapter_s_layers_stay_what_they_are_inside_a_gate(tiny_model: Path) -> None:
    opened = open_model(describe(tiny_model), dtype="float32")
    trained = add_adapter(opened, rank=4, alpha=8, dropout=0.5, targets="all-linear", seed=1)
    with torch.no_grad():
        for one in trained.values():
            one.add_(0.1)
    ids = torch.arange(20).unsqueeze(0)
    opened.model.eval()
    before = opened.model(input_ids=ids).logits
    opened.model.train()
    assert compile_between_products(opened.model)["gates"] == opened.model.config.num_hidden_layers
    assert opened.model.training and all(one.training for one in opened.model.modules())
    opened.model.eval()
    assert torch.allclose(opened.model(input_ids=ids).logits, before, atol=1e-5)


def test_a_layer_of_the_same_parts_that_computes_something_else_is_left_alone(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    odd = model.get_decoder().layers[0].mlp
    own = odd.forward
    odd.forward = lambda x: 2 * own(x)
    assert compile_between_products(model)["gates"] == model.config.num_hidden_layers - 1


def test_a_model_with_none_of_these_is_an_error() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(TrainingError, match="GPT2LMHeadModel has no norms"):
        compile_between_products(model)


@needs_compiler
def test_a_stage_learns_the_same_and_goes_on_with_the_same_bits(
    tmp_path: Path, tiny_model: Path, monkeypatch: Any
) -> None:
    settings = {"tune": {"lora": {"rank": 4}}, "anchor": {"on": "both"}}
    weights = []
    for compile_ in (False, True):
        spec, workspace = (
            make_spec(tmp_path, tiny_model, compile=compile_, **settings),
            open_workspace(tmp_path / "run"),
        )
        run_sft(spec, workspace)
        weights.append(published_weights(workspace, spec))
    assert not same_bits(*weights), "compiled and not are different orders of sums"
    for name, one in weights[0].items():
        assert (one - weights[1][name]).norm() <= 1e-3 * one.norm(), name
    interrupted_as_whole(tmp_path, tiny_model, monkeypatch, steps=(3,), save_steps=2, compile=True, **settings)
