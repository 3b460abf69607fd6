"""What a stage trains on: its rows read, encoded and mixed, with the facts that the ledger keeps about them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from evertune.data.encode import EncodedRow, Encoding, Item, counted_of, encode_rows, tokens_of
from evertune.data.quotas import Mixing, quotas_of
from evertune.data.replay import drop_duplicates
from evertune.data.rows import Row, read_rows
from evertune.data.stream import Pick, Stream, Stretches, lengths_of
from evertune.model.codec import Codec
from evertune.train.spec import RowsRef, TrainingSpec

Rows = dict[str, list[EncodedRow]]
Items = Mapping[str, Sequence[Item]]
Encode = Callable[..., Encoding[Any]]


@dataclass(frozen=True)
class Material:
    """Encoded rows or pairs by source, and the stream that says which of them is seen when.

    Attributes:
        steps: optimizer steps of the stage.
        data: per new source: its digest, rows, rows left out as too long, tokens.
        removed_duplicates: replay rows left out because they are also new rows, or came twice.
    """

    new: Items
    replay: Rows
    stream: Stream | Stretches
    batch_rows: int
    micro_batch_rows: int
    world_size: int
    steps: int
    data: list[dict[str, Any]]
    removed_duplicates: int

    @property
    def micro_steps(self) -> int:
        """Forward passes of one process in a step."""
        return self.stream.micro_steps(
            batch_rows=self.batch_rows, micro_batch_rows=self.micro_batch_rows, world_size=self.world_size
        )

    @property
    def save_every(self) -> int:
        """A resume point may lie after any step."""
        return 1

    def recall(self, history: Sequence[Mapping[str, float]]) -> None:
        """What a step shows depends on its number alone."""

    def prepare(self, step: int) -> dict[str, float]:
        """Nothing has to be made ready."""
        return {}

    def micro_batch(self, step: int, micro_step: int, rank: int) -> list[Item]:
        """The items of one micro-batch, a pure function of its place; empty when the step has none left for it."""
        picks = self.stream.batch(
            step,
            micro_step,
            rank,
            batch_rows=self.batch_rows,
            micro_batch_rows=self.micro_batch_rows,
            world_size=self.world_size,
            lengths=self._lengths,
        )
        return [self.row(pick) for pick in picks]

    def step_rows(self, step: int) -> list[Item]:
        """The items of a whole step, over all micro-batches and processes."""
        first = step * self.batch_rows
        return [self.row(self.stream.pick(position)) for position in range(first, first + self.batch_rows)]

    @cached_property
    def _lengths(self) -> dict[tuple[str, int], int]:
        return lengths_of({**self.new, **self.replay})

    def row(self, pick: Pick) -> Item:
        return self.replay[pick.source][pick.index] if pick.is_replay else self.new[pick.source][pick.index]

    def picks(self) -> list[Pick]:
        """Every row the stage sees, in order."""
        return [self.stream.pick(position) for position in range(self.steps * self.batch_rows)]

    def shown(self) -> list[Item]:
        """The items that the stage sees, each once; all there are where that is settled on the way."""
        if isinstance(self.stream, Stretches):
            return self.items()
        return [self.row(pick) for pick in dict.fromkeys(self.picks())]

    def items(self) -> list[Item]:
        """All items, new ones first."""
        kinds: Sequence[Items] = (self.new, self.replay)
        return [item for kind in kinds for items in kind.values() for item in items]

    def first_rows(self, count: int, *, is_replay: bool) -> list[Item]:
        """The first items of one kind that the stage sees."""
        picks = [pick for pick in self.picks() if pick.is_replay == is_replay]
        return [self.row(pick) for pick in picks[:count]]

    def facts(self, spec: TrainingSpec) -> dict[str, Any]:
        """The ledger's fields about what was seen."""
        picks = self.picks()
        replayed = Counter(pick.source for pick in picks if pick.is_replay)
        rows = [self.row(pick) for pick in picks]
        return {
            "data": self.data,
            "replay": self._replay_facts(spec, replayed, len(picks)),
            "steps": self.steps,
            "new_rows": len(picks) - replayed.total(),
            "replay_rows": replayed.total(),
            "tokens": sum(map(tokens_of, rows)),
            "counted_tokens": sum(map(counted_of, rows)),
        }

    def _replay_facts(self, spec: TrainingSpec, replayed: Counter[str], seen: int) -> dict[str, Any] | None:
        if not spec.replay or spec.share == 0.0:
            return None
        return {
            "share_asked": spec.share,
            "share_done": replayed.total() / seen,
            "rows": replayed.total(),
            "pool_rows": sum(len(rows) for rows in self.replay.values()),
            "removed_duplicates": self.removed_duplicates,
            "sources": {source: replayed[source] for source in sorted(self.replay)},
            "sha256": {ref.source: ref.digest for ref in spec.replay},
        }


def load_material(spec: TrainingSpec, codec: Codec, *, world_size: int, encode: Encode = encode_rows) -> Material:
    """Read, deduplicate and encode a stage's rows, and lay out its stream.

    Args:
        encode: makes items of the new rows; replayed ones are always rows.

    Raises:
        DataError: a row cannot be read or encoded, or is too long.
    """
    new_rows = {ref.source: _read(ref) for ref in spec.new}
    replay_rows = {ref.source: _read(ref) for ref in spec.replay} if spec.share > 0.0 else {}
    removed = 0
    if spec.dedup and replay_rows:
        replay_rows, removed = _drop_duplicates(replay_rows, new_rows, near=spec.dedup == "near")
    limits: dict[str, Any] = {"max_tokens": spec.max_tokens, "too_long": spec.too_long}
    new = {source: encode(rows, codec, **limits) for source, rows in new_rows.items()}
    # Where every replay row is also a new one, nothing is left to replay: the ledger then shows a share of 0.
    replay = {
        source: [row.as_replay() for row in encode_rows(rows, codec, **limits).rows]
        for source, rows in replay_rows.items()
        if rows
    }
    sizes = {source: len(encoding.rows) for source, encoding in new.items()}
    tokens = {source: sum(map(tokens_of, encoding.rows)) for source, encoding in new.items()}
    stream = Stream(
        new=sizes,
        weights=None,
        quotas=quotas_of(Mixing(weights=spec.weights, **(spec.mix or {})), sizes, tokens),
        replay={source: len(rows) for source, rows in replay.items()},
        share=spec.share if replay else 0.0,
        seed=spec.seed,
    )
    return Material(
        new={source: list(encoding.rows) for source, encoding in new.items()},
        replay=replay,
        stream=stream,
        batch_rows=spec.batch_rows,
        micro_batch_rows=spec.micro_batch_rows,
        world_size=world_size,
        steps=count_steps(spec, stream.rows_per_epoch),
        data=[_source_facts(ref, new[ref.source]) for ref in spec.new],
        removed_duplicates=removed,
    )


def count_steps(spec: TrainingSpec, rows_per_epoch: int) -> int:
    """Optimizer steps of a stage. The last step of the last epoch is filled up from the next epoch's rows."""
    if spec.steps is not None:
        return spec.steps
    assert spec.epochs is not None, "a stage has steps or epochs"
    return max(1, ceil(spec.epochs * rows_per_epoch / spec.batch_rows))


def _read(ref: RowsRef) -> list[Row]:
    return read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit)


def _drop_duplicates(
    replay: dict[str, list[Row]], new: dict[str, list[Row]], *, near: bool
) -> tuple[dict[str, list[Row]], int]:
    old, learnt = ([row for rows in each.values() for row in rows] for each in (replay, new))
    kept, removed = drop_duplicates(old, learnt, near=near)
    return {source: [row for row in kept if row.source == source] for source in replay}, len(removed)


def _source_facts(ref: RowsRef, encoding: Encoding[Any]) -> dict[str, Any]:
    return {
        "source": ref.source,
        "sha256": ref.digest,
        "rows": len(encoding.rows),
        "dropped_long": len(encoding.dropped),
        "removed": ref.removed,
        "tokens": sum(map(tokens_of, encoding.rows)),
    }
