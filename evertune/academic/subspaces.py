"""Room set aside before training: InfLoRA's adapters and orthogonal-subspace fine-tuning.

InfLoRA (Liang and Li 2024, arXiv:2404.00228): the new adapter's A is fixed, its rows an orthonormal basis of where the
new task's inputs lie and the old tasks' do not; only B is trained, so that old inputs never reach it.

OSFT (Nayak et al. 2025, arXiv:2504.07097): of each matrix W = U S V' the leading singular directions are frozen, and an
update may use neither their outputs nor their inputs: it is (1 - U_k U_k') D (1 - V_k V_k').

Departures:
- InfLoRA keeps a memory of inputs (DualGPM); here the old tasks' inputs are those of remembered rows, run through the
  start, whose layers see what the adapters below make of them. A's rows have length 1, the paper's too.
- OSFT in the paper, and in PEFT's tuner, trains the factors of the lower part, W_lo = U_lo S_lo V_lo'. Here W is
  trained and each gradient and each step projected onto the same set of updates, so that AdamW's moments are of W and
  what is published is a plain model. Linear layers of the decoder only: all else, the embeddings too, stays as it is.
- The share that is protected is one number; the paper grows it from task to task and with a layer's importance.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evertune.academic.projection import Stateless, input_basis, input_covariances
from evertune.errors import TrainingError
from evertune.measure.products import squared_norm
from evertune.train.plugins import Bench, Parts


def new_input_directions(new_II: Tensor, old_IK: Tensor | None, rank: int) -> Tensor:
    """(rank, I) float32: the leading directions of the new inputs outside the span of the old ones, orthonormal.

    Rows beyond what there is outside are 0.

    Args:
        new_II: sum of x x' over the new inputs, float64.
        old_IK: orthonormal columns that span the old inputs; None where there are none.
    """
    size = new_II.shape[0]
    outside_II = torch.eye(size, dtype=torch.float64, device=new_II.device)
    if old_IK is not None:
        outside_II = outside_II - old_IK.double() @ old_IK.double().T
    values, vectors = torch.linalg.eigh(outside_II @ new_II @ outside_II)
    found_IR = outside_II @ vectors.flip(1)[:, :rank]
    # What is left of an eigenvector of eigenvalue 0 may lie inside: rounding must not make it a direction.
    is_there = values.flip(0)[:rank] > 1e-9 * values.abs().max().clamp_min(1e-30)
    lengths = found_IR.norm(dim=0)
    found_IR = torch.where(is_there & (lengths > 1e-6), found_IR / lengths.clamp_min(1e-12), 0.0)
    if found_IR.shape[1] < rank:
        found_IR = nn.functional.pad(found_IR, (0, rank - found_IR.shape[1]))
    return found_IR.T.float().contiguous()


class FixedA(Stateless):
    """Only B is trained."""

    name = "inflora"

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        for name in [one for one in gradients if one.endswith(".lora_A")]:
            del gradients[name]
        return {}


@torch.no_grad()
def make_inflora(bench: Bench) -> Parts:
    """Sets every A before the first step.

    Raises:
        TrainingError: the old tasks' inputs leave a layer no direction for the new one.
    """
    rows = bench.new_rows(bench.options["rows"])
    old_rows = [row for each in bench.memory.values() for row in each]
    new = input_covariances(bench, rows)
    old = input_covariances(bench, old_rows) if old_rows else {}
    for name, covariance_II in new.items():
        weight = bench.trained[f"{name}.lora_A"]
        basis = input_basis(old[name], bench.options["energy"]) if name in old else None
        a_RI = new_input_directions(covariance_II, basis, weight.shape[0])
        if not a_RI.any():
            raise TrainingError(
                f"inflora: the inputs of earlier tasks leave {name} no direction for the new one.",
                remedy="Lower energy, or remember fewer rows.",
            )
        weight.copy_(a_RI)
    bench.trainer.masters.follow()
    return Parts(rules=[FixedA()])


@dataclass(frozen=True)
class Protected:
    """The leading singular directions of a weight (O, I): (O, k) and (I, k) with orthonormal columns, float32."""

    outputs_OK: Tensor
    inputs_IK: Tensor

    @classmethod
    def of(cls, weight_OI: Tensor, share: float) -> "Protected":
        """Those that hold `share` of the smaller side, rounded down, at least one."""
        u_OM, _, v_MI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
        k = max(1, int(share * min(weight_OI.shape)))
        return cls(u_OM[:, :k].float().contiguous(), v_MI[:k].T.float().contiguous())

    def outside(self, change_OI: Tensor) -> Tensor:
        """The part of a change that touches neither the outputs nor the inputs: (1 - UU') D (1 - VV')."""
        rest = change_OI - self.outputs_OK @ (self.outputs_OK.T @ change_OI)
        return rest - (rest @ self.inputs_IK) @ self.inputs_IK.T


class Osft(Stateless):
    """Keeps the protected directions of each weight as they were at the stage's start."""

    name = "osft"

    def __init__(self, weights: Mapping[str, Tensor], protected: Mapping[str, Protected]) -> None:
        self._start = {name: weights[name].detach().clone() for name in protected}
        self._protected = protected

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        before = sum(float(squared_norm(one)) for name, one in gradients.items() if name in self._protected)
        for name in list(gradients):
            if name in self._protected:
                gradients[name] = self._protected[name].outside(gradients[name])
            else:
                del gradients[name]
        after = sum(float(squared_norm(one)) for one in gradients.values())
        return {"osft_kept": after / before} if before > 0.0 else {}

    def see(self, weights: Mapping[str, Tensor]) -> None:
        """AdamW rescales entry by entry, which leaves the set of allowed updates: put the step back into it."""
        for name, one in self._protected.items():
            start = self._start[name]
            weights[name].data.copy_(start + one.outside(weights[name].detach() - start))


@torch.no_grad()
def make_osft(bench: Bench) -> Parts:
    """The rule for every linear layer of the decoder that is trained."""
    head = bench.policy.head.weight_VH
    names = [
        f"{name}.weight"
        for name, one in bench.policy.model.named_modules()
        if isinstance(one, nn.Linear) and f"{name}.weight" in bench.trained and one.weight is not head
    ]
    share = bench.options["protected"]
    return Parts(rules=[Osft(bench.trained, {one: Protected.of(bench.trained[one], share) for one in names})])
