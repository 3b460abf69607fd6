"""How much each weight matters to remembered rows: Fisher information and MAS, one row at a time.

Importance is a mean of squares (or of absolute values) of gradients of *single* rows. The square of a batch's mean
gradient, which some libraries take, is another number: rows that pull in opposite directions cancel in it, and what
both of them need counts as free.
"""

# N counted positions, V vocabulary

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.train.batch import collate, counted_positions
from evertune.train.head import head_loss
from evertune.train.plugins import Bench

Tensors = dict[str, Tensor]


def mean_of(
    gradients: Iterable[Mapping[str, Tensor]], like: Mapping[str, Tensor], count: int, power: Callable[[Tensor], Tensor]
) -> Tensors:
    """Sum of `power` of each gradient, divided by `count`, in float32; only one gradient is in memory at a time.

    Args:
        gradients: by weight name; a weight that a gradient lacks gets 0 from it.
        like: the weights, for names and shapes.
    """
    total = {name: torch.zeros_like(one, dtype=torch.float32, requires_grad=False) for name, one in like.items()}
    for gradient in gradients:
        for name, one in gradient.items():
            total[name] += power(one.float())
    return {name: one / count for name, one in total.items()}


def fisher(bench: Bench, rows: Sequence[EncodedRow], *, labels: str) -> Tensors:
    """Diagonal Fisher information per counted token at the present weights.

    The mean over rows' tokens of the squared gradient of a row's log-likelihood. With `true` labels each counted token
    is drawn from the model's own distribution after the row's own words: the cross terms of different tokens vanish in
    expectation, so that one draw a row is unbiased. With `empirical` labels the row's tokens are taken: Kirkpatrick et
    al. write the former, most code does the latter, and the two agree only where the model fits its data.
    """
    tokens = sum(counted_positions(row) for row in rows)
    gradients = (_likelihood_gradient(bench, row, is_drawn=labels == "true") for row in rows)
    return mean_of(gradients, bench.trained, tokens, torch.square)


def mas_importance(bench: Bench, rows: Sequence[EncodedRow]) -> Tensors:
    """Mean over rows of |d (mean over its counted positions of the squared norm of the logits) / d weight|."""
    return mean_of((_norm_gradient(bench, row) for row in rows), bench.trained, len(rows), torch.abs)


def normalised(importance: Mapping[str, Tensor]) -> Tensors:
    """Divided by its mean over all weights; zero stays zero."""
    count = sum(one.numel() for one in importance.values())
    mean = sum(float(one.double().sum()) for one in importance.values()) / max(count, 1)
    return {name: one / mean if mean > 0 else one for name, one in importance.items()}


def _likelihood_gradient(bench: Bench, row: EncodedRow, *, is_drawn: bool) -> Tensors:
    def loss(hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        if is_drawn:
            targets_N = _draw(bench, hidden_NH.detach(), row)
        return head_loss(hidden_NH, targets_N, head=bench.policy.head, ce_weight=1.0).loss

    return _gradient(bench, row, loss)


def _norm_gradient(bench: Bench, row: EncodedRow) -> Tensors:
    def norm(hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        head = bench.policy.head
        logits_NV = hidden_NH.float() @ head.weight_VH.float().T
        if head.bias_V is not None:
            logits_NV = logits_NV + head.bias_V.float()
        return logits_NV.square().sum(dim=-1).mean()

    return _gradient(bench, row, norm)


def _gradient(bench: Bench, row: EncodedRow, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensors:
    """Gradient of a function of one row's hidden states (N, H) and targets (N,), without dropout."""
    policy, masters = bench.policy, bench.trainer.masters
    policy.model.eval()
    masters.zero_gradients()
    batch = collate([row], pad_id=policy.pad_id, device=policy.device)
    loss(policy.counted_hidden(batch), batch.targets_N).backward()  # type: ignore[no-untyped-call]
    found = masters.gradients()
    masters.zero_gradients()
    return found


@torch.no_grad()
def _draw(bench: Bench, hidden_NH: Tensor, row: EncodedRow) -> Tensor:
    """A token for each position from the model's distribution, from the seed and the row alone."""
    seed = int.from_bytes(sha256(f"{bench.seed}/{row.digest}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    head = bench.policy.head
    parts = [head.log_probabilities(part).exp().cpu() for part in hidden_NH.split(head.chunk_positions())]
    drawn_N = torch.multinomial(torch.cat(parts), 1, generator=generator).squeeze(1)
    return drawn_N.to(hidden_NH.device)
