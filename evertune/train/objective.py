"""What a step minimises: the role of an objective, and the cross-entropy of supervised stages.

An objective forms gradients of sums over the items of a micro-batch, divided by counts of the *whole* step, so that
how a step is cut up changes speed and memory, not the result.
"""

# B rows, T tokens, N counted positions, H hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from evertune.data.encode import EncodedRow, Item
from evertune.model.packing import draws_at_random
from evertune.train.batch import Decoder, MicroBatch, collate, counted_hidden, counted_positions
from evertune.train.head import Head, PositionTerm, head_loss
from evertune.train.penalty import Penalty
from evertune.train.sharding import ShardedDecoder


@dataclass(frozen=True)
class Policy:
    """The model in training: its decoder gives hidden states, its head logits. `pad_id` fills up short rows, where they
    are not packed."""

    model: nn.Module
    decoder: Decoder
    head: Head
    pad_id: int
    is_packed: bool = False

    @property
    def sharded(self) -> ShardedDecoder | None:
        """The decoder, where the model lies in shards over the processes."""
        return self.decoder if isinstance(self.decoder, ShardedDecoder) else None

    @property
    def device(self) -> torch.device:
        return self.head.weight_VH.device

    @cached_property
    def _draws(self) -> bool:
        return draws_at_random(self.model)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states (B, T, H) of right-padded rows."""
        hidden_BTH: Tensor = self.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        return hidden_BTH

    def counted_hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states (N, H) at the counted positions."""
        shares = self.device.type == "cpu" and not (self.model.training and self._draws)
        return counted_hidden(self.decoder, batch, is_packed=self.is_packed, shares=shares)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to the model's."""
        if self.sharded is not None:
            self.sharded.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class StepCounts:
    """What the sums of a step are divided by, known from the stream before any forward pass.

    Attributes:
        divisors: of the objective's sums by name, in the order of `Objective.backward`; 0 where a step has none.
        penalised: counted positions of each penalty.
        counted: counted positions of all rows.
    """

    divisors: dict[str, int]
    penalised: dict[str, int]
    counted: int
    tokens: int
    rows: int
    replayed: int


class Objective(Protocol):
    """What a stage minimises, beside its penalties."""

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        """Names of the sums, and what each is divided by over these items. `loss` comes first."""

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        """One micro-batch: forward, and backward of its part of the step's mean losses.

        Returns:
            Undivided sums: the objective's in the order of `divisors`, then of each penalty.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of the counted tokens, in nats per token."""

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        return {"loss": sum(counted_positions(row) for item in items for row in item.rows)}

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        rows = [row for item in items for row in item.rows]
        batch = collate(rows, pad_id=policy.pad_id, device=policy.device)
        hidden_NH = policy.counted_hidden(batch)
        terms = penalty_terms(penalties, rows, counts, device=policy.device)
        ce_weight = 1.0 / counts.divisors["loss"]
        found = head_loss(hidden_NH, batch.targets_N, head=policy.head, ce_weight=ce_weight, terms=terms)
        policy.backward(found.loss)
        return torch.stack([found.ce_sum, *penalty_sums(penalties, found.term_sums, like=found.ce_sum)])


def backward_beside_replay(
    policy: Policy,
    judged: Sequence[EncodedRow],
    replayed: Sequence[EncodedRow],
    counts: StepCounts,
    penalties: Sequence[Penalty],
    *,
    replay_weight: float,
    judge: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
) -> Tensor:
    """`Objective.backward` where whole answers are judged, beside replayed rows, in one pass of the decoder.

    The judged rows bear the loss that `judge` returns, the replayed ones cross-entropy, both the penalties that apply.

    Args:
        counts: whose divisor `replay_loss` counts the step's replayed tokens.
        replay_weight: of the mean cross-entropy of those tokens.
        judge: (hidden states (N, H) and targets (N,) of the judged rows' counted positions, sums to be filled in) ->
            the loss, a scalar with gradient. Not called where there are no judged rows.
    """
    batch = collate([*judged, *replayed], pad_id=policy.pad_id, device=policy.device)
    hidden_NH, targets_N = policy.counted_hidden(batch), batch.targets_N
    split = sum(map(counted_positions, judged))
    sums = {name: hidden_NH.new_zeros((), dtype=torch.float32) for name in counts.divisors}
    penalised: dict[str, Tensor] = {}
    losses = [judge(hidden_NH[:split], targets_N[:split], sums)] if judged else []
    for group, places in ((judged, slice(0, split)), (replayed, slice(split, None))):
        terms = penalty_terms(penalties, group, counts, device=policy.device)
        is_replay = group is replayed
        if not group or not (terms or is_replay):
            continue
        weight = replay_weight / counts.divisors["replay_loss"] if is_replay else 0.0
        found = head_loss(hidden_NH[places], targets_N[places], head=policy.head, ce_weight=weight, terms=terms)
        losses.append(found.loss)
        if is_replay:
            sums["replay_loss"] = found.ce_sum
        for name, value in found.term_sums.items():
            penalised[name] = penalised[name] + value if name in penalised else value
    policy.backward(torch.stack(losses).sum())
    return torch.stack([*sums.values(), *penalty_sums(penalties, penalised, like=losses[0].detach())])


def penalty_terms(
    penalties: Sequence[Penalty], rows: Sequence[EncodedRow], counts: StepCounts, *, device: torch.device
) -> list[PositionTerm]:
    """The terms of the penalties that apply to some of these rows, over the rows' counted positions in order."""
    terms = []
    lengths = torch.tensor([counted_positions(row) for row in rows])
    for penalty in penalties:
        chosen = [penalty.applies_to(row) for row in rows]
        if any(chosen):
            values = penalty.at_positions([row for row, is_chosen in zip(rows, chosen, strict=True) if is_chosen])
            weight = penalty.weight / counts.penalised[penalty.name]
            mask_N = torch.tensor(chosen).repeat_interleave(lengths).to(device)
            terms.append(PositionTerm(penalty.name, mask_N, weight, values))
    return terms


def penalty_sums(penalties: Sequence[Penalty], sums: dict[str, Tensor], *, like: Tensor) -> list[Tensor]:
    """The sum of each penalty; 0 for one that applied to nothing."""
    return [sums.get(one.name, like.new_zeros(())) for one in penalties]
