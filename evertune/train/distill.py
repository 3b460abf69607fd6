"""Distillation: the student matches its teachers' distributions at the counted tokens of the new rows, mixed with
cross-entropy; replayed rows are learnt by cross-entropy alone, as in a supervised stage.

    distill_spec.py      the order               distill_losses.py    divergences and ensembles
    distill_teachers.py  who answers when        distill_targets.py   what was answered
    distill_policy.py    the student answers     distill_answers.py   the teacher answers
    distill_shown.py     the teacher reads more than the student
"""

# N counted positions, M positions of the rows of one source, V vocabulary

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evertune.data.encode import EncodedPrompt, EncodedRow, Item, counted_of, encode_rows
from evertune.errors import RecipeError
from evertune.measure.stats import compare_paired
from evertune.model.adapter import read_factors
from evertune.model.codec import Codec, load_codec
from evertune.model.forward import Forward
from evertune.model.lowrank import compress, fill
from evertune.model.open import check_digest
from evertune.train.adapt import Ask
from evertune.train.batch import MicroBatch, collate
from evertune.train.distill_answers import Check, Questions, with_answers, write_answers
from evertune.train.distill_losses import at_temperature, divergence_of
from evertune.train.distill_policy import OnPolicyFeed, SampledRow, is_answered
from evertune.train.distill_shown import Demonstrations
from evertune.train.distill_spec import DemonstrationSpec, DistillSpec
from evertune.train.distill_targets import Targets
from evertune.train.distill_teachers import Teachers
from evertune.train.head import PositionTerm, head_loss
from evertune.train.loop import Feed, make_accelerator, wait_for_all
from evertune.train.losses import bucket
from evertune.train.material import Encode, Material, load_material
from evertune.train.objective import Objective, Policy, StepCounts, penalty_sums, penalty_terms
from evertune.train.penalty import Penalty, PositionValues
from evertune.train.sink import Metrics
from evertune.train.stage import Lesson, Setting, gatherer, mean_of, run_training
from evertune.workspace import Workspace

# Below this the kept words say too little of what the teacher would say.
LITTLE_MASS = 0.9
# One-sided level of the bound that the gain from a demonstration must have above 0.
GAIN_LEVEL = 0.05


def run_distill(
    spec: DistillSpec, workspace: Workspace, check: Check | None = None, *, ask: Ask | None = None
) -> dict[str, Any]:
    """Ask the teachers what is not stored yet, train the student and publish it; see `run_training`.

    Args:
        check: verifies what teachers write; needed where the order says so.
        ask: scores guards of the model in training.

    The record's `volatile` has `teacher_forwards`: forward passes of teachers that this performance needed.

    Raises:
        RecipeError: more words are to be kept than there are.
        CheckpointError: a teacher has another vocabulary, or its outputs are NaN or Inf.
    """
    lesson = _Distilled(spec, workspace, check or _unverified)
    if workspace.manifest(spec.key) is None:
        lesson.teach()
    return run_training(spec, workspace, lesson, ask=ask)


@dataclass(frozen=True)
class Distillation:
    """Mean over the counted tokens of a step of `weight * T**2 * divergence + (1 - weight) * cross-entropy` where a
    teacher teaches, and of cross-entropy elsewhere, in nats.

    Rows that the student has answered itself have no right answer, and so no cross-entropy. T**2 keeps the gradient's
    size at any temperature T (Hinton et al. 2015, arXiv:1503.02531). Cross-entropy is taken at temperature 1. Metrics:
    `loss` is what is minimised, `distill` the mean of T**2 * divergence over the taught tokens, `ce` the cross-entropy
    of the rows' own answers, `length` the tokens of the student's answers and `stopped` the share of them that ended by
    itself.
    """

    targets: Targets
    spec: DistillSpec

    def divisors(self, items: Sequence[Item]) -> dict[str, int]:
        sampled = [item for item in items if isinstance(item, SampledRow)]
        counted = sum(map(counted_of, items))
        return {
            "loss": counted,
            "ce": counted - sum(map(counted_of, sampled)),
            "distill": sum(counted_of(item) for item in items if self._teaches(item)),
            "length": len(sampled),
            "stopped": len(sampled),
        }

    def backward(
        self, policy: Policy, items: Sequence[Item], counts: StepCounts, penalties: Sequence[Penalty]
    ) -> Tensor:
        rows = [row for item in items for row in item.rows]
        batch = collate(rows, pad_id=policy.pad_id, device=policy.device)
        hidden_NH = policy.counted_hidden(batch)
        terms = self._terms(items, batch, 1.0 / counts.divisors["loss"])
        penalised = penalty_terms(penalties, rows, counts, device=policy.device)
        # Cross-entropy weighs differently where a teacher teaches, so it comes as terms too.
        found = head_loss(hidden_NH, batch.targets_N, head=policy.head, ce_weight=0.0, terms=[*terms, *penalised])
        policy.backward(found.loss)
        zero = found.ce_sum.new_zeros(())
        distilled = sum((found.term_sums[one.name] for one in terms if one.name.startswith("distill ")), zero)
        untaught, taught = (found.term_sums.get(name, zero) for name in ("ce untaught", "ce taught"))
        loss = untaught + (1.0 - self.spec.weight) * taught + self.spec.weight * distilled
        sampled = [item for item in items if isinstance(item, SampledRow)]
        said = [zero + sum(map(counted_of, sampled)), zero + sum(item.stopped for item in sampled)]
        own = [loss, untaught + taught, distilled, *said]
        return torch.stack([*own, *penalty_sums(penalties, found.term_sums, like=found.ce_sum)])

    def _terms(self, items: Sequence[Item], batch: MicroBatch, share: float) -> list[PositionTerm]:
        """The parts of the loss on these rows, each divided by the step's counted tokens."""
        weight, terms = self.spec.weight, []
        for source in dict.fromkeys(item.source for item in items if self._teaches(item)):
            chosen = [self._teaches(item) and item.source == source for item in items]
            values = self._divergences([row for row, one in zip(batch.rows, chosen, strict=True) if one], batch)
            terms.append(PositionTerm(f"distill {source}", batch.positions_of(chosen), weight * share, values))
        answered = {"ce taught": 1.0 - weight, "ce untaught": 1.0}
        names = [
            "" if isinstance(item, SampledRow) else "ce taught" if self._teaches(item) else "ce untaught"
            for item in items
        ]
        for name, factor in answered.items():
            mask_N = batch.positions_of([one == name for one in names])
            if mask_N.any():
                terms.append(PositionTerm(name, mask_N, factor * share, _surprises(batch.targets_N[mask_N])))
        return terms

    def _divergences(self, rows: Sequence[EncodedRow], batch: MicroBatch) -> PositionValues:
        target, temperature = self.targets.read(rows), self.spec.temperature
        divergence = divergence_of(self.spec.loss, beta=self.spec.beta)
        device = batch.ids_BT.device
        ids_MJ = None if target.ids_MJ is None else target.ids_MJ.to(device)
        teacher_logp_ML = target.logp_ML.to(device)

        def values(logp_MV: Tensor, chosen: slice) -> Tensor:
            student = at_temperature(logp_MV, temperature)
            if ids_MJ is not None:
                student = bucket(student, ids_MJ[chosen])
            return temperature**2 * divergence(student, teacher_logp_ML[chosen])

        return values

    def _teaches(self, item: Item) -> bool:
        return self.spec.weight > 0.0 and not item.is_replay and item.source in self.spec.routes


def _surprises(targets_M: Tensor) -> PositionValues:
    """Negative log-likelihood of the target words, unreduced."""
    return lambda logp_MV, chosen: -logp_MV.gather(1, targets_M[chosen].unsqueeze(1)).squeeze(1)


def _unverified(source: str, output: str, answer: Any) -> bool:
    raise AssertionError(f"answers to {source} are to be verified, and nobody can")


class _Distilled(Lesson):
    """The lesson of a distillation stage."""

    def __init__(self, spec: DistillSpec, workspace: Workspace, check: Check) -> None:
        self._spec, self._workspace, self._check = spec, workspace, check
        self._material: Material | None = None
        self._forwards = 0
        self._shown = Demonstrations(spec.demonstration.text) if spec.demonstration else None
        self._gain: float | None = None
        self._held: float | None = None
        self._asked = 0
        self._is_passing = False
        self._teachers: Teachers | None = None
        self.can_compare = spec.on_policy is None  # a row that the student answers has no teacher before it is answered

    @cached_property
    def _targets(self) -> Targets:
        passing = self._is_passing
        return Targets(self._spec, root=self._workspace.cache, tmp=self._workspace.tmp, passing=passing)

    def teach(self) -> None:
        """Fill the store, before the student is in memory."""
        spec = self._spec
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        accelerator = make_accelerator(device=spec.device, track=[], logging_dir=self._workspace.work / spec.key)
        codec = load_codec(spec.start.base.path)
        teachers = self._make_teachers(str(accelerator.device))
        if spec.answers is not None:
            if accelerator.is_main_process:
                questions = Questions()
                prompts = load_material(spec, codec, world_size=1, encode=questions.encode).new.values()
                asked = [one for each in prompts for one in each if isinstance(one, EncodedPrompt)]
                write_answers(
                    spec,
                    asked,
                    teachers,
                    targets=self._targets,
                    codec=codec,
                    check=self._check,
                    turns=questions.turns,
                )
                self._asked = len(asked)
            wait_for_all(accelerator)
            self.__dict__.pop("_targets", None)
        material = self.load(codec, world_size=accelerator.num_processes)
        if accelerator.is_main_process:
            if spec.demonstration is not None:
                self._gain = _measured_gain(spec, spec.demonstration, material, teachers, self._targets)
            teachers.answer(_taught_rows(spec, material), self._targets)
            self._forwards = teachers.forwards
        wait_for_all(accelerator)
        # What has been opened does not hold what the main process has stored since, and from now on nothing is stored.
        self.__dict__.pop("_targets", None)
        self._is_passing = spec.on_policy is not None

    def begin(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Begin the new adapter at the stack that is to be compressed.

        Raises:
            RecipeError: the stack changes layers that the new adapter leaves alone.
        """
        spec = self._spec
        if spec.compressed is None:
            return
        check_digest(spec.compressed)
        lora = spec.tune["lora"]
        found = compress([read_factors(one.path) for one in spec.compressed.stack[1:]], lora["rank"])
        missing = [name for name in found.factors if f"{name}.lora_A" not in trained]
        if missing:
            raise RecipeError(
                f"{spec.label}: the stack to compress changes {missing[0]}, and tune.lora.targets leaves it out.",
                remedy="Set targets to 'all-linear', or name that layer too.",
            )
        self._held = found.held
        fill(trained, found.factors, scale=(lora.get("alpha") or 2.0 * lora["rank"]) / lora["rank"])

    def load(self, codec: Codec, *, world_size: int) -> Material:
        if self._material is None:
            encode: Encode = encode_rows
            if self._shown is not None:
                encode = self._shown.encode
            elif self._spec.answers is not None:
                encode = with_answers(self._spec, self._targets)
            self._material = load_material(self._spec, codec, world_size=world_size, encode=encode)
        return self._material

    def objective(self, setting: Setting) -> Objective:
        return Distillation(self._targets, self._spec)

    def feed(self, setting: Setting, policy: Policy) -> Feed:
        """The rows, some of them answered by the student as it is."""
        if self._spec.on_policy is None:
            return setting.material
        self._teachers = self._make_teachers(str(setting.accelerator.device))

        def ask() -> Forward:
            policy.model.eval()
            return Forward(setting.opened)

        return OnPolicyFeed(
            self._spec,
            setting.material,
            ask=ask,
            stop_ids=setting.opened.codec.stop_ids,
            teachers=self._teachers,
            targets=self._targets,
            gather=gatherer(setting),
            rank=setting.accelerator.process_index,
            answered=self._shown.answered if self._shown else None,
        )

    def _make_teachers(self, device: str) -> Teachers:
        if self._shown is None:
            return Teachers(self._spec, device=device)
        return Teachers(self._spec, device=device, read=self._shown.shown)

    def methods(self) -> dict[str, bool]:
        is_on_policy = self._spec.on_policy is not None
        return {
            "logit_kd": self._spec.weight > 0.0,
            "seq_kd": self._spec.answers is not None,
            "gkd": is_on_policy,
            "multi_teacher_opd": is_on_policy and len(self._spec.teachers) > 1,
            "cross_stage_distill": self._spec.route == "best",
            "sdft_onpolicy": self._spec.demonstration is not None,
        }

    def parents(self) -> list[str]:
        made_from = [one.checkpoint for one in self._spec.teachers]
        made_from += [self._spec.compressed] if self._spec.compressed else []
        return list(dict.fromkeys(one.digest for one in made_from))

    def volatile(self) -> dict[str, Any]:
        later = self._teachers.forwards if self._teachers else 0
        return {"teacher_forwards": self._forwards + later}

    def _own_facts(self) -> dict[str, float]:
        """How much of the teachers' probability, of a compressed stack's updates, and of the rows' answers was kept."""
        answered = sum(map(len, self._material.new.values())) / self._asked if self._material and self._asked else None
        found = {"covered_mass": self._covered_mass, "held": self._held, "answered": answered, "gain": self._gain}
        return {name: one for name, one in found.items() if one is not None}

    def final(self, last: Sequence[Metrics]) -> dict[str, float]:
        named = [name for name in ("ce", "distill", "length", "stopped") if any(name in one for one in last)]
        return {**{name: mean_of(last, name) for name in named}, **self._own_facts()}

    def warnings(self, first: Sequence[Metrics], last: Sequence[Metrics]) -> list[dict[str, str]]:
        if self._covered_mass is None or self._covered_mass >= LITTLE_MASS:
            return []
        told = (
            f"the {self._spec.words} kept words hold {self._covered_mass:.1%} of the teachers' probability: what they "
            "say beyond these is learnt as one lump. Raise 'words', or lower 'temperature'."
        )
        return [{"name": "covered_mass", "text": told}]

    @cached_property
    def _covered_mass(self) -> float | None:
        assert self._material is not None, "a stage that has ended was loaded"
        rows = _taught_rows(self._spec, self._material)
        if not rows:
            return None
        means = [(self._targets.covered_mass(each), sum(map(counted_of, each))) for each in rows.values()]
        return sum(mean * count for mean, count in means) / sum(count for _, count in means)


def _measured_gain(
    spec: DistillSpec, how: DemonstrationSpec, material: Material, teachers: Teachers, targets: Targets
) -> float:
    """Mean gain of the rows' own answers from the demonstration, in nats per token, the least of all teachers.

    Raises:
        RecipeError: for one of them it is not shown to be positive.
    """
    seen = list(dict.fromkeys((pick.source, pick.index) for pick in material.picks() if not pick.is_replay))
    found = []
    for number, teacher in enumerate(spec.teachers):
        own = [row for source, i in seen if number in spec.routes[source] for row in material.new[source][i].rows]
        rows = list({row.digest: row for row in own}.values())[: how.rows]
        if not rows:
            continue
        gains = teachers.gain(teacher, rows, targets.gains(teacher))
        mean = float(np.mean(gains))
        bound = compare_paired(gains, [str(i) for i in range(len(gains))], level=GAIN_LEVEL, bounded=False).lower_bound
        if not bound > 0.0:
            raise RecipeError(
                f"{spec.label}: the demonstration does not help teacher '{teacher.name}': after it the rows' own "
                f"answers are {mean:+.3f} nats per token likelier (lower bound {bound:+.3f}, {len(rows)} rows), "
                "expected a gain above 0.",
                remedy="Write another 'demonstration.text', or leave it out: it would teach what the model knows.",
            )
        found.append(mean)
    return min(found)


def _taught_rows(spec: DistillSpec, material: Material) -> dict[str, list[EncodedRow]]:
    """The new rows that the stage sees with their own answers and that a teacher teaches, each once, by source."""
    seen = dict.fromkeys(
        pick
        for number, pick in enumerate(material.picks())
        if not pick.is_replay and not is_answered(spec, *divmod(number, material.batch_rows))
    )
    rows: dict[str, list[EncodedRow]] = {source: [] for source in spec.routes}
    for pick in sorted(seen, key=lambda one: (one.source, one.index)):
        if pick.source in rows and spec.weight > 0.0:
            rows[pick.source] += material.row(pick).rows
    return {source: each for source, each in rows.items() if each}
