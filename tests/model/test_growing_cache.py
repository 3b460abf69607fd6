"""The cache with room to grow, against transformers' own, which copies what it holds at every token."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from evertune.model.growing_cache import ROOM, add_rows, growing_cache, keep_rows

SIZES = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}


def test_it_holds_what_transformers_cache_holds_past_its_room_and_when_rows_leave() -> None:
    torch.manual_seed(0)
    ours, theirs = growing_cache(LlamaConfig(**SIZES)), DynamicCache(config=LlamaConfig(**SIZES))
    rows = 3
    for step in range(2 * ROOM):
        if step == ROOM // 2:
            for one in (ours, theirs):
                one.batch_select_indices(torch.tensor([2, 0, 0, 1]))
            rows = 4
        new = [torch.randn(rows, 2, 9 if step == 0 else 1 + step % 3, 4) for _ in range(2)]
        held = ours.update(*new, layer_idx=0)
        assert all(map(torch.equal, held, theirs.update(*new, layer_idx=0)))
        assert ours.get_seq_length() == theirs.get_seq_length()


@torch.no_grad()
def test_a_token_is_written_behind_the_others_which_stay_where_they_are() -> None:
    cache = growing_cache(LlamaConfig(**SIZES))
    places = set()
    for step in range(2 * ROOM):
        keys, values = cache.update(*torch.randn(2, 2, 2, 5 if step == 0 else 1, 4), layer_idx=0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 2


@pytest.mark.parametrize("cropped", [1, 7])
def test_cropped_tokens_are_written_over(cropped: int) -> None:
    ours, theirs = growing_cache(LlamaConfig(**SIZES)), DynamicCache(config=LlamaConfig(**SIZES))
    for one in (ours, theirs):
        torch.manual_seed(0)
        one.update(*torch.randn(2, 2, 2, 9, 4), layer_idx=0)
        one.crop(-cropped)
        one.update(*torch.randn(2, 2, 2, 2, 4), layer_idx=0)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)


def test_keys_laid_out_otherwise_are_not_taken_for_room() -> None:
    cache = growing_cache(LlamaConfig(**SIZES))
    cache.update(*torch.randn(2, 2, 2, 3, 4), layer_idx=0)
    turned = torch.randn(2, 3, 2, 4)
    cache.layers[0].keys = turned.transpose(1, 2)
    before, new = turned.clone(), torch.randn(2, 2, 1, 4)
    keys, _ = cache.update(new, new, layer_idx=0)
    assert torch.equal(turned, before)
    assert torch.equal(keys, torch.cat([before.transpose(1, 2), new], dim=2))


def test_a_layer_that_holds_a_window_stays_transformers_own() -> None:
    cache = growing_cache(MistralConfig(**SIZES, sliding_window=8))
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer


@torch.no_grad()
def test_rows_join_behind_zeros_and_others_stay_with_their_last_tokens() -> None:
    torch.manual_seed(0)
    cache, joining = growing_cache(LlamaConfig(**SIZES)), growing_cache(LlamaConfig(**SIZES))
    held, new, following = torch.randn(3, 2, 9, 4), torch.randn(2, 2, 5, 4), torch.randn(4, 2, 1, 4)
    cache.update(held, -held, layer_idx=0)
    joining.update(new, -new, layer_idx=0)
    keep_rows(cache, torch.tensor([2, 0]), tokens=3)
    assert torch.equal(cache.layers[0].keys, held[[2, 0], :, -3:])
    add_rows(cache, joining)
    expected = torch.cat([torch.cat([torch.zeros(2, 2, 2, 4), held[[2, 0], :, -3:]], dim=2), new])
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    grown, _ = cache.update(following, following, layer_idx=0)
    assert torch.equal(grown, torch.cat([expected, following], dim=2))
    assert grown.data_ptr() == keys.data_ptr(), "there is room for the next token"
    add_rows(joining, cache)
    assert joining.get_seq_length() == 6 and not joining.layers[0].keys[:2, :, :1].any()
