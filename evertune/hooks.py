"""Probes inside another trainer: `ProbeCallback` for transformers' and TRL's trainers.

    from evertune.hooks import ProbeCallback
    trainer = SFTTrainer(..., callbacks=[ProbeCallback("recipe.yaml", every_steps=50)])

The model is scored before the first step and every N steps, on the probes of a recipe or a suite, and judged by the
gate against where it began. When harm to a guard is shown, training ends there.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from evertune.errors import ProbeError
from evertune.gate import Verdict, judge
from evertune.model.checkpoint import Checkpoint
from evertune.model.codec import Codec, load_codec
from evertune.model.open import OpenModel
from evertune.probe.job import score_open
from evertune.probe.scores import ItemScores
from evertune.suites import Suite, load_suite

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)
FOLDER = "probes"


class ProbeCallback(TrainerCallback):  # type: ignore[misc]
    """Scores the model in training, item by item, and can end training when a guard has dropped.

    Leaves in its folder `steps.jsonl`, one line a probing (`{"step", "decision", "scores", "reasons"}`), and the item
    scores as `<step>-<probe>.parquet`, which `evertune gate` reads; scores also stand in the trainer's log history as
    `probe/<name>`. Weights, random numbers and the trainer's modes are as if it had not been there.

    Args:
        probes: a recipe or a suite in YAML, files of items, or a `Suite`; the general suite when empty. Probes of
            lm-eval are asked like any other.
        every_steps: optimizer steps between two probings, above 0.
        stop_on_harm: end training when the gate's verdict is HOLD: harm to a guard is significant, or a hard rule is
            broken. All planned probings count as tries, so that looking often is no reason to stop.
        folder: where results go; `probes` in the trainer's output folder when not given.

    Raises:
        RecipeError, ProbeError: the probes cannot be read.
    """

    def __init__(
        self,
        probes: "str | Path | Sequence[str | Path] | Suite" = (),
        *,
        every_steps: int,
        stop_on_harm: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}, expected 1 or more")
        self.suite = probes if isinstance(probes, Suite) else load_suite(_places(probes))
        self.verdicts: dict[int, Verdict] = {}
        self.scores: dict[int, dict[str, ItemScores]] = {}
        self._every, self._stops = every_steps, stop_on_harm
        self._folder = Path(folder) if folder is not None else None
        self._codec: Codec | None = None

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> None:
        """Score the start; after a resume, read what was scored then.

        Raises:
            ProbeError: the run goes on from a step, and the scores of its start are not in the folder.
        """
        if not state.is_world_process_zero:
            return
        folder = self._place(args)
        folder.mkdir(parents=True, exist_ok=True)
        self._codec = codec_of(kwargs["model"], kwargs["processing_class"])
        if state.global_step == 0:
            (folder / "steps.jsonl").unlink(missing_ok=True)
            self._score(args, state, kwargs["model"])
            return
        files = {one.name: folder / f"0-{one.name}.parquet" for one in self.suite.probes}
        missing = [str(file) for file in files.values() if not file.is_file()]
        if missing:
            raise ProbeError(
                f"{missing[0]}: found nothing, expected the scores of the start: training goes on from step "
                f"{state.global_step}.",
                remedy="Give the folder of the first part of the run, or begin anew.",
            )
        self.scores[0] = {name: ItemScores.read_parquet(file) for name, file in files.items()}

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> "TrainerControl":
        """Score every N steps, and after the last one."""
        if state.is_world_process_zero and (
            state.global_step % self._every == 0 or state.global_step == state.max_steps
        ):
            verdict = self._judge(args, state, kwargs["model"])
            if self._stops and verdict.decision == "HOLD":
                log.warning("training ends at step %d: %s", state.global_step, " ".join(verdict.reasons))
                control.should_training_stop = True
        return control

    def _judge(self, args: "TrainingArguments", state: "TrainerState", model: Any) -> Verdict:
        after, before = self._score(args, state, model), self.scores[0]
        tried = max(1, -(-state.max_steps // self._every))
        verdict = judge(after, before, before, self.suite.facts, self.suite.gate_settings, tried=tried)
        self.verdicts[state.global_step] = verdict
        self._write(args, state, after, verdict)
        return verdict

    def _score(self, args: "TrainingArguments", state: "TrainerState", model: Any) -> dict[str, ItemScores]:
        assert self._codec is not None, "scored before training has begun"
        with _asking(model):
            found = score_open(as_open(model, self._codec), self.suite.probes, alone=True)
        self.scores[state.global_step] = found
        for name, scores in found.items():
            scores.write_parquet(self._place(args) / f"{state.global_step}-{name}.parquet")
        values = {f"probe/{name}": scores.value for name, scores in found.items()}
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, **values})
        return found

    def _write(
        self, args: "TrainingArguments", state: "TrainerState", scores: Mapping[str, ItemScores], verdict: Verdict
    ) -> None:
        line = {
            "step": state.global_step,
            "decision": verdict.decision,
            "scores": {name: one.value for name, one in scores.items()},
            "reasons": list(verdict.reasons),
        }
        with (self._place(args) / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _place(self, args: "TrainingArguments") -> Path:
        return self._folder if self._folder is not None else Path(str(args.output_dir)) / FOLDER


def codec_of(model: Any, tokenizer: Any) -> Codec:
    """The tokenizer, chat template and stop tokens of a trainer, as evertune reads those of a folder.

    Raises:
        CheckpointError: see `load_codec`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        _plain(model).generation_config.save_pretrained(folder)
        return load_codec(folder)


def as_open(model: Any, codec: Codec) -> OpenModel:
    """A trainer's model as one that can be asked.

    Raises:
        ProbeError: its weights are spread over processes.
    """
    plain = _plain(model)
    weight = plain.get_input_embeddings().weight
    if hasattr(weight, "placements") or getattr(weight, "ds_id", None) is not None or weight.numel() == 0:
        raise ProbeError(
            "the model's weights are spread over processes (FSDP, DeepSpeed), so one process cannot ask it.",
            remedy="Probe its checkpoints with `evertune probe`, or train it in an external stage.",
        )
    nowhere = Checkpoint(path=codec.folder, digest="in training", form="model")
    return OpenModel(plain, codec, nowhere, device=weight.device, dtype=weight.dtype)


def _plain(model: Any) -> Any:
    """The causal language model inside wrappers; adapters stay inside its layers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _asking(model: Any) -> Iterator[None]:
    """Inside, evaluation mode without gradients; outside, each module's mode and all random numbers as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _places(probes: "str | Path | Sequence[str | Path]") -> list[Path]:
    return [Path(probes)] if isinstance(probes, str | Path) else [Path(one) for one in probes]
