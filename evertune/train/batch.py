"""Rows as tensors: one padded micro-batch, and which of its positions are counted.

Rows are padded on the right and no attention mask is made: in a causal model a position sees only what is before it,
so what stands behind a row's end changes none of its outputs, and attention without a mask is cheaper.
"""

# B rows, T tokens of the longest row, N counted positions

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow


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


def collate(rows: Sequence[EncodedRow], *, pad_id: int, device: torch.device) -> MicroBatch:
    """Pad rows to the longest of them."""
    length = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    predicts_BT = torch.zeros((len(rows), length), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.from_numpy(row.ids)
        predicts_BT[b, : len(row.ids) - 1] = torch.from_numpy(row.counted[1:])
    return MicroBatch(tuple(rows), ids_BT.to(device), predicts_BT.to(device))


def counted_positions(row: EncodedRow) -> int:
    """How many tokens of a row carry loss. The first token has nothing before it and never does."""
    return int(row.counted[1:].sum())
