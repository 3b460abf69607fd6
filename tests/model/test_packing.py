"""Rows packed into one sequence: what each would be alone, and nothing of one in another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from evertune.model import packing
from evertune.model.packing import BLOCK, enable_packing, packed_hidden

ROWS = (1, 5, BLOCK, 2 * BLOCK + 3)


def _heads(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query of 6 heads, key and value of 2, width 8, laid out token by token as projections make them; and a slope."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((6, 8), (2, 8), (2, 8), (6, 8))
    return [torch.randn((sum(ROWS), *size), generator=generator, dtype=dtype).transpose(0, 1) for size in sizes]


def _by_torch(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """(T, H, D): torch's attention, row by row, with the mask written out."""
    found = []
    for one in zip(*(each.split(ROWS, dim=1) for each in (query, key, value)), strict=True):
        t = one[0].shape[1]
        seen = torch.ones((t, t), dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        found.append(F.scaled_dot_product_attention(*(each[None] for each in one), attn_mask=seen, enable_gqa=True)[0])
    return torch.cat(found, dim=1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 3, BLOCK - 1, BLOCK + 7])
@pytest.mark.parametrize("kept", [0, 10**6])
def test_attention_within_rows_and_its_gradient_are_torch_s(window: int | None, kept: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "KEPT_TOKENS", kept)
    *inputs, slope = _heads()
    inputs = [one.requires_grad_() for one in inputs]
    ours = packing._RowAttention.apply(*inputs, ROWS, 8**-0.5, window)
    theirs = _by_torch(*inputs, window)
    assert torch.allclose(ours, theirs, atol=1e-12)
    slope = slope.transpose(0, 1)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(theirs, inputs, slope), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's flash kernel needs a GPU")
@pytest.mark.parametrize("window", [None, 3, BLOCK + 7])
def test_on_a_gpu_one_call_reads_the_rows_as_torch_does_one_by_one(window: int | None) -> None:
    *inputs, slope = (one.cuda() for one in _heads(dtype=torch.bfloat16))
    assert packing._has_flash(inputs[0])
    exact = [one.double().requires_grad_() for one in inputs]
    truth_THD = _by_torch(*exact, window)
    truth = [truth_THD, *torch.autograd.grad(truth_THD, exact, slope.double().transpose(0, 1))]
    inputs = [one.requires_grad_() for one in inputs]
    ours_THD = packing._flash(*inputs, ROWS, 8**-0.5, window)
    ours = [ours_THD, *torch.autograd.grad(ours_THD, inputs, slope.transpose(0, 1))]
    for one, true in zip(ours, truth, strict=True):
        assert (one - true).norm() <= 0.01 * true.norm()


def test_in_bfloat16_it_is_as_close_to_the_truth_as_torch_s_own() -> None:
    *inputs, slope = _heads(dtype=torch.bfloat16)
    exact = [one.double().requires_grad_() for one in inputs]
    truth = torch.autograd.grad(_by_torch(*exact, None), exact, slope.double().transpose(0, 1))
    inputs = [one.requires_grad_() for one in inputs]
    errors = []
    for found in (packing._RowAttention.apply(*inputs, ROWS, 8**-0.5, None), _by_torch(*inputs, None)):
        gradients = torch.autograd.grad(found, inputs, slope.transpose(0, 1))
        errors.append(
            [float((one.double() - true).norm() / true.norm()) for one, true in zip(gradients, truth, strict=True)]
        )
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 2.0 * theirs


def test_a_row_has_the_hidden_states_and_gradients_it_has_alone(tiny_model: Path) -> None:
    alone, packed = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    assert enable_packing(packed)
    rows = [torch.arange(3, 3 + length) % 250 for length in (7, 1, 150, 12)]
    found = packed_hidden(packed.get_decoder(), rows)
    expected = torch.cat([alone.get_decoder()(input_ids=row[None]).last_hidden_state[0] for row in rows])
    assert torch.allclose(found, expected, atol=1e-5)
    for one in (found, expected):
        one.square().sum().backward()
    for name, parameter in packed.named_parameters():
        expected_grad = dict(alone.named_parameters())[name].grad
        assert torch.allclose(parameter.grad, expected_grad, rtol=1e-4, atol=1e-4), name


def test_nothing_of_one_row_is_in_another(tiny_model: Path) -> None:
    """The same bits whatever stands before and behind, and no gradient from one row to another."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert enable_packing(model)
    decoder, row = model.get_decoder(), torch.arange(40, 60)
    others = [[torch.arange(n, n + 30), torch.arange(2 * n, 2 * n + 9)] for n in (1, 77)]
    found = [packed_hidden(decoder, [before, row, after])[30:50] for before, after in others]
    assert torch.equal(*found)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.retain_grad() or out))
    packed_hidden(decoder, [others[0][0], row, others[0][1]])[30:50].sum().backward()
    gradient = seen[0].grad[0]
    assert (gradient[:30] == 0).all() and (gradient[50:] == 0).all()
    assert (gradient[30:50] != 0).any()


def test_asked_without_rows_the_model_computes_the_bits_of_before(tiny_model: Path) -> None:
    plain, packed = (AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2))
    assert enable_packing(packed) and enable_packing(packed)
    ids, mask = torch.arange(60).view(3, 20), torch.ones((3, 20), dtype=torch.long)
    mask[1, :4] = 0
    for settings in ({}, {"attention_mask": mask}):
        assert torch.equal(plain(input_ids=ids, **settings).logits, packed(input_ids=ids, **settings).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    assert torch.equal(plain.generate(ids, **greedy), packed.generate(ids, **greedy))


def test_a_trained_model_that_recomputes_its_layers_gives_the_same_gradients(tiny_model: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(tiny_model).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    rows = [torch.arange(9), torch.arange(30, 50)]
    for model in models:
        assert enable_packing(model)
        packed_hidden(model.get_decoder(), rows).square().sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def _small(kind: Any, config: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return kind(config(**sizes, **heads, **settings)).eval()


def test_a_sliding_window_is_kept() -> None:
    model = _small(MistralForCausalLM, MistralConfig, sliding_window=4)
    rows = [torch.arange(11), torch.arange(20, 26)]
    expected = torch.cat([model.get_decoder()(input_ids=row[None]).last_hidden_state[0] for row in rows])
    assert enable_packing(model)
    assert torch.allclose(packed_hidden(model.get_decoder(), rows), expected, atol=1e-5)


def test_an_architecture_that_adds_to_the_scores_is_not_packed_and_left_as_it_was() -> None:
    model = _small(Gemma2ForCausalLM, Gemma2Config, attn_logit_softcapping=5.0)
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        packing._attention(model, query, query, query, None, softcap=5.0, packed_rows=(1, 2))


def test_a_model_that_lets_rows_see_each_other_is_not_packed(tiny_model: Path, monkeypatch: Any) -> None:
    """The trial itself: with an attention that does not know of rows it has to say no."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        kwargs.pop(packing.ROWS, None)
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, packing.NAME, blind)
    assert not enable_packing(AutoModelForCausalLM.from_pretrained(tiny_model))
