"""The index on disk: batches against all before them, and kills at any moment."""

import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evertune.data.dedup import Memory, resolve
from evertune.data.fingerprint import Fingerprints, fingerprint, join
from evertune.data.index import NAMES, DedupIndex, IndexSettings, open_index
from evertune.data.rows import Row
from evertune.errors import DataError, IntegrityError, WorkspaceError
from evertune.workspace.disk import flock

SETTINGS = IndexSettings("both", 3, 0.8)
NOTHING = np.zeros(0, np.uint64)


def prints(texts: list[str]) -> Fingerprints:
    return fingerprint([Row("s", "r", 1, Path("r"), {"text": one}, "text") for one in texts])


def batch(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcdefghijklmnop", k=12)) for _ in range(count)]


def extend(index: DedupIndex, texts: list[str]) -> list[str]:
    new = prints(texts)
    kept = np.flatnonzero(resolve(new, earlier=index).stays)
    index.add(new.take(kept), [texts[i] for i in kept], NOTHING)
    return [texts[i] for i in kept]


def test_batches_find_what_came_before_as_memory_does(tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    held = prints([])
    for seed in range(6):
        texts = batch(seed) + batch(seed - 1)[:5] + [one + " q" for one in batch(seed - 2)[:5]]
        expected = resolve(prints(texts), earlier=Memory(held, NOTHING, 0.8))
        again = open_index(tmp_path / "i", SETTINGS, create=False)
        found = resolve(prints(texts), earlier=again)
        assert np.array_equal(found.stays, expected.stays)
        assert np.array_equal(found.jaccard, expected.jaccard)
        held = join([held, prints(texts).take(np.flatnonzero(found.stays))])
        extend(index, texts)
    assert len(index) == len(held)


def test_a_row_is_named_by_its_label(tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    for seed in range(5):
        extend(index, batch(seed))
    texts = batch(2)
    found = resolve(prints(texts), earlier=index)
    assert [index.label(i) for i in found.earlier] == texts


def test_segments_stay_few(tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    for seed in range(20):
        extend(index, batch(seed, 10))
    counts = [one.count for one in index.segments]
    assert sum(counts) == 200
    assert all(one >= 2 * other for one, other in itertools.pairwise(counts))
    assert sorted(one.name for one in (tmp_path / "i").iterdir()) == sorted(
        [NAMES, *(one.folder.name for one in index.segments)]
    )


def test_templates_of_an_earlier_batch_are_templates_later(tmp_path: Path) -> None:
    task = "answer this question of the exam with one letter and no word beside it please thank you"
    first = [f"{task} {i} {i + 1} {i + 2}" for i in range(60)]
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    new = prints(first)
    found = resolve(new)
    index.add(new, first, found.templates)
    assert resolve(prints([f"{task} 70 71 72"]), earlier=index).stays.all()
    assert not resolve(prints([f"{task} 5 6 7"]), earlier=index).stays.any()


def test_another_setting_is_refused(tmp_path: Path) -> None:
    open_index(tmp_path / "i", SETTINGS, create=True)
    with pytest.raises(DataError, match="built with .*0.8.*, asked for is .*0.7"):
        open_index(tmp_path / "i", IndexSettings("both", 3, 0.7), create=True)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no index there"):
        open_index(tmp_path / "i", SETTINGS, create=False)


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    extend(index, batch(0))
    index.segments[0].folder.rename(tmp_path / "gone")
    with pytest.raises(IntegrityError, match="is missing from the index"):
        open_index(tmp_path / "i", SETTINGS, create=False)


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    index = open_index(tmp_path / "i", SETTINGS, create=True)
    with flock(tmp_path / "i", fcntl.LOCK_EX), pytest.raises(WorkspaceError, match="written by another process"):
        extend(index, batch(0))


WRITER = """
import sys
from pathlib import Path
from tests.data.test_index import SETTINGS, batch, extend, open_index
index = open_index(Path(sys.argv[1]), SETTINGS, create=True)
for seed in range(12):
    extend(index, batch(seed))
"""


def test_an_index_that_was_killed_while_it_was_written_loses_nothing(tmp_path: Path) -> None:
    # Killed again and again at other moments, it ends as one that was left alone.
    rng = random.Random(0)
    arguments = [sys.executable, "-c", WRITER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*arguments, str(tmp_path / "whole")], check=True, env=environment)
    kills = 0
    for _ in range(4):
        child = subprocess.Popen([*arguments, str(tmp_path / "killed")], env=environment)
        deadline = time.monotonic() + 60
        before = _names(tmp_path / "killed")
        while child.poll() is None and _names(tmp_path / "killed") == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        held = open_index(tmp_path / "killed", SETTINGS, create=True)
        assert len(held) == sum(len(one.prints()) for one in held.segments)
    subprocess.run([*arguments, str(tmp_path / "killed")], check=True, env=environment)
    whole, killed = (open_index(tmp_path / name, SETTINGS, create=False) for name in ("whole", "killed"))
    assert kills >= 2
    labels = [sorted(label for one in each.segments for label in one.labels) for each in (whole, killed)]
    assert labels[0] == labels[1]
    assert sorted(one.name for one in (tmp_path / "killed").iterdir()) == sorted(
        [NAMES, *(one.folder.name for one in killed.segments)]
    )


def _names(folder: Path) -> str:
    place = folder / NAMES
    return place.read_text() if place.is_file() else ""
