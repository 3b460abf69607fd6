"""Rows one behind the other in one sequence, none of which sees another: no padding goes through the model.

    rows      a b c      d e      f g h i
    packed    a b c d e f g h i             one forward pass of 9 tokens instead of 3 x 4
    position  0 1 2 0 1 0 1 2 3
    attention within each row, causal

Linear layers and norms act on tokens one by one, so only attention has to know where rows begin. The model calls it by
the name `NAME` in transformers' registry; asked without rows, that is transformers' own `sdpa`.
"""

# B rows, T tokens of all rows, t of one row, Q queries of a block, H heads, K key heads, G = H / K, D head width

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from evertune.model.tree import AtOnce, ByRuns, Paths, Tree

flash_rows: Any
try:
    from torch.nn.attention.varlen import varlen_attn as flash_rows
except ImportError:  # before torch 2.10
    flash_rows = None

NAME = "evertune_packed"
ROWS, TREE = "packed_rows", "packed_tree"
# Queries of one block: half of a long row's scores lie behind the query and are not computed. 96 to 160 are alike.
BLOCK = 128
# Probabilities of rows up to this length are kept for the backward pass; longer rows compute them twice.
KEPT_TOKENS = 1024
# What an architecture may add to the scores, and the attention here does not.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sinks", "head_mask")
_LAYERS = {"full_attention", "sliding_attention"}
# Older versions let heads share keys without being asked to.
_SHARED_HEADS = {"enable_gqa": True} if flash_rows and "enable_gqa" in signature(flash_rows).parameters else {}


def enable_packing(model: Any) -> bool:
    """Let a model read packed rows, where its architecture allows it; what else it computes stays bit for bit the same.

    Tried on short rows before it is believed.

    Returns:
        Whether `packed_hidden` can be used.
    """
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    if not model._supports_attention_backend or model._is_stateful or not layers <= _LAYERS:
        return False
    if text._attn_implementation == NAME:
        return True
    before = text._attn_implementation
    if before != "sdpa":
        return False
    was_training = model.training
    model.eval()
    model.set_attn_implementation(NAME)
    is_exact = text._attn_implementation == NAME and _reads_rows_apart(model)
    if not is_exact:
        model.set_attn_implementation(before)
    model.train(was_training)
    return is_exact


def packed_hidden(decoder: Callable[..., Any], rows: Sequence[Tensor]) -> Tensor:
    """Last hidden states (T, H) of all tokens of the rows, one row after the other.

    Args:
        decoder: of a model that `enable_packing` has accepted.
        rows: token ids (t,) int64 of each row, at least one each.
    """
    lengths = tuple(map(len, rows))
    ids_1T = torch.cat(list(rows)).unsqueeze(0)
    positions_1T = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(ids_1T.device)
    hidden_TH: Tensor = _read(decoder, ids_1T, positions_1T, {ROWS: lengths}).last_hidden_state[0]
    return hidden_TH


def read_tree(decoder: nn.Module, tree: Tree, *, device: torch.device) -> Any:
    """Outputs of the decoder for all tokens of a tree, in their order.

    Args:
        decoder: of a model that `enable_packing` has accepted.
    """
    ids_1T, positions_1T = (torch.tensor([one], device=device) for one in (tree.ids, tree.positions))
    paths: Paths = ByRuns(tree) if device.type == "cpu" else AtOnce(tree)
    return _read(decoder, ids_1T, positions_1T, {TREE: paths})


def _read(decoder: Callable[..., Any], ids_1T: Tensor, positions_1T: Tensor, kind: dict[str, Any]) -> Any:
    # A mask that is ready is taken as it is, so that none of (T, T) is made; attention here reads the rows instead.
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=ids_1T.device)
    return decoder(input_ids=ids_1T, position_ids=positions_1T, attention_mask=no_mask, use_cache=False, **kind)


@torch.no_grad()
def _reads_rows_apart(model: Any) -> bool:
    """Whether a row read behind another does not see it, and has the hidden states that it has alone."""
    embedding = model.get_input_embeddings().weight
    before, other, row = (
        torch.arange(start, start + count, device=embedding.device) % len(embedding)
        for start, count in ((1, 5), (20, 5), (3, 7))
    )
    decoder = model.get_decoder()
    alone_tH = decoder(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0].float()
    try:
        first_tH, second_tH = (packed_hidden(decoder, [one, row])[len(one) :].float() for one in (before, other))
    except (TypeError, ValueError, NotImplementedError):
        return False
    # In bfloat16 thirty layers turn the last bits of two exact ways into a tenth of such a nonsense row.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    return torch.allclose(first_tH, second_tH) and bool((first_tH - alone_tH).norm() <= tolerance * alone_tH.norm())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, T, D), key and value (B, K, T, D) -> (B, T, H, D)."""
    rows, paths = kwargs.pop(ROWS, None), kwargs.pop(TREE, None)
    if rows is None and paths is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if any(kwargs.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError(f"packed attention without {', '.join(_UNKNOWN)}")
    window = kwargs.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paths is not None:
        return paths.attend(query[0], key[0], value[0], scale, window).transpose(0, 1).unsqueeze(0), None
    if query.device.type == "cpu" and dropout == 0.0:
        return _RowAttention.apply(query[0], key[0], value[0], rows, scale, window).unsqueeze(0), None
    if dropout == 0.0 and _has_flash(query):
        return _flash(query[0], key[0], value[0], rows, scale, window).unsqueeze(0), None
    parts = [
        _sdpa(query_t, key_t, value_t, scale, window, dropout)
        for query_t, key_t, value_t in zip(*(one.split(rows, dim=2) for one in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _flash(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, rows: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """All rows in one call of the kernel, (T, H, D): a call each would cost more in launches than in products."""
    starts, longest = _bounds(rows, query_HTD.device)
    inputs = (one.transpose(0, 1).contiguous() for one in (query_HTD, key_KTD, value_KTD))
    seen = (-1 if window is None else window - 1, 0)  # keys before a query and after it
    found: Tensor = flash_rows(
        *inputs, starts, starts, longest, longest, scale=scale, window_size=seen, **_SHARED_HEADS
    )
    return found


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash kernel for rows of different lengths takes such a query."""
    return (
        flash_rows is not None
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@lru_cache(maxsize=4)
def _bounds(rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """(B + 1,) int32, where rows begin and the last one ends, and the longest row's length; alike in every layer."""
    return torch.tensor([0, *rows], device=device).cumsum(0, dtype=torch.int32), max(rows)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
    """One row through torch's own attention, by kernels that add in the same order each time."""
    t = query.shape[2]
    mask = None
    if window is not None and window < t:
        mask = torch.ones((t, t), dtype=torch.bool, device=query.device).tril().triu(1 - window)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
        )


class _RowAttention(torch.autograd.Function):
    """Causal attention within each row, by blocks of queries, as two products with a softmax between them.

    On a CPU in bfloat16 the backward pass of torch's fused attention takes four times as long as this one at 150 tokens
    and is not more exact. Key heads serve their groups of queries without being repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        rows: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        H, T, D = query_HTD.shape
        K = key_KTD.shape[0]
        out_TKGD = query_HTD.new_empty((T, K, H // K, D))
        query_KGTD = query_HTD.unflatten(0, (K, H // K))
        kept: list[Tensor] = []
        is_kept = any(ctx.needs_input_grad[:3])
        for first, length in _starts(rows):
            for block in _blocks(length, window):
                queries, keys = block.places(first)
                probability_KQk = _probabilities(query_KGTD[:, :, queries], key_KTD[:, keys], block, scale)
                found_KQD = torch.bmm(probability_KQk, value_KTD[:, keys])
                out_TKGD[queries] = found_KQD.view(K, H // K, -1, D).permute(2, 0, 1, 3)
                if is_kept and length <= KEPT_TOKENS:
                    kept.append(probability_KQk)
        ctx.save_for_backward(query_HTD, key_KTD, value_KTD, *kept)
        ctx.rows, ctx.scale, ctx.window = rows, scale, window
        return out_TKGD.view(T, H, D)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query_HTD, key_KTD, value_KTD, *kept = ctx.saved_tensors
        H, T, D = query_HTD.shape
        K = key_KTD.shape[0]
        grad_KGTD = upstream[0].view(T, K, H // K, D).permute(1, 2, 0, 3)
        query_KGTD = query_HTD.unflatten(0, (K, H // K))
        # Laid out as the projections made them, token by token.
        of_query_TKGD = query_HTD.new_empty((T, K, H // K, D))
        of_key_KTD = key_KTD.new_zeros((T, K, D)).transpose(0, 1)
        of_value_KTD = value_KTD.new_zeros((T, K, D)).transpose(0, 1)
        probabilities = iter(kept)
        for first, length in _starts(ctx.rows):
            for block in _blocks(length, ctx.window):
                queries, keys = block.places(first)
                group = query_KGTD[:, :, queries]
                if length <= KEPT_TOKENS:
                    probability_KQk = next(probabilities)
                else:
                    probability_KQk = _probabilities(group, key_KTD[:, keys], block, ctx.scale)
                grad_KQD = grad_KGTD[:, :, queries].reshape(K, -1, D)
                slope_KQk = torch.bmm(grad_KQD, value_KTD[:, keys].transpose(1, 2))
                slope_KQk = torch._softmax_backward_data(slope_KQk, probability_KQk, -1, probability_KQk.dtype)
                found_KQD = torch.bmm(slope_KQk, key_KTD[:, keys]).mul_(ctx.scale)
                of_query_TKGD[queries] = found_KQD.view(K, H // K, -1, D).permute(2, 0, 1, 3)
                of_value_KTD[:, keys] += torch.bmm(probability_KQk.transpose(1, 2), grad_KQD)
                of_key_KTD[:, keys] += torch.bmm(slope_KQk.transpose(1, 2), group.reshape(K, -1, D))
        of_query_HTD = of_query_TKGD.view(T, H, D).transpose(0, 1)
        return of_query_HTD, of_key_KTD.mul_(ctx.scale), of_value_KTD, None, None, None


class _Block:
    """Queries [first, last) of a row, and the keys [start, last) that any of them sees."""

    def __init__(self, first: int, last: int, window: int | None) -> None:
        self.first, self.last = first, last
        self.start = 0 if window is None else max(0, first - window + 1)
        self.window = window

    def places(self, row: int) -> tuple[slice, slice]:
        """Places of queries and keys where the row begins at `row`."""
        return slice(row + self.first, row + self.last), slice(row + self.start, row + self.last)

    def hide(self, scores_KGQk: Tensor) -> None:
        """Set to minus infinity what a query does not see, in place."""
        size = self.last - self.first
        scores_KGQk[..., -size:] += _later(size, scores_KGQk.dtype)
        if self.window is not None and self.last - self.start > self.window:
            seen = torch.ones(scores_KGQk.shape[-2:], dtype=torch.bool).triu(self.first - self.start - self.window + 1)
            scores_KGQk.masked_fill_(~seen, -torch.inf)


def _probabilities(group_KGQD: Tensor, key_KkD: Tensor, block: _Block, scale: float) -> Tensor:
    K, G, Q, D = group_KGQD.shape
    query_KQD = group_KGQD.reshape(K, G * Q, D)
    unused = query_KQD.new_empty((1, 1, 1))
    scores_KQk = torch.baddbmm(unused, query_KQD, key_KkD.transpose(1, 2), beta=0, alpha=scale)
    block.hide(scores_KQk.view(K, G, Q, -1))
    return scores_KQk.softmax(dim=-1)


@lru_cache(maxsize=2 * BLOCK)
def _later(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size): minus infinity at keys that come after the query, 0 elsewhere."""
    return torch.full((size, size), -torch.inf, dtype=dtype).triu(1)


@lru_cache(maxsize=4096)
def _blocks(length: int, window: int | None) -> tuple[_Block, ...]:
    return tuple(_Block(first, min(first + BLOCK, length), window) for first in range(0, length, BLOCK))


def _starts(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(first token, tokens) of each row."""
    found, first = [], 0
    for length in rows:
        found.append((first, length))
        first += length
    return found


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
