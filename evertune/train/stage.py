"""A trained stage from order to published checkpoint: open, load, train or go on, measure, publish. The room's front
door; what differs between kinds is a `Lesson`.
"""

import contextlib
import re
import resource
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from evertune.data.encode import EncodedRow
from evertune.data.stream import Stretches
from evertune.hashing import digest_json
from evertune.methods import standing_of
from evertune.model.adapter import add_adapter, new_parameters, read_factors, save_new
from evertune.model.checkpoint import Checkpoint
from evertune.model.codec import Codec
from evertune.model.compiled import compile_between_products
from evertune.model.export import save_dense
from evertune.model.open import OpenModel, open_model
from evertune.model.packing import enable_packing
from evertune.train.adapt import AdaptiveFeed, Ask, adapt_facts, adapt_warnings
from evertune.train.anchor import Anchor, anchors
from evertune.train.distance import stage_drift
from evertune.train.guarded import GuardedFeed, guard_brake
from evertune.train.head import split_model
from evertune.train.kernels import require_liger
from evertune.train.loop import Feed, Pace, Trainer, cosines, gradient_of, make_accelerator, train, wait_for_all
from evertune.train.material import Material
from evertune.train.objective import Objective, Policy
from evertune.train.optimizer import Masters, full, warmup_steps
from evertune.train.plugins import plug_in
from evertune.train.reference import Reference, ReferenceSource
from evertune.train.resume import METRICS, ResumePoints
from evertune.train.sharding import ShardedDecoder, shard
from evertune.train.sink import Metrics, Sink, require_trackers, start_trackers, to_lines, without_volatile
from evertune.train.spec import CARRIED, AnchorSpec, TrainingSpec
from evertune.workspace import Manifest, Workspace

# The final loss is averaged over this many steps: one step's is mostly the luck of its rows.
FINAL_STEPS = 10
LOSS_POINTS = 100
# A layer's name within a parameter's, whatever wraps the model: `model.layers.3`.
_LAYER = re.compile(r"(model\.layers\.\d+)\.")


class Lesson(ABC):
    """What differs between the kinds of trained stages. An instance belongs to one performance of a stage."""

    can_compare = True
    """Whether the gradients of new and replayed rows can be compared before anything is trained."""
    replay_ratio: float | None = None
    """Share of the new rows' gradient norm that replayed rows are weighed to; see `Trainer`."""

    @abstractmethod
    def load(self, codec: Codec, *, world_size: int) -> Material:
        """What the stage trains on."""

    @abstractmethod
    def objective(self, setting: "Setting") -> Objective:
        """What it minimises."""

    def begin(self, trained: Mapping[str, nn.Parameter]) -> None:  # noqa: B027 - most begin at the start
        """Change the trained parameters before the first step, where they begin elsewhere than at the start."""

    def feed(self, setting: "Setting", policy: Policy) -> Feed:
        """What each step shows."""
        spec, ask = setting.spec, setting.ask
        if spec.adapt is None or not isinstance(setting.material.stream, Stretches):
            return setting.material
        assert ask is not None, "the share follows guards, and nothing asks them"
        return AdaptiveFeed(setting.material, spec.share, spec.adapt, ask, setting.opened, agreer(setting))

    def brake(self, metrics: Metrics) -> str | None:
        """Why the stage should end after a step with these metrics, or None. A function of the metrics alone."""
        return None

    def observe(self, metrics: Metrics) -> Metrics:
        """Learn from a step's metrics what the next one needs, and return what to log beside them. A run that goes on
        is given those of all steps before first."""
        return {}

    def methods(self) -> dict[str, bool]:
        """Ids in the table of methods, and whether the stage uses them."""
        return {}

    def final(self, last: Sequence[Metrics]) -> dict[str, float]:
        """Facts of the end of the stage beside loss and kl, from its last steps."""
        return {}

    def warnings(self, first: Sequence[Metrics], last: Sequence[Metrics]) -> list[dict[str, str]]:
        """What a person should know of the end of the stage: `{"name", "text"}`."""
        return []

    def parents(self) -> list[str]:
        """Digests of what went into the checkpoint beside its start."""
        return []

    def volatile(self) -> dict[str, Any]:
        """Facts of this performance that the result does not depend on."""
        return {}


@dataclass(frozen=True)
class Setting:
    """What an objective may be made from."""

    spec: TrainingSpec
    opened: OpenModel
    material: Material
    accelerator: Accelerator
    workspace: Workspace
    ask: Ask | None = None
    sharded: ShardedDecoder | None = None

    def source(self, reference: Checkpoint) -> ReferenceSource:
        """Where a reference's outputs come from."""
        return ReferenceSource(
            reference=reference,
            opened=self.opened,
            is_start=self.spec.is_lora and reference.digest == self.spec.start.digest,
            cache=self.workspace.cache,
            tmp=self.workspace.tmp,
            sharded=self.sharded,
        )

    def complete(self, source: ReferenceSource, kind: str, rows: Sequence[EncodedRow]) -> None:
        """Store what is missing of a reference's outputs, once for all processes."""
        with self.sharded.whole() if self.sharded else contextlib.nullcontext():
            if self.accelerator.is_main_process:
                source.complete(kind, rows)
            wait_for_all(self.accelerator)


def gatherer(setting: Setting) -> Callable[[list[Any]], list[Any]]:
    """Joins what each process has made; the same in every process."""
    if setting.accelerator.num_processes == 1:
        return lambda one: one
    from accelerate.utils import gather_object

    def gather(one: list[Any]) -> list[Any]:
        found: list[Any] = gather_object(one)
        return found

    return gather


def agreer(setting: Setting) -> Callable[[Callable[[], dict[str, float]]], dict[str, float]]:
    """Calls in the main process; its result is that of all, whatever another would have computed."""
    if setting.accelerator.num_processes == 1:
        return lambda call: call()
    from accelerate.utils import broadcast_object_list

    def agree(call: Callable[[], dict[str, float]]) -> dict[str, float]:
        found: list[Any] = [call() if setting.accelerator.is_main_process else None]
        broadcast_object_list(found)
        return dict(found[0])

    return agree


def run_training(spec: TrainingSpec, workspace: Workspace, lesson: Lesson, *, ask: Ask | None = None) -> dict[str, Any]:
    """Train one stage, or go on with it from its newest resume point, and publish the checkpoint under `spec.key`.

    Args:
        ask: scores guards of the model in training, where the share of replay or the stage's end depends on them.

    Returns:
        `{"checkpoint": the ledger's fields known here, "volatile": {"time", "seconds", "tokens_per_second",
        "peak_memory_bytes"}}`; the same lies in the published object's record.

    Raises:
        DataError, CheckpointError: the input is not what it should be.
        TrainingError: NaN or Inf; the last resume point is intact.
        KeyboardInterrupt: asked to stop; the same order goes on later.
    """
    done = workspace.manifest(spec.key)
    if done is not None:
        return _result(done)
    require_trackers(spec.track)
    points = ResumePoints(workspace, spec.key)
    accelerator = make_accelerator(device=spec.device, track=spec.track, logging_dir=points.folder / "trackers")
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    # A model that is to be sharded goes to its device layer by layer.
    device = "cpu" if spec.fsdp else str(accelerator.device)
    opened, trained = open_trained(spec, device)
    lesson.begin(trained)
    material = lesson.load(opened.codec, world_size=accelerator.num_processes)
    trainer = make_trainer(Setting(spec, opened, material, accelerator, workspace, ask), trained, lesson)
    plugged = plug_in(spec, trainer, opened, workspace)
    at_start = interference(trainer, material) if lesson.can_compare else None
    found = points.newest()
    if found is not None:
        trainer.load_state(found.state(like=trainer.masters.weights))
    first, history = (found.step, found.history) if found is not None else (0, [])
    trainer.feed.recall(history)
    wait_for_all(accelerator)
    if accelerator.is_main_process:
        points.drop_after(first)
    start_trackers(accelerator, spec.label, spec.settings(), folder=points.folder / "trackers")
    brake = partial(_brake, spec, lesson)
    sink = Sink(points.folder / METRICS, history=history, accelerator=accelerator)
    keep = partial(_keep, spec, workspace, opened, trainer)
    train(
        trainer, points, sink, first=first, save_steps=spec.save_steps, brake=brake, observe=lesson.observe, keep=keep
    )
    trainer.masters.use_average()
    compared = _start_and_end(at_start, interference(trainer, material)) if lesson.can_compare else None
    performance = {"peak_memory_bytes": peak_memory(accelerator.device), **lesson.volatile()}
    written = whole_model(spec, opened, trainer)
    if accelerator.is_main_process:
        facts = {**_facts(spec, lesson, material, sink.history), "interference": compared}
        if spec.plugins:
            facts["plugins"] = plugged.facts()
        _publish(spec, workspace, written, sink.history, facts, performance, plugged.carried())
        points.clear()
    wait_for_all(accelerator)
    accelerator.end_training()
    manifest = workspace.manifest(spec.key)
    assert manifest is not None, "published and yet not there"
    return _result(manifest)


def _brake(spec: TrainingSpec, lesson: Lesson, metrics: Metrics) -> str | None:
    """Why the stage should end after a step with these metrics, or None."""
    return (guard_brake(metrics, spec.guard_stop) if spec.guard_stop else None) or lesson.brake(metrics)


def open_trained(
    spec: TrainingSpec, device: str, *, dtype: str | None = None
) -> tuple[OpenModel, Mapping[str, nn.Parameter]]:
    """The start in memory and the parameters to train: a new adapter's over the frozen start, or all of them, in the
    stage's dtype where no other is asked for."""
    if spec.is_lora:
        opened = open_model(spec.start, dtype=spec.dtype, device=device)
        lora = spec.tune["lora"]
        trained = add_adapter(
            opened,
            rank=lora["rank"],
            alpha=lora.get("alpha") or 2.0 * lora["rank"],
            dropout=lora.get("dropout", 0.0),
            targets=lora.get("targets", "all-linear"),
            seed=spec.seed,
        )
    else:
        opened = open_model(spec.start, dtype=dtype or spec.dtype, device=device, fold=True)
        opened.model.requires_grad_(True)
        trained = trained_parameters(spec, opened)
    if spec.gradient_checkpointing:
        with warnings.catch_warnings():
            # Its new name is not in every transformers 5 that the package accepts.
            warnings.simplefilter("ignore", FutureWarning)
            opened.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return opened, trained


def trained_parameters(spec: TrainingSpec, opened: OpenModel) -> dict[str, nn.Parameter]:
    """What a stage trains of an open model, by name, as it is at present."""
    return new_parameters(opened) if spec.is_lora else dict(opened.model.named_parameters())


def whole_model(spec: TrainingSpec, opened: OpenModel, trainer: Trainer) -> OpenModel:
    """The trained model in one piece, to be written: the one in memory, or in the memory of the main process one put
    together from the shards, or from the masters where these are stored. All processes call it."""
    if trainer.policy.sharded is None and not spec.keeps_master:
        return opened
    is_main = trainer.accelerator.is_main_process
    dtype = "float32" if spec.keeps_master else spec.dtype
    whole, trained = open_trained(spec, "cpu", dtype=dtype) if is_main else (opened, {})
    for name, weight in trainer.masters.shown.items():
        value = full(weight.detach())
        if is_main:
            trained[name].data.copy_(value)
    return whole


def make_trainer(setting: Setting, trained: Mapping[str, nn.Parameter], lesson: Lesson) -> Trainer:
    """Everything a step needs, the anchor's reference included."""
    spec, opened = setting.spec, setting.opened
    decoder, head = split_model(opened.model)
    if spec.kernels == "liger":
        require_liger(setting.accelerator.device)
        head = replace(head, has_liger=True)
    if spec.compile:
        compile_between_products(opened.model)
    policy = Policy(opened.model, decoder, head, opened.codec.pad_id, is_packed=enable_packing(opened.model))
    # What is stored, where the model computes with its rounding.
    starts = dict(open_trained(spec, str(opened.device), dtype="float32")[1]) if spec.keeps_master else {}
    if spec.fsdp:
        sharded = shard(opened.model, decoder, head, is_packed=policy.is_packed, trained=trained, starts=starts)
        trained = trained_parameters(spec, opened)
        opened.device = setting.accelerator.device
        policy = replace(policy, decoder=sharded, head=sharded.head)
        setting = replace(setting, sharded=sharded)
    feed = lesson.feed(setting, policy)
    is_settled = feed is setting.material
    if spec.guard_stop is not None:
        assert setting.ask is not None, "the stage ends where guards fall, and nothing asks them"
        feed = GuardedFeed(feed, spec.guard_stop, setting.ask, opened, agreer(setting))
    penalties = []
    if spec.anchor is not None and spec.anchor.kl > 0.0:
        penalties.append(_anchor(spec.anchor, setting, is_settled=is_settled))
    pace = Pace(
        steps=feed.steps,
        micro_steps=feed.micro_steps,
        rate=spec.lr,
        schedule=spec.schedule,
        warmup=warmup_steps(spec.warmup, feed.steps),
        clip=spec.clip,
        seed=spec.seed,
    )
    masters = Masters(trained, weight_decay=spec.weight_decay, ema_decay=spec.ema_decay, starts=starts)
    return Trainer(
        policy,
        masters,
        feed,
        pace,
        setting.accelerator,
        penalties,
        objective=lesson.objective(setting),
        replay_ratio=lesson.replay_ratio,
        whole=setting.sharded.whole if setting.sharded and feed is not setting.material else contextlib.nullcontext,
    )


def interference(trainer: Trainer, material: Material) -> dict[str, float] | None:
    """Cosine between the gradients of the new and of the replayed rows' loss, on one micro-batch of each: of all
    trained weights under `""`, and of each layer that has some under its name.

    Below 0 the two disagree: a step that helps the one hurts the other. None without replay.
    """
    new, old = (material.first_rows(material.micro_batch_rows, is_replay=kind) for kind in (False, True))
    if not new or not old:
        return None
    taught, replayed = (gradient_of(trainer, rows) for rows in (new, old))
    layers = {found[1]: found[0] for name in taught if (found := _LAYER.search(name))}
    return cosines(taught, replayed, {"": "", **layers})


def _anchor(anchor: AnchorSpec, setting: Setting, *, is_settled: bool) -> Anchor:
    """The anchor; where its reference's outputs are stored, they are made first: of the rows that the stage sees, where
    that is settled beforehand, else of all."""
    source = setting.source(anchor.reference)
    if anchor.cache == "off":
        reference: Reference = source.live()
    else:
        items = setting.material.shown() if is_settled else setting.material.items()
        rows = [row for item in items for row in item.rows]
        setting.complete(source, anchor.cache, [row for row in rows if anchors(anchor.on, row)])
        reference = source.from_cache(anchor.cache)
    return Anchor(anchor.kl, anchor.on, anchor.direction, reference)


def _publish(
    spec: TrainingSpec,
    workspace: Workspace,
    opened: OpenModel,
    history: Sequence[Metrics],
    facts: dict[str, Any],
    performance: Mapping[str, Any],
    carried: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write the trained model and its metrics as one object; drift is measured on the weights as written."""

    def write(folder: Path) -> dict[str, Any]:
        _write_weights(spec, opened, folder)
        new = read_factors(folder) if spec.is_lora else None
        (folder / METRICS).write_bytes(to_lines(without_volatile(history)))
        for name, tensors in carried.items():
            (folder / CARRIED).mkdir(exist_ok=True)
            save_file({key: one.contiguous() for key, one in tensors.items()}, folder / CARRIED / f"{name}.safetensors")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        drift = stage_drift(opened, start=spec.start, base=spec.base, new=new)
        seconds = sum(one["seconds"] for one in history)
        tokens = sum(one["tokens"] for one in history)
        volatile = {"time": time.time(), "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
        volatile |= performance
        return {"checkpoint": {**facts, "bytes": size, "drift": drift}, "volatile": volatile}

    workspace.publish(kind="checkpoint", key=spec.key, record={}, write=write)


def _write_weights(spec: TrainingSpec, opened: OpenModel, folder: Path) -> None:
    if spec.is_lora:
        save_new(opened, folder, spec.start)
    else:
        save_dense(opened.model, folder, like=spec.start)


def _keep(spec: TrainingSpec, workspace: Workspace, opened: OpenModel, trainer: Trainer, done: int) -> None:
    """Publish the weights after a step where the recipe asks for it: an object of its own that names its stage."""
    if not spec.keep_steps or done % spec.keep_steps or done == trainer.pace.steps:
        return
    trainer.masters.check_finite(step=done)
    written = whole_model(spec, opened, trainer)
    if trainer.accelerator.is_main_process:
        workspace.publish(
            kind="kept",
            key=digest_json({"kind": "kept", "stage": spec.key, "step": done}),
            record={"stage": spec.key, "step": done, "steps": trainer.pace.steps},
            write=partial(_write_weights, spec, written),
        )
    wait_for_all(trainer.accelerator)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of a GPU's memory, else of the machine's, libraries included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _facts(spec: TrainingSpec, lesson: Lesson, material: Material, history: Sequence[Metrics]) -> dict[str, Any]:
    """The ledger's fields known before the checkpoint is written."""
    last = history[-FINAL_STEPS:]
    # Where replayed rows are no part of the loss, a step of these alone has none. The first step always has a new row.
    taught = [one for one in history if "loss" in one]
    final = {"loss": mean_of(taught[-FINAL_STEPS:], "loss"), **lesson.final(last)}
    if any("kl" in one for one in last):
        final["kl"] = mean_of(last, "kl")
    stride = -(-len(taught) // LOSS_POINTS)
    used = _methods(spec, lesson, has_replay=bool(material.replay))
    facts = {
        "label": spec.label,
        "stage": spec.kind,
        "standing": standing_of(used),
        "methods": used,
        "form": "adapter" if spec.is_lora else "model",
        "stands_on": spec.start.digest if spec.is_lora else None,
        "start": spec.start.digest,
        "settings": spec.settings(),
        "anchor": _anchor_facts(spec),
        "losses": [[one["step"], one["loss"]] for one in taught[::stride]],
        "final": final,
        **material.facts(spec),
        "steps": len(history),
        "tokens": sum(one["tokens"] for one in history),
        "counted_tokens": sum(one["counted_tokens"] for one in history),
    }
    adapted = spec.adapt if isinstance(material.stream, Stretches) else None
    if adapted is not None and facts["replay"] is not None:
        facts["replay"] |= {"adapt": adapt_facts(history, adapted)}
    if parents := lesson.parents():
        facts["parents"] = parents
    warnings = lesson.warnings(taught[:FINAL_STEPS], taught[-FINAL_STEPS:])
    if adapted is not None:
        warnings += adapt_warnings(history, adapted)
    reason = _brake(spec, lesson, history[-1])
    if reason:
        warnings.append({"name": "stopped_early", "text": f"the stage ended after step {len(history)}: {reason}"})
    return {**facts, "warnings": warnings} if warnings else facts


def _anchor_facts(spec: TrainingSpec) -> dict[str, Any] | None:
    anchor = spec.anchor
    if anchor is None or anchor.kl == 0.0:
        return None
    named = {spec.base.digest: "base", spec.start.digest: "start"}
    to = named.get(anchor.reference.digest, anchor.reference.digest)
    return {"kl": anchor.kl, "to": to, "on": anchor.on, "direction": anchor.direction, "cache": anchor.cache}


def _methods(spec: TrainingSpec, lesson: Lesson, *, has_replay: bool) -> list[str]:
    """Ids in the table of methods."""
    used = {
        **lesson.methods(),
        "lora": spec.is_lora,
        "replay": has_replay,
        "dedup": has_replay and bool(spec.dedup),
        "anchored_sft_kl": spec.anchor is not None and spec.anchor.kl > 0.0,
        "ema": spec.ema_decay is not None,
        **{one.method: True for one in spec.plugins},
    }
    return [name for name, is_used in used.items() if is_used]


def _result(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.record[name] for name in ("checkpoint", "volatile")}


def mean_of(history: Sequence[Metrics], name: str) -> float:
    """Mean of a metric over the steps that have it."""
    values = [one[name] for one in history if name in one]
    return sum(values) / len(values)


def _start_and_end(start: dict[str, float] | None, end: dict[str, float] | None) -> dict[str, Any] | None:
    if start is None or end is None:
        return None
    layers = {name: [value, end[name]] for name, value in start.items() if name}
    return {"start": start[""], "end": end[""], "layers": layers}
