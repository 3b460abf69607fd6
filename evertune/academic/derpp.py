"""Dark experience replay (Buzzega et al. 2020, arXiv:2004.07211), DER++: stored rows with the outputs they had.

To each step's gradient is added that of alpha * (distance of the outputs from the stored ones) on some stored rows, and
of beta * cross-entropy on other ones. The rows and outputs lie beside the checkpoint, in `carried/`, and go to a stage
that starts from exactly it: whoever has that folder has these rows.

Departures:
- A language model's logits are tens of thousands of numbers a position: the most likely words and one tail bucket are
  kept, and the distance is KL(stored || present) on these, not the squared distance of logits.
- Outputs are those at the end of the stage that taught the row, not at the moment it passed by.
- The memory has the same number of rows of each task, the first of each, where the paper samples a reservoir.
"""

# M counted positions of some rows, K kept words

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from evertune.academic.importance import Tensors
from evertune.academic.projection import Stateless, add_, picks
from evertune.data.encode import EncodedRow
from evertune.train.batch import collate, counted_positions
from evertune.train.head import PositionTerm, head_loss
from evertune.train.losses import bucket, forward_kl, top_words
from evertune.train.plugins import Bench, Parts


@dataclass(frozen=True)
class Stored:
    """A remembered row: the task it came from, its words, and at its counted positions the outputs it had.

    words: (M, K) int32. logp: (M, K + 1) float32, the tail's in the last column.
    """

    task: int
    row: EncodedRow
    words_MK: Tensor
    logp_ML: Tensor


def pack(memory: Sequence[Stored]) -> Tensors:
    """The memory as tensors for a safetensors file; log-probabilities in half precision."""
    if not memory:
        return {}
    return {
        "task": torch.tensor([one.task for one in memory], dtype=torch.int32),
        "tokens": torch.tensor([len(one.row.ids) for one in memory], dtype=torch.int32),
        "ids": torch.from_numpy(np.concatenate([one.row.ids for one in memory]).astype(np.int32)),
        "counted": torch.from_numpy(np.concatenate([one.row.counted for one in memory])),
        "words": torch.cat([one.words_MK for one in memory]).to(torch.int32).cpu(),
        "logp": torch.cat([one.logp_ML for one in memory]).half().cpu(),
    }


def unpack(tensors: Mapping[str, Tensor]) -> list[Stored]:
    """What `pack` was given; the rows are marked as replay."""
    if not tensors:
        return []
    found, token, position = [], 0, 0
    for i, length in enumerate(tensors["tokens"].tolist()):
        row = row_of(i, tensors["ids"][token : token + length], tensors["counted"][token : token + length])
        token += length
        positions = slice(position, position + counted_positions(row))
        position = positions.stop
        logp_ML = tensors["logp"][positions].float().log_softmax(dim=-1)
        found.append(Stored(int(tensors["task"][i]), row, tensors["words"][positions].long(), logp_ML))
    return found


def row_of(number: int, ids_T: Tensor, counted_T: Tensor) -> EncodedRow:
    """A stored row as the model reads it, marked as replay."""
    ids, counted = ids_T.numpy(), counted_T.numpy()
    digest = sha256(ids.astype("<i4").tobytes() + counted.tobytes()).hexdigest()
    return EncodedRow("memory", str(number), ids, counted, is_replay=True, digest=digest)


def kept(memory: Sequence[Stored], rows: int, tasks: int) -> list[Stored]:
    """The first rows of each task, so many that `tasks` tasks fit into `rows`; at least one of each."""
    share = max(1, rows // max(tasks, 1))
    return [one for t in sorted({each.task for each in memory}) for one in [m for m in memory if m.task == t][:share]]


class DerPlusPlus(Stateless):
    """Adds the memory's gradient to each step's, and leaves a memory to the next stage."""

    name = "derpp"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._memory = unpack(bench.carried)
        self._tasks = 1 + max((one.task for one in self._memory), default=-1)

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        if not self._memory:
            return {}
        options, masters = self._bench.options, self._bench.trainer.masters
        drawn = [
            [self._memory[i] for i in picks(options["rows"], len(self._memory), "derpp", which, self._bench.seed, step)]
            for which in ("outputs", "answers")
        ]
        self._bench.policy.model.eval()
        masters.zero_gradients()
        divergence = self._backward(drawn[0], kl=options["alpha"], ce=0.0)[0]
        answers = self._backward(drawn[1], kl=0.0, ce=options["beta"])[1]
        memory = masters.gradients()
        masters.zero_gradients()
        add_(gradients, 1.0, memory)
        return {"derpp_kl": divergence, "derpp_ce": answers}

    def carried(self) -> Tensors:
        rows = self._bench.new_rows(self._bench.options["memory_rows"])
        own = [self._remember(row) for row in rows[: max(1, self._bench.options["memory_rows"] // (self._tasks + 1))]]
        return pack(kept([*self._memory, *own], self._bench.options["memory_rows"], self._tasks + 1))

    @torch.no_grad()
    def _remember(self, row: EncodedRow) -> Stored:
        policy = self._bench.policy
        policy.model.eval()
        batch = collate([row], pad_id=policy.pad_id, device=policy.device)
        logp_MV = policy.head.log_probabilities(policy.counted_hidden(batch))
        words_MK, logp_ML = top_words(logp_MV, min(self._bench.options["words"], logp_MV.shape[1] - 1))
        return Stored(self._tasks, row, words_MK.cpu(), logp_ML.cpu())

    def _backward(self, chosen: Sequence[Stored], *, kl: float, ce: float) -> tuple[float, float]:
        """Backward of kl * mean divergence + ce * mean cross-entropy; returns both means, in nats a token."""
        policy = self._bench.policy
        rows = [one.row for one in chosen]
        count = sum(counted_positions(row) for row in rows)
        batch = collate(rows, pad_id=policy.pad_id, device=policy.device)
        words_MK = torch.cat([one.words_MK for one in chosen]).to(policy.device)
        logp_ML = torch.cat([one.logp_ML for one in chosen]).to(policy.device)

        def values(logp_NV: Tensor, where: slice) -> Tensor:
            return forward_kl(bucket(logp_NV, words_MK[where]), logp_ML[where])

        terms = [PositionTerm("kl", torch.ones(count, dtype=torch.bool, device=policy.device), kl / count, values)]
        hidden_NH = policy.counted_hidden(batch)
        found = head_loss(hidden_NH, batch.targets_N, head=policy.head, ce_weight=ce / count, terms=terms if kl else [])
        found.loss.backward()  # type: ignore[no-untyped-call]
        return float(found.term_sums["kl"]) / count if kl else 0.0, float(found.ce_sum) / count


def make_derpp(bench: Bench) -> Parts:
    return Parts(rules=[DerPlusPlus(bench)])
