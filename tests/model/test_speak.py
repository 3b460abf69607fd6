"""Answers in batches that others leave and join, against each prompt read alone and anew for each token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evertune.model import speak as module
from evertune.model.forward import BATCH_TOKENS, Forward, _answer_tokens
from evertune.model.growing_cache import keep_rows
from evertune.model.speak import speak
from tests.probe.models import ARCHITECTURES, SIZES, architecture, naive_greedy

LIMIT = 20


def prompts(count: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 25, (count,), generator=generator).tolist()
    return [torch.randint(3, SIZES["vocab_size"], (one,), generator=generator).tolist() for one in lengths]


def read_rows(model: Any) -> list[tuple[int, int]]:
    """(rows, tokens of each) of every pass through the model from now on."""
    seen: list[tuple[int, int]] = []
    layers = getattr(model.get_decoder(), "layers", None) or model.get_decoder().h
    layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_an_answer_is_the_same_whoever_leaves_and_joins(name: str) -> None:
    model, forward = architecture(name, **ARCHITECTURES[name])
    # Stop tokens that end some answers at once, some on the way, and let some speak to the limit.
    stop_ids = {2, 5, 7, 11, 13, 17, 19}
    found = speak(forward, prompts(), max_new_tokens=LIMIT, stop_ids=stop_ids, batch_tokens=4 * 45)
    lengths = {len(one.ids) for one in found}
    assert len(lengths) > 1 and LIMIT in lengths, "answers of one length leave together"
    for prompt, answer in zip(prompts(), found, strict=True):
        ids, stopped = naive_greedy(model, prompt, LIMIT, stop_ids)
        assert (tuple(answer.ids[:-1] if answer.stopped else answer.ids), answer.stopped) == (ids, stopped)


@pytest.mark.parametrize("given", [True, False])
def test_prompts_join_those_that_still_speak(given: bool) -> None:
    """The first of four never ends; the others end with their first token, as all later ones do."""
    model, forward = architecture("llama")
    seen = read_rows(model)

    def choose(logits_BV: torch.Tensor, answers: Any, said: Any) -> torch.Tensor:
        return torch.tensor([9 if answer == 0 else 2 for answer in answers])

    asked = [[3] * 12, *([4 + i] * 8 for i in range(9))]
    forward.answer_tokens = 10_000 if given else 4 * 18
    rules: dict[str, Any] = {"batch_tokens": 4 * 18} if given else {}
    found = speak(forward, asked, max_new_tokens=6, stop_ids={2}, choose=choose, **rules)
    assert [one.ids for one in found] == [[9] * 6] + [[2]] * 9
    # Four prompts in one row, three that join the one left, three more; then it speaks alone.
    assert [rows for rows, _ in seen] == [1] * (3 + 5)
    assert [tokens for _, tokens in seen] == [12 + 3 * 8, 3 * 8, 3 * 8, 1, 1, 1, 1, 1]


def test_a_window_is_not_joined() -> None:
    model, forward = architecture("gemma2", **ARCHITECTURES["gemma2"])
    seen = read_rows(model)

    def choose(logits_BV: torch.Tensor, answers: Any, said: Any) -> torch.Tensor:
        return torch.tensor([9 if answer == 0 else 2 for answer in answers])

    asked = [[3] * 12, *([4 + i] * 8 for i in range(5))]
    speak(forward, asked, max_new_tokens=6, stop_ids={2}, choose=choose, batch_tokens=4 * 18)
    assert [tokens for _, tokens in seen] == [12, 1, 1, 1, 1, 1, 8]


def test_an_answer_that_has_ended_takes_no_more_positions() -> None:
    """Three of four end on the way, and three join the one left, which ends before them and stays among them."""
    model, forward = architecture("gpt2", **{**ARCHITECTURES["gpt2"], "n_positions": 24})
    positions: list[int] = []
    model.get_decoder().wpe.register_forward_pre_hook(lambda _, inputs: positions.append(int(inputs[0].max())))

    def choose(logits_BV: torch.Tensor, answers: Any, said: Any) -> torch.Tensor:
        ends = [answer in (1, 2, 3) and count == 9 for answer, count in zip(answers, said, strict=True)]
        return torch.tensor([2 if one else 9 for one in ends])

    asked = [[3 + i, 4, 5, 6] for i in range(7)]
    found = speak(forward, asked, max_new_tokens=20, stop_ids={2}, choose=choose, batch_tokens=4 * 24)
    assert [len(one.ids) for one in found] == [20, 10, 10, 10, 20, 20, 20]
    assert len(positions) == 1 + 9 + 1 + 19, "two prompts' time, of which the one left shares both"
    assert max(positions) == 4 + 19 - 1, "a last token is not read"


def test_rows_that_stay_keep_no_padding_for_those_that_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    _, forward = architecture("llama")
    kept: list[int] = []

    def keep(cache: Any, rows: torch.Tensor, *, tokens: int) -> None:
        kept.append(tokens)
        keep_rows(cache, rows, tokens=tokens)

    monkeypatch.setattr(module, "keep_rows", keep)
    # The long one ends at once, the short one speaks on.
    speak(
        forward,
        [[3] * 30, [4] * 5],
        max_new_tokens=4,
        stop_ids={2},
        choose=lambda logits, answers, said: torch.tensor([2 if answer == 0 else 9 for answer in answers]),
    )
    assert kept == [5]


def test_several_answers_to_a_prompt_read_it_once_and_are_in_its_order() -> None:
    model, forward = architecture("llama")
    seen = read_rows(model)

    def choose(logits_BV: torch.Tensor, answers: Any, said: Any) -> torch.Tensor:
        return torch.tensor([20 + answer if count == 0 else 2 for answer, count in zip(answers, said, strict=True)])

    found = speak(forward, prompts(3), answers=2, max_new_tokens=4, stop_ids={2}, choose=choose)
    assert [one.ids for one in found] == [[20 + k, 2] for k in range(6)]
    assert seen[0][0] == 1 and seen[1:] == [(6, 1)]


@pytest.mark.parametrize(
    ("layers", "key_heads", "width", "dtype", "expected"),
    [
        # 2 x 30 x 3 x 64 numbers a token: 23,040 bytes in bfloat16, of which 1 GiB holds more than the most allowed.
        (30, 3, 64, torch.bfloat16, 4 * BATCH_TOKENS),
        (30, 3, 64, torch.float32, 2**30 // 46_080),
        (32, 32, 128, torch.bfloat16, BATCH_TOKENS),
    ],
)
def test_a_batch_has_as_many_tokens_as_its_cache_may_hold(
    layers: int, key_heads: int, width: int, dtype: torch.dtype, expected: int
) -> None:
    config = SimpleNamespace(
        num_attention_heads=32, num_key_value_heads=key_heads, head_dim=width, num_hidden_layers=layers
    )
    assert _answer_tokens(config, dtype) == expected
    assert _answer_tokens(SimpleNamespace(num_hidden_layers=layers, hidden_size=64), dtype) == BATCH_TOKENS


def test_bits_of_an_answer_follow_prompts_and_weights_alone() -> None:
    _, forward = architecture("llama")
    rules: dict[str, Any] = {"max_new_tokens": LIMIT, "stop_ids": {2, 5, 7, 11, 13}, "batch_tokens": 4 * 45}
    assert speak(forward, prompts(), **rules) == speak(Forward(_again()), prompts(), **rules)


def _again() -> Any:
    model, _ = architecture("llama")
    return SimpleNamespace(model=model, device=torch.device("cpu"), codec=SimpleNamespace(pad_id=0))
