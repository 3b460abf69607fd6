"""Weights laid out for the processor: the same products, and the layers as they were afterwards."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evertune.model import packed_weights as module
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward
from evertune.model.open import open_model
from evertune.model.packed_weights import LEAST_TOKENS, frozen_linear, packed_weights
from evertune.probe.generate import generate_answers
from evertune.train.sample import sample_answers

pytestmark = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here")


def _layers(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 33, bias=False)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48), (300, 48)])
def test_products_are_as_close_to_the_truth_as_plain_ones(shape: tuple[int, ...]) -> None:
    layers = _layers()
    x = torch.randn(shape, dtype=torch.float64).bfloat16()
    plain = layers(x)
    with packed_weights(layers, tokens=LEAST_TOKENS):
        assert all("forward" in vars(layers[i]) for i in (0, 2)), "something is packed here"
        packed = layers(x)
    truth = layers.double()(x.double())
    errors = [float((one.double() - truth).norm() / truth.norm()) for one in (packed, plain)]
    assert packed.shape == plain.shape and errors[0] <= 1.5 * errors[1]


class _Attention(nn.Module):
    """Layers by the names that go together, of which one reads what another has made."""

    def __init__(self, bias: tuple[bool, bool, bool] = (False, False, False)) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(48, out, bias=has) for out, has in zip((96, 32, 32), bias, strict=True)
        )
        self.o_proj = nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x + 1.0)
        x = x + self.o_proj(q + torch.cat([k, v, k], dim=-1))
        first = self.k_proj(x)
        x.mul_(2.0)
        return torch.cat([first, self.q_proj(x), self.v_proj(x)], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (True, False, True)])
def test_layers_that_read_the_same_tensor_share_a_product_and_no_other(bias: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    layers = _Attention(bias).bfloat16()
    x = torch.randn(5, 48).bfloat16()
    plain = layers(x.clone())
    with packed_weights(layers, tokens=100):
        packed = [layers(x.clone()) for _ in range(2)]
    assert torch.equal(*packed)
    assert torch.allclose(packed[0].float(), plain.float(), rtol=0.02, atol=0.05)


@torch.no_grad()
def test_siblings_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, made, product = _Attention().bfloat16(), [], module._product
    monkeypatch.setattr(module, "_product", lambda x, weight, *rest: made.append(len(x)) or product(x, weight, *rest))
    x = torch.randn(5, 48).bfloat16()
    with packed_weights(layers, tokens=100):
        for one in (layers.q_proj, layers.k_proj, layers.v_proj):
            one(x)
    assert made == [5]


@torch.no_grad()
def test_afterwards_the_layers_follow_their_weights_again() -> None:
    layers = _layers()
    with pytest.raises(RuntimeError, match="in the middle"), packed_weights(layers, tokens=100):
        raise RuntimeError("in the middle")
    layers[2].weight.zero_()
    assert not layers(torch.ones(3, 48, dtype=torch.bfloat16)).any()


def test_what_is_not_for_it_stays_as_it_is() -> None:
    def packed(layers: nn.Module, tokens: int = 100) -> bool:
        with packed_weights(layers, tokens=tokens):
            return any("forward" in vars(one) for one in layers.modules())

    with torch.no_grad():
        assert packed(_layers())
        assert not packed(_layers(torch.float32))
        assert not packed(_layers(), tokens=LEAST_TOKENS - 1)
    assert not packed(_layers()), "these products have no gradient"


@torch.no_grad()
def test_a_torch_without_the_operations_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_product", None)
    layers, x = _layers(), torch.ones(3, 48, dtype=torch.bfloat16)
    with packed_weights(layers, tokens=100):
        found = layers(x)
    assert torch.equal(found, layers(x))


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_answers_are_generated_with_it_and_are_the_same(
    way: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Forward(open_model(describe(tiny_model), dtype="bfloat16"))
    prompts, made, reorder = [[5, 6, 7], [8, 9]], [], module._reorder
    assert reorder is not None
    monkeypatch.setattr(module, "_reorder", lambda weight: made.append(weight.shape) or reorder(weight))

    def said(tokens: int) -> list[list[int]]:
        if way == "greedy":
            greedy = generate_answers(forward, prompts, max_new_tokens=tokens, stop_ids=frozenset())
            return [list(one.ids) for one in greedy]
        rules = {"max_new_tokens": tokens, "temperature": 1.0, "stop_ids": frozenset()}
        return [list(one.ids) for group in sample_answers(forward, prompts, seeds=[[1], [2]], **rules) for one in group]

    few = said(LEAST_TOKENS - 1)
    assert not made, "a few tokens are not worth it"
    many = said(LEAST_TOKENS)
    assert made and [one[: len(other)] for one, other in zip(many, few, strict=True)] == few


def _head(rows: int = 5) -> Any:
    torch.manual_seed(0)
    return tuple(torch.randn(shape).bfloat16() for shape in ((rows, 48), (200, 48), (200,)))


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that are laid out from now on."""
    made: list[torch.Tensor] = []
    reorder = module._reorder
    assert reorder is not None
    monkeypatch.setattr(module, "_reorder", lambda weight: made.append(weight) or reorder(weight))
    return made


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_a_frozen_weight_is_laid_out_once_for_all_that_multiply_with_it(
    has_bias: bool, laid_out: list[torch.Tensor]
) -> None:
    x, weight, bias = _head()
    for rows in (1, 5):
        found = frozen_linear(x[:rows], weight, bias if has_bias else None)
        torch.testing.assert_close(found, F.linear(x[:rows], weight, bias if has_bias else None))
    assert len(laid_out) == 1


@torch.no_grad()
def test_a_weight_that_was_written_to_is_laid_out_anew(laid_out: list[torch.Tensor]) -> None:
    x, weight, _ = _head()
    frozen_linear(x, weight, None)
    weight.mul_(2.0)
    torch.testing.assert_close(frozen_linear(x, weight, None), F.linear(x, weight))
    assert len(laid_out) == 2


@torch.no_grad()
def test_a_copy_goes_with_its_weight() -> None:
    x, weight, _ = _head()
    gc.collect()  # of what other tests have left
    before = len(module._frozen)
    frozen_linear(x, weight, None)
    assert len(module._frozen) == before + 1
    del weight
    gc.collect()
    assert len(module._frozen) == before


def test_where_a_gradient_is_asked_for_nothing_is_laid_out(laid_out: list[torch.Tensor]) -> None:
    x, weight, _ = _head()
    frozen_linear(x.requires_grad_(), weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand_as(x), rtol=0.02, atol=0.1)
    with torch.no_grad():
        frozen_linear(x, weight.requires_grad_(), None)
    assert not laid_out
    wide = [one.float() for one in _head()]
    assert torch.equal(frozen_linear(*wide), F.linear(*wide)) and not laid_out
