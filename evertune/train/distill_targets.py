"""What the student is to match: teachers' outputs at the counted positions of rows, kept on disk.

    top      the K most likely words of a teacher and one tail bucket for all others
    pooled   of an ensemble: every member's log-probabilities of the words that any member keeps, and its tail
    all      the whole distribution, for small vocabularies

An entry depends on its teacher, on tokenizer and template, precision and temperature, and on the row. So it serves
every stage that asks the same teacher about the same row, and an anchor to the same checkpoint.
"""

# M counted positions of some rows, K kept words of one teacher, J kept words of an ensemble, L words or buckets

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from evertune.data.encode import EncodedRow
from evertune.hashing import digest_json
from evertune.model.codec import load_codec
from evertune.model.open import DTYPES
from evertune.train.cache import ReferenceCache
from evertune.train.distill_losses import mixture
from evertune.train.distill_spec import DistillSpec, TeacherSpec


@dataclass(frozen=True)
class Target:
    """A distribution to match at each of M positions.

    Attributes:
        ids_MJ: the words that stand alone; None where all do.
        logp_ML: log-probabilities, float32, normalised: of those words and, last, of all others together; or of the
            whole vocabulary.
    """

    ids_MJ: Tensor | None
    logp_ML: Tensor


class Store(Protocol):
    """Where a teacher's outputs lie, as `ReferenceCache` keeps them."""

    def missing(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]: ...

    def read(self, row: EncodedRow) -> dict[str, Tensor]: ...

    def add(self, rows: Sequence[EncodedRow], compute: Callable[[EncodedRow], dict[str, Tensor]]) -> None: ...


class PassingStore:
    """Outputs for rows that the student has written and that nobody will ask about again: in memory, until forgotten.

    Args:
        stored: what is on disk; it is read and never written.
    """

    def __init__(self, stored: ReferenceCache) -> None:
        self._stored = stored
        self._held: dict[str, dict[str, Tensor]] = {}

    def missing(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        return [row for row in self._stored.missing(rows) if row.digest not in self._held]

    def read(self, row: EncodedRow) -> dict[str, Tensor]:
        return self._held[row.digest] if row.digest in self._held else self._stored.read(row)

    def add(self, rows: Sequence[EncodedRow], compute: Callable[[EncodedRow], dict[str, Tensor]]) -> None:
        self._held.update({row.digest: compute(row) for row in rows})

    def forget(self) -> None:
        self._held.clear()


class Targets:
    """The stored outputs of a stage's teachers.

    Args:
        root: the workspace's cache folder.
        tmp: its folder of unfinished files.
        passing: what is added is held in memory only.
    """

    def __init__(self, spec: DistillSpec, *, root: Path, tmp: Path, passing: bool = False) -> None:
        self._spec, self._root, self._tmp, self._passing = spec, root, tmp, passing
        self._codec = load_codec(spec.start.base.path).digest
        self._open: dict[str, ReferenceCache | PassingStore] = {}

    def read(self, rows: Sequence[EncodedRow]) -> Target:
        """What rows of one source are to match, row by row. Everything asked for must be stored."""
        teachers = self._spec.of(rows[0].source)
        stored = [[cache.read(row) for row in rows] for cache in self.stores(rows[0].source)]
        # Stored in half precision: normalised again, so that equal distributions have no divergence.
        members = [torch.cat([one["logp"] for one in each]).float().log_softmax(dim=-1) for each in stored]
        logp_ML = members[0] if len(members) == 1 else mixture(members, [one.weight for one in teachers])
        words = [one["ids"] for one in stored[0] if "ids" in one]
        return Target(torch.cat(words).long() if words else None, logp_ML)

    def forget(self) -> None:
        """Drop what is held in memory only."""
        for store in self._open.values():
            if isinstance(store, PassingStore):
                store.forget()

    def covered_mass(self, rows: Sequence[EncodedRow]) -> float:
        """Mean probability that the targets give to words that stand alone, over the counted positions of the rows."""
        targets = [self.read([row]) for row in rows]
        found = [
            1.0 - one.logp_ML[:, -1].exp() if one.ids_MJ is not None else one.logp_ML.new_ones(1) for one in targets
        ]
        return float(torch.cat(found).double().mean())

    def stores(self, source: str) -> list[Store]:
        """Where the targets of a source's rows lie: one store for each of its teachers."""
        teachers = self._spec.of(source)
        if len(teachers) == 1 or self._spec.words is None:
            return [self.own(one) for one in teachers]
        return [self.pooled(one, teachers) for one in teachers]

    def own(self, teacher: TeacherSpec) -> Store:
        """A teacher's own kept words, or its whole distribution."""
        kind = "all" if self._spec.words is None else f"top{self._spec.words}"
        return self._store(teacher, kind)

    def pooled(self, teacher: TeacherSpec, ensemble: Sequence[TeacherSpec]) -> Store:
        """A teacher's log-probabilities of the words that any member of an ensemble keeps."""
        members = digest_json([one.checkpoint.digest for one in ensemble])
        return self._store(teacher, f"top{self._spec.words} of {members}")

    def written(self, teacher: TeacherSpec, source: str) -> Store:
        """The answers that a teacher writes to prompts of a source, by prompt."""
        how = self._spec.answers
        assert how is not None, "nobody writes answers"
        facts = [how.keep, how.samples, how.max_new_tokens, how.temperature, how.verifiers.get(source), self._spec.seed]
        return self._store(teacher, f"answers {digest_json(facts)}")

    def gains(self, teacher: TeacherSpec) -> Store:
        """What a demonstration does to a teacher's likelihood of rows' own answers."""
        return self._store(teacher, "gain")

    def _store(self, teacher: TeacherSpec, kind: str) -> Store:
        temperature = self._spec.temperature
        shown = "" if self._spec.demonstration is None else " after a demonstration"
        identity = {
            "reference": teacher.checkpoint.digest,
            "codec": self._codec,
            "dtype": str(DTYPES[self._spec.dtype]),
            "kind": (kind if temperature == 1.0 else f"{kind} at temperature {temperature!r}") + shown,
        }
        name = digest_json(identity)
        if name not in self._open:
            stored = ReferenceCache(self._root, self._tmp, identity=identity)
            self._open[name] = PassingStore(stored) if self._passing else stored
        return self._open[name]
