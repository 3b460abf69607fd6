"""The language-model head on counted positions only: logits in chunks of positions, never a (batch, time, vocabulary)
tensor.

Each chunk's loss and gradients are formed in the forward pass and only the gradients are kept, so memory is bounded
by one chunk and nothing is computed twice. (The idea of fused linear cross-entropy kernels, arXiv:2410.10989.)
"""

# N counted positions, M positions of a term (a subset of N), V vocabulary, H hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.errors import CheckpointError
from evertune.train.losses import cross_entropy_sum

# Largest float32 chunk of logits: 2**24 elements, 64 MiB. A step of 341 positions of a 49k vocabulary is one GEMM.
CHUNK_ELEMENTS = 1 << 24

# Transforms of the logits after the head, by their key in the config, with the value that means "none".
_LOGIT_TRANSFORMS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logits_soft_cap": (None,),
    "output_multiplier_scale": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
    "dim_model_base": (None,),
}


@dataclass(frozen=True)
class Head:
    """The linear map from hidden states to logits: weight (V, H), bias (V,) or None."""

    weight_VH: Tensor
    bias_V: Tensor | None

    def log_probabilities(self, hidden_NH: Tensor) -> Tensor:
        """(N, V) float32, in one piece: the caller chunks."""
        return F.linear(hidden_NH, self.weight_VH, self.bias_V).float().log_softmax(dim=-1)

    def chunk_positions(self) -> int:
        """How many positions fit a chunk of logits."""
        return max(1, CHUNK_ELEMENTS // self.weight_VH.shape[0])


@dataclass(frozen=True)
class PositionTerm:
    """A penalty on the distribution at some counted positions, computed on the same logits as the cross-entropy.

    Attributes:
        name: its key in the metrics.
        mask_N: True where it applies, in the order of the counted positions; M of them.
        weight: factor of the summed penalty in the loss; the caller puts 1 / (positions of the step) in it.
        values: (log-probabilities (m, V), slice of the M positions) -> (m,) penalties in nats.
    """

    name: str
    mask_N: Tensor
    weight: float
    values: Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class HeadLoss:
    """`loss` carries the gradient; the sums (nats, undivided) are for the metrics and carry none."""

    loss: Tensor
    ce_sum: Tensor
    term_sums: dict[str, Tensor]


def split_model(model: torch.nn.Module) -> tuple[torch.nn.Module, Head]:
    """The decoder that yields last hidden states, and the head; works through PEFT.

    Raises:
        CheckpointError: the logits are not a plain linear map of the last hidden state: by the config, or by a trial
            on a few tokens.
    """
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    refuse_logit_transforms(inner.config)
    linear = inner.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        raise CheckpointError(
            f"{type(inner).__name__}: the output head is {type(linear).__name__}, expected a plain linear layer.",
            remedy="Leave the head out of the adapter's targets.",
        )
    decoder, head = inner.get_decoder(), Head(linear.weight, linear.bias)
    _try_on_a_few_tokens(inner, decoder, head)
    return decoder, head


def refuse_logit_transforms(config: Any) -> None:
    """Raise CheckpointError when the config names a softcap or scale that a linear head would leave out."""
    text = config.get_text_config()
    for key, neutral in _LOGIT_TRANSFORMS.items():
        found = getattr(text, key, None)
        if found not in neutral:
            raise CheckpointError(
                f"config.json: '{key}' is {found}: this architecture ({text.model_type}) changes the logits after the "
                "head, and training here computes them from the head alone.",
                remedy="Train this model with an external stage.",
            )


@torch.no_grad()
def _try_on_a_few_tokens(model: Any, decoder: Any, head: Head) -> None:
    """The names above cannot be complete: compare with the model's own logits."""
    ids_BT = torch.arange(min(8, len(head.weight_VH)), device=head.weight_VH.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids_BT, use_cache=False).logits.float()
    hidden = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    model.train(was_training)
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            f"{type(model).__name__}: its logits are NaN or Inf, though its weights are finite: they overflow.",
            remedy="Go back to an earlier checkpoint, or try 'numerics: {dtype: float32}'.",
        )
    difference = (F.linear(hidden, head.weight_VH, head.bias_V).float() - logits).abs().max()
    # Half a per cent is what the last bit of a bfloat16 is worth; a scale or a cap differs by far more.
    if not difference <= 0.02 * logits.abs().max():
        raise CheckpointError(
            f"{type(model).__name__}: its logits are not the head's output on the last hidden states (they differ by "
            f"{float(difference):.3g}), and training here computes them from the head alone.",
            remedy="Train this model with an external stage.",
        )


def head_loss(
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    head: Head,
    ce_weight: float,
    terms: Sequence[PositionTerm] = (),
    chunk_positions: int | None = None,
) -> HeadLoss:
    """Cross-entropy and penalties at the counted positions: `ce_weight * ce_sum + sum(weight * term_sum)`.

    Gradients reach `hidden_NH` and, where it is trained, the head. Accumulates in float32 over chunks; a single chunk
    forms the head's gradient in one GEMM.

    Args:
        hidden_NH: hidden states at the positions whose next token is counted, N >= 1.
        targets_N: those next tokens.
        chunk_positions: positions per chunk; by memory when not given.
    """
    step = chunk_positions or head.chunk_positions()

    def chunk_loss(logits_NV: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        stop = start + logits_NV.shape[0]
        logp_NV = logits_NV.float().log_softmax(dim=-1)
        sums = [cross_entropy_sum(logp_NV, targets_N[start:stop])]
        loss = ce_weight * sums[0]
        for term in terms:
            mask = term.mask_N[start:stop]
            first, count = int(term.mask_N[:start].sum()), int(mask.sum())
            rows = logp_NV if count == len(mask) else logp_NV[mask]
            total = term.values(rows, slice(first, first + count)).sum() if count else logp_NV.new_zeros(())
            sums.append(total)
            loss = loss + term.weight * total
        return loss, sums

    wants_grad = torch.is_grad_enabled()
    loss, sums = _ChunkedLoss.apply(hidden_NH, head.weight_VH, head.bias_V, chunk_loss, step, wants_grad)
    named = {term.name: sums[i + 1] for i, term in enumerate(terms)}
    return HeadLoss(loss=loss, ce_sum=sums[0], term_sums=named)


def target_log_probabilities(
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    head: Head,
    temperature: float = 1.0,
    chunk_positions: int | None = None,
) -> Tensor:
    """Log-probabilities (N,) float32 of the target words, for losses that are no plain sum over positions.

    Args:
        temperature: what the logits are divided by.

    Differentiable in `hidden_NH` and, where it is trained, the head. The slope of each position's value is formed with
    the value, so that a frozen head is applied once; for a trained one the backward pass applies it again.
    """
    step = chunk_positions or head.chunk_positions()
    wants_grad = torch.is_grad_enabled()
    logp_N: Tensor = _TargetLogProbabilities.apply(
        hidden_NH, head.weight_VH, head.bias_V, targets_N, step, temperature, wants_grad
    )
    return logp_N


class _TargetLogProbabilities(torch.autograd.Function):
    """The slope of log p(target) in the logits is onehot(target) - p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        step: int,
        temperature: float,
        wants_grad: bool,
    ) -> Tensor:
        wants_slope = wants_grad and ctx.needs_input_grad[0]
        values, slopes = [], []
        for start in range(0, len(hidden_NH), step):
            targets = targets_N[start : start + step]
            logits_nV = F.linear(hidden_NH[start : start + step], weight_VH, bias_V).float()
            logp_nV = (logits_nV / temperature).log_softmax(dim=-1)
            values.append(logp_nV.gather(1, targets.unsqueeze(1)).squeeze(1))
            if wants_slope:
                slopes.append((_logit_slopes(logp_nV, targets) / temperature).to(weight_VH.dtype) @ weight_VH)
        ctx.step, ctx.temperature = step, temperature
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, torch.cat(slopes) if slopes else None)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        hidden_NH, weight_VH, bias_V, targets_N, slopes_NH = ctx.saved_tensors
        (grad_N,) = upstream
        grads = _Gradients([False, *ctx.needs_input_grad[1:3]])
        if any(ctx.needs_input_grad[1:3]):
            for start in range(0, len(hidden_NH), ctx.step):
                chosen = slice(start, start + ctx.step)
                with torch.enable_grad():
                    parts = [
                        None if one is None else one.detach().requires_grad_(need)
                        for one, need in zip(
                            (hidden_NH[chosen], weight_VH, bias_V), (False, *ctx.needs_input_grad[1:3]), strict=True
                        )
                    ]
                    logits_nV = F.linear(*parts).float()  # type: ignore[arg-type]
                    logp_nV = (logits_nV / ctx.temperature).log_softmax(dim=-1)
                    taken_n = logp_nV.gather(1, targets_N[chosen].unsqueeze(1)).squeeze(1)
                    loss = (taken_n * grad_N[chosen]).sum()
                grads.add(loss, parts)
        _, weight, bias = grads.finish(None, weight_VH, bias_V)
        hidden = None if slopes_NH is None else (grad_N.unsqueeze(1) * slopes_NH).to(hidden_NH.dtype)
        return hidden, weight, bias, None, None, None, None


def _logit_slopes(logp_nV: Tensor, targets_n: Tensor) -> Tensor:
    slopes_nV = logp_nV.exp().neg_()
    return slopes_nV.scatter_add_(1, targets_n.unsqueeze(1), slopes_nV.new_ones(len(targets_n), 1))


class _ChunkedLoss(torch.autograd.Function):
    """Loss over chunks of positions with the gradients formed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        chunk_loss: Callable[[Tensor, int], tuple[Tensor, list[Tensor]]],
        step: int,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [wants_grad and needed for needed in ctx.needs_input_grad[:3]]
        loss, sums, grads = torch.zeros((), device=hidden_NH.device), None, _Gradients(wanted)
        for start in range(0, len(hidden_NH), step):
            with torch.enable_grad():
                parts = [
                    None if one is None else one.detach().requires_grad_(need)
                    for one, need in zip((hidden_NH[start : start + step], weight_VH, bias_V), wanted, strict=True)
                ]
                chunk, chunk_sums = chunk_loss(F.linear(*parts), start)  # type: ignore[arg-type]
            if any(wanted):
                grads.add(chunk, parts)
            loss = loss + chunk.detach()
            stacked = torch.stack([one.detach() for one in chunk_sums])
            sums = stacked if sums is None else sums + stacked
        ctx.grads = grads.finish(hidden_NH, weight_VH, bias_V)
        assert sums is not None, "no counted position"
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        return (*(None if one is None else one * upstream[0] for one in grads), None, None, None)


class _Gradients:
    """Collects the gradients of hidden states (concatenated) and of weight and bias (added in float32)."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self._wanted = wanted
        self._hidden: list[Tensor] = []
        self._shared: list[Tensor | None] = [None, None]

    def add(self, loss: Tensor, parts: Sequence[Tensor | None]) -> None:
        inputs = [one for one, need in zip(parts, self._wanted, strict=True) if need and one is not None]
        found = iter(torch.autograd.grad(loss, inputs))
        if self._wanted[0]:
            self._hidden.append(next(found))
        for i in (0, 1):
            if self._wanted[i + 1]:
                new, old = next(found), self._shared[i]
                # One chunk stays as it is; only a second one makes the float32 sum worth its memory.
                self._shared[i] = new if old is None else old.float().add_(new)

    def finish(self, *inputs: Tensor | None) -> list[Tensor | None]:
        hidden = torch.cat(self._hidden) if self._hidden else None
        shared = [
            None if grad is None or one is None else grad.to(one.dtype)
            for grad, one in zip(self._shared, inputs[1:], strict=True)
        ]
        return [hidden, *shared]
