"""Cross-entropy by Liger's fused Triton kernels, in place of the chunks of `head.py`: the door to Liger, for GPUs.

The same sum and the same gradients, formed in the same one pass over chunks of positions; the softmax of a chunk is one
kernel instead of several. (Liger-Kernel, arXiv:2410.10989.)
"""

# N counted positions, H hidden, V vocabulary

import importlib.util
import os

import torch
from torch import Tensor

from evertune.errors import TrainingError

NOT_COUNTED = -100


def require_liger(device: torch.device) -> None:
    """Raise TrainingError where Liger's kernels cannot run.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, slowly: for tests.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise TrainingError(
            "numerics.kernels is 'liger', but liger-kernel is not installed.",
            remedy="Run `pip install 'evertune[gpu]'`, or use 'kernels: torch'.",
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TrainingError(
            f"numerics.kernels is 'liger', which needs a GPU; the stage runs on {device.type}.",
            remedy="Use 'kernels: torch', or 'device: cuda'.",
        )


def liger_cross_entropy_sum(hidden_NH: Tensor, targets_N: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Summed negative log-likelihood of the targets, a float32 scalar in nats, with gradient to all float inputs."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(
        hidden_NH,
        weight_VH,
        targets_N,
        bias=bias_V,
        ignore_index=NOT_COUNTED,
        reduction="sum",
        # Chunks' gradients of the head add up in float32, as ours do.
        accum_dtype=torch.float32,
    )
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return loss.float()
