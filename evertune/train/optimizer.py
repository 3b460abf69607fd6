"""AdamW on float32 master copies of the trained weights, the learning-rate schedule, and the average over steps."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from evertune.errors import TrainingError

# Gradients that wait on a GPU for others before they are widened.
WAITING_ELEMENTS = 1 << 24

Schedule = Literal["linear", "cosine", "constant"]


def warmup_steps(share: float, steps: int) -> int:
    """Steps of warm-up, rounded up; at least one step is left at the peak."""
    return min(math.ceil(share * steps), steps - 1)


def rate_factor(step: int, *, steps: int, warmup: int, schedule: Schedule) -> float:
    """Factor of the peak learning rate at a step in [0, steps): above 0 everywhere, 1 at the end of warm-up.

    Warm-up rises along (step + 1) / (warmup + 1). `linear` and `cosine` then fall toward 0, which they would reach at
    step `steps`, one after the last: no step is spent at rate 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


class Masters:
    """The trained weights in float32, with their gradients, AdamW's moments and, when asked, their average.

    `shown` is what the model has been given, unrounded: the weights, in the end their average where there is one. What
    is in `after_step` is called with the weights after each step, before the model and the average follow them.

    A float32 parameter is its own master. A narrower one gets a copy; its gradient is added to the copy's in float32
    as soon as a backward pass has formed it, and freed, so micro-batches do not round away in bfloat16.

    Args:
        trained: the parameters to train, by name; the model keeps computing with them.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) do not decay.
        ema_decay: kept share of the old average at each step. The average begins at the start's weights.
        starts: float32 weights, by name, to begin from where the model has them rounded; they are taken over.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        starts: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._trained = dict(trained)
        starts = starts or {}
        self.weights = {name: _master(one, starts.get(name)) for name, one in self._trained.items()}
        narrow = [(one, self.weights[name]) for name, one in self._trained.items() if one is not self.weights[name]]
        on_gpu = any(one.device.type == "cuda" for one, _ in narrow)
        self._incoming = Incoming(narrow, limit=WAITING_ELEMENTS if on_gpu else 0)
        self.shown: Mapping[str, Tensor] = self.weights
        self.average = {name: one.detach().clone() for name, one in self.weights.items()} if ema_decay else None
        self.after_step: list[Callable[[Mapping[str, Tensor]], None]] = []
        self._ema_decay = ema_decay or 0.0
        groups = [
            {"params": [one for one in self.weights.values() if one.ndim >= 2], "weight_decay": weight_decay},
            {"params": [one for one in self.weights.values() if one.ndim < 2], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)
        self.zero_gradients()

    def zero_gradients(self) -> None:
        self._incoming.forget()
        for weight in self.weights.values():
            weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients accumulated so far; a parameter no loss has reached is absent."""
        return {name: one.grad for name, one in self.weights.items() if one.grad is not None}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Put these gradients, float32 and in the masters' shapes, in place of what has been accumulated."""
        for name, weight in self.weights.items():
            weight.grad = gradients.get(name)

    def clip(self, largest_norm: float | None, *, step: int) -> float:
        """Scale the gradients so that their joint norm is at most `largest_norm`; returns the norm before.

        Raises:
            TrainingError: a gradient is NaN or Inf; names the step and the first such tensor.
        """
        gradients = self.gradients()
        norm = joint_norm(gradients)
        if not torch.isfinite(norm):
            raise _not_finite(gradients, "gradient of", step)
        if largest_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.weights.values()), largest_norm, norm)
        return float(norm)

    def update(self, rate: float) -> None:
        """One step of AdamW at this learning rate; the model's parameters follow their masters, gradients are freed."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.zero_gradients()
        with torch.no_grad():
            for look in self.after_step:
                look(self.weights)
            self._write(self.weights)
            for name, average in (self.average or {}).items():
                average.lerp_(self.weights[name].detach(), 1.0 - self._ema_decay)

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with these weights; after it with its own again, bit for bit."""
        own = {name: one.detach().clone() for name, one in self._trained.items()}
        try:
            with torch.no_grad():
                self._write(weights)
            yield
        finally:
            with torch.no_grad():
                self._write(own)

    def check_finite(self, *, step: int) -> None:
        """Raise TrainingError naming the first trained tensor, or average, that holds NaN or Inf."""
        for what, tensors in (("weight", self.weights), ("average of", self.average or {})):
            if _names_not_finite(tensors):
                raise _not_finite(tensors, what, step)

    @torch.no_grad()
    def follow(self) -> None:
        """Give the model these weights, after they were changed by hand."""
        self._write(self.weights)

    @torch.no_grad()
    def use_average(self) -> None:
        """Give the model the averaged weights, where there is an average. Training does not go on from there."""
        if self.average is not None:
            self.shown = self.average
            self._write(self.average)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs, as groups of tensors: `weights`, `moments` and, when kept, `average`."""
        moments = {}
        for name, weight in self.weights.items():
            for key, value in self._adam.state.get(weight, {}).items():
                moments[f"{name}.{key}"] = value
        found = {"weights": {name: one.detach() for name, one in self.weights.items()}, "moments": moments}
        return found if self.average is None else {**found, "average": self.average}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go back to what `state` returned, bit for bit."""
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
            moments = {key: state["moments"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
            # A weight that no loss has reached yet has no moments. Fused kernels want all of them beside the weight.
            self._adam.state[weight] = {
                k: one.to(weight.device).clone() for k, one in moments.items() if one is not None
            }
        for name, average in (self.average or {}).items():
            average.copy_(state["average"][name])
        self._write(self.weights)
        self.zero_gradients()

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        pairs = [(one, weights[name]) for name, one in self._trained.items() if one is not weights[name]]
        if pairs:
            _copy(*zip(*pairs, strict=True))


class Incoming:
    """Takes the gradients of narrow parameters over into their masters', in float32, while a backward pass forms them.

    Args:
        pairs: parameters and their masters.
        limit: elements that wait for others, at the latest until the end of the pass; at 0 each gradient is taken and
            freed as soon as it is there. On a GPU a kernel for each would take longer to start than to run.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Parameter, Tensor]], *, limit: int) -> None:
        self._limit = limit
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []
        self._elements = 0
        for parameter, master in pairs:
            parameter.register_post_accumulate_grad_hook(partial(self._hear, master))

    def forget(self) -> None:
        """Nothing waits any more: after a pass that has broken off."""
        for narrow, _ in self._waiting:
            narrow.grad = None
        self._waiting, self._elements = [], 0

    def _hear(self, master: Tensor, narrow: nn.Parameter) -> None:
        if self._limit and not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self._take)
        self._waiting.append((narrow, master))
        self._elements += narrow.numel()
        if self._elements >= self._limit:
            self._take()

    @torch.no_grad()
    def _take(self) -> None:
        arrived = [(narrow, master, narrow.grad) for narrow, master in self._waiting if narrow.grad is not None]
        self._waiting, self._elements = [], 0
        if not arrived:
            return
        wide = [torch.empty_like(one, dtype=torch.float32) for *_, one in arrived]
        _copy(wide, [one for *_, one in arrived])
        for (narrow, master, _), new in zip(arrived, wide, strict=True):
            narrow.grad = None
            master.grad = new if master.grad is None else master.grad.add_(new)


def joint_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of all of them together, over all processes where they lie in shards."""
    return full(torch.nn.utils.get_total_norm(list(gradients.values())))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in shards; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may lie in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_shards(values: Sequence[Tensor], like: Iterable[Tensor]) -> list[float]:
    """Numbers that each process has computed from its own parts, summed over those that hold the shards of `like`;
    as they are where nothing lies in shards. In one exchange: all processes call it."""
    told = torch.stack(list(values))
    mesh = next((one.device_mesh for one in like if isinstance(one, DTensor)), None)
    if mesh is not None:
        dist.all_reduce(told, group=mesh.get_group())
    found: list[float] = told.tolist()
    return found


def _master(parameter: nn.Parameter, start: Tensor | None) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return (parameter.detach().float().clone() if start is None else start.detach()).requires_grad_(True)


def _copy(into: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """Copy tensors, from other dtypes too: on a GPU by a few kernels for all."""
    torch._foreach_copy_([own(one) for one in into], [own(one) for one in of])


def _names_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or Inf, in any process."""
    if not tensors:
        return []
    bad = [(~torch.isfinite(own(one))).any().float() for one in tensors.values()]
    return [name for name, one in zip(tensors, over_shards(bad, tensors.values()), strict=True) if one]


def _not_finite(tensors: Mapping[str, Tensor], what: str, step: int) -> TrainingError:
    name = next(iter(_names_not_finite(tensors)), "their joint norm")
    return TrainingError(
        f"step {step}: {what} {name} is not finite (NaN or Inf).",
        remedy="Lower lr or raise warmup; the start checkpoint and all resume points before are intact.",
    )
