"""O-LoRA (Wang et al. 2023, arXiv:2310.14152): a new adapter whose A is orthogonal to those of the adapters below.

lambda_1 sum over earlier adapters i of |A_i A_t^T|_1 + lambda_2 sum of |A_t|_2 and |B_t|_2. Every stage of Evertune
trains a new adapter over frozen ones, so the method fits as it is; below are the adapters of the start's stack.

Departures: none in the formula. The penalty is added once a step to a mean per token, not to a sum; with a whole model
below, which is no adapter, there is nothing to be orthogonal to, and the first term is 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evertune.academic.quadratic import OnWeights
from evertune.model.adapter import read_factors
from evertune.train.plugins import Bench, Parts


def overlap(earlier_A: Sequence[Tensor], a_RI: Tensor) -> Tensor:
    """Sum over earlier adapters of the absolute entries of A_i A_t^T: 0 where the row spaces are orthogonal."""
    return torch.stack([(one @ a_RI.T).abs().sum() for one in earlier_A]).sum()


@dataclass(frozen=True)
class Olora(OnWeights):
    """earlier: by module, the A factors (rank, inputs) of the adapters below, float32."""

    weight: float
    norm_share: float
    earlier: Mapping[str, Sequence[Tensor]]
    name: str = "olora"

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        parts = [overlap(all_A, weights[f"{module}.lora_A"]) for module, all_A in self.earlier.items()]
        if self.norm_share:
            parts += [self.norm_share * one.norm() for one in weights.values()]
        return torch.stack(parts).sum() if parts else None


def make_olora(bench: Bench) -> Parts:
    """The penalty against every adapter of the start's stack."""
    earlier: dict[str, list[Tensor]] = {}
    for checkpoint in bench.start.stack:
        if checkpoint.form == "adapter":
            for module, factor in read_factors(checkpoint.path).items():
                if f"{module}.lora_A" in bench.trained:
                    earlier.setdefault(module, []).append(factor.a_RI.float().to(bench.policy.device))
    weight, norm_weight = bench.options["weight"], bench.options["norm_weight"]
    return Parts([Olora(weight, norm_weight / weight if weight else 0.0, earlier)])
