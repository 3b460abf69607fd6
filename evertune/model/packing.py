"""Rows one behind the other in one sequence, none of which sees another: no padding goes through the model.

    rows      a b c      d e      f g h i
    packed    a b c d e f g h i             one forward pass of 9 tokens instead of 3 x 4
    position  0 1 2 0 1 0 1 2 3
    attention within each row, causal

What rows have in common at their start (a system prompt, the prompt of two answers) need not be read twice:

    rows      s t a b      s t c
    shared    s t a b c                     a token sees the tokens on its way from the start of its row
    position  0 1 2 3 2

Linear layers and norms act on tokens one by one, so only attention has to know where rows begin. The model calls it by
the name `NAME` in transformers' registry; asked without rows, that is transformers' own `sdpa`. (Sharing the prompt of
a preference pair: arXiv:2410.20305.)
"""

# B rows, T tokens that are read, t of one row, H heads, K key heads, D head width

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from evertune.model.mode import evaluating
from evertune.model.precision import in_float32
from evertune.model.row_attention import RowAttention, Rows
from evertune.model.tree import AtOnce, ByRuns, Paths, Tree, grow

flash_rows: Any
try:
    from torch.nn.attention.varlen import varlen_attn as flash_rows
except ImportError:  # before torch 2.10
    flash_rows = None

NAME = "evertune_packed"
# Behind what rows share torch's attention takes a mask, and computes what it hides: for longer rows that is no gain.
FUSED_TOKENS = 512
# Of which the tokens of a forward pass are a multiple on a GPU, at least.
FILLED_TOKENS = 64
ROWS, TREE, STEP = "packed_rows", "packed_tree", "next_token"
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
    model.set_attn_implementation(NAME)
    with evaluating(model):
        is_exact = text._attn_implementation == NAME and _reads_rows_apart(model)
    if not is_exact:
        model.set_attn_implementation(before)
    return is_exact


def packed_hidden(
    decoder: Callable[..., Any],
    rows: Sequence[Tensor],
    *,
    asked: Tensor | None = None,
    shares: bool = False,
    forward_only: bool = False,
) -> Tensor:
    """Last hidden states (T, H) of all tokens of the rows, one row after the other.

    Args:
        decoder: of a model that `enable_packing` has accepted.
        rows: token ids (t,) int64 of each row, at least one each.
        asked: (T,) bool, where not all tokens are asked for: of which.
        shares: read once what several rows begin with. On a CPU, and of a model that draws nothing at random: a token
            that is read once has one dropout mask.
        forward_only: where rows may share, and none is longer than `FUSED_TOKENS`, by torch's own attention, which is
            the faster one forward and the slower one backward; the last bits are others.
    """
    device = rows[0].device
    forward_only = forward_only and max(map(len, rows)) <= FUSED_TOKENS
    grows = shares and (len(rows) > 1 or forward_only)
    tree = grow([row.tolist() for row in rows], budget=sys.maxsize)[0] if grows else None
    kind: dict[str, Any]
    if tree is None or (not forward_only and len(tree.ids) == sum(map(len, rows))):
        read = [*rows, *_filler(rows, device)]
        kind = {ROWS: Rows.apart([len(row) for row in read])}
        ids_1T = torch.cat(read).unsqueeze(0)
        positions_1T = torch.cat([torch.arange(len(row)) for row in read]).unsqueeze(0).to(device)
        places = None if asked is None else asked.nonzero().squeeze(1)
        if places is None and len(read) > len(rows):
            places = torch.arange(sum(map(len, rows)), device=device)
    else:
        kind = {TREE: ByRuns(tree)} if forward_only else {ROWS: Rows.along(tree)}
        ids_1T, positions_1T = (torch.tensor([one], device=device) for one in (tree.ids, tree.positions))
        places = torch.tensor([place for i in range(len(rows)) for place in tree.places[i]], device=device)
        places = places if asked is None else places[asked]
    hidden_TH: Tensor = _read(decoder, ids_1T, positions_1T, {**kind, "use_cache": False}).last_hidden_state[0]
    return hidden_TH if places is None else hidden_TH[places]


def filled(tokens: int) -> int:
    """The number of tokens, rounded up to one of the 32 or fewer that are used between two powers of two."""
    multiple = max(FILLED_TOKENS, 1 << max(0, tokens.bit_length() - 6))
    return tokens + -tokens % multiple


def filling(lengths: Sequence[int]) -> list[int]:
    """Lengths of the rows that fill up rows of these lengths, none longer than the longest of them."""
    tokens, longest = sum(lengths), max(lengths)
    whole, rest = divmod(filled(tokens) - tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _filler(rows: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """On a GPU further rows, none longer than the longest, which nobody asks for: matrix products then have one of few
    shapes. For a new shape the library chooses a kernel, which takes longer than the product."""
    more = filling([len(row) for row in rows]) if device.type == "cuda" else []
    return [torch.zeros(count, dtype=torch.int64, device=device) for count in more]


def draws_at_random(model: Any) -> bool:
    """Whether a forward pass in training has dropout or noise: by the model's config, or in a module such as an
    adapter's."""
    settings = model.config.get_text_config().to_dict()
    chances = [one for key, one in settings.items() if "drop" in key or "jitter" in key]
    chances += [one.p for one in model.modules() if isinstance(one, nn.Dropout)]
    return any(isinstance(one, int | float) and one > 0 for one in chances)


def read_tree(
    decoder: nn.Module, tree: Tree, *, device: torch.device, cache: Mapping[str, DynamicCache] | None = None
) -> Any:
    """Outputs of the decoder for all tokens of a tree, in their order.

    Args:
        decoder: of a model that `enable_packing` has accepted.
        cache: by the decoder's name for it, where keys and values are kept, behind those of trees read before.
    """
    ids_1T, positions_1T = (torch.tensor([one], device=device) for one in (tree.ids, tree.positions))
    paths: Paths = ByRuns(tree) if device.type == "cpu" else AtOnce(tree)
    return _read(decoder, ids_1T, positions_1T, {TREE: paths, **(cache or {}), "use_cache": cache is not None})


def for_next_token(mask_BT: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with which the decoder of a model that `enable_packing` has accepted reads one more token on a CPU.

    transformers lays each group of heads out as queries of one, which torch's kernel takes a fifth longer for, and a
    mask of truth values is turned into numbers in every layer.

    Args:
        mask_BT: 1 at the tokens that a row sees, of those in the cache and the new one. No layer has a window.
    """
    sees_B11T = mask_BT[:, None, None].bool()
    return {"attention_mask": torch.where(sees_B11T, 0.0, -torch.inf).to(dtype), STEP: True}


def _read(decoder: Callable[..., Any], ids_1T: Tensor, positions_1T: Tensor, kind: dict[str, Any]) -> Any:
    # A mask that is ready is taken as it is, so that none of (T, T) is made; attention here reads the rows instead.
    no_mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=ids_1T.device)
    return decoder(input_ids=ids_1T, position_ids=positions_1T, attention_mask=no_mask, **kind)


@torch.no_grad()
def _reads_rows_apart(model: Any) -> bool:
    """Whether rows read one behind the other have the hidden states that they have alone.

    Asked in float32: in bfloat16 two exact ways through thirty layers differ by a quarter on such nonsense rows, and by
    more than the states themselves where the model was trained on something else.
    """
    embedding = model.get_input_embeddings().weight
    before, other, row = (
        torch.arange(start, start + count, device=embedding.device) % len(embedding)
        for start, count in ((1, 5), (20, 4), (3, 7))
    )
    decoder = model.get_decoder()
    try:
        packed_hidden(decoder, [before, row])  # by the kernels of the model's own dtype, which may be others
        with in_float32(model):
            alone_tH = decoder(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0]
            packed_tH = packed_hidden(decoder, [before, row, other, row])
    except (TypeError, ValueError, NotImplementedError):
        return False
    found = (packed_tH[len(before) :][: len(row)], packed_tH[-len(row) :])
    return all(bool((one - alone_tH).norm() <= 1e-3 * alone_tH.norm()) for one in found)


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
    rows, paths, is_step = kwargs.pop(ROWS, None), kwargs.pop(TREE, None), kwargs.pop(STEP, False)
    if rows is None and paths is None and not is_step:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if any(kwargs.get(name) is not None for name in _UNKNOWN):
        raise NotImplementedError(f"packed attention without {', '.join(_UNKNOWN)}")
    if is_step:
        return _step(query, key, value, attention_mask, scaling), None
    window = kwargs.get("sliding_window")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if paths is not None:
        own = slice(-query.shape[2], None)  # a cache may hold other trees before this one
        found = paths.attend(query.squeeze(0), key[0, :, own], value[0, :, own], scale, window)
        return found.transpose(0, 1).unsqueeze(0), None
    # (Indexing would form a gradient of zeros to write this one into.)
    query_HTD, key_KTD, value_KTD = (one.squeeze(0) for one in (query, key, value))
    if query.device.type == "cpu" and dropout == 0.0:
        return RowAttention.apply(query_HTD, key_KTD, value_KTD, rows, scale, window).unsqueeze(0), None
    if dropout == 0.0 and _has_flash(query):
        return _flash(query_HTD, key_KTD, value_KTD, rows.lengths, scale, window).unsqueeze(0), None
    parts = [
        _sdpa(query_t, key_t, value_t, scale, window, dropout)
        for query_t, key_t, value_t in zip(
            *(one.split(rows.lengths, dim=2) for one in (query, key, value)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return found.transpose(1, 2)


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
    if found.grad_fn is not None and torch.is_deterministic_algorithms_warn_only_enabled():
        # Where torch would only warn, it adds gradients in any order.
        found.grad_fn.register_prehook(lambda upstream: torch.use_deterministic_algorithms(True))
        found.grad_fn.register_hook(lambda *_: torch.use_deterministic_algorithms(True, warn_only=True))
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


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
