"""Room of its own for each task: PackNet's masks, and progressive networks as adapters.

PackNet (Mallya and Lazebnik 2017, arXiv:1711.05769): a task trains the weights that are free, keeps the largest part of
them and leaves the rest to later tasks; what a task has kept never changes again.

Progressive networks (Rusu et al. 2016, arXiv:1606.04671): a new column for each task over frozen ones, with lateral
connections from what the earlier columns compute.

Departures, PackNet:
- "Free" and "kept" are said of the *change* from the base. The paper prunes weights to 0, which half of a language
  model's weights do not survive; here the entries that changed least go back to the base's value and are free again.
  The base takes the place of the paper's network before pruning, and nothing of it is given up.
- A task's share is of each matrix; norms and biases stay as they are from the first task on.
- Which task an entry belongs to lies beside the checkpoint, in `carried/`, a byte a weight. A task's own model is the
  checkpoint that its stage made, or any later one masked with `weights_of_task`: bit for bit the same.

Departures, progressive networks:
- A column is an adapter, and the columns' outputs add up, so that the model is one network without a task at inference;
  an earlier task's own model is the checkpoint of its stage, which is still there bit for bit.
- A lateral connection is linear: of the new adapter's rank, `lateral` rows of A are fixed to what the earlier adapters
  read (the leading directions of their A, where these are more), and B's columns for them are trained. The paper's are
  small networks with a nonlinearity of their own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evertune.academic.importance import Tensors
from evertune.academic.projection import Stateless
from evertune.errors import TrainingError
from evertune.model.adapter import read_factors
from evertune.train.plugins import Bench, Parts

FREE = 0


def kept_entries(change: Tensor, free: Tensor, share: float) -> Tensor:
    """Bool: of the free entries, the `share` that changed most, rounded down; entries that did not change stay free.

    Of equal changes the first in memory is taken.
    """
    size = torch.where(free, change.abs(), -1.0).flatten()
    count = int(share * int(free.sum()))
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[torch.sort(size, descending=True, stable=True).indices[:count]] = True
    return chosen.view_as(change) & free & (change != 0)


def weights_of_task(
    weights: Mapping[str, Tensor], base: Mapping[str, Tensor], owner: Mapping[str, Tensor], task: int
) -> Tensors:
    """The model as it was after a task, from a later one: the later tasks' entries are the base's again.

    Args:
        owner: by weight name, the task that keeps each entry, from 1; 0 where it is free.
    """
    return {
        name: torch.where((owner[name] > FREE) & (owner[name] <= task), one, base[name])
        if name in owner
        else base[name]
        for name, one in weights.items()
    }


class PackNet:
    """Trains free entries, then goes on with those that are kept.

    Args:
        weights: at the stage's start.
        owner: as for `weights_of_task`; of the tasks before.
        prune_at: the step after which the kept entries are chosen.
    """

    name = "packnet"

    def __init__(
        self, weights: Mapping[str, Tensor], owner: Mapping[str, Tensor], *, share: float, prune_at: int
    ) -> None:
        self._start = {name: one.detach().clone() for name, one in weights.items()}
        self._owner = {
            name: owner[name].to(one.device)
            if name in owner
            else torch.zeros(one.shape, dtype=torch.uint8, device=one.device)
            for name, one in weights.items()
            if one.ndim >= 2
        }
        self._task = 1 + max((int(one.max()) for one in owner.values()), default=FREE)
        self._open = {name: one == FREE for name, one in self._owner.items()}
        self._share, self._prune_at, self._done = share, prune_at, 0

    @property
    def free_share(self) -> float:
        """Of the entries of all matrices."""
        free = sum(int((one == FREE).sum()) for one in self._owner.values())
        return free / sum(one.numel() for one in self._owner.values())

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        self._done = step + 1
        for name in list(gradients):
            if name in self._open:
                gradients[name] = gradients[name] * self._open[name]
            else:
                del gradients[name]
        trained = sum(int(one.sum()) for one in self._open.values())
        return {"packnet_trained": trained / sum(one.numel() for one in self._open.values())}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        if self._done == self._prune_at:
            self._open = {
                name: kept_entries(weights[name].detach() - self._start[name], self._owner[name] == FREE, self._share)
                for name in self._open
            }
        # AdamW's moments and decay move entries whose gradient is 0: what is not open goes back, bit for bit.
        for name, one in weights.items():
            is_open = self._open.get(name)
            start = self._start[name]
            one.data.copy_(start if is_open is None else torch.where(is_open, one.detach(), start))

    def state(self) -> Tensors:
        return {name: one.to(torch.uint8) for name, one in self._open.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._open = {name: state[name].bool().to(one.device) for name, one in self._open.items()}

    def carried(self) -> Tensors:
        """The owner of each entry, this task's included. A task that was never pruned keeps all it changed."""
        mine = torch.tensor(self._task, dtype=torch.uint8)
        return {
            name: torch.where(one & (self._owner[name] == FREE), mine.to(one.device), self._owner[name]).cpu()
            for name, one in self._open.items()
        }


def make_packnet(bench: Bench) -> Parts:
    """The rule from the owners that the stage before carried here.

    Raises:
        TrainingError: nothing is free any more, there are more tasks than a byte can name, or the stage averages.
    """
    if bench.spec.ema_decay is not None:
        raise TrainingError(
            "packnet: an average over the steps mixes kept weights with those that were given back.",
            remedy="Leave ema out.",
        )
    steps, options = bench.trainer.pace.steps, bench.options
    prune_at = max(1, round(steps * (1.0 - options["retrain"])))
    rule = PackNet(bench.trained, bench.carried, share=options["keep"], prune_at=prune_at)
    if rule.free_share == 0.0 or rule._task > 255:
        raise TrainingError(
            f"packnet: {rule._task - 1} tasks have taken every weight.",
            remedy="Keep a smaller share from the first task on, or begin a new line from the base.",
        )
    return Parts(rules=[rule])


def lateral_rows(earlier_A: Sequence[Tensor], count: int) -> Tensor:
    """(count, I): an orthonormal basis of the leading directions that the earlier adapters read; exact where their
    ranks together are not above `count`, rows beyond them 0."""
    stacked_RI = torch.cat([one.double() for one in earlier_A])
    values, rows_MI = torch.linalg.svd(stacked_RI, full_matrices=False)[1:]
    kept = values[:count] > 1e-9 * values[0]
    found = torch.zeros(count, stacked_RI.shape[1], dtype=torch.float64, device=stacked_RI.device)
    found[: len(kept)] = torch.where(kept[:, None], rows_MI[:count], 0.0)
    return found.float()


class Lateral(Stateless):
    """The last rows of each A are the lateral connections' and stay fixed."""

    name = "progressive"

    def __init__(self, fixed: Mapping[str, Tensor]) -> None:
        self._fixed = fixed

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        for name, rows in self._fixed.items():
            if name in gradients:
                gradients[name][-len(rows) :] = 0.0
        return {}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        for name, rows in self._fixed.items():
            weights[name].data[-len(rows) :] = rows


@torch.no_grad()
def make_progressive(bench: Bench) -> Parts:
    """Sets the lateral rows before the first step; over a whole model there are none.

    Raises:
        TrainingError: the rank leaves the new column no row of its own.
    """
    count = bench.options["lateral"]
    earlier: dict[str, list[Tensor]] = {}
    for checkpoint in bench.start.stack:
        if checkpoint.form == "adapter":
            for module, factor in read_factors(checkpoint.path).items():
                if f"{module}.lora_A" in bench.trained:
                    earlier.setdefault(f"{module}.lora_A", []).append(factor.a_RI.float().to(bench.policy.device))
    fixed = {}
    for name, factors in earlier.items():
        rank = bench.trained[name].shape[0]
        if count >= rank:
            raise TrainingError(
                f"progressive: {count} lateral rows leave an adapter of rank {rank} none of its own.",
                remedy="Raise tune.lora.rank, or lower lateral.",
            )
        fixed[name] = lateral_rows(factors, count)
        bench.trained[name][-count:] = fixed[name]
    bench.trainer.masters.follow()
    return Parts(rules=[Lateral(fixed)])
