"""Teachers answering, before the student is in memory: what is missing of their outputs is computed and stored.

Teachers are loaded one after another and never together, so any number of them needs the memory of one. Teachers that
are adapters of one base take turns on its weights.
"""

# M counted positions of a row, V vocabulary, K kept words of one teacher, J kept words of an ensemble

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.errors import CheckpointError
from evertune.model.checkpoint import Checkpoint
from evertune.model.codec import Codec
from evertune.model.forward import Forward
from evertune.model.open import OpenModel, open_model, stacked
from evertune.train.distill_losses import at_temperature, pooled_words
from evertune.train.distill_spec import DistillSpec, TeacherSpec
from evertune.train.distill_targets import Store, Targets
from evertune.train.head import split_model, target_log_probabilities
from evertune.train.losses import bucket, top_words
from evertune.train.reference import LiveReference

# Rows stored together: what an interrupted teacher has to answer again.
SHARD_ROWS = 512

Rows = Sequence[EncodedRow]
Summary = Callable[[Tensor, EncodedRow, slice], dict[str, Tensor]]
"""(log-probabilities (m, V) at some of a row's counted positions, the row, which of them) -> what is stored of them."""


Read = Callable[[EncodedRow], EncodedRow]
Author = Callable[[Forward, LiveReference, Codec, EncodedRow], dict[str, Tensor]]
"""(the teacher ready to speak, and ready to judge, its own tokenizer, a prompt) -> what is stored of its answer."""


def _as_it_is(row: EncodedRow) -> EncodedRow:
    return row


class Teachers:
    """A stage's teachers, of whom at most one model is in memory at any time.

    Args:
        device: where they compute.
        read: a row as they read it, where that is more than the student reads; the same tokens count.

    Attributes:
        forwards: forward passes so far, one a row.

    Raises:
        RecipeError: more words are to be kept than there are.
        CheckpointError: a teacher has another vocabulary.
    """

    def __init__(self, spec: DistillSpec, *, device: str, read: Read = _as_it_is) -> None:
        spec.check()
        self.forwards = 0
        self._spec, self._device, self._read = spec, device, read
        self._opened: OpenModel | None = None

    def answer(self, rows: Mapping[str, Rows], targets: Targets) -> None:
        """Compute and store what is missing of the teachers' outputs.

        Args:
            rows: the rows to be taught, by source.

        Raises:
            CheckpointError: a teacher is not what it should be, or its outputs are NaN or Inf.
        """
        spec = self._spec
        keep = _whole(spec) if spec.words is None else _top(spec, spec.words)
        taught = [(number, source) for source in rows for number in spec.routes[source]]
        for number in sorted(dict.fromkeys(number for number, _ in taught), key=self._turn):
            own = [row for one, source in taught if one == number for row in rows[source]]
            self._ask(spec.teachers[number], own, targets.own(spec.teachers[number]), keep)
        if spec.words is not None:
            # Which words an ensemble needs is known once each member has named its own.
            for number, source in sorted(taught, key=lambda one: self._turn(one[0])):
                ensemble = spec.of(source)
                if len(ensemble) > 1:
                    pooled = _pooled(spec, [targets.own(one) for one in ensemble])
                    store = targets.pooled(spec.teachers[number], ensemble)
                    self._ask(spec.teachers[number], rows[source], store, pooled)

    def write(self, teacher: TeacherSpec, rows: Rows, store: Store, author: Author) -> None:
        """Store the answers that a teacher writes to these prompts, where they are missing."""
        missing = store.missing(rows)
        if not missing:
            return
        with self._seated(teacher) as live:
            assert self._opened is not None, "a teacher is seated"
            forward, codec = Forward(self._opened), self._opened.codec
            for first in range(0, len(missing), SHARD_ROWS):
                store.add(missing[first : first + SHARD_ROWS], lambda row: author(forward, live, codec, row))
        self.forwards += live.forwards

    def gain(self, teacher: TeacherSpec, rows: Rows, store: Store) -> list[float]:
        """By how much likelier the teacher finds the rows' counted tokens as it reads them than as the student does, in
        nats per token, row by row; computed where it is missing."""
        missing = store.missing(rows)
        if missing:
            with self._seated(teacher) as live:
                store.add(missing, lambda row: {"gain": mean_logp(live, self._read(row)) - mean_logp(live, row)})
                self.forwards += live.forwards
        return [float(store.read(row)["gain"]) for row in rows]

    def _turn(self, number: int) -> tuple[str, int]:
        """Teachers of one base come one after the other, so that it is loaded once."""
        return self._spec.teachers[number].checkpoint.base.digest, number

    def _ask(self, teacher: TeacherSpec, rows: Rows, store: Store, summary: Summary) -> None:
        """Store what is missing of the teacher's outputs for these rows."""
        missing = store.missing(rows)
        if not missing:
            return
        with self._seated(teacher) as live:
            for first in range(0, len(missing), SHARD_ROWS):
                chosen = missing[first : first + SHARD_ROWS]
                store.add(chosen, lambda row: _outputs(live, self._read(row), summary))
            self.forwards += live.forwards

    @contextmanager
    def _seated(self, teacher: TeacherSpec) -> Iterator[LiveReference]:
        try:
            opened = self._base(teacher.checkpoint.base)
            with stacked(opened, teacher.checkpoint):
                decoder, head = split_model(opened.model)
                yield LiveReference(opened.model, decoder, head, frozen=nullcontext, pad_id=opened.codec.pad_id)
        except CheckpointError as error:
            raise CheckpointError(f"teacher '{teacher.name}': {error.message}", remedy=error.remedy) from error

    def _base(self, base: Checkpoint) -> OpenModel:
        if self._opened is None or self._opened.checkpoint.digest != base.digest:
            self._opened = None  # freed before the next is loaded
            gc.collect()
            self._opened = open_model(base, dtype=self._spec.dtype, device=self._device)
        return self._opened


@torch.no_grad()
def mean_logp(live: LiveReference, row: EncodedRow) -> Tensor:
    """Mean log-probability (1,) of a row's counted tokens, in nats."""
    targets_M = torch.from_numpy(row.ids[row.counted]).long().to(live.head.weight_VH.device)
    return target_log_probabilities(live.hidden([row]), targets_M, head=live.head).mean().reshape(1).cpu()


@torch.no_grad()
def _outputs(live: LiveReference, row: EncodedRow, summary: Summary) -> dict[str, Tensor]:
    """What is stored of one row. Rows are run one at a time, so that the bits do not depend on a row's company."""
    hidden_MH, step = live.hidden([row]), live.head.chunk_positions()
    parts = []
    for start in range(0, len(hidden_MH), step):
        chosen = slice(start, start + step)
        logp_MV = live.head.log_probabilities(hidden_MH[chosen])
        if not torch.isfinite(logp_MV).all():
            raise CheckpointError(
                f"its outputs for row {row.id!r} of '{row.source}' are NaN or Inf, though its weights are finite: they "
                "overflow.",
                remedy="Take another teacher, or try 'numerics: {dtype: float32}'.",
            )
        parts.append({name: one.cpu() for name, one in summary(logp_MV, row, chosen).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _whole(spec: DistillSpec) -> Summary:
    return lambda logp_MV, row, chosen: {"logp": at_temperature(logp_MV, spec.temperature)}


def _top(spec: DistillSpec, words: int) -> Summary:
    def summary(logp_MV: Tensor, row: EncodedRow, chosen: slice) -> dict[str, Tensor]:
        return _narrow(*top_words(at_temperature(logp_MV, spec.temperature), words), logp_MV.shape[1])

    return summary


def _pooled(spec: DistillSpec, members: Sequence[Store]) -> Summary:
    def summary(logp_MV: Tensor, row: EncodedRow, chosen: slice) -> dict[str, Tensor]:
        kept = [one.read(row)["ids"][chosen].long().to(logp_MV.device) for one in members]
        ids_MJ = pooled_words(kept, logp_MV.shape[1])
        return _narrow(ids_MJ, bucket(at_temperature(logp_MV, spec.temperature), ids_MJ), logp_MV.shape[1])

    return summary


def _narrow(ids_MJ: Tensor, logp_ML: Tensor, vocabulary: int) -> dict[str, Tensor]:
    narrow = torch.uint16 if vocabulary <= 1 << 16 else torch.int32
    return {"ids": ids_MJ.to(narrow), "logp": logp_ML.to(torch.float16)}
