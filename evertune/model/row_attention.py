"""Attention of packed rows on a CPU: causal along each row, whether rows lie apart or share what they begin with."""

# T tokens that are read, Q queries of a block, k keys they see, H heads, K key heads, G = H / K, D head width

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from evertune.model.tree import Tree

# Queries of one block: half of a long row's scores lie behind the query and are not computed. 96 to 160 are alike.
BLOCK = 128
# Probabilities of rows up to this length are kept for the backward pass; longer rows compute them twice.
KEPT_TOKENS = 1024


@dataclass(frozen=True)
class _Span:
    """Tokens [first, last) that are read one behind the other; `before` has the places of those that lead to them."""

    first: int
    last: int
    before: tuple[slice, ...] = ()

    @property
    def depth(self) -> int:
        return sum(one.stop - one.start for one in self.before)

    def path(self, start: int, stop: int) -> tuple[slice, ...]:
        """Places of the tokens [start, stop) on the way from the root to the span's end, joined where they meet."""
        found: list[slice] = []
        at = 0
        for one in (*self.before, slice(self.first, self.last)):
            low, high = one.start + max(start - at, 0), one.start + min(stop - at, one.stop - one.start)
            at += one.stop - one.start
            if low >= high:
                continue
            if found and found[-1].stop == low:
                low = found.pop().start
            found.append(slice(low, high))
        return tuple(found)


class Rows:
    """Where rows lie in what is read: one behind the other, or along the paths of a tree."""

    def __init__(self, spans: Sequence[_Span]) -> None:
        self._spans = spans
        self._blocks: dict[int | None, list[_Block]] = {}

    @classmethod
    def apart(cls, lengths: Sequence[int]) -> "Rows":
        ends = list(accumulate(lengths))
        return cls([_Span(last - length, last) for last, length in zip(ends, lengths, strict=True)])

    @classmethod
    def along(cls, tree: Tree) -> "Rows":
        return cls(
            [
                _Span(one.first, one.last, tuple(slice(each.first, each.last) for each in tree.ancestors(one)))
                for one in tree.segments
            ]
        )

    @property
    def is_shared(self) -> bool:
        """Whether several rows go through some tokens."""
        return any(one.before for one in self._spans)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of rows that lie apart."""
        assert not self.is_shared, "rows that share tokens have no lengths of their own"
        return tuple(one.last - one.first for one in self._spans)

    def blocks(self, window: int | None) -> "list[_Block]":
        """What attends in one go; the same for every layer with this window."""
        if window not in self._blocks:
            self._blocks[window] = [
                _Block(one, first, min(first + BLOCK, one.last), window)
                for one in self._spans
                for first in range(one.first, one.last, BLOCK)
            ]
        return self._blocks[window]


class _Block:
    """Queries of a span, and the keys on their way that any of them sees.

    Attributes:
        queries: their places.
        is_kept: whether their probabilities are kept for the backward pass.
    """

    def __init__(self, span: _Span, first: int, last: int, window: int | None) -> None:
        self.queries = slice(first, last)
        depth = span.depth
        before, end = depth + first - span.first, depth + last - span.first
        self.is_kept = depth + span.last - span.first <= KEPT_TOKENS
        self._window = window
        # Keys that the first query does not see any more are left out.
        self._start = 0 if window is None else max(0, before - window + 1)
        self._before, self._keys = before, span.path(self._start, end)

    def seen(self, of_KTD: Tensor) -> Tensor:
        """(K, k, D): keys or values that the queries see."""
        parts = [of_KTD[:, one] for one in self._keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, to_KTD: Tensor, part_KkD: Tensor) -> None:
        """Add the gradient of what `seen` returns, in place."""
        first = 0
        for one in self._keys:
            size = one.stop - one.start
            to_KTD[:, one] += part_KkD[:, first : first + size]
            first += size

    def hide(self, scores_KGQk: Tensor) -> None:
        """Set to minus infinity what a query does not see, in place."""
        size = scores_KGQk.shape[-2]
        scores_KGQk[..., -size:] += _later(size, scores_KGQk.dtype)
        if self._window is not None and scores_KGQk.shape[-1] > self._window:
            ahead = self._before - self._start - self._window + 1
            seen = torch.ones(scores_KGQk.shape[-2:], dtype=torch.bool).triu(ahead)
            scores_KGQk.masked_fill_(~seen, -torch.inf)


class RowAttention(torch.autograd.Function):
    """Causal attention along each row, by blocks of queries, as two products with a softmax between them.

    On a CPU in bfloat16 the backward pass of torch's fused attention takes four times as long as this one at 150 tokens
    and is not more exact. Key heads serve their groups of queries without being repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        rows: Rows,
        scale: float,
        window: int | None,
    ) -> Tensor:
        H, T, D = query_HTD.shape
        K = key_KTD.shape[0]
        out_TKGD = query_HTD.new_empty((T, K, H // K, D))
        query_KGTD = query_HTD.unflatten(0, (K, H // K))
        kept: list[Tensor] = []
        is_kept = any(ctx.needs_input_grad[:3])
        for block in rows.blocks(window):
            probability_KQk = _probabilities(query_KGTD[:, :, block.queries], block.seen(key_KTD), block, scale)
            found_KQD = torch.bmm(probability_KQk, block.seen(value_KTD))
            out_TKGD[block.queries] = found_KQD.view(K, H // K, -1, D).permute(2, 0, 1, 3)
            if is_kept and block.is_kept:
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
        # Laid out as the projections made them, token by token; sums over many rows in more than bfloat16.
        of_query_TKGD = query_HTD.new_empty((T, K, H // K, D))
        wide = torch.promote_types(key_KTD.dtype, torch.float32) if ctx.rows.is_shared else key_KTD.dtype
        of_key_KTD = key_KTD.new_zeros((T, K, D), dtype=wide).transpose(0, 1)
        of_value_KTD = value_KTD.new_zeros((T, K, D), dtype=wide).transpose(0, 1)
        probabilities = iter(kept)
        for block in ctx.rows.blocks(ctx.window):
            group, key_KkD = query_KGTD[:, :, block.queries], block.seen(key_KTD)
            if block.is_kept:
                probability_KQk = next(probabilities)
            else:
                probability_KQk = _probabilities(group, key_KkD, block, ctx.scale)
            grad_KQD = grad_KGTD[:, :, block.queries].reshape(K, -1, D)
            slope_KQk = torch.bmm(grad_KQD, block.seen(value_KTD).transpose(1, 2))
            slope_KQk = torch._softmax_backward_data(slope_KQk, probability_KQk, -1, probability_KQk.dtype)
            found_KQD = torch.bmm(slope_KQk, key_KkD).mul_(ctx.scale)
            of_query_TKGD[block.queries] = found_KQD.view(K, H // K, -1, D).permute(2, 0, 1, 3)
            block.add(of_value_KTD, torch.bmm(probability_KQk.transpose(1, 2), grad_KQD))
            block.add(of_key_KTD, torch.bmm(slope_KQk.transpose(1, 2), group.reshape(K, -1, D)))
        of_query_HTD = of_query_TKGD.view(T, H, D).transpose(0, 1)
        of_key_KTD, of_value_KTD = of_key_KTD.mul_(ctx.scale).to(key_KTD.dtype), of_value_KTD.to(value_KTD.dtype)
        return of_query_HTD, of_key_KTD, of_value_KTD, None, None, None


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
