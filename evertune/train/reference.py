"""The anchor's reference: the policy with its trained adapter switched off, a second frozen model, or stored outputs.

Divergences are computed on the policy's own chunk of logits; a full matrix of the reference's logits is never made.
"""

# M anchored positions, n positions of a chunk, m anchored ones of these, H hidden, V vocabulary, K kept words,
# L = K + 1 buckets

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from evertune.data.encode import EncodedRow
from evertune.errors import CheckpointError
from evertune.model.adapter import without_new
from evertune.model.checkpoint import Checkpoint
from evertune.model.mode import evaluating
from evertune.model.open import OpenModel, open_model
from evertune.model.packing import enable_packing
from evertune.train.batch import Decoder, collate, counted_hidden
from evertune.train.cache import ReferenceCache
from evertune.train.head import Head, split_model, target_log_probabilities
from evertune.train.losses import bucket, forward_kl, reverse_kl, top_words
from evertune.train.penalty import PositionValues, Slope
from evertune.train.sharding import ShardedDecoder

Direction = Literal["forward", "reverse"]
TOP_WORDS = 64
# oneDNN makes a kernel for each shape and keeps a thousand of them, a third of a MiB each. Rows of all lengths, read
# one at a time, would fill that: they are padded to a multiple of this.
ALONE_MULTIPLE = 64
# Of a tail's mass: below, it would vanish in float32, and its logarithm with it.
SMALLEST = 1e-37


class Reference(Protocol):
    """Where the reference's outputs come from."""

    def values(self, rows: Sequence[EncodedRow], direction: Direction) -> PositionValues:
        """Divergences from the reference at the counted positions of the rows."""


class LiveReference:
    """A frozen model that runs beside the policy, on the anchored rows only.

    Args:
        model, decoder, head: the reference's parts; the policy's own when `frozen` makes them compute the reference.
        frozen: a context in which the model computes the reference's outputs.
        is_packed: whether it reads rows packed.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        head: Head,
        *,
        frozen: Callable[[], AbstractContextManager[None]],
        pad_id: int,
        is_packed: bool = False,
    ) -> None:
        self.head = head
        self.forwards = 0
        self.positions = _positions(model)
        self._model, self._decoder = model, decoder
        self._frozen, self._pad_id, self._is_packed = frozen, pad_id, is_packed

    @torch.no_grad()
    def hidden(self, rows: Sequence[EncodedRow], *, multiple: int = 1, fast: bool = False) -> Tensor:
        """Last hidden states (M, H) at the counted positions, without dropout; rows are padded to a multiple.

        Args:
            fast: by attention that leaves other last bits than the policy's own: the divergence from a policy of the
                same weights is then what rounding leaves instead of 0, as from stored outputs.
        """
        batch = collate(rows, pad_id=self._pad_id, device=self.head.weight_VH.device, multiple=multiple)
        shares = batch.ids_BT.device.type == "cpu"
        with evaluating(self._model), self._frozen():
            hidden_MH = counted_hidden(
                self._decoder,
                batch,
                is_packed=self._is_packed,
                shares=shares,
                forward_only=fast and shares,
                multiple=multiple,
            )
        self.forwards += 1
        return hidden_MH

    def values(self, rows: Sequence[EncodedRow], direction: Direction) -> PositionValues:
        return full_divergence(self.hidden(rows, fast=True), self.head, direction)


def _positions(model: Any) -> float:
    """How many tokens a model can read, all with the rotation of a short text."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    known = (getattr(text, "max_position_embeddings", None), rope.get("original_max_position_embeddings"))
    return min((one for one in known if one), default=float("inf"))


@dataclass(frozen=True)
class CachedHidden:
    """The exact reference from stored hidden states and its frozen head."""

    cache: ReferenceCache
    head: Head

    def values(self, rows: Sequence[EncodedRow], direction: Direction) -> PositionValues:
        stored = [self.cache.read(row)["hidden"] for row in rows]
        return full_divergence(torch.cat(stored).to(self.head.weight_VH.device), self.head, direction)


@dataclass(frozen=True)
class CachedTop:
    """A lower bound of the divergence from the stored most likely words and their tail."""

    cache: ReferenceCache
    device: torch.device

    def values(self, rows: Sequence[EncodedRow], direction: Direction) -> PositionValues:
        stored = [self.cache.read(row) for row in rows]
        ids_MK = torch.cat([one["ids"] for one in stored]).to(self.device).long()
        # Stored in half precision: normalised again, so that equal distributions have divergence 0.
        ref_logp_ML = torch.cat([one["logp"] for one in stored]).to(self.device).float().log_softmax(dim=-1)

        return ForwardTop(ids_MK, ref_logp_ML) if direction == "forward" else _reverse_top(ids_MK, ref_logp_ML)


@dataclass(frozen=True)
class ForwardTop:
    """KL(reference || policy) over kept words and their tail, with its slope.

    With r the reference's probabilities, p the policy's, R and P those of the tail: at a kept word p - r, at another
    p (1 - R / P).
    """

    ids_MK: Tensor
    ref_logp_ML: Tensor
    is_narrow: bool = field(default=True, init=False)

    def __call__(self, logp_mV: Tensor, chosen: slice) -> Tensor:
        return forward_kl(bucket(logp_mV, self.ids_MK[chosen]), self.ref_logp_ML[chosen])

    def begin(self, logp_nV: Tensor, rows_m: Tensor, chosen: slice) -> Callable[[Tensor], Slope]:
        words_mK, ref_logp_mL = self.ids_MK[chosen], self.ref_logp_ML[chosen]
        places = (rows_m.unsqueeze(1), words_mK)
        kept_logp_mK = logp_nV[places]

        def finish(p_nV: Tensor) -> Slope:
            kept_mK = p_nV[places]
            # Summed over its own words: one minus the mass of the kept ones would cancel where these hold nearly all.
            p_nV[places] = 0.0
            tail_m = p_nV.sum(dim=-1)[rows_m].clamp(min=SMALLEST)
            p_nV[places] = kept_mK
            policy_mL = torch.cat([kept_logp_mK, tail_m.log().unsqueeze(1)], dim=1)
            ref_mL = ref_logp_mL.exp()
            ratio_m = ref_mL[:, -1] / tail_m
            at_words_mK = kept_mK * ratio_m.unsqueeze(1) - ref_mL[:, :-1]
            return Slope(forward_kl(policy_mL, ref_logp_mL), 1.0 - ratio_m, words_mK, at_words_mK)

        return finish


def _reverse_top(ids_MK: Tensor, ref_logp_ML: Tensor) -> PositionValues:
    return lambda logp_mV, chosen: reverse_kl(bucket(logp_mV, ids_MK[chosen]), ref_logp_ML[chosen])


@dataclass(frozen=True)
class ForwardFull:
    """KL(reference || policy) over the whole vocabulary, from the reference's hidden states; its slope is p - r."""

    hidden_MH: Tensor
    head: Head
    is_narrow: bool = field(default=False, init=False)

    def __call__(self, logp_mV: Tensor, chosen: slice) -> Tensor:
        with torch.no_grad():
            ref_logp_mV = self.head.log_probabilities(self.hidden_MH[chosen])
        return forward_kl(logp_mV, ref_logp_mV)

    def begin(self, logp_nV: Tensor, rows_m: Tensor, chosen: slice) -> Callable[[Tensor], Slope]:
        ref_logp_mV = self.head.log_probabilities(self.hidden_MH[chosen])
        ref_mV = ref_logp_mV.exp()
        # In place: a further matrix as large as the logits takes as long as what is computed.
        further_mV = ref_logp_mV.sub_(logp_nV if len(rows_m) == len(logp_nV) else logp_nV[rows_m])
        values_m = further_mV.mul_(ref_mV).sum(dim=-1)
        slope = Slope(values_m, torch.ones_like(values_m), minus_mV=ref_mV)
        return lambda p_nV: slope


def full_divergence(hidden_MH: Tensor, head: Head, direction: Direction) -> PositionValues:
    """Exact divergences over the whole vocabulary from the reference's hidden states."""
    if direction == "forward":
        return ForwardFull(hidden_MH, head)

    def values(logp_mV: Tensor, chosen: slice) -> Tensor:
        with torch.no_grad():
            ref_logp_mV = head.log_probabilities(hidden_MH[chosen])
        return reverse_kl(logp_mV, ref_logp_mV)

    return values


def reference_outputs(reference: LiveReference, kind: str) -> Callable[[EncodedRow], dict[str, Tensor]]:
    """What the cache stores of a row, as a function of the row alone: rows are run one at a time, so that the stored
    bits do not depend on the company a row was in.

    `target`: float32 log-probabilities (M,) of the row's own next tokens, 4 bytes a position. `hidden`: (M, H) in the
    model's dtype. `top64`: ids (M, K) and float16 log-probabilities (M, L); 258 bytes a
    position up to 65,536 words, 386 above.
    """

    def alone(row: EncodedRow) -> Tensor:
        fits = len(row.ids) + -len(row.ids) % ALONE_MULTIPLE <= reference.positions
        return reference.hidden([row], multiple=ALONE_MULTIPLE if fits else 1)

    def hidden(row: EncodedRow) -> dict[str, Tensor]:
        return {"hidden": alone(row).cpu()}

    @torch.no_grad()
    def top(row: EncodedRow) -> dict[str, Tensor]:
        vocabulary = reference.head.weight_VH.shape[0]
        narrow = torch.uint16 if vocabulary <= 1 << 16 else torch.int32
        parts = [
            top_words(reference.head.log_probabilities(chunk), min(TOP_WORDS, vocabulary - 1))
            for chunk in alone(row).split(reference.head.chunk_positions())
        ]
        ids, logp = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        return {"ids": ids.to(narrow), "logp": logp.to(torch.float16)}

    @torch.no_grad()
    def target(row: EncodedRow) -> dict[str, Tensor]:
        targets_M = torch.from_numpy(row.ids[1:][row.counted[1:]]).long().to(reference.head.weight_VH.device)
        return {"logp": target_log_probabilities(alone(row), targets_M, head=reference.head).cpu()}

    return {"hidden": hidden, "top64": top, "target": target}[kind]


@dataclass(frozen=True)
class ReferenceSource:
    """What a stage's reference is made from.

    Attributes:
        reference: the frozen checkpoint.
        opened: the policy in memory.
        is_start: the policy with its trained adapter off *is* the reference.
        cache, tmp: the workspace's folders.
        sharded: how the policy is read where it lies in shards.
    """

    reference: Checkpoint
    opened: OpenModel
    is_start: bool
    cache: Path
    tmp: Path
    sharded: ShardedDecoder | None = None

    def live(self) -> LiveReference:
        """The reference beside the policy.

        Raises:
            CheckpointError: its tokenizer or vocabulary is another.
        """
        if self.is_start:
            frozen: Callable[[], AbstractContextManager[None]] = partial(without_new, self.opened)
            return self._live(self.opened, frozen, self.sharded)
        dtype = str(self.opened.dtype).removeprefix("torch.")
        other = open_model(self.reference, dtype=dtype, device=str(self.opened.device))
        if other.codec.digest != self.opened.codec.digest:
            raise CheckpointError(
                f"anchor: the reference {self.reference.path} has another tokenizer or chat template than the model in "
                "training, so the same text is not the same tokens.",
                remedy="Anchor to a checkpoint of the same base.",
            )
        return self._live(other, contextlib.nullcontext)

    def stored(self, kind: str) -> ReferenceCache:
        """The stored outputs of one kind, as far as they go."""
        identity = {
            "reference": self.reference.digest,
            "codec": self.opened.codec.digest,
            "dtype": str(self.opened.dtype),
            "kind": kind,
        }
        return ReferenceCache(self.cache, self.tmp, identity=identity)

    def complete(self, kind: str, rows: Sequence[EncodedRow]) -> int:
        """Store what is missing for these rows; returns the number of reference forward passes, 0 when all is there."""
        cache = self.stored(kind)
        missing = cache.missing(rows)
        needs_head = kind == "hidden" and not self.is_start and cache.head() is None
        if not missing and not needs_head:
            return 0
        live = self.live()
        cache.add(missing, reference_outputs(live, kind))
        if needs_head:
            bias = live.head.bias_V
            cache.add_head({"weight": live.head.weight_VH, **({} if bias is None else {"bias": bias})})
        return live.forwards

    def from_cache(self, kind: str) -> Reference:
        """The reference as `complete` has stored it."""
        cache, device = self.stored(kind), self.opened.device
        if kind == "top64":
            return CachedTop(cache, device)
        if self.is_start:
            return CachedHidden(cache, self.sharded.head if self.sharded else split_model(self.opened.model)[1])
        tensors = cache.head()
        assert tensors is not None, "the cache was not completed"
        bias = tensors.get("bias")
        return CachedHidden(cache, Head(tensors["weight"].to(device), None if bias is None else bias.to(device)))

    def _live(
        self,
        opened: OpenModel,
        frozen: Callable[[], AbstractContextManager[None]],
        sharded: ShardedDecoder | None = None,
    ) -> LiveReference:
        decoder: Decoder
        decoder, head = (sharded, sharded.head) if sharded else split_model(opened.model)
        is_packed = sharded.is_packed if sharded else enable_packing(opened.model)
        return LiveReference(
            opened.model, decoder, head, frozen=frozen, pad_id=opened.codec.pad_id, is_packed=is_packed
        )
