"""Preferences learnt one domain after the other: COPR-style regularisation, and fast-slow DPO.

COPR (Zhang et al. 2024, arXiv:2402.14228) fits the policy to the optimal policy of each preference set, known up to its
partition function over the sampled answers, and holds it, by a Lagrange multiplier, to the optimal policies of earlier
sets. Here the stage's own loss is DPO's, and what is held is the policy's choice among the two answers of each earlier
pair: P(y | x) = pi(y | x) over the pair's sum, on log-likelihoods per token; the distance is the mean squared
difference of log P, as in the paper's fit.

Departures, COPR: the earlier policy is the one that its stage ended with, not the optimal one of a reward model; its
log P lie with the pairs' tokens beside the checkpoint, in `carried/`. Log-likelihoods are per token, because sums over
a long answer differ by tens of nats and P would be 0 or 1. The multiplier begins at 1 and follows a minibatch.

OFS-DPO (Qi et al. 2024, arXiv:2406.05534) trains a fast and a slow module of the same shape that chase each other: to
DPO's loss comes gamma times the gap between their preference probabilities, (sigmoid(beta m_fast) - sigmoid(beta
m_slow))^2, m the difference of a pair's log-ratios.

Departures, OFS-DPO: the trained weights are the fast module; the slow one is a copy that goes part of the way toward
it every few steps, where the paper trains it at a lower rate, and where the slow one has the smaller preference loss on
the step's pairs, the fast one goes on from it. The gap is squared. Combining the fast modules of several domains
(COFS-DPO) is a merge of adapters, which is a stage of its own.
"""

# P pairs, R = 2 P answers: all chosen, then all rejected

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.academic.derpp import row_of
from evertune.academic.importance import Tensors
from evertune.academic.projection import add_, picks
from evertune.data.encode import EncodedPair, EncodedRow
from evertune.train.batch import collate, counted_positions
from evertune.train.dpo import Preference
from evertune.train.head import target_log_probabilities
from evertune.train.plugins import Bench, Parts


def choice(likelihoods_P2: Tensor) -> Tensor:
    """log P of each answer among the two of its pair, (P, 2): a softmax over log-likelihoods."""
    return likelihoods_P2.log_softmax(dim=1)


def moved(now_P2: Tensor, then_P2: Tensor) -> Tensor:
    """Mean squared difference of log P, a scalar with gradient to `now_P2`."""
    return (now_P2 - then_P2).square().mean()


class Copr:
    """Holds the choices of earlier pairs, and leaves this stage's to the next."""

    name = "copr"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._pairs, self._then = _unpack(bench.carried)
        self._stage = 1 + int(bench.carried["stage"].max()) if bench.carried else 0
        self._stages = bench.carried["stage"].tolist() if bench.carried else []
        self._multiplier = 1.0

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        if not self._pairs:
            return {}
        options, masters = self._bench.options, self._bench.trainer.masters
        drawn = picks(options["rows"], len(self._pairs), "copr", self._bench.seed, step)
        self._bench.policy.model.eval()
        masters.zero_gradients()
        now_P2 = choice(_likelihoods(self._bench, [self._pairs[i] for i in drawn]))
        distance = moved(now_P2, self._then[drawn].to(now_P2.device))
        (self._multiplier * distance).backward()  # type: ignore[no-untyped-call]
        held = masters.gradients()
        masters.zero_gradients()
        add_(gradients, 1.0, held)
        told = {"copr_moved": float(distance.detach()), "copr_multiplier": self._multiplier}
        risen = self._multiplier + options["rate"] * (told["copr_moved"] - options["slack"])
        self._multiplier = min(max(risen, 0.0), options["most"])
        return told

    def see(self, weights: Mapping[str, Tensor]) -> None:
        pass

    def state(self) -> Tensors:
        return {"multiplier": torch.tensor([self._multiplier], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._multiplier = float(state["multiplier"][0])

    @torch.no_grad()
    def carried(self) -> Tensors:
        share = max(1, self._bench.options["memory_rows"] // (self._stage + 1))
        own = _own_pairs(self._bench, share)
        self._bench.policy.model.eval()
        then = [choice(_likelihoods(self._bench, [pair])).cpu() for pair in own]
        kept = [i for s in sorted(set(self._stages)) for i in [j for j, t in enumerate(self._stages) if t == s][:share]]
        pairs = [*(self._pairs[i] for i in kept), *own]
        stages = [*(self._stages[i] for i in kept), *[self._stage] * len(own)]
        return _pack(pairs, torch.cat([self._then[kept], *then]), stages)


class FastSlow:
    """Adds the gap's gradient to the fast module's, and moves the slow one."""

    name = "fast_slow"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._objective = cast(Preference, bench.trainer.objective)
        self._slow = _copies(bench.trained)
        self._done, self._slow_leads = 0, False

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        self._done = step + 1
        pairs = [one for one in self._bench.trainer.feed.step_rows(step) if isinstance(one, EncodedPair)]
        if not pairs:
            self._slow_leads = False
            return {}
        masters, beta = self._bench.trainer.masters, self._objective.spec.beta
        self._bench.policy.model.eval()
        with torch.no_grad(), masters.holding(self._slow):
            slow_P = beta * self._margins(pairs)
        masters.zero_gradients()
        fast_P = beta * self._margins(pairs)
        gap = (fast_P.sigmoid() - slow_P.sigmoid()).square().mean()
        gap.backward()  # type: ignore[no-untyped-call]
        own = masters.gradients()
        masters.zero_gradients()
        add_(gradients, self._bench.options["weight"], own)
        self._slow_leads = bool(F.softplus(-slow_P).mean() < F.softplus(-fast_P.detach()).mean())
        return {"fast_slow_gap": float(gap.detach()), "fast_slow_behind": float(self._slow_leads)}

    @torch.no_grad()
    def see(self, weights: Mapping[str, Tensor]) -> None:
        if self._done == 0 or self._done % self._bench.options["every"]:
            return
        for name, one in weights.items():
            if self._slow_leads:
                one.copy_(self._slow[name])
            else:
                self._slow[name].lerp_(one.detach(), self._bench.options["pace"])

    def state(self) -> Tensors:
        return dict(self._slow)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._slow = {name: one.to(self._slow[name].device).clone() for name, one in state.items()}

    def carried(self) -> Tensors:
        return {}

    def _margins(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """(P,) differences of the pairs' summed log-ratios to the stage's reference."""
        rows = [one.chosen for one in pairs] + [one.rejected for one in pairs]
        logp_N = _log_probabilities(self._bench, rows)
        reference_N = torch.cat([self._objective.reference.read(row)["logp"] for row in rows]).to(logp_N.device)
        chosen_P, rejected_P = _by_row(logp_N - reference_N, rows).chunk(2)
        return chosen_P - rejected_P


def make_copr(bench: Bench) -> Parts:
    return Parts(rules=[Copr(bench)])


def make_fast_slow(bench: Bench) -> Parts:
    return Parts(rules=[FastSlow(bench)])


Pair = tuple[EncodedRow, EncodedRow]


def _own_pairs(bench: Bench, most: int) -> list[Pair]:
    """The first different pairs that the stage shows."""
    found: dict[tuple[str, str], Pair] = {}
    for step in range(bench.trainer.feed.steps):
        for item in bench.trainer.feed.step_rows(step):
            if isinstance(item, EncodedPair) and len(found) < most:
                found[item.chosen.digest, item.rejected.digest] = (item.chosen, item.rejected)
    return list(found.values())


def _likelihoods(bench: Bench, pairs: Sequence[Pair]) -> Tensor:
    """(P, 2) mean log-probabilities of the answers' tokens, chosen first."""
    rows = [one for one, _ in pairs] + [other for _, other in pairs]
    lengths_R = torch.tensor([counted_positions(row) for row in rows], device=bench.policy.device)
    return torch.stack((_by_row(_log_probabilities(bench, rows), rows) / lengths_R).chunk(2), dim=1)


def _log_probabilities(bench: Bench, rows: Sequence[EncodedRow]) -> Tensor:
    policy = bench.policy
    batch = collate(rows, pad_id=policy.pad_id, device=policy.device)
    return target_log_probabilities(policy.counted_hidden(batch), batch.targets_N, head=policy.head)


def _by_row(values_N: Tensor, rows: Sequence[EncodedRow]) -> Tensor:
    """(R,) sums over the positions of each row."""
    return torch.stack([one.sum() for one in values_N.split([counted_positions(row) for row in rows])])


def _pack(pairs: Sequence[Pair], then_P2: Tensor, stages: Sequence[int]) -> Tensors:
    rows = [row for pair in pairs for row in pair]
    return {
        "tokens": torch.tensor([len(row.ids) for row in rows], dtype=torch.int32),
        "ids": torch.cat([torch.from_numpy(row.ids) for row in rows]),
        "counted": torch.cat([torch.from_numpy(row.counted) for row in rows]),
        "then": then_P2.float(),
        "stage": torch.tensor(stages, dtype=torch.int32),
    }


def _unpack(tensors: Mapping[str, Tensor]) -> tuple[list[Pair], Tensor]:
    if not tensors:
        return [], torch.empty(0, 2)
    lengths: list[Any] = tensors["tokens"].tolist()
    ids, counted = (tensors[name].split(lengths) for name in ("ids", "counted"))
    rows = [row_of(i, one, mask) for i, (one, mask) in enumerate(zip(ids, counted, strict=True))]
    return list(zip(rows[0::2], rows[1::2], strict=True)), tensors["then"]


def _copies(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: one.detach().clone() for name, one in weights.items()}
