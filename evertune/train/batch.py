"""Rows as tensors: one padded micro-batch, and which of its positions are counted; hidden states at those.

Rows are packed where the architecture allows it (see `model/packing.py`). Else they are padded on the right and no
attention mask is made: in a causal model a position sees only what is before it, so what stands behind a row's end
changes none of its outputs, and attention without a mask is cheaper. For the same reason a packed row ends at its last
counted position: what comes after it would be computed for nothing.
"""

# B rows, T tokens of the longest row, t of one row, N counted positions, H hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.model.packing import packed_hidden

Decoder = Callable[..., Any]
"""A model's decoder: keyword inputs as transformers names them -> outputs with `last_hidden_state`."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        rows: as encoded; row b of the tensors is `rows[b]`.
        ids_BT: token ids, padded on the right.
        predicts_BT: True at the positions whose *next* token is counted. Counted positions are numbered row by row.
    """

    rows: tuple[EncodedRow, ...]
    ids_BT: Tensor
    predicts_BT: Tensor

    @property
    def targets_N(self) -> Tensor:
        """The counted tokens, in the order of the counted positions."""
        return self.ids_BT[:, 1:][self.predicts_BT[:, :-1]]

    def positions_of(self, rows: Sequence[bool]) -> Tensor:
        """(N,) bool: the counted positions that lie in the chosen rows."""
        counts = self.predicts_BT.sum(dim=1)
        chosen = torch.tensor(rows, dtype=torch.bool, device=counts.device)
        return chosen.repeat_interleave(counts)


def collate(rows: Sequence[EncodedRow], *, pad_id: int, device: torch.device, multiple: int = 1) -> MicroBatch:
    """Pad rows to the longest of them, or to the next multiple of a number."""
    longest = max(len(row.ids) for row in rows)
    length = longest + -longest % multiple
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    predicts_BT = torch.zeros((len(rows), length), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.from_numpy(row.ids)
        predicts_BT[b, : len(row.ids) - 1] = torch.from_numpy(row.counted[1:])
    return MicroBatch(tuple(rows), ids_BT.to(device), predicts_BT.to(device))


def counted_hidden(
    decoder: Decoder,
    batch: MicroBatch,
    *,
    is_packed: bool,
    shares: bool = False,
    forward_only: bool = False,
    multiple: int = 1,
) -> Tensor:
    """Last hidden states (N, H) at the counted positions, row by row.

    Args:
        is_packed: read the rows packed; the model must have been accepted by `enable_packing`.
        multiple: of which the lengths of packed rows are, as far as the batch is padded.
        shares, forward_only: how packed rows are read; see `packed_hidden`.
    """
    if not is_packed or not batch.predicts_BT.any():
        hidden_BTH: Tensor = decoder(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
        return hidden_BTH[batch.predicts_BT]
    rows, asked = [], []
    for b, row in enumerate(batch.rows):
        if places := row.counted[1:].nonzero()[0].tolist():
            last = places[-1] + 1
            rows.append(batch.ids_BT[b, : last + -last % multiple])
            asked.append(batch.predicts_BT[b, : len(rows[-1])])
    return packed_hidden(decoder, rows, asked=torch.cat(asked), shares=shares, forward_only=forward_only)


def counted_positions(row: EncodedRow) -> int:
    """How many tokens of a row carry loss. The first token has nothing before it and never does."""
    return int(row.counted[1:].sum())
