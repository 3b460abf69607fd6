"""Perform a planned merge: segments of tensors across threads, one rounding, a journal, and one rename at the end.

    <out>.partial-<plan>/   weights files of their full size, journal.jsonl; removed by the rename or resumed
    <out>/                  the model, with merge.json: what went in, digests of what came out, facts of each tensor

Nothing depends on the number of threads, on how the inputs are divided into files, or on when a merge was killed.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evertune.errors import MergeError, WorkspaceError
from evertune.failpoint import reach
from evertune.hashing import canonical_json
from evertune.merge import kernels
from evertune.merge.chunk import Pool
from evertune.merge.journal import Journal
from evertune.merge.kernels import Array
from evertune.merge.methods import Pass, Rule, State
from evertune.merge.output import OutputFiles
from evertune.merge.plan import (
    KEPT_BYTES,
    MANIFEST,
    TOKENIZER_FILES,
    MergePlan,
    TensorPlan,
    default_threads,
    index_json,
    kept_chunk_bytes,
    tensor_rule,
)
from evertune.merge.reader import Inputs, Reader, Seconds, open_inputs
from evertune.merge.sources import FLOATS, Files
from evertune.merge.starts import check_starts
from evertune.merge.statistics import measure
from evertune.model.checkpoint import INDEX, NOTE, Checkpoint, describe
from evertune.model.header import DTYPE_BITS

JOURNAL = "journal.jsonl"
COPY_BYTES = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """A finished merge.

    Attributes:
        checkpoint: the published folder.
        manifest: what merge.json says.
        seconds: CPU seconds by what was done, over all threads, of this process.
        resumed: segments that an earlier process had finished.
    """

    checkpoint: Checkpoint
    manifest: dict[str, Any]
    seconds: Seconds
    resumed: int


def run_merge(plan: MergePlan, out: Path, *, threads: int | None = None, progress: Progress | None = None) -> Merged:
    """Merge into a new folder, or finish a merge that was killed.

    Args:
        out: must not exist, or be an empty folder.
        progress: called with bytes written and bytes in all, from any thread.

    Raises:
        MergeError: an input holds NaN or Inf, models have different starts, a result does not fit its dtype, or `out`
            holds files.
        CheckpointError: an input is cut, or was changed while it was read.
        WorkspaceError: the disk has no room, or the folder cannot be written.
    """
    out = out.absolute()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(plan, out)
    check_room(plan, partial)
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MergeError(f"{partial} is being written by another process.", remedy="Wait for it.") from None
        try:
            manifest, seconds, resumed = merge_into(plan, partial, threads=threads, progress=progress)
        except MergeError:
            shutil.rmtree(partial)  # the inputs are at fault: there is nothing to go on with
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WorkspaceError(
                f"{partial}: the disk became full while it was written.",
                remedy="Make room and give the same command again: it goes on from what is there.",
            ) from error
        if out.is_dir():
            out.rmdir()
        reach("merge.finished")
        partial.rename(out)
        _sync(out.parent)
    finally:
        os.close(lock)
    known = {out / name: facts["sha256"] for name, facts in manifest["files"].items()}
    return Merged(describe(out, known=known), manifest, seconds, resumed)


def partial_of(plan: MergePlan, out: Path) -> Path:
    """The folder that a merge is written to until it is whole."""
    return out.with_name(f"{out.name}.partial-{plan.digest[:12]}")


def check_new(out: Path) -> None:
    """Raise MergeError where a folder to write exists and is not empty."""
    above = next((one for one in out.absolute().parents if one.exists()), None)
    if above is not None and not above.is_dir():
        raise MergeError(f"{above} is a file, so there can be no folder {out.absolute()}.", remedy="Give a new folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(
            f"{out.absolute()} exists and is not an empty folder.", remedy="Give a new folder; nothing is overwritten."
        )


def check_room(plan: MergePlan, folder: Path) -> None:
    """Raise WorkspaceError where a folder to be cannot be written, or the disk has no room for what it still lacks."""
    kept = sum(one.stat().st_blocks * 512 for one in folder.iterdir()) if folder.is_dir() else 0
    missing = plan.bytes_written() - kept
    place = next(one for one in (folder, *folder.parents) if one.exists())
    if not os.access(place, os.W_OK):
        raise WorkspaceError(
            f"{place}: is read-only, or belongs to someone else; the result cannot be written there.",
            remedy="Give another folder with --out.",
        )
    free = shutil.disk_usage(place).free
    if missing > free:
        raise WorkspaceError(
            f"{place}: {free / 1e6:,.1f} MB are free, {missing / 1e6:,.1f} MB are to be written.",
            remedy="Make room, or write somewhere else.",
        )


def merge_into(
    plan: MergePlan, folder: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], Seconds, int]:
    """Write the whole model into a folder, whose journal may tell what is done; returns what merge.json says.

    Raises:
        MergeError, CheckpointError: as `run_merge`.
    """
    if plan.config.different_starts == "refuse":
        check_starts(plan)
    journal = Journal(folder / JOURNAL, plan.digest)
    outputs = OutputFiles(folder, plan.files)
    journal.watch(outputs.descriptors)
    files = Files()
    try:
        resumed = _take_over(plan, journal, outputs)
        seconds = _Work(plan, files, outputs, journal, resumed, progress).run(threads or default_threads())
        files.check_unchanged()
    except BaseException:
        journal.abandon()
        outputs.abandon()
        raise
    finally:
        files.close()
    statistics = dict(journal.statistics)
    journal.close()
    digests = outputs.close()
    manifest = _manifest(plan, digests, statistics)
    _write_rest(plan, folder, manifest)
    return manifest, seconds, len(resumed)


def _take_over(plan: MergePlan, journal: Journal, outputs: OutputFiles) -> set[tuple[int, int]]:
    """The segments of an earlier process whose bytes are what the journal says."""
    found = set()
    for (i, segment), expected in sorted(journal.finished.items()):
        tensor = plan.tensors[i]
        offset, size = _bytes_of(tensor, segment)
        data = np.empty(size, np.uint8)
        outputs.read(tensor.file, offset, data)
        if kernels.checksum(data) == expected:
            found.add((i, segment))
            outputs.digest(tensor.file, offset, data)
    return found


def _bytes_of(tensor: TensorPlan, segment: int) -> tuple[int, int]:
    """Where in its file a segment lies, and its size."""
    begin, end = tensor.span(segment)
    width = DTYPE_BITS[tensor.dtype] // 8
    return tensor.begin + begin * width, (end - begin) * width


@dataclass
class _Open:
    """A tensor that is being merged.

    stage: index of the pass at work, or the number of passes when chunks are merged.
    left: segments of the stage that are not done.
    sums: of each segment of a pass whose sums are floats; one shared array otherwise.
    """

    index: int
    inputs: Inputs
    rule: Rule
    state: State = field(default_factory=dict)
    stage: int = 0
    left: int = 0
    sums: dict[int, Array] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def one_pass(self) -> Pass | None:
        return self.rule.passes[self.stage] if self.stage < len(self.rule.passes) else None


class _Work:
    """The queue: tensors in order, at most a few open, each through its passes and then merged."""

    def __init__(
        self,
        plan: MergePlan,
        files: Files,
        outputs: OutputFiles,
        journal: Journal,
        finished: set[tuple[int, int]],
        progress: Progress | None,
    ) -> None:
        self._plan, self._files, self._outputs, self._journal = plan, files, outputs, journal
        self._finished, self._progress = finished, progress
        self._ready: deque[tuple[_Open, int]] = deque()
        self._next = 0
        self._open = 0
        self._written = 0
        self._total = plan.bytes_written()
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._seconds = Seconds()
        self._pool = Pool(kept_chunk_bytes(plan), KEPT_BYTES)

    def run(self, threads: int) -> Seconds:
        """Work until everything is done; raises the first error of a worker."""
        workers = [threading.Thread(target=self._worker, args=(threads,), daemon=True) for _ in range(threads - 1)]
        for one in workers:
            one.start()
        self._worker(threads)
        for one in workers:
            one.join()
        if self._error is not None:
            raise self._error
        return self._seconds

    def _worker(self, threads: int) -> None:
        reader = Reader(self._files, self._pool)
        started = time.thread_time()
        buffer = np.empty(0, np.uint8)
        try:
            while (task := self._take(threads)) is not None:
                opened, segment = task
                if opened.one_pass is not None:
                    self._gather(opened, segment, opened.one_pass, reader)
                else:
                    buffer = self._merge(opened, segment, reader, buffer)
                self._finish(opened, reader)
        except BaseException as error:
            with self._condition:
                self._error = self._error or error
                self._condition.notify_all()
        seconds = reader.seconds
        seconds.compute = time.thread_time() - started - seconds.read - seconds.write - seconds.digest
        with self._condition:
            self._seconds.add(seconds)

    def _take(self, threads: int) -> tuple[_Open, int] | None:
        """The next segment to work on; None when there is none left."""
        with self._condition:
            while True:
                if self._error is not None:
                    return None
                if self._ready:
                    return self._ready.popleft()
                if self._next < len(self._plan.tensors) and self._open <= threads:
                    self._open_next()
                elif self._next == len(self._plan.tensors) and self._open == 0:
                    self._condition.notify_all()
                    return None
                else:
                    self._condition.wait()

    def _open_next(self) -> None:
        index, tensor = self._next, self._plan.tensors[self._next]
        self._next += 1
        done = all((index, segment) in self._finished for segment in range(tensor.segments))
        if done and (index in self._journal.statistics or not self._is_measured(tensor)):
            return
        rule = tensor_rule(self._plan.config, tensor)
        opened = _Open(index, open_inputs(self._plan, tensor, self._files), rule)
        self._open += 1
        self._begin(opened)

    def _begin(self, opened: _Open) -> None:
        """Queue the segments of a stage, ahead of all others; call it under the condition."""
        segments = list(range(opened.inputs.tensor.segments))
        if opened.one_pass is not None and opened.one_pass.of_sample:
            segments = [0]
        if opened.one_pass is None:
            segments = [one for one in segments if (opened.index, one) not in self._finished]
        elif np.issubdtype(opened.one_pass.dtype, np.integer):
            opened.sums = {0: np.zeros(opened.one_pass.shape, opened.one_pass.dtype)}
        else:
            opened.sums = {}
        # A tensor without elements, or one that only its statistics are missing of, has one empty task.
        opened.left = max(1, len(segments))
        self._ready.extendleft((opened, one) for one in reversed(segments or [-1]))
        self._condition.notify_all()

    def _gather(self, opened: _Open, segment: int, one: Pass, reader: Reader) -> None:
        is_shared = bool(np.issubdtype(one.dtype, np.integer))
        sums = reader.room.take("sums", one.shape, one.dtype) if is_shared else np.empty(one.shape, one.dtype)
        sums.fill(0)
        inputs = opened.inputs
        span = inputs.tensor.span(segment)
        chunks = reader.chunks(inputs, *span, keep=True, check=not opened.rule.shows_nan)
        for chunk in reader.sample(inputs) if one.of_sample else chunks:
            one.gather(chunk, opened.state, sums)
        if opened.rule.shows_nan and not np.isfinite(sums).all():
            reader.check_finite(inputs, *span)
        with opened.lock:
            if is_shared:
                opened.sums[0] += sums
            else:
                opened.sums[segment] = sums

    def _merge(self, opened: _Open, segment: int, reader: Reader, buffer: Array) -> Array:
        tensor = opened.inputs.tensor
        offset, size = _bytes_of(tensor, segment) if segment >= 0 else (tensor.begin, 0)
        if len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        data = buffer[:size]
        if size and tensor.settings is None:
            copy_equal(self._plan, tensor, offset, data, self._files)
        elif size:
            self._apply(opened, segment, reader, data)
        if size:
            started = time.thread_time()
            self._outputs.write(tensor.file, offset, data)
            written = time.thread_time()
            self._outputs.digest(tensor.file, offset, data)
            reader.seconds.write += written - started
            reader.seconds.digest += time.thread_time() - written
            self._journal.segment(opened.index, segment, kernels.checksum(data), size)
            reach("merge.segment")
        if self._progress is not None:
            with self._condition:
                self._written += size
                self._progress(self._written, self._total)
        return buffer

    def _apply(self, opened: _Open, segment: int, reader: Reader, data: Array) -> None:
        tensor = opened.inputs.tensor
        width, first = DTYPE_BITS[tensor.dtype] // 8, tensor.span(segment)[0]
        not_counted = np.empty(0, np.int64)
        for chunk in reader.chunks(opened.inputs, *tensor.span(segment), check=not opened.rule.shows_nan):
            place = (chunk.begin - first) * width
            merged = reader.room.take("merged", (chunk.count,), chunk.like.dtype)
            opened.rule.apply(chunk, opened.state, merged, not_counted)
            bad = kernels.encode(merged, FLOATS[tensor.dtype], data[place : place + chunk.count * width])
            if bad:
                reader.check_finite(opened.inputs, chunk.begin, chunk.begin + chunk.count)
                raise MergeError(
                    f"{tensor.name}: {bad} of {chunk.count} merged values do not fit into {tensor.dtype}, beginning at "
                    f"element {chunk.begin}.",
                    remedy="Use smaller weights, or dtype: bfloat16 or float32.",
                )

    def _finish(self, opened: _Open, reader: Reader) -> None:
        """After a task: the last of a stage begins the next stage, the last of all closes the tensor."""
        with opened.lock:
            opened.left -= 1
            if opened.left:
                return
        one = opened.one_pass
        if one is not None:
            total: Array = np.zeros(one.shape, one.dtype)
            for segment in sorted(opened.sums):
                total += opened.sums[segment]
            again = one.finish(total, opened.state)
            with self._condition:
                opened.stage += 0 if again else 1
                self._begin(opened)
            return
        reader.release(opened.inputs)
        if opened.index not in self._journal.statistics and self._is_measured(opened.inputs.tensor):
            facts = measure(opened.inputs, opened.rule, opened.state, reader)
            self._journal.statistics[opened.index] = facts
            self._journal.measured(opened.index, facts)
        with self._condition:
            self._open -= 1
            self._condition.notify_all()

    def _is_measured(self, tensor: TensorPlan) -> bool:
        return tensor.settings is not None and bool(tensor.experts) and tensor.elements > 0


def copy_equal(plan: MergePlan, tensor: TensorPlan, offset: int, data: Array, files: Files) -> None:
    """An integer or boolean tensor: the same in all models, and copied."""
    other = np.empty_like(data)
    for i, model in enumerate(plan.sources):
        at = model.tensors[tensor.name]
        files.add(at.file)
        files.read(at.file, at.info.begin + offset - tensor.begin, data if i == 0 else other)
        if i and not np.array_equal(data, other):
            raise MergeError(
                f"the {tensor.dtype} buffer {tensor.name} differs between '{plan.sources[0].name}' and "
                f"'{model.name}', and has no value between.",
                remedy="Merge models with one start.",
            )


def _manifest(plan: MergePlan, digests: list[str], statistics: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What merge.json says. Holds no time and no path, so that the same merge gives the same bytes."""
    config = plan.config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"base"})
    for one in config["models"].values():
        del one["path"]
    return {
        "version": 1,
        "plan": plan.digest,
        "config": config,
        "method": {"name": plan.method.name, "paper": plan.method.paper, "standing": plan.method.standing},
        "models": {one.name: one.checkpoint.digest for one in plan.sources if one is not plan.base},
        "base": plan.base.checkpoint.digest if plan.base else None,
        "config_from": plan.donor.name,
        "notes": list(plan.notes),
        "files": {
            one.name: {"sha256": digest, "bytes": one.size} for one, digest in zip(plan.files, digests, strict=True)
        },
        "tensors": {plan.tensors[i].name: statistics[i] for i in sorted(statistics)},
    }


def _write_rest(plan: MergePlan, folder: Path, manifest: dict[str, Any]) -> None:
    """Tokenizer, index, manifest and, last, config.json, without which no loader takes the folder; then no journal."""
    donor = plan.donor.checkpoint.base.path
    for name in TOKENIZER_FILES:
        if (donor / name).is_file():
            shutil.copyfile(donor / name, folder / name)
    index = index_json(plan)
    if index is not None:
        _write(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    _write(folder / MANIFEST, manifest_text(manifest))
    made_of = [one.checkpoint.digest for one in plan.sources]
    (folder / NOTE).write_bytes(canonical_json({"made_of": made_of}))
    _write(folder / "config.json", json.dumps(dict(plan.merged_config), indent=2, sort_keys=True) + "\n")
    for file in folder.iterdir():
        _sync(file)
    (folder / JOURNAL).unlink()
    _sync(folder)


def manifest_text(manifest: dict[str, Any]) -> str:
    """merge.json: its settings for a reader, then a line for each tensor."""
    settings = {key: value for key, value in manifest.items() if key != "tensors"}
    lines = [f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in manifest["tensors"].items()]
    head = json.dumps({**settings, "tensors": {}}, indent=1)
    return head.removesuffix("{}\n}") + "{\n" + ",\n".join(lines) + "\n }\n}\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
