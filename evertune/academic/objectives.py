"""Supervised losses that weigh each token by what the model thinks of it: DFT, ASFT, proximal SFT.

DFT (Wu et al. 2025, arXiv:2508.05629): -sg(p) log p, which undoes the 1 / p in the gradient of cross-entropy. ASFT (Zhu
et al. 2025, arXiv:2509.23753): the same plus lambda KL(start || policy) on the new rows. Proximal SFT (Zhu et al. 2025,
arXiv:2508.17784): -min(r, clip(r, 1 - low, 1 + high)) with r = p / p_old, PPO's surrogate with every advantage 1.

Departures: replayed rows keep cross-entropy, and both kinds are divided by all counted tokens of the step. ASFT's KL is
exact, over the whole vocabulary. In proximal SFT the old policy is the policy `every` steps ago, not that at the start
of an outer batch of several small ones: the ratio is 1 in the step after each refresh and moves until the next; its
dropout is off. AdamW follows.
"""

# N counted positions

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from evertune.academic.importance import Tensors
from evertune.data.encode import Item
from evertune.model.mode import evaluating
from evertune.train.anchor import Anchor
from evertune.train.batch import MicroBatch, collate, counted_positions
from evertune.train.head import head_loss, target_log_probabilities
from evertune.train.objective import Policy, StepCounts, penalty_sums, penalty_terms
from evertune.train.optimizer import Masters
from evertune.train.penalty import Penalty
from evertune.train.plugins import Bench, Parts


def dft_losses(logp_N: Tensor) -> Tensor:
    """-sg(p) log p of each token, (N,): its slope in the logits is p (p_all - onehot), that of -p itself.

    Args:
        logp_N: log-probabilities of the rows' own tokens, with gradient.
    """
    return -logp_N.detach().exp() * logp_N


def proximal_losses(logp_N: Tensor, old_N: Tensor, *, low: float, high: float) -> Tensor:
    """-min(r, clip(r, 1 - low, 1 + high)) of each token, (N,), r = p / p_old: flat above 1 + high.

    With every advantage 1 the lower bound never binds: below it, r itself is the smaller one.

    Args:
        old_N: log-probabilities under the old policy, without gradient.
    """
    ratio_N = (logp_N - old_N).exp()
    return -torch.minimum(ratio_N, ratio_N.clamp(1.0 - low, 1.0 + high))


class TokenLoss(Protocol):
    """A loss of single tokens."""

    def losses(self, policy: Policy, batch: MicroBatch, logp_N: Tensor) -> Tensor:
        """(N,), with gradient through `logp_N`; the model is not left changed."""

    def before(self, policy: Policy, batch: MicroBatch) -> None:
        """Called before the policy's own forward pass."""


@dataclass(frozen=True)
class TokenObjective:
    """The mean over all counted tokens of a loss of the new rows' and of the replayed rows' cross-entropy."""

    loss: TokenLoss

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        counted = sum(counted_positions(row) for item in items for row in item.rows)
        return {"loss": counted, "nll": counted}

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        rows = [row for item in items for row in item.rows]
        batch = collate(rows, pad_id=policy.pad_id, device=policy.device)
        self.loss.before(policy, batch)
        hidden_NH, targets_N = policy.counted_hidden(batch), batch.targets_N
        logp_N = target_log_probabilities(hidden_NH, targets_N, head=policy.head)
        is_new_N = batch.positions_of([not row.is_replay for row in rows])
        loss_N = torch.where(is_new_N, self.loss.losses(policy, batch, logp_N), -logp_N)
        total = loss_N.sum() / counts.divisors["loss"]
        sums: dict[str, Tensor] = {}
        terms = penalty_terms(penalties, rows, counts, device=policy.device)
        if terms:
            found = head_loss(hidden_NH, targets_N, head=policy.head, ce_weight=0.0, terms=terms)
            total, sums = total + found.loss, found.term_sums
        total.backward()  # type: ignore[no-untyped-call]
        own = [loss_N.detach().sum(), -logp_N.detach().sum()]
        return torch.stack([*own, *penalty_sums(penalties, sums, like=own[0])])


class Dft:
    """Dynamic fine-tuning."""

    def before(self, policy: Policy, batch: MicroBatch) -> None:
        pass

    def losses(self, policy: Policy, batch: MicroBatch, logp_N: Tensor) -> Tensor:
        return dft_losses(logp_N)


class Proximal:
    """Proximal SFT: a loss, and the rule that keeps the old policy, a float32 copy of the trained weights."""

    name = "psft"

    def __init__(self, masters: Masters, *, low: float, high: float, every: int) -> None:
        self._masters, self._low, self._high, self._every = masters, low, high, every
        self._old = _copies(masters.weights)
        self._old_N = torch.empty(0)
        self._done = 0
        self._clipped: list[float] = []

    @torch.no_grad()
    def before(self, policy: Policy, batch: MicroBatch) -> None:
        with evaluating(policy.model), self._masters.holding(self._old):
            hidden_NH = policy.counted_hidden(batch)
            self._old_N = target_log_probabilities(hidden_NH, batch.targets_N, head=policy.head)

    def losses(self, policy: Policy, batch: MicroBatch, logp_N: Tensor) -> Tensor:
        above = (logp_N.detach() - self._old_N).exp() > 1.0 + self._high
        self._clipped.append(float(above.float().mean()))
        return proximal_losses(logp_N, self._old_N, low=self._low, high=self._high)

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        self._done = step + 1
        share = sum(self._clipped) / max(len(self._clipped), 1)
        self._clipped = []
        return {"psft_clipped": share}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        if self._done % self._every == 0:
            self._old = _copies(weights)

    def state(self) -> Tensors:
        return dict(self._old)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._old = {name: one.to(self._old[name].device).clone() for name, one in state.items()}
        self._clipped = []

    def carried(self) -> Tensors:
        return {}


def make_dft(bench: Bench) -> Parts:
    return Parts(objective=TokenObjective(Dft()))


def make_asft(bench: Bench) -> Parts:
    """DFT, and the anchor to the start on the new rows."""
    anchor = Anchor(bench.options["kl"], "new", "forward", bench.reference().live(), name="asft_kl")
    return Parts([anchor], objective=TokenObjective(Dft()))


def make_psft(bench: Bench) -> Parts:
    options = bench.options
    masters = bench.trainer.masters
    proximal = Proximal(masters, low=options["clip_low"], high=options["clip_high"], every=options["every"])
    return Parts(rules=[proximal], objective=TokenObjective(proximal))


def _copies(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: one.detach().clone() for name, one in weights.items()}
