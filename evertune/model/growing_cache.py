"""An attention cache with room to grow: one token more is written behind the others, which are not copied."""

# B rows, K key heads, T tokens held, C new ones, N held by another cache, D head width

from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Tokens that there is room for after each copy.
ROOM = 64


def growing_cache(config: Any) -> DynamicCache:
    """transformers' cache for a model with this configuration; layers that hold all tokens have room to grow."""
    cache = DynamicCache(config=config)
    cache.layers = [_GrowingLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache


def holds_all_tokens(cache: DynamicCache) -> bool:
    """Whether no layer holds a window or a state instead."""
    return all(isinstance(one, _GrowingLayer) for one in cache.layers)


def spread(cache: DynamicCache, place_BT: Tensor) -> None:
    """Make a batch of B rows out of one sequence: each row holds copies of the tokens at its places.

    Args:
        cache: `holds_all_tokens`, of one sequence.
    """
    for layer in cache.layers:
        held: Any = layer
        held.keys, held.values = (one[0, :, place_BT].transpose(0, 1) for one in (held.keys, held.values))


def keep_rows(cache: DynamicCache, kept_B: Tensor, *, tokens: int) -> None:
    """Keep these rows alone, and their last tokens.

    Args:
        cache: `holds_all_tokens`, as for `add_rows`.
    """
    for layer in cache.layers:
        held: Any = layer
        held.keys, held.values = (_with_room(one[kept_B, :, -tokens:]) for one in (held.keys, held.values))


def add_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Put the rows of another cache behind a cache's own; where one has fewer tokens, zeros stand before them."""
    for layer, joining in zip(cache.layers, other.layers, strict=True):
        held, new = cast(Any, layer), cast(Any, joining)
        held.keys, held.values = _below(held.keys, new.keys), _below(held.values, new.values)


class _GrowingLayer(DynamicLayer):
    """`keys` and `values` (B, K, T, D) are the beginnings of longer tensors; what selects from them copies T tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, K, T + C, D) keys and values, views of what is held: without gradients only."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = _behind(self.keys, key_states), _behind(self.values, value_states)
        else:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = _with_room(key_states), _with_room(value_states)
        return self.keys, self.values


def _behind(held_BKTD: Tensor, new_BKCD: Tensor) -> Tensor:
    B, K, T, D = held_BKTD.shape
    of_head = held_BKTD.stride(1)
    longer = T + new_BKCD.shape[2]
    if held_BKTD.stride() != (K * of_head, of_head, D, 1) or longer * D > of_head:
        held_BKTD = _with_room(held_BKTD, longer)
    grown = held_BKTD.as_strided((B, K, longer, D), held_BKTD.stride())
    grown[:, :, T:] = new_BKCD
    return grown


def _below(held_BKTD: Tensor, new_CKTD: Tensor) -> Tensor:
    B, K, T, D = held_BKTD.shape
    C, _, N, _ = new_CKTD.shape
    longest = max(T, N)
    # Zeros, not whatever is in memory: what no row sees is multiplied by a weight of 0 all the same.
    both = held_BKTD.new_zeros((B + C, K, longest + ROOM, D))[:, :, :longest]
    both[:B, :, longest - T :], both[B:, :, longest - N :] = held_BKTD, new_CKTD
    return both


def _with_room(held_BKTD: Tensor, tokens: int = 0) -> Tensor:
    B, K, T, D = held_BKTD.shape
    longer = held_BKTD.new_empty((B, K, max(T, tokens) + ROOM, D))
    longer[:, :, :T] = held_BKTD
    return longer[:, :, :T]
