"""The language-model head on counted positions only: logits in chunks of positions, never a (batch, time, vocabulary)
tensor.

Each chunk's loss and gradients are formed in the forward pass and only the gradients are kept, so memory is bounded
by one chunk and nothing is computed twice. (The idea of fused linear cross-entropy kernels, arXiv:2410.10989.)
Where every term knows its slope in the logits, cross-entropy and anchor share one softmax, turned in place into that
slope; other terms go through autograd on the chunk's logits, which is the same mathematics in more passes.
"""

# N counted positions, n of a chunk, M positions of a term (a subset of N), m of a chunk, V vocabulary, H hidden

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from evertune.errors import CheckpointError
from evertune.model.mode import evaluating
from evertune.model.packed_weights import frozen_linear
from evertune.train.kernels import liger_cross_entropy_sum
from evertune.train.losses import cross_entropy_sum
from evertune.train.penalty import ClosedForm, PositionValues

# Largest float32 chunk of logits: 2**24 elements, 64 MiB; on a GPU, where each chunk starts two dozen kernels, 256 MiB.
CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS = 1 << 24, 1 << 26
# On a CPU what follows a product finds it in the cache where it is not larger.
CPU_POSITIONS = 128
# Slopes of a trained head's logits that are kept, in its dtype, to form its gradient from: each time a matrix of the
# weight's size is written, read and added, which for a chunk of 64 positions takes longer than the product.
SLOPE_ELEMENTS = 1 << 24

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
    """The linear map from hidden states to logits: weight (V, H), bias (V,) or None.

    has_liger: cross-entropy without further terms goes through Liger's kernels.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    has_liger: bool = False

    def log_probabilities(self, hidden_NH: Tensor) -> Tensor:
        """(N, V) float32, in one piece: the caller chunks."""
        return frozen_linear(hidden_NH, self.weight_VH, self.bias_V).log_softmax(dim=-1, dtype=torch.float32)

    def chunk_positions(self) -> int:
        """How many positions fit a chunk of logits."""
        device = self.weight_VH.device.type
        elements = GPU_CHUNK_ELEMENTS if device == "cuda" else CHUNK_ELEMENTS
        fitting = max(1, elements // self.weight_VH.shape[0])
        return min(fitting, CPU_POSITIONS) if device == "cpu" else fitting


class ModuleHead(Head):
    """The head of a model whose weights are other tensors at other times, as those of a sharded one are: asked each
    time."""

    def __init__(self, linear: torch.nn.Linear, *, has_liger: bool = False) -> None:
        object.__setattr__(self, "_linear", linear)
        object.__setattr__(self, "has_liger", has_liger)

    @property
    def weight_VH(self) -> Tensor:  # type: ignore[override]
        return self._linear.weight  # type: ignore[attr-defined, no-any-return]

    @property
    def bias_V(self) -> Tensor | None:  # type: ignore[override]
        return self._linear.bias  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class PositionTerm:
    """A penalty on the distribution at some counted positions, computed on the same logits as the cross-entropy.

    Attributes:
        name: its key in the metrics.
        mask_N: True where it applies, in the order of the counted positions; M of them.
        weight: factor of the summed penalty in the loss; the caller puts 1 / (positions of the step) in it.
        values: penalties at some of the M positions; a `ClosedForm` where the slope is known.
    """

    name: str
    mask_N: Tensor
    weight: float
    values: PositionValues

    def within(self, start: int, stop: int) -> tuple[Tensor, slice]:
        """Of a chunk of the counted positions: where the term applies, and which of its own positions these are."""
        mask_n = self.mask_N[start:stop]
        first = int(self.mask_N[:start].sum())
        return mask_n, slice(first, first + int(mask_n.sum()))


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
    with evaluating(model):
        logits = model(input_ids=ids_BT, use_cache=False).logits.float()
        hidden = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
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
    if head.has_liger and not terms:
        ce_sum = liger_cross_entropy_sum(hidden_NH, targets_N, head.weight_VH, head.bias_V)
        return HeadLoss(loss=ce_weight * ce_sum, ce_sum=ce_sum.detach(), term_sums={})
    is_closed = all(isinstance(one.values, ClosedForm) for one in terms)
    is_narrow = is_closed and all(cast(ClosedForm, one.values).is_narrow for one in terms)
    # With a second matrix beside the logits of a chunk, both have to fit where otherwise one does.
    step = chunk_positions or (head.chunk_positions() if is_narrow else max(1, head.chunk_positions() // 2))
    chunk_loss = partial(
        _chunk_in_place if is_closed else _chunk_by_autograd, targets_N=targets_N, ce_weight=ce_weight, terms=terms
    )
    wants_grad = torch.is_grad_enabled()
    loss, sums = _ChunkedLoss.apply(hidden_NH, head.weight_VH, head.bias_V, chunk_loss, step, wants_grad)
    named = {term.name: sums[i + 1] for i, term in enumerate(terms)}
    return HeadLoss(loss=loss, ce_sum=sums[0], term_sums=named)


Parts = Sequence[Tensor | None]
"""Hidden states (n, H) of a chunk, the head's weight and bias."""


@dataclass(frozen=True)
class _Chunk:
    """Loss and sums (without gradient) of a chunk, and the gradients of its parts that were wanted, in their order.

    slope_nV: where given, the loss's slope in the logits, from which the head's gradient is yet to be formed.
    """

    loss: Tensor
    sums: list[Tensor]
    gradients: Sequence[Tensor]
    slope_nV: Tensor | None = None


def _chunk_by_autograd(
    parts: Parts,
    start: int,
    wanted: Sequence[bool],
    *,
    targets_N: Tensor,
    ce_weight: float,
    terms: Sequence[PositionTerm],
) -> _Chunk:
    with torch.enable_grad():
        parts = [
            None if one is None else one.detach().requires_grad_(need) for one, need in zip(parts, wanted, strict=True)
        ]
        logp_nV = F.linear(*parts).log_softmax(dim=-1, dtype=torch.float32)  # type: ignore[arg-type]
        stop = start + len(logp_nV)
        sums = [cross_entropy_sum(logp_nV, targets_N[start:stop])]
        loss = ce_weight * sums[0]
        for term in terms:
            mask, chosen = term.within(start, stop)
            rows = logp_nV if bool(mask.all()) else logp_nV[mask]
            sums.append(term.values(rows, chosen).sum() if len(rows) else logp_nV.new_zeros(()))
            loss = loss + term.weight * sums[-1]
    inputs = [one for one, need in zip(parts, wanted, strict=True) if need and one is not None]
    gradients = torch.autograd.grad(loss, inputs) if inputs else ()
    return _Chunk(loss.detach(), [one.detach() for one in sums], gradients)


def _chunk_in_place(
    parts: Parts,
    start: int,
    wanted: Sequence[bool],
    *,
    targets_N: Tensor,
    ce_weight: float,
    terms: Sequence[PositionTerm],
) -> _Chunk:
    """The slope of cross-entropy in the logits is p - onehot, that of a closed form a factor of p with corrections."""
    hidden_nH, weight_VH, bias_V = parts
    assert hidden_nH is not None and weight_VH is not None
    logp_nV = frozen_linear(hidden_nH, weight_VH, bias_V).log_softmax(dim=-1, dtype=torch.float32)
    stop = start + len(logp_nV)
    targets_n1 = targets_N[start:stop].unsqueeze(1)
    sums = [-logp_nV.gather(1, targets_n1).sum()]
    places = [term.within(start, stop) for term in terms]
    rows = [mask.nonzero().squeeze(1) for mask, _ in places]
    finish = [
        cast(ClosedForm, term.values).begin(logp_nV, rows_m, chosen)
        for term, rows_m, (_, chosen) in zip(terms, rows, places, strict=True)
    ]
    p_nV = logp_nV.exp_()
    slopes = [one(p_nV) for one in finish]
    sums += [one.values_m.sum() for one in slopes]
    loss = torch.stack(
        [weight * one for weight, one in zip([ce_weight, *(t.weight for t in terms)], sums, strict=True)]
    )
    if not any(wanted):
        return _Chunk(loss.sum(), sums, ())
    slope_nV = p_nV
    factor_n = torch.full((len(slope_nV),), ce_weight, device=slope_nV.device)
    for term, rows_m, one in zip(terms, rows, slopes, strict=True):
        factor_n[rows_m] += term.weight * one.factor_m
    slope_nV.mul_(factor_n.unsqueeze(1))
    slope_nV.scatter_add_(1, targets_n1, torch.full_like(targets_n1, -ce_weight, dtype=torch.float32))
    for term, rows_m, one in zip(terms, rows, slopes, strict=True):
        one.correct(slope_nV, rows_m, term.weight)
    narrow_nV = slope_nV.to(weight_VH.dtype)
    gradients = []
    if wanted[0]:
        gradients.append(narrow_nV @ weight_VH)
    if wanted[2]:
        gradients.append(slope_nV.sum(dim=0))
    return _Chunk(loss.sum(), sums, gradients, narrow_nV if wanted[1] else None)


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
            logp_nV = _log_probabilities(hidden_NH[start : start + step], weight_VH, bias_V, temperature)
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
        _, wants_weight, wants_bias = wanted = [False, *ctx.needs_input_grad[1:3]]
        grads = _Gradients(wanted)
        for start in range(0, len(hidden_NH) if any(wanted) else 0, ctx.step):
            chosen = slice(start, start + ctx.step)
            hidden_nH = hidden_NH[chosen]
            logp_nV = _log_probabilities(hidden_nH, weight_VH, bias_V, ctx.temperature)
            slope_nV = _logit_slopes(logp_nV, targets_N[chosen]).mul_(grad_N[chosen].unsqueeze(1) / ctx.temperature)
            grads.add(
                [slope_nV.sum(dim=0)] if wants_bias else [],
                slope=(slope_nV.to(weight_VH.dtype), hidden_nH) if wants_weight else None,
            )
        _, weight, bias = grads.finish(None, weight_VH, bias_V)
        hidden = None if slopes_NH is None else (grad_N.unsqueeze(1) * slopes_NH).to(hidden_NH.dtype)
        return hidden, weight, bias, None, None, None, None


def _log_probabilities(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    return (frozen_linear(hidden_nH, weight_VH, bias_V).float() / temperature).log_softmax(dim=-1)


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
        chunk_loss: Callable[[Parts, int, Sequence[bool]], _Chunk],
        step: int,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = [wants_grad and needed for needed in ctx.needs_input_grad[:3]]
        grads = _Gradients(wanted)
        chunks = []
        for start in range(0, len(hidden_NH), step):
            hidden_nH = hidden_NH[start : start + step]
            chunk = chunk_loss((hidden_nH, weight_VH, bias_V), start, wanted)
            if any(wanted):
                grads.add(chunk.gradients, slope=None if chunk.slope_nV is None else (chunk.slope_nV, hidden_nH))
            chunks.append((chunk.loss, torch.stack(chunk.sums)))
        ctx.grads = grads.finish(hidden_NH, weight_VH, bias_V)
        assert chunks, "no counted position"
        loss, sums = (torch.stack(each).sum(dim=0) for each in zip(*chunks, strict=True))
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
        self._slopes: list[tuple[Tensor, Tensor]] = []

    def add(self, gradients: Sequence[Tensor], *, slope: tuple[Tensor, Tensor] | None = None) -> None:
        """One chunk's, of those that are wanted, in order; or for the weight's what it is the product of."""
        found = iter(gradients)
        if self._wanted[0]:
            self._hidden.append(next(found))
        for i in (0, 1):
            if self._wanted[i + 1] and (i or slope is None):
                self._add_shared(i, next(found))
        if slope is not None:
            self._slopes.append(slope)
            if sum(one.numel() for one, _ in self._slopes) >= SLOPE_ELEMENTS:
                self._multiply()

    def finish(self, *inputs: Tensor | None) -> list[Tensor | None]:
        self._multiply()
        hidden = torch.cat(self._hidden) if self._hidden else None
        shared = [
            None if grad is None or one is None else grad.to(one.dtype)
            for grad, one in zip(self._shared, inputs[1:], strict=True)
        ]
        return [hidden, *shared]

    def _add_shared(self, i: int, new: Tensor) -> None:
        old = self._shared[i]
        # One stays as it is; only a second one makes the float32 sum worth its memory.
        self._shared[i] = new if old is None else old.float().add_(new)

    def _multiply(self) -> None:
        if self._slopes:
            columns = zip(*self._slopes, strict=True)
            slope_nV, hidden_nH = (torch.cat(each) if len(each) > 1 else each[0] for each in columns)
            self._slopes.clear()
            self._add_shared(0, slope_nV.t() @ hidden_nH)
