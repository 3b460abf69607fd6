"""On-policy distillation: the student answers some rows by itself, and its teachers say at each of its tokens what they
would have said there (GKD, Agarwal et al. 2023, arXiv:2306.13649).

So the student is taught where it goes by itself, and not only where the rows lead it. Rows are answered for a few steps
at a time, so an answer is at most that much older than the weights that learn from it; GKD samples anew for each step.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evertune.data.encode import EncodedRow, Item
from evertune.model.forward import Forward
from evertune.train.distill_spec import DistillSpec
from evertune.train.distill_targets import Targets
from evertune.train.distill_teachers import Teachers
from evertune.train.material import Material
from evertune.train.rollout import answer_seed
from evertune.train.sample import sample_answers
from evertune.train.sink import Metrics


@dataclass(frozen=True, eq=False)
class SampledRow:
    """A row that the student has answered: the tokens of its answer count."""

    row: EncodedRow
    stopped: bool

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def is_replay(self) -> bool:
        return False

    @property
    def rows(self) -> tuple[EncodedRow, ...]:
        return (self.row,)


class OnPolicyFeed:
    """The stream of a stage, in which a share of the new rows is answered by the student.

    `prepare` must be called with each step in order, from the first one of a window on.

    Args:
        ask: makes the student ready to speak, in evaluation mode.
        targets: where the teachers' outputs for its answers are held for a window; also has those of the other rows.
        gather: joins what each process has made.
        answered: makes a row of another answer; `answered_row` when not given.
    """

    def __init__(
        self,
        spec: DistillSpec,
        material: Material,
        *,
        ask: Callable[[], Forward],
        stop_ids: frozenset[int],
        teachers: Teachers,
        targets: Targets,
        gather: Callable[[list[Any]], list[Any]],
        rank: int,
        answered: Callable[[EncodedRow, Sequence[int]], EncodedRow] | None = None,
    ) -> None:
        assert spec.on_policy is not None, "the student never answers"
        self._spec, self._settings, self._material = spec, spec.on_policy, material
        self._ask, self._stop_ids = ask, stop_ids
        self._teachers, self._targets = teachers, targets
        self._gather, self._rank, self._answered_row = gather, rank, answered or answered_row
        self._held: dict[int, list[Item]] = {}
        self._window = -1

    @property
    def steps(self) -> int:
        return self._material.steps

    @property
    def micro_steps(self) -> int:
        return self._material.micro_steps

    @property
    def save_every(self) -> int:
        """Only between windows is nothing held."""
        return self._settings.steps

    def recall(self, history: Sequence[Metrics]) -> None:
        """What a step shows depends on its number and the weights alone."""

    def prepare(self, step: int) -> Metrics:
        """Let the student answer the rows of the window that a step belongs to, and the teachers judge them."""
        window = step // self._settings.steps
        if window == self._window:
            return {}
        first = window * self._settings.steps
        steps = range(first, min(first + self._settings.steps, self._material.steps))
        self._held = self._answered({one: self._material.step_rows(one) for one in steps})
        self._targets.forget()
        mine = [
            item
            for one in steps
            for micro in range(self.micro_steps)
            for item in self.micro_batch(one, micro, self._rank)
        ]
        written = [item.row for item in mine if isinstance(item, SampledRow)]
        sources = dict.fromkeys(row.source for row in written)
        self._teachers.answer({name: [row for row in written if row.source == name] for name in sources}, self._targets)
        self._window = window
        return {}

    def step_rows(self, step: int) -> Sequence[Item]:
        return self._held[step]

    def micro_batch(self, step: int, micro_step: int, rank: int) -> Sequence[Item]:
        size = self._material.micro_batch_rows
        first = (micro_step * self._material.world_size + rank) * size
        return self._held[step][first : first + size]

    def _answered(self, steps: dict[int, list[Item]]) -> dict[int, list[Item]]:
        """The items of each step, the chosen ones with the student's answer; longest first."""
        places = [
            (one, i)
            for one, items in steps.items()
            for i, item in enumerate(items)
            if not item.is_replay and is_answered(self._spec, one, i)
        ]
        mine = places[self._rank :: self._material.world_size]
        answered = dict(
            self._gather(list(zip(mine, self._answers([steps[one][i] for one, i in mine], mine), strict=True)))
        )
        return {
            one: sorted(
                (answered.get((one, i), item) for i, item in enumerate(items)), key=lambda item: -len(item.rows[0].ids)
            )
            for one, items in steps.items()
        }

    def _answers(self, items: Sequence[Item], places: Sequence[tuple[int, int]]) -> list[SampledRow]:
        if not items:
            return []
        rows = [item.rows[0] for item in items]
        said = sample_answers(
            self._ask(),
            [prompt_of(row).tolist() for row in rows],
            seeds=[[answer_seed(self._spec.seed, *place, 0)] for place in places],
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            stop_ids=self._stop_ids,
        )
        return [
            SampledRow(self._answered_row(row, one.ids), one.stopped) for row, (one,) in zip(rows, said, strict=True)
        ]


def is_answered(spec: DistillSpec, step: int, place: int) -> bool:
    """Whether the student answers the row at a place of a step: a function of the recipe's seed and the place."""
    return spec.on_policy is not None and answer_seed(spec.seed, step, place, 1) < spec.on_policy.share * 2.0**63


def prompt_of(row: EncodedRow) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A row's tokens up to where its last answer begins."""
    last = int(np.flatnonzero(row.counted)[-1])
    before = np.flatnonzero(~row.counted[:last])
    return row.ids[: int(before[-1]) + 1]


def answered_row(row: EncodedRow, answer: Sequence[int]) -> EncodedRow:
    """The row's prompt with another answer, whose tokens count."""
    prompt = prompt_of(row)
    ids = np.concatenate([prompt, np.array(answer, dtype="<i4")]).astype("<i4")
    counted = np.arange(len(ids)) >= len(prompt)
    digest = hashlib.sha256(ids.tobytes() + counted.tobytes()).hexdigest()
    return EncodedRow(row.source, row.id, ids, counted, is_replay=False, digest=digest)
