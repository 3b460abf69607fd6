"""The chunked head against plain autograd over the full matrix of logits."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.errors import CheckpointError
from evertune.model import packed_weights
from evertune.train import head as head_module
from evertune.train.head import (
    Head,
    PositionTerm,
    head_loss,
    refuse_logit_transforms,
    split_model,
    target_log_probabilities,
)
from evertune.train.losses import forward_kl, reverse_kl, top_words
from evertune.train.reference import ForwardFull, ForwardTop

N, V, H = 13, 37, 8
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl}


def _tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(N, H, generator=generator).to(dtype),
        "weight": torch.randn(V, H, generator=generator).to(dtype),
        "bias": torch.randn(V, generator=generator).to(dtype),
        "targets": torch.randint(0, V, (N,), generator=generator),
        "mask": torch.rand(N, generator=generator) < 0.5,
        "ref": (torch.randn(N, V, generator=generator) * 2).log_softmax(-1),
    }


def _term(one: dict[str, Tensor], direction: str, weight: float) -> PositionTerm:
    ref = one["ref"][one["mask"]]
    return PositionTerm("kl", one["mask"], weight, lambda logp, chosen: DIVERGENCES[direction](logp, ref[chosen]))


def _naive(hidden: Tensor, weight: Tensor, bias: Tensor, one: dict[str, Tensor], direction: str) -> Tensor:
    logp = F.linear(hidden, weight, bias).float().log_softmax(-1)
    ce = F.nll_loss(logp, one["targets"], reduction="sum") / N
    ref = one["ref"][one["mask"]]
    policy, target = (logp[one["mask"]], ref) if direction == "forward" else (ref, logp[one["mask"]])
    return ce + 0.3 * F.kl_div(policy, target, log_target=True, reduction="sum") / one["mask"].sum()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 4, 5, N, 100])
def test_loss_and_gradients_equal_autograd_over_all_logits(chunk: int, direction: str):
    one = _tensors()
    parts = [one[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    head = Head(parts[1], parts[2])
    term = _term(one, direction, 0.3 / int(one["mask"].sum()))
    found = head_loss(parts[0], one["targets"], head=head, ce_weight=1 / N, terms=[term], chunk_positions=chunk)
    gradients = torch.autograd.grad(found.loss, parts)
    copies = [one[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    naive = _naive(*copies, one, direction)
    assert found.loss.item() == pytest.approx(naive.item(), rel=1e-6)
    for gradient, expected in zip(gradients, torch.autograd.grad(naive, copies), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("kind", ["top", "full", "both", "none"])
def test_slopes_in_place_are_those_of_autograd(kind: str, chunk: int):
    """Terms that know their slope, against the same terms called as functions of the log-probabilities."""
    one = _tensors()
    count = int(one["mask"].sum())
    ids, kept = top_words(one["ref"][one["mask"]], 5)
    # Widely spread logits, so that some tails hold nearly nothing.
    one["weight"] *= 4
    terms = {
        "top": PositionTerm("top", one["mask"], 0.3 / count, ForwardTop(ids, kept)),
        "full": PositionTerm("full", ~one["mask"], 0.2, _full(N - count)),
    }
    chosen = {"both": list(terms.values()), "none": []}.get(kind) or [terms[name] for name in terms if name == kind]
    found = []
    for terms_now in (chosen, [replace(term, values=partial(_called, term.values)) for term in chosen]):
        parts = [one[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        if not chosen and terms_now is not chosen:
            loss = F.cross_entropy(F.linear(*parts), one["targets"], reduction="sum") / N
            found.append([loss, torch.stack([loss * N]), *torch.autograd.grad(loss, parts)])
            continue
        done = head_loss(
            parts[0], one["targets"], head=Head(parts[1], parts[2]), ce_weight=1 / N, terms=terms_now,
            chunk_positions=chunk,
        )  # fmt: skip
        sums = torch.stack([done.ce_sum, *done.term_sums.values()])
        found.append([done.loss, sums, *torch.autograd.grad(done.loss, parts)])
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def _full(count: int) -> ForwardFull:
    generator = torch.Generator().manual_seed(8)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((count, H), (V, H)))
    return ForwardFull(hidden, Head(weight, None))


def _called(values: Any, logp: Tensor, chosen: slice) -> Tensor:
    return values(logp, chosen)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same():
    one = _tensors()
    hidden = one["hidden"].clone().requires_grad_()
    found = head_loss(hidden, one["targets"], head=Head(one["weight"], None), ce_weight=0.5, chunk_positions=4)
    found.loss.backward()
    logits = F.linear(one["hidden"].clone().requires_grad_(), one["weight"])
    expected = 0.5 * (logits.softmax(-1) - F.one_hot(one["targets"], V)) @ one["weight"]
    assert one["weight"].grad is None
    assert torch.allclose(hidden.grad, expected, atol=1e-5)


def test_with_a_reference_s_logits_beside_them_chunks_are_half_as_large(monkeypatch):
    head, seen = Head(torch.randn(V, H), None), []
    product = F.linear
    monkeypatch.setattr(head_module.F, "linear", lambda x, *rest: seen.append(len(x)) or product(x, *rest))
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 8 * V)
    hidden, targets = torch.randn(8, H), torch.zeros(8, dtype=torch.int64)
    everywhere = torch.ones(8, dtype=torch.bool)
    narrow = ForwardTop(torch.arange(2).repeat(8, 1), torch.full((8, 3), 1 / 3).log())
    for values, longest in ((None, 8), (narrow, 8), (_full(8), 4)):
        seen.clear()
        terms = [PositionTerm("kl", everywhere, 1.0, values)] if values else []
        head_loss(hidden, targets, head=head, ce_weight=1.0, terms=terms)
        assert max(seen) == longest


def test_the_upstream_gradient_scales_all():
    one = _tensors()
    gradients = []
    for scale in (1.0, 4.0):
        hidden, weight = (one[name].clone().requires_grad_() for name in ("hidden", "weight"))
        found = head_loss(hidden, one["targets"], head=Head(weight, None), ce_weight=1.0, chunk_positions=5)
        (scale * found.loss).backward()
        gradients.append((hidden.grad, weight.grad))
    assert torch.equal(gradients[0][0] * 4, gradients[1][0])
    assert torch.equal(gradients[0][1] * 4, gradients[1][1])


def test_the_weight_gradient_over_many_bfloat16_chunks_is_summed_in_float32(monkeypatch):
    """Adding 13 small gradients to a large one in bfloat16 would lose them: 256 + 13 x 1 stays 256."""
    monkeypatch.setattr(head_module, "SLOPE_ELEMENTS", 1)
    hidden = torch.ones(14, 1, dtype=torch.bfloat16)
    hidden[0] = 256
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    found = head_loss(
        hidden, torch.zeros(14, dtype=torch.int64), head=Head(weight, None), ce_weight=2.0, chunk_positions=1
    )
    found.loss.backward()
    assert weight.grad[1].item() == torch.tensor(256.0 + 13.0).bfloat16().item() != 256.0


@pytest.mark.parametrize(("elements", "products"), [(1, 8), (5 * 10, 3), (1 << 24, 1)])
def test_the_weight_gradient_is_formed_of_many_chunks_at_once(monkeypatch, elements: int, products: int):
    monkeypatch.setattr(head_module, "SLOPE_ELEMENTS", elements)
    made, multiply = [], head_module._Gradients._add_shared
    monkeypatch.setattr(
        head_module._Gradients, "_add_shared", lambda own, i, new: made.append(i) or multiply(own, i, new)
    )
    torch.manual_seed(0)
    hidden, targets = torch.randn(16, 6), torch.randint(0, 10, (16,))
    weight, expected = (torch.randn(10, 6).requires_grad_() for _ in range(2))
    expected.data.copy_(weight.data)
    head_loss(hidden, targets, head=Head(weight, None), ce_weight=0.5, chunk_positions=2).loss.backward()
    assert len(made) == products
    (0.5 * torch.nn.functional.cross_entropy(hidden @ expected.t(), targets, reduction="sum")).backward()
    assert torch.allclose(weight.grad, expected.grad, atol=1e-6)


def test_sums_are_undivided_and_carry_no_gradient():
    one = _tensors()
    hidden = one["hidden"].clone().requires_grad_()
    found = head_loss(
        hidden, one["targets"], head=Head(one["weight"], None), ce_weight=0.1, terms=[_term(one, "forward", 0.7)]
    )
    assert not found.ce_sum.requires_grad
    loss = 0.1 * found.ce_sum + 0.7 * found.term_sums["kl"]
    assert found.loss.item() == pytest.approx(loss.item())


def test_no_gradients_are_formed_where_none_are_wanted():
    one = _tensors()
    hidden = one["hidden"].clone().requires_grad_()
    with torch.no_grad():
        found = head_loss(hidden, one["targets"], head=Head(one["weight"], None), ce_weight=1.0)
    assert not found.loss.requires_grad


def test_no_tensor_of_all_positions_by_vocabulary_is_made():
    """The largest allocation seen while 64 chunks run is one chunk's, not the whole matrix."""
    seen: list[int] = []

    def values(logp: Tensor, chosen: slice) -> Tensor:
        seen.append(logp.numel())
        return logp.sum(-1)

    hidden, weight = torch.randn(128, 4, requires_grad=True), torch.randn(50, 4)
    term = PositionTerm("x", torch.ones(128, dtype=torch.bool), 0.0, values)
    head_loss(
        hidden,
        torch.zeros(128, dtype=torch.int64),
        head=Head(weight, None),
        ce_weight=1.0,
        terms=[term],
        chunk_positions=2,
    )
    assert max(seen) == 2 * 50
    assert len(seen) == 64


class _Config:
    model_type = "made-up"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def get_text_config(self) -> "_Config":
        return self


@pytest.mark.parametrize(
    ("key", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("logits_scaling", 8)]
)
def test_an_architecture_that_changes_its_logits_is_refused(key: str, value: float):
    with pytest.raises(CheckpointError, match=key):
        refuse_logit_transforms(_Config(**{key: value}))
    refuse_logit_transforms(_Config(final_logit_softcapping=None, logit_scale=1.0))


def test_a_softcap_in_a_models_config_is_refused_before_any_numbers(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(CheckpointError, match="final_logit_softcapping"):
        split_model(model)


def test_a_softcap_without_a_known_name_is_seen_in_the_numbers(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    split_model(model)

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model.__class__ = Doubled
    with pytest.raises(CheckpointError, match="not the head's"):
        split_model(model)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_and_head_give_the_models_own_logits(tmp_path, tied: bool):
    from transformers import AutoModelForCausalLM

    from tests.tiny import write_tiny_model

    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "m", tied=tied))
    decoder, head = split_model(model)
    ids = torch.arange(24).reshape(2, 12)
    logits = model(input_ids=ids).logits
    ours = F.linear(decoder(input_ids=ids).last_hidden_state, head.weight_VH)
    assert torch.equal(logits, ours)
    assert (head.weight_VH is model.get_input_embeddings().weight) == tied


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here")
@pytest.mark.parametrize("is_trained", [False, True])
def test_a_frozen_head_is_laid_out_once_for_all_chunks_and_its_reference(monkeypatch, is_trained: bool):
    made, used, reorder, product = [], [], packed_weights._reorder, packed_weights._product
    monkeypatch.setattr(packed_weights, "_reorder", lambda weight: made.append(weight) or reorder(weight))
    monkeypatch.setattr(packed_weights, "_product", lambda x, *rest: used.append(len(x)) or product(x, *rest))
    one = _tensors(torch.bfloat16)
    weight, hidden = one["weight"].requires_grad_(is_trained), one["hidden"].requires_grad_()
    anchor = PositionTerm("kl", torch.ones(N, dtype=torch.bool), 0.1, ForwardFull(hidden.detach(), Head(weight, None)))
    for _ in range(2):
        found = head_loss(
            hidden, one["targets"], head=Head(weight, None), ce_weight=1.0, terms=[anchor], chunk_positions=4
        )
        found.loss.backward()
    target_log_probabilities(hidden, one["targets"], head=Head(weight, None), chunk_positions=4).sum().backward()
    # Four chunks of the policy and of the reference, twice; and four more.
    chunks = [4, 4, 4, 4, 4, 4, 1, 1] * 2 + [4, 4, 4, 1]
    assert (len(made), used) == ((0, []) if is_trained else (1, chunks))
    # The reference's hidden states and head are the policy's: what is formed in place is no divergence at all.
    assert float(found.term_sums["kl"]) == 0.0
