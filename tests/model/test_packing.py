"""Rows packed into one sequence: what each would be alone, and nothing of one in another."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from evertune.model import packing, row_attention
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.model.packing import enable_packing, packed_hidden
from evertune.model.row_attention import BLOCK, RowAttention, Rows
from evertune.model.tree import ByRuns, grow
from evertune.train.loop import prefer_same_bits

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
    monkeypatch.setattr(row_attention, "KEPT_TOKENS", kept)
    *inputs, slope = _heads()
    inputs = [one.requires_grad_() for one in inputs]
    ours = RowAttention.apply(*inputs, Rows.apart(ROWS), 8**-0.5, window)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's flash kernel needs a GPU")
def test_on_a_gpu_gradients_are_the_same_bits_each_time_where_these_are_asked_for() -> None:
    rows = (1700, 900, 40)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn((heads, sum(rows), 64), generator=generator).bfloat16().cuda().requires_grad_()
        for heads in (9, 3, 3)
    ]
    try:
        prefer_same_bits()
        found = [
            torch.autograd.grad(packing._flash(*inputs, rows, 0.125, None).square().sum(), inputs) for _ in range(8)
        ]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for again in found[1:] for pair in zip(found[0], again, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention is a GPU's")
def test_on_a_gpu_a_model_is_read_without_plans_for_each_length(tiny_model: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_model(describe(tiny_model), dtype="bfloat16", device="cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="rows are filled up on a GPU")
@pytest.mark.parametrize("ask", [False, True])
def test_on_a_gpu_what_fills_up_is_not_among_what_was_asked_for(tiny_model: Path, ask: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).cuda()
    assert enable_packing(model)
    rows = [torch.arange(5, device="cuda"), torch.arange(20, 29, device="cuda")]
    asked = torch.arange(14, device="cuda") % 3 == 0 if ask else torch.ones(14, dtype=torch.bool, device="cuda")
    alone = torch.cat([model.get_decoder()(input_ids=row.unsqueeze(0)).last_hidden_state[0] for row in rows])
    found = packed_hidden(model.get_decoder(), rows, asked=asked if ask else None)
    assert torch.allclose(found, alone[asked], atol=1e-5)


def test_tokens_are_filled_up_to_one_of_few_numbers_and_by_a_32nd_at_most() -> None:
    assert [packing.filled(count) for count in (1, 64, 65, 2047, 2048, 4097)] == [64, 64, 128, 2048, 2048, 4224]
    found = {packing.filled(count) for count in range(4096, 8192)}
    assert len(found) <= 33
    assert all(count <= packing.filled(count) <= count * 33 / 32 for count in range(2048, 8192))


@pytest.mark.parametrize("lengths", [[1], [64], [9, 3, 20], [1024] * 64 + [1], [700, 1700]])
def test_what_fills_up_is_no_longer_row_than_there_is(lengths: list[int]) -> None:
    more = packing.filling(lengths)
    assert sum(lengths) + sum(more) == packing.filled(sum(lengths))
    assert all(0 < count <= max(lengths) for count in more)


def test_in_bfloat16_it_is_as_close_to_the_truth_as_torch_s_own() -> None:
    *inputs, slope = _heads(dtype=torch.bfloat16)
    exact = [one.double().requires_grad_() for one in inputs]
    truth = torch.autograd.grad(_by_torch(*exact, None), exact, slope.double().transpose(0, 1))
    inputs = [one.requires_grad_() for one in inputs]
    errors = []
    for found in (RowAttention.apply(*inputs, Rows.apart(ROWS), 8**-0.5, None), _by_torch(*inputs, None)):
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


SYSTEM, PROMPT = torch.arange(90, 110), torch.arange(120, 131)
# Two answers to one prompt, another prompt behind the same system prompt, a row twice, one that ends where others go
# on, and one that shares nothing.
FAMILY = [
    torch.cat([SYSTEM, PROMPT, torch.arange(5, 12)]),
    torch.arange(200, 215),
    torch.cat([SYSTEM, PROMPT, torch.arange(30, 190)]),
    torch.cat([SYSTEM, torch.arange(60, 64)]),
    torch.cat([SYSTEM, torch.arange(60, 64)]),
    torch.cat([SYSTEM, PROMPT[:9]]),
]


def _tokens_read(model: Any) -> list[int]:
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    return read


def test_what_rows_begin_with_is_read_once_and_nothing_else_changes(tiny_model: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64) for _ in range(2)]
    counts = [_tokens_read(model) for model in models]
    assert all(map(enable_packing, models))
    asked = torch.cat([torch.arange(len(row)) % 3 > 0 for row in FAMILY])
    for mask in (None, asked):
        hidden = [
            packed_hidden(model.get_decoder(), FAMILY, asked=mask, shares=shares)
            for model, shares in zip(models, (False, True), strict=True)
        ]
        assert torch.allclose(*hidden, atol=1e-12)
        assert len(hidden[1]) == (len(asked) if mask is None else int(mask.sum()))
    # The system prompt, 9 tokens of the prompt, what each has from there; few alike tokens are not worth sharing.
    assert [one[-1] for one in counts] == [sum(map(len, FAMILY)), 20 + 9 + 9 + 162 + 2 * 4 + 15]
    for one in hidden:
        (one * torch.linspace(-1, 1, one.numel(), dtype=one.dtype).view_as(one)).sum().backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        # The model's norms are in float32, whatever its dtype.
        assert one.grad is None or (one.grad - other.grad).norm() <= 1e-6 * one.grad.norm()


@pytest.mark.parametrize("window", [None, 25])
def test_forward_only_rows_have_the_hidden_states_of_training(window: int | None, monkeypatch: Any) -> None:
    kind, config = (LlamaForCausalLM, LlamaConfig) if window is None else (MistralForCausalLM, MistralConfig)
    model = _small(kind, config, vocab_size=250, **({} if window is None else {"sliding_window": window})).double()
    assert enable_packing(model)
    attended: list[int] = []
    attend = ByRuns.attend
    monkeypatch.setattr(ByRuns, "attend", lambda *args: attended.append(1) or attend(*args))
    for rows in (FAMILY, FAMILY[1:3], FAMILY[:1]):  # the second share nothing
        trained = packed_hidden(model.get_decoder(), rows, shares=True)
        assert not attended
        found = packed_hidden(model.get_decoder(), rows, shares=True, forward_only=True)
        assert attended
        assert torch.allclose(found, trained, atol=1e-6)
        attended.clear()
    monkeypatch.setattr(packing, "FUSED_TOKENS", max(map(len, FAMILY)) - 1)
    found = packed_hidden(model.get_decoder(), FAMILY, shares=True, forward_only=True)
    assert not attended, "behind a mask a long row gains nothing"
    assert torch.equal(found, packed_hidden(model.get_decoder(), FAMILY, shares=True))


def test_rows_that_share_nothing_have_the_bits_of_rows_that_may_not(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert enable_packing(model)
    rows = [FAMILY[0], torch.cat([SYSTEM[:7], FAMILY[1]])]  # seven tokens are fewer than are worth it
    assert torch.equal(*(packed_hidden(model.get_decoder(), rows, shares=shares) for shares in (False, True)))


@pytest.mark.parametrize("window", [None, 3, BLOCK - 1, BLOCK + 7])
@pytest.mark.parametrize("kept", [0, 10**6])
def test_attention_along_a_tree_and_its_gradient_are_torch_s(window: int | None, kept: int, monkeypatch: Any) -> None:
    """Against torch's attention with the tree's mask written out: who shares my row up to me, and is near enough."""
    monkeypatch.setattr(row_attention, "KEPT_TOKENS", kept)
    rows = [torch.arange(300).tolist(), [*range(140), *range(400, 560)], [*range(10), 7], [900], [*range(140), 5]]
    (tree,) = grow(rows, budget=10**6)
    tokens = len(tree.ids)
    assert tokens == 300 + 160 + 1 + 1 + 1
    seen_TT = torch.zeros((tokens, tokens), dtype=torch.bool)
    for places in tree.places.values():
        for i, query in enumerate(places):
            seen_TT[query, places[0 if window is None else max(0, i - window + 1) : i + 1]] = True
    generator = torch.Generator().manual_seed(0)
    *inputs, slope = (
        torch.randn((tokens, heads, 8), generator=generator, dtype=torch.float64).transpose(0, 1)
        for heads in (6, 2, 2, 6)
    )
    inputs = [one.requires_grad_() for one in inputs]
    ours = RowAttention.apply(*inputs, Rows.along(tree), 8**-0.5, window)
    theirs = F.scaled_dot_product_attention(*(one[None] for one in inputs), attn_mask=seen_TT, enable_gqa=True)[0]
    theirs = theirs.transpose(0, 1)
    assert torch.allclose(ours, theirs, atol=1e-12)
    slope = slope.transpose(0, 1)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(theirs, inputs, slope), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_in_bfloat16_shared_tokens_sum_the_slopes_of_their_rows_without_losing_them() -> None:
    """A prefix of 64 rows: its keys' gradient is as close to the truth as where each row has its own prefix."""
    rows = [[*range(16), *range(1000 + 9 * i, 1000 + 9 * i + 9)] for i in range(64)]
    (tree,) = grow(rows, budget=10**6)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn((len(tree.ids), heads, 8), generator=generator).transpose(0, 1) for heads in (6, 2, 2)]
    slope = torch.randn((len(tree.ids), 6, 8), generator=generator) + 0.5
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        own = [one.to(torch.bfloat16).to(dtype).requires_grad_() for one in inputs]
        found = RowAttention.apply(*own, Rows.along(tree), 8**-0.5, None)
        gradients.append(torch.autograd.grad(found, own, slope.to(torch.bfloat16).to(dtype)))
    for true, narrow in zip(*gradients, strict=True):
        assert (narrow.double() - true).norm() < 0.006 * true.norm()


def test_no_gradient_goes_from_a_row_to_what_another_has_alone(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert enable_packing(model)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.retain_grad() or out))
    ends = torch.tensor([0, *map(len, FAMILY)]).cumsum(0)
    packed_hidden(model.get_decoder(), FAMILY, shares=True)[ends[2] : ends[3]].sum().backward()
    gradient_T = seen[-1].grad[0].abs().sum(dim=-1)
    assert int((gradient_T != 0).sum()) == len(FAMILY[2])


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
    return kind(config(**{**sizes, **heads, **settings})).eval()


def test_a_sliding_window_is_kept() -> None:
    model = _small(MistralForCausalLM, MistralConfig, sliding_window=4)
    rows = [torch.arange(11), torch.arange(20, 26)]
    expected = torch.cat([model.get_decoder()(input_ids=row[None]).last_hidden_state[0] for row in rows])
    assert enable_packing(model)
    assert torch.allclose(packed_hidden(model.get_decoder(), rows), expected, atol=1e-5)
    kin = [torch.cat([torch.arange(10), one]) for one in (torch.arange(20, 26), torch.arange(30, 41))]
    expected = torch.cat([model.get_decoder()(input_ids=row[None]).last_hidden_state[0] for row in kin])
    assert torch.allclose(packed_hidden(model.get_decoder(), kin, shares=True), expected, atol=1e-5)


def test_an_architecture_that_adds_to_the_scores_is_not_packed_and_left_as_it_was() -> None:
    model = _small(Gemma2ForCausalLM, Gemma2Config, attn_logit_softcapping=5.0)
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        packing._attention(model, query, query, query, None, softcap=5.0, packed_rows=Rows.apart([1, 2]))


def test_a_model_in_which_rounding_grows_is_packed_all_the_same() -> None:
    """Hard attention through many layers, as in a model asked what it was not trained on: in bfloat16 two exact ways
    lead to other states, which says nothing about whether rows are read apart."""
    model = _small(MistralForCausalLM, MistralConfig, num_hidden_layers=34, initializer_range=0.3)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 40
    model = model.to(torch.bfloat16)
    before, row = torch.arange(1, 6), torch.arange(3, 10)
    alone_tH = model.get_decoder()(input_ids=row[None]).last_hidden_state[0]
    assert enable_packing(model)
    packed_tH = packed_hidden(model.get_decoder(), [before, row])[5:]
    assert (packed_tH - alone_tH).norm() > 0.05 * alone_tH.norm()  # how much, the processor decides


def test_a_model_that_lets_rows_see_each_other_is_not_packed(tiny_model: Path, monkeypatch: Any) -> None:
    """The trial itself: with an attention that does not know of rows it has to say no."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def blind(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        kwargs.pop(packing.ROWS, None)
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, packing.NAME, blind)
    assert not enable_packing(AutoModelForCausalLM.from_pretrained(tiny_model))
