"""The one training loop, on accelerate: steps of micro-batches, gradients in float32, finite or not at all.

A step's loss is a sum over its counted tokens divided by their number in the whole step, over all micro-batches and
processes, so that how a step is cut up changes speed and memory, not the result.
"""

import contextlib
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from evertune.data.encode import Item
from evertune.errors import TrainingError
from evertune.measure.products import inner_product, squared_norm
from evertune.train.batch import counted_positions
from evertune.train.objective import CrossEntropy, Objective, Policy, StepCounts
from evertune.train.optimizer import Masters, Schedule, joint_norm, over_shards, own, rate_factor
from evertune.train.penalty import GradientRule, Penalty
from evertune.train.resume import ResumePoints
from evertune.train.sink import Metrics, Sink

# What `accelerate launch` may be asked for, and this loop does not do.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "sharded weights (FSDP)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "several kinds of parallelism",
}


class Feed(Protocol):
    """The stream of rows, as functions of the place and, where the model itself makes rows, of its weights."""

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""

    @property
    def micro_steps(self) -> int:
        """Forward passes of one process in a step."""

    @property
    def save_every(self) -> int:
        """Resume points may lie after multiples of this many steps only."""

    def prepare(self, step: int) -> Metrics:
        """Make ready what the step will show; returns what its metrics should say of that. Called once before each
        step."""

    def recall(self, history: Sequence[Metrics]) -> None:
        """Go on from the metrics of the steps that are done. Called once, before the first step of a performance."""

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[Item]:
        """The items of one forward pass of one process; may be empty."""

    def step_rows(self, step: int) -> Sequence[Item]:
        """The items of a whole step, over all micro-batches and processes."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast.

    Attributes:
        steps: optimizer steps in all.
        micro_steps: forward passes of one process in a step.
        rate: peak learning rate.
        warmup: steps of warm-up.
        clip: largest norm of the gradient, None for no clipping.
        seed: of the dropout masks.
    """

    steps: int
    micro_steps: int
    rate: float
    schedule: Schedule
    warmup: int
    clip: float | None
    seed: int


@dataclass
class Trainer:
    """Performs optimizer steps. State lies in `masters` and in the rules only.

    Args:
        feed: the stream of rows.
        penalties: terms added to the objective.
        rules: change each step's gradient, in this order; use `add_rule`, so that they see the weights too.
        losses: of the step under way, for rules.
        replay_ratio: where given, the replayed rows' part of each step, their penalties included, is weighed so that
            its gradient has this share of the norm of the new rows' gradient. Else the objective's weights stand.
        whole: what the feed runs the model in, where it does.
    """

    policy: Policy
    masters: Masters
    feed: Feed
    pace: Pace
    accelerator: Accelerator
    penalties: Sequence[Penalty] = ()
    objective: Objective = CrossEntropy()  # noqa: RUF009 - it holds nothing
    rules: Sequence[GradientRule] = ()
    replay_ratio: float | None = None
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    losses: Metrics = field(default_factory=dict)

    def add_rule(self, rule: GradientRule) -> None:
        """Let a rule change gradients and see the weights from the next step on."""
        self.rules = [*self.rules, rule]
        self.masters.after_step.append(rule.see)

    def step(self, step: int) -> Metrics:
        """Perform step number `step` (from 0); returns its metrics, in nats per counted or penalised token.

        Raises:
            TrainingError: loss or gradient is NaN or Inf; the weights are then as they were before the step.
        """
        with self.whole():
            prepared = self.feed.prepare(step)
        counts = self.count(step)
        if not self.policy.model.training:  # a walk through thousands of modules
            self.policy.model.train()
        sums, told = self._accumulate(step, counts)
        self.losses = losses = self._finish_losses(sums, step, counts)
        told |= self._apply_rules(step)
        norm = self.masters.clip(self.pace.clip, step=step + 1)
        rate = self.pace.rate * rate_factor(
            step, steps=self.pace.steps, warmup=self.pace.warmup, schedule=self.pace.schedule
        )
        self.masters.update(rate)
        return {
            "step": step + 1,
            "steps": self.pace.steps,
            **losses,
            **told,
            **prepared,
            "lr": rate,
            "grad_norm": norm,
            "tokens": counts.tokens,
            "counted_tokens": counts.counted,
            "new_rows": counts.rows - counts.replayed,
            "replay_rows": counts.replayed,
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything a resumed run needs: that of the masters, and of each rule that has some."""
        rules = {f"rule-{rule.name}": rule.state() for rule in self.rules}
        return {**self.masters.state(), **{name: one for name, one in rules.items() if one}}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go back to what `state` returned, bit for bit."""
        self.masters.load_state(state)
        for rule in self.rules:
            rule.load_state(state.get(f"rule-{rule.name}", {}))

    def _accumulate(self, step: int, counts: StepCounts) -> tuple[Tensor, dict[str, float]]:
        """The step's sums and, in the masters, its gradient; and how replay was weighed, where it is by its norm."""
        if self.replay_ratio is None:
            return self._sweep(step, counts), {}
        sums = self._sweep(step, counts, is_replay=False)
        new = self.masters.gradients()
        self.masters.zero_gradients()
        sums += self._sweep(step, counts, is_replay=True)
        replayed = self.masters.gradients()
        norms = [float(joint_norm(one)) for one in (new, replayed)]
        # A step without new rows has nothing to be measured against, and a norm of 0 nothing to weigh.
        has_both = counts.replayed < counts.rows and norms[1] > 0.0
        weight = self.replay_ratio * norms[0] / norms[1] if has_both else 1.0
        for name, one in replayed.items():
            new[name] = new[name].add_(one, alpha=weight) if name in new else one.mul_(weight)
        self.masters.set_gradients(new)
        return sums, {"replay_weight": weight} if counts.replayed else {}

    def _sweep(self, step: int, counts: StepCounts, *, is_replay: bool | None = None) -> Tensor:
        """Forward and backward of a step's items, or of its replayed or new ones alone; gradients are summed over
        processes, the returned sums are not."""
        rank = self.accelerator.process_index
        sums = torch.zeros(len(counts.divisors) + len(self.penalties), device=self.policy.device)
        for micro_step in range(self.pace.micro_steps):
            items = self.feed.micro_batch(step, micro_step, rank)
            if is_replay is not None:
                items = [one for one in items if one.is_replay == is_replay]
            if items:
                with dropout_seed(self.policy.device, self.pace.seed, step, micro_step, rank):
                    sums += self.backward(items, counts)
        if self.policy.sharded is not None:
            self.policy.sharded.finish()
        elif self.accelerator.num_processes > 1:
            for weight in self.masters.weights.values():
                local = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self.accelerator.reduce(local, "sum")
        return sums

    def _apply_rules(self, step: int) -> dict[str, float]:
        told: dict[str, float] = {}
        for rule in self.rules:
            gradients = self.masters.gradients()
            told |= rule.change(gradients, step)
            # A rule may have formed gradients of its own in the same place.
            self.masters.set_gradients(gradients)
        return told

    def count(self, step: int) -> StepCounts:
        """Count the items of a step over all processes."""
        return count_items(self.feed.step_rows(step), self.objective, self.penalties)

    def backward(self, items: Sequence[Item], counts: StepCounts) -> Tensor:
        """One micro-batch: forward, backward, its gradient added to the masters'.

        Returns:
            Undivided sums: the objective's, then of each penalty in nats.
        """
        return self.objective.backward(self.policy, items, counts, self.penalties)

    def _finish_losses(self, sums: Tensor, step: int, counts: StepCounts) -> Metrics:
        """Sum losses over processes, add the penalties on weights, check that all is finite."""
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        divisors = {**counts.divisors, **counts.penalised}
        losses = {
            name: one / divisors[name] for name, one in zip(divisors, sums.tolist(), strict=True) if divisors[name]
        }
        for penalty in self.penalties:
            value = penalty.on_weights(self.masters.weights)
            if value is not None:
                (penalty.weight * value).backward()  # type: ignore[no-untyped-call]
                losses[penalty.name] = float(value.detach())
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingError(
                    f"step {step + 1}: {'the loss' if name == 'loss' else 'penalty ' + name} is {loss}.",
                    remedy="Lower lr or raise warmup; the start checkpoint and all resume points before are intact.",
                )
        return losses


def train(
    trainer: Trainer,
    points: ResumePoints,
    sink: Sink,
    *,
    first: int,
    save_steps: int,
    brake: Callable[[Metrics], str | None] = lambda metrics: None,
    observe: Callable[[Metrics], Metrics] = lambda metrics: {},
    keep: Callable[[int], None] = lambda done: None,
) -> None:
    """Perform the steps from `first` on, with a resume point about every `save_steps`, where the feed allows one.

    After SIGINT or SIGTERM the steps up to the next place for a resume point are finished and saved, and
    KeyboardInterrupt raised.

    Args:
        brake: says of a step's metrics why the stage should end there, or None.
        observe: is given each step's metrics in order, in a run that goes on those of the steps before it first, and
            returns what to log beside them.
        keep: is called after each step with the number of steps done.

    Raises:
        TrainingError: NaN or Inf in loss, gradient or weights.
        KeyboardInterrupt: the run was asked to stop; the same order goes on from where it stopped.
    """
    every = trainer.feed.save_every
    for metrics in sink.history:
        observe(metrics)
    is_over = bool(sink.history) and brake(sink.history[-1]) is not None
    with stop_requests() as requests:
        for step in range(first, first if is_over else trainer.pace.steps):
            began = time.monotonic()
            metrics = trainer.step(step)
            seconds = time.monotonic() - began
            metrics |= observe(metrics)
            sink.log({**metrics, "seconds": seconds, "tokens_per_second": metrics["tokens"] / max(seconds, 1e-9)})
            if brake(metrics) is not None:
                break
            done = step + 1
            keep(done)
            may_save = done % every == 0
            is_stopping = may_save and _any_process(trainer.accelerator, bool(requests))
            if may_save and (done // save_steps > (done - every) // save_steps or is_stopping):
                trainer.masters.check_finite(step=done)
                if trainer.policy.sharded is not None or trainer.accelerator.is_main_process:
                    points.save(done, trainer.state(), sink.history, is_sharded=trainer.policy.sharded is not None)
                wait_for_all(trainer.accelerator)
            if is_stopping:
                raise KeyboardInterrupt
    trainer.masters.check_finite(step=len(sink.history))


def gradient_of(trainer: Trainer, items: Sequence[Item]) -> dict[str, Tensor]:
    """The gradient of the objective on these items at the present weights, without dropout and penalties.

    Leaves the trainer's own gradients empty.
    """
    trainer.policy.model.eval()
    trainer.masters.zero_gradients()
    trainer.objective.backward(trainer.policy, items, count_items(items, trainer.objective, ()), ())
    if trainer.policy.sharded is not None:
        trainer.policy.sharded.finish()
    gradients = trainer.masters.gradients()
    trainer.masters.zero_gradients()
    return gradients


def count_items(items: Sequence[Item], objective: Objective, penalties: Sequence[Penalty]) -> StepCounts:
    """What the sums over these items are divided by."""
    rows = [row for item in items for row in item.rows]
    return StepCounts(
        divisors=objective.divisors(items),
        penalised={one.name: sum(counted_positions(row) for row in rows if one.applies_to(row)) for one in penalties},
        counted=sum(counted_positions(row) for row in rows),
        tokens=sum(len(row.ids) for row in rows),
        rows=len(items),
        replayed=sum(item.is_replay for item in items),
    )


def cosines(one: Mapping[str, Tensor], other: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, float]:
    """Cosines of two gradients, by part: over the tensors in whose name the part's text occurs, each read once.

    Sums are in float64; 0 where one of the gradients vanishes.
    """
    names = list(one.keys() | other.keys())
    sums = [total for name in names for total in _products(one.get(name), other.get(name))]
    values = over_shards(sums, [*one.values(), *other.values()]) if sums else []
    of_name = dict(zip(names, zip(*(iter(values),) * 3, strict=True), strict=True))
    found = {}
    for part, text in parts.items():
        triples = [triple for name, triple in of_name.items() if text in name]
        dot, *squares = map(math.fsum, zip(*triples, strict=True)) if triples else (0.0, 0.0, 0.0)
        found[part] = dot / math.sqrt(squares[0] * squares[1]) if min(squares) > 0.0 else 0.0
    return found


def _products(one: Tensor | None, other: Tensor | None) -> list[Tensor]:
    """Of what this process holds of two tensors: their dot product, and of each with itself."""
    held = [None if each is None else own(each) for each in (one, other)]
    like = next(each for each in held if each is not None)
    a, b = (torch.zeros_like(like) if each is None else each for each in held)
    return [inner_product(a, b), squared_norm(a), squared_norm(b)]


@contextlib.contextmanager
def dropout_seed(device: torch.device, *parts: int) -> Iterator[None]:
    """Inside, random masks are a function of the parts; outside, the global generators are as before."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big"))
        yield


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are collected in the list instead of acting. Does nothing outside the main thread,
    where Python delivers no signals."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_accelerator(*, device: str, track: Sequence[str], logging_dir: Any) -> Accelerator:
    """The processes and the device of this stage. Precision is ours to manage, so accelerate's stays off.

    On a GPU torch is told to prefer kernels that give the same bits each time.

    Raises:
        TrainingError: `cuda` is asked for and there is none; there are more processes than GPUs; or the launcher asks
            for a kind of parallelism that would silently become copies of the whole model.
    """
    for name, asked in UNSUPPORTED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise TrainingError(
                f"launch: {name} asks for {asked}, and each process would get a whole copy instead.",
                remedy="Launch without it (torchrun, or 'accelerate launch --multi-gpu'). For sharded weights write "
                "'launch: {command: torchrun --nproc-per-node 2, fsdp: true}'. Or train with an external stage.",
            )
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "numerics.device is 'cuda', but no CUDA device is visible.",
            remedy="Use 'auto' or 'cpu', or install a driver.",
        )
    is_cpu = device == "cpu" or not torch.cuda.is_available()
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not is_cpu and processes > gpus:
        raise TrainingError(
            f"launch: found {processes} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}, expected one for "
            "each GPU at most.",
            remedy=f"Start fewer ('--nproc-per-node {gpus}'), or set 'numerics: {{device: cpu}}'.",
        )
    accelerator = Accelerator(
        cpu=is_cpu, mixed_precision="no", log_with=list(track) or None, project_dir=str(logging_dir)
    )
    if not is_cpu:
        prefer_same_bits()  # on this process's own GPU, which is known by now
    return accelerator


def prefer_same_bits() -> None:
    """Let kernels of the GPU add in the same order each time, where torch has such ones."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        # torch asks for it once, at the first product, and brings a workspace of its own. While it is set, some
        # versions read it anew for each product, which takes longer than to start one.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        try:
            torch.ones((1, 1), device="cuda").mm(torch.ones((1, 1), device="cuda"))
        finally:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def wait_for_all(accelerator: Accelerator) -> None:
    """Until every process is here. accelerate's own names a GPU also where all are on the CPU, and that GPU may not
    exist."""
    if accelerator.num_processes > 1:
        on_gpu = accelerator.device.type == "cuda"
        dist.barrier(device_ids=[accelerator.local_process_index] if on_gpu else None)


def _any_process(accelerator: Accelerator, claim: bool) -> bool:
    """Whether the claim holds in any process: all must leave the loop after the same step."""
    if accelerator.num_processes == 1:
        return claim
    return bool(accelerator.reduce(torch.tensor(float(claim), device=accelerator.device), "sum") > 0)
