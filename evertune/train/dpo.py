"""Direct preference optimisation beside replayed rows: the chosen answer is to gain on the rejected one, against what a
frozen reference gives them, and what was learnt before is trained on in the same steps.

A step's loss is the mean over its pairs of the preference loss, plus `nll` times the mean negative log-likelihood of
the chosen answers' tokens, plus `replay_weight` times that of the replayed rows' tokens, plus the anchor.
"""

# B rows, T tokens, N counted positions, P pairs, R = 2 P rows of pairs

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evertune.data.encode import EncodedPair, Item, encode_pairs
from evertune.model.codec import Codec
from evertune.train.adapt import Ask, adaptive
from evertune.train.batch import counted_positions
from evertune.train.cache import ReferenceCache
from evertune.train.head import target_log_probabilities
from evertune.train.losses import preference_losses
from evertune.train.material import Material, load_material
from evertune.train.objective import Objective, Policy, StepCounts, backward_beside_replay
from evertune.train.penalty import Penalty
from evertune.train.sink import Metrics
from evertune.train.spec import DpoSpec
from evertune.train.stage import Lesson, Setting, mean_of, run_training
from evertune.workspace import Workspace

REFERENCE = "target"
# Both answers have fallen by more than this, in nats per token: a hundredth of each token's probability.
DISPLACEMENT_NATS = 0.01
FINAL = ("accuracy", "margin", "nll", "rejected_nll", "chosen_shift", "rejected_shift", "replay_loss", "replay_weight")


def run_dpo(spec: DpoSpec, workspace: Workspace, *, ask: Ask | None = None) -> dict[str, Any]:
    """Train one preference stage and publish it; see `run_training`."""
    return run_training(spec, workspace, _Preferring(spec), ask=ask)


@dataclass(frozen=True)
class Preference:
    """The objective of a preference stage.

    Attributes:
        spec: its settings.
        reference: log-probabilities of the pairs' tokens, stored.
    """

    spec: DpoSpec
    reference: ReferenceCache

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        pairs = [item for item in items if isinstance(item, EncodedPair)]
        chosen = sum(counted_positions(pair.chosen) for pair in pairs)
        rejected = sum(counted_positions(pair.rejected) for pair in pairs)
        replayed = sum(counted_positions(row) for item in items if item.is_replay for row in item.rows)
        return {
            "loss": len(pairs),
            "accuracy": len(pairs),
            "margin": len(pairs),
            "chosen_reward": len(pairs),
            "rejected_reward": len(pairs),
            "nll": chosen,
            "chosen_shift": chosen,
            "rejected_nll": rejected,
            "rejected_shift": rejected,
            "replay_loss": replayed,
        }

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        pairs = [item for item in items if isinstance(item, EncodedPair)]
        replayed = [row for item in items if item.is_replay for row in item.rows]

        def judge(hidden_NH: Tensor, targets_N: Tensor, sums: dict[str, Tensor]) -> Tensor:
            logp_N = target_log_probabilities(hidden_NH, targets_N, head=policy.head)
            return self._pair_loss(logp_N, pairs, counts, sums)

        # First all chosen answers, then all rejected ones.
        paired = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        weight = self.spec.replay_weight
        return backward_beside_replay(policy, paired, replayed, counts, penalties, replay_weight=weight, judge=judge)

    def _pair_loss(
        self, logp_N: Tensor, pairs: Sequence[EncodedPair], counts: StepCounts, sums: dict[str, Tensor]
    ) -> Tensor:
        """The pairs' part of the step's loss, with gradient; their sums are written into `sums`.

        Args:
            logp_N: the policy's, of all chosen answers' tokens and then of all rejected ones'.
        """
        rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        lengths_R = torch.tensor([counted_positions(row) for row in rows], device=logp_N.device)
        reference_N = torch.cat([self.reference.read(row)["logp"] for row in rows]).to(logp_N.device)
        ratio_P, rejected_P = _sums_of(logp_N - reference_N, lengths_R).chunk(2)
        tokens_P, rejected_tokens_P = lengths_R.chunk(2)
        loss_P = preference_losses(
            ratio_P,
            rejected_P,
            chosen_tokens_P=tokens_P,
            rejected_tokens_P=rejected_tokens_P,
            loss=self.spec.loss,
            beta=self.spec.beta,
            label_smoothing=self.spec.label_smoothing,
        )
        chosen_logp, rejected_logp = (one.sum() for one in _sums_of(logp_N, lengths_R).chunk(2))
        found = {
            "loss": loss_P.sum(),
            "accuracy": (ratio_P > rejected_P).float().sum(),
            "margin": self.spec.beta * (ratio_P - rejected_P).sum(),
            "chosen_reward": self.spec.beta * ratio_P.sum(),
            "rejected_reward": self.spec.beta * rejected_P.sum(),
            "nll": -chosen_logp,
            "rejected_nll": -rejected_logp,
            "chosen_shift": ratio_P.sum(),
            "rejected_shift": rejected_P.sum(),
        }
        sums.update({name: one.detach() for name, one in found.items()})
        return found["loss"] / counts.divisors["loss"] + self.spec.nll * found["nll"] / counts.divisors["nll"]


def _sums_of(values_N: Tensor, lengths_R: Tensor) -> Tensor:
    """(R,) sums over the positions of each row, which lie one after another."""
    rows_N = torch.arange(len(lengths_R), device=values_N.device).repeat_interleave(lengths_R)
    return values_N.new_zeros(len(lengths_R)).index_add(0, rows_N, values_N)


class _Preferring(Lesson):
    def __init__(self, spec: DpoSpec) -> None:
        self._spec = spec
        self.replay_ratio = spec.replay_ratio

    def load(self, codec: Codec, *, world_size: int) -> Material:
        material = load_material(self._spec, codec, world_size=world_size, encode=encode_pairs)
        return adaptive(material, self._spec)

    def objective(self, setting: Setting) -> Objective:
        """The objective, with the reference's log-probabilities of every pair computed once and stored."""
        source = setting.source(self._spec.reference)
        pairs = [item for item in setting.material.shown() if not item.is_replay]
        setting.complete(source, REFERENCE, [row for pair in pairs for row in pair.rows])
        return Preference(self._spec, source.stored(REFERENCE))

    def methods(self) -> dict[str, bool]:
        return {"kl_dpo": True, "dpo_nll": self._spec.nll > 0}

    def final(self, last: Sequence[Metrics]) -> dict[str, float]:
        return {name: mean_of(last, name) for name in FINAL if any(name in one for one in last)}

    def warnings(self, first: Sequence[Metrics], last: Sequence[Metrics]) -> list[dict[str, str]]:
        chosen, rejected = (mean_of(last, f"{name}_shift") for name in ("chosen", "rejected"))
        if max(chosen, rejected) > -DISPLACEMENT_NATS:
            return []
        text = (
            f"both answers have become less likely than to the reference, by {-chosen:.3f} (chosen) and "
            f"{-rejected:.3f} (rejected) nats per token: probability goes to answers that are in no pair. Raise nll, "
            "lower lr, or drop pairs whose answers are nearly alike (docs/stages.md)."
        )
        return [{"name": "likelihood_displacement", "text": text}]
