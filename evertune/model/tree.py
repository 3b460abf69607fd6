"""Rows that begin alike as one tree of tokens, each of which is read once: contexts, then what may follow them.

    a b c d x y        a b c d ─┬─ x y          segments  a b c d | x y | z | e f g
    a b c d z                   └─ z            parents      -       0    0     -
    e f g              e f g

A token sees the tokens on its way from the root, as it would in its own row, so its hidden state is the same.
"""

# T tokens of the tree, H heads, K key heads, D head width, Q queries of a run, k keys they see

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# A branch of its own costs a call of attention in every layer; fewer shared tokens than this are read again instead.
LEAST_SHARED = 8
# Short siblings attend in one call, which computes what they do not see of each other for nothing.
RUN_TOKENS = 64


@dataclass(frozen=True)
class Segment:
    """Tokens that stand together: `parent` is the index of the segment before them, `depth` how many tokens lead up to
    them, `first` their place in the tree."""

    ids: tuple[int, ...]
    parent: int | None
    depth: int
    first: int

    @property
    def last(self) -> int:
        return self.first + len(self.ids)


@dataclass
class Tree:
    """Segments in the order they are read, and of each row the place in the tree of every token."""

    segments: list[Segment] = field(default_factory=list)
    places: dict[int, list[int]] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        return [one for segment in self.segments for one in segment.ids]

    @property
    def positions(self) -> list[int]:
        """How many tokens each token has before it in its rows."""
        return [segment.depth + i for segment in self.segments for i in range(len(segment.ids))]

    def runs(self) -> "list[Run]":
        """What attends in one call: a segment, or several short leaves with one parent that follow each other."""
        branching = {one.parent for one in self.segments}
        groups: list[list[Segment]] = []
        joins = False  # whether the last group is of leaves that have a parent
        for i, one in enumerate(self.segments):
            is_leaf = one.parent is not None and i not in branching
            fits = joins and groups[-1][0].parent == one.parent and _tokens(groups[-1]) + len(one.ids) <= RUN_TOKENS
            if fits and is_leaf:
                groups[-1].append(one)
            else:
                groups.append([one])
                joins = is_leaf
        return [Run(self.ancestors(group[0]), tuple(group)) for group in groups]

    def ancestors(self, segment: Segment) -> tuple[Segment, ...]:
        """The segments that lead up to one, from the root."""
        found: list[Segment] = []
        while segment.parent is not None:
            segment = self.segments[segment.parent]
            found.append(segment)
        return tuple(reversed(found))


class Run:
    """Queries of segments with one parent, with the keys that they see."""

    def __init__(self, ancestors: Sequence[Segment], segments: Sequence[Segment]) -> None:
        self.queries = slice(segments[0].first, segments[-1].last)
        self._ancestors, self._segments = ancestors, segments
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(self, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, window: int | None) -> Tensor:
        """(H, Q, D), on a CPU."""
        query_HQD = query_HTD[:, self.queries]
        key_KkD, value_KkD = (
            torch.cat([one[:, each.first : each.last] for each in self._ancestors] + [one[:, self.queries]], dim=1)
            if self._ancestors
            else one[:, self.queries]
            for one in (key_KTD, value_KTD)
        )
        is_plain = not self._ancestors and len(self._segments) == 1
        is_causal = is_plain and (window is None or window >= query_HQD.shape[1])
        found_1HQD = F.scaled_dot_product_attention(
            query_HQD.unsqueeze(0),
            key_KkD.unsqueeze(0),
            value_KkD.unsqueeze(0),
            attn_mask=None if is_causal else self._mask(window, query_HTD.dtype),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
        )
        return found_1HQD[0]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(Q, k): 0 where a query sees a key, minus infinity elsewhere; the same for every layer with this window.
        (Truth values would be turned into these numbers by torch in every layer.)"""
        key = (window, dtype)
        if key not in self._masks:
            own_Q = torch.cat([torch.arange(one.depth, one.depth + len(one.ids)) for one in self._segments])
            branch_Q = torch.cat([torch.full((len(one.ids),), i) for i, one in enumerate(self._segments)])
            before = sum(len(one.ids) for one in self._ancestors)
            place_k = torch.cat([torch.arange(before), own_Q])
            branch_k = torch.cat([torch.full((before,), -1), branch_Q])
            ahead_Qk = own_Q.unsqueeze(1) - place_k
            seen_Qk = (ahead_Qk >= 0) & ((branch_k == -1) | (branch_k == branch_Q.unsqueeze(1)))
            seen_Qk = seen_Qk if window is None else seen_Qk & (ahead_Qk < window)
            self._masks[key] = torch.where(seen_Qk, 0.0, -torch.inf).to(dtype)
        return self._masks[key]


class Paths(Protocol):
    """Attention of a tree's tokens, in every layer the same."""

    def attend(self, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, window: int | None) -> Tensor:
        """(H, T, D): every token's attention to the tokens on its way from the root."""


class ByRuns:
    """A call for each run: little is computed that nobody sees."""

    def __init__(self, tree: Tree) -> None:
        self._runs = tree.runs()

    def attend(self, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, window: int | None) -> Tensor:
        return torch.cat([one.attend(query_HTD, key_KTD, value_KTD, scale, window) for one in self._runs], dim=1)


class AtOnce:
    """One call for the whole tree: for a GPU, where a call costs more than most of what it computes for nothing."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, window: int | None) -> Tensor:
        groups = len(query_HTD) // len(key_KTD)
        # The fused kernel that takes a mask does not let heads share keys.
        key_1HTD, value_1HTD = (one.repeat_interleave(groups, dim=0).unsqueeze(0) for one in (key_KTD, value_KTD))
        mask_TT = self._mask(window, query_HTD.device)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            found_1HTD = F.scaled_dot_product_attention(
                query_HTD.unsqueeze(0), key_1HTD, value_1HTD, attn_mask=mask_TT, scale=scale
            )
        return found_1HTD[0]

    def _mask(self, window: int | None, device: torch.device) -> Tensor:
        """(T, T): True where a token sees another; the same for every layer with this window."""
        if window not in self._masks:
            segments, tokens = self._tree.segments, len(self._tree.ids)
            seen_TT = torch.zeros((tokens, tokens), dtype=torch.bool)
            for one in segments:
                own = slice(one.first, one.last)
                seen_TT[own, own] = torch.ones((len(one.ids), len(one.ids)), dtype=torch.bool).tril()
                parent = one.parent
                while parent is not None:
                    seen_TT[own, segments[parent].first : segments[parent].last] = True
                    parent = segments[parent].parent
            if window is not None:
                position_T = torch.tensor(self._tree.positions)
                seen_TT &= position_T.unsqueeze(1) - position_T < window
            self._masks[window] = seen_TT.to(device)
        return self._masks[window]


def grow(rows: Sequence[Sequence[int]], *, budget: int) -> list[Tree]:
    """Trees of all rows, each of about `budget` tokens; a row alone above it is a tree of its own.

    Rows are taken in the order of their tokens, so that those that begin alike come together. What trees there are
    depends on the rows alone.

    Args:
        rows: token ids of each row, none empty.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    packs: list[list[int]] = []
    size = 0
    for i in order:
        added = len(rows[i]) - (_alike(rows[packs[-1][-1]], rows[i]) if packs else 0)
        if not packs or size + added > budget:
            packs.append([])
            size, added = 0, len(rows[i])
        packs[-1].append(i)
        size += added
    return [_grow_one(rows, pack) for pack in packs]


def _grow_one(rows: Sequence[Sequence[int]], order: Sequence[int]) -> Tree:
    tree = Tree(places={i: [] for i in order})
    alike = [_alike(rows[one], rows[other]) for one, other in pairwise(order)]

    def add(ids: Sequence[int], parent: int | None, depth: int, whose: Sequence[int]) -> int:
        first = tree.segments[-1].last if tree.segments else 0
        tree.segments.append(Segment(tuple(ids), parent, depth, first))
        for i in whose:
            tree.places[i] += range(first, first + len(ids))
        return len(tree.segments) - 1

    # A stack instead of recursion: (range in the order, how far all its rows have been read, their last segment).
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)]
    while waiting:
        begin, end, depth, parent = waiting.pop()
        cuts = [begin, *(j for j in range(begin + 1, end) if alike[j - 1] < depth + LEAST_SHARED), end]
        branches = []
        for start, stop in pairwise(cuts):
            if stop - start > 1:
                branches.append((start, stop))
            elif rest := rows[order[start]][depth:]:
                add(rest, parent, depth, [order[start]])
        # Leaves are added above, so that short ones lie together; what branches on follows from the left.
        if len(cuts) > 2:
            waiting += [(start, stop, depth, parent) for start, stop in reversed(branches)]
        elif branches:
            common = min(alike[begin : end - 1])
            segment = add(rows[order[begin]][depth:common], parent, depth, order[begin:end])
            waiting.append((begin, end, common, segment))
    return tree


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two rows share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _tokens(segments: Sequence[Segment]) -> int:
    return sum(len(one.ids) for one in segments)
