"""Pushes of rows against autograd's own inner products, on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evertune.influence import push as push_module
from evertune.influence.order import SourceOrder
from evertune.influence.push import (
    Sampled,
    _items_loss,
    _layer_weights,
    find_pushes,
    marking_words,
    probe_gradient,
    pushes,
)
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward, Tokens, score_rows
from evertune.model.open import OpenModel, open_model
from evertune.probe.loss import LossItem, loss_items
from evertune.probe.score import score_probe
from evertune.probe.suite import Probe, load_probe

WORDS = ("red", "green", "blue", "north", "south")


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> OpenModel:
    return open_model(describe(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    place = tmp_path_factory.mktemp("probe")
    items = [
        {"id": f"i{n}", "prompt": f"Which word is number {n}?", "choices": list(WORDS[: 2 + n % 3]), "answer": n % 2}
        for n in range(6)
    ]
    (place / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    found = load_probe("words", settings={"path": "p.jsonl", "kind": "choice"}, root=place)
    assert isinstance(found, Probe)
    return found


def texts(opened: OpenModel, *said: str) -> list[Tokens]:
    found = []
    for one in said:
        ids = opened.codec.encode(one)
        found.append(Tokens(tuple(ids), (False, *[True] * (len(ids) - 1))))
    return found


def sampled(*tokens: Tokens, factors: tuple[float, ...] = (1.0,)) -> Sampled:
    return Sampled(row=None, source="s", texts=tokens, factors=factors)  # type: ignore[arg-type]


def test_a_push_is_minus_the_inner_product_of_row_and_probe_gradient(opened: OpenModel, probe: Probe) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=6)
    one, two = texts(opened, "the red north is blue and so is the south", "a green one")
    rows = [sampled(one), sampled(two), sampled(one, two, factors=(0.05, -0.05))]
    loss, found = pushes(opened, asked, rows)

    weights = _layer_weights(opened.model)
    assert weights and not any("lora" in name or "embed" in name or "head" in name for name in weights)
    expected_loss, toward = probe_gradient(opened, asked, weights)
    assert loss == pytest.approx(expected_loss)
    norm = torch.stack([g.square().sum() for g in toward.values()]).sum().sqrt()
    products = []
    for text in (one, two):
        ids = torch.tensor([text.ids])
        for weight in weights.values():
            weight.requires_grad_(True)
        logp = opened.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        gradients = torch.autograd.grad(-logp, list(weights.values()))
        for weight in weights.values():
            weight.requires_grad_(False)
        products.append(float(sum((a * b).sum() for a, b in zip(gradients, toward.values(), strict=True)) / norm))
    # A difference of two float32 losses: how many of its digits hold depends on the processor's order of sums.
    assert found[:2] == pytest.approx([-one for one in products], rel=2e-2)
    # A pair's slope at the start of DPO: beta / 2 (chosen nll - rejected nll).
    assert found[2] == pytest.approx(-0.05 * (products[0] - products[1]), rel=2e-2)


def test_a_step_on_a_row_moves_the_probe_as_its_push_says(opened: OpenModel, probe: Probe) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=6)
    rows = [sampled(one) for one in texts(opened, "Which word is number 3? red", "zz qq zz qq", "blue blue blue")]
    before, found = pushes(opened, asked, rows)
    weights = _layer_weights(opened.model)
    for row, push in zip(rows, found, strict=True):
        kept = {name: one.clone() for name, one in weights.items()}
        ids = torch.tensor([row.texts[0].ids])
        for one in weights.values():
            one.requires_grad_(True)
        logp = opened.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        gradients = torch.autograd.grad(-logp, list(weights.values()))
        with torch.no_grad():
            for one, gradient in zip(weights.values(), gradients, strict=True):
                one.requires_grad_(False)
                one.sub_(gradient, alpha=1e-3 / float(push_norm(gradients)))
            after = float(_items_loss(Forward(opened), asked)) / len(asked)
            for name, one in weights.items():
                one.copy_(kept[name])
        assert np.sign(after - before) == np.sign(push)


def push_norm(gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([one.square().sum() for one in gradients]).sum().sqrt()


def test_the_weights_end_as_they_were(opened: OpenModel, probe: Probe) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=2)
    kept = {name: one.clone() for name, one in opened.model.named_parameters()}
    pushes(opened, asked, [sampled(*texts(opened, "red and blue"))])
    for name, one in opened.model.named_parameters():
        assert torch.allclose(one, kept[name], rtol=1e-5, atol=1e-7), name
        assert not one.requires_grad


def test_the_probes_loss_is_of_right_answers_against_wrong_ones(opened: OpenModel, probe: Probe) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=6)
    total = 0.0
    for item in asked:
        likelihoods = np.array([sum(one) for one in score_rows(Forward(opened), item.texts)]) * item.scales
        total += np.log(np.exp(likelihoods).sum()) - likelihoods[item.right]
    assert float(_items_loss(Forward(opened), asked)) == pytest.approx(total, rel=1e-4)


def test_words_that_mark_a_group_are_frequent_in_it_and_rare_elsewhere() -> None:
    assert marking_words(["the cat sat", "the cat ran"], ["the dog sat", "the dog ran"]) == ["cat"]


def test_the_worst_source_comes_first_and_replays_to_the_same_numbers(
    tiny_model: Path, probe: Probe, tmp_path: Path
) -> None:
    rows = {"one": "red blue red blue", "two": "zz qq zz qq"}
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(9)))
    orders = [SourceOrder(name, str(tmp_path / f"{name}.jsonl"), "text", None, False, 9.0) for name in rows]
    model = describe(tiny_model)
    scores = score_probe(open_model(model, dtype="float32"), probe)
    asked = {"most_rows": 8, "most_items": 4, "max_tokens": 64, "seed": 1, "device": "cpu"}
    found = find_pushes(model, model, probe, scores, scores, orders, **asked)
    again = find_pushes(model, model, probe, scores, scores, orders, **asked)
    assert found == again
    first, second = found["sources"]
    assert first["push"] >= second["push"]
    assert (first["sampled"], first["shown"]) == (8, 9.0)
    # The two ends are one model here: all points agree, and the push is their mean.
    assert first["along"] == pytest.approx([first["push"]] * 3, rel=1e-3)
    assert sum(one["rows"] for one in found["clusters"]) == 8


def test_a_loss_that_no_layer_has_a_gradient_of_is_not_called_a_push_of_zero(
    opened: OpenModel, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=2)
    found = push_module.probe_gradient(opened, asked, _layer_weights(opened.model))
    silent = {name: torch.zeros_like(one) for name, one in found[1].items()}
    monkeypatch.setattr(push_module, "probe_gradient", lambda *_: (found[0], silent))
    with pytest.raises(AssertionError, match="no gradient"):
        pushes(opened, asked, [])


def test_what_items_share_is_read_once_with_the_gradient_that_each_text_has_alone(
    opened: OpenModel, probe: Probe
) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=6)
    weights = _layer_weights(opened.model)
    assert Forward(opened).can_pack
    loss, together = probe_gradient(opened, asked, weights)
    for one in weights.values():
        one.requires_grad_(True)
    alone = torch.stack([_items_loss_alone(opened, item) for item in asked]).mean()
    expected = torch.autograd.grad(alone, list(weights.values()))
    for one in weights.values():
        one.requires_grad_(False)
    assert loss == pytest.approx(alone.item(), rel=1e-5)
    for (name, found), each in zip(together.items(), expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-3, atol=1e-6, msg=name)


def test_where_rows_cannot_be_packed_the_loss_is_the_same(opened: OpenModel, probe: Probe) -> None:
    scores = score_probe(opened, probe)
    asked = loss_items(opened.codec, probe, before=scores, after=scores, most=6)
    forward = Forward(opened)
    together = _items_loss(forward, asked)
    forward.can_pack = False
    torch.testing.assert_close(_items_loss(forward, asked), together, rtol=1e-5, atol=1e-6)


def _items_loss_alone(opened: OpenModel, item: LossItem) -> torch.Tensor:
    found = []
    for text, scale in zip(item.texts, item.scales, strict=True):
        ids = torch.tensor([text.ids])
        logp = opened.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(scale * logp[torch.tensor(text.counted[1:])].sum())
    return -torch.stack(found).log_softmax(0)[item.right]
