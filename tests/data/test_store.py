"""Rows by number from disk, in constant memory."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from evertune.data import store
from evertune.data.rows import Row
from evertune.data.store import RowStore, write_store
from evertune.errors import DataError


def rows(count: int) -> list[Row]:
    return [Row("s", f"r{i}", i, Path("r"), {"text": f"row {i} é", "n": i}, "text") for i in range(count)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RowStore:
    monkeypatch.setattr(store, "BATCH_ROWS", 7)
    return write_store(rows(50), tmp_path / "s.arrow", count_tokens=lambda row: row.line)


def test_any_row_by_its_number(made: RowStore) -> None:
    assert len(made) == 50
    assert [made[i] for i in (0, 6, 7, 49)] == [{"text": f"row {i} é", "n": i} for i in (0, 6, 7, 49)]
    assert list(made) == [row.value for row in rows(50)]
    for index in (-1, 50):
        with pytest.raises(IndexError):
            made[index]


def test_many_rows_in_the_order_asked_for(made: RowStore) -> None:
    indices = [random.Random(0).randrange(50) for _ in range(200)]
    assert [one["n"] for one in made.take(np.array(indices))] == indices
    assert made.take(np.array([], dtype=np.int64)) == []


def test_ids_and_tokens(made: RowStore) -> None:
    assert list(made.ids()) == [f"r{i}" for i in range(50)]
    assert made.tokens == sum(range(50))


def test_the_file_is_ordinary_arrow(made: RowStore) -> None:
    table = pyarrow.ipc.open_file(str(made.path)).read_all()
    assert table.schema.names == ["id", "row", "tokens"]
    assert table.num_rows == 50


def test_no_rows_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no rows"):
        write_store([], tmp_path / "s.arrow")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from evertune.data.rows import Row
from evertune.data.store import RowStore, write_store
path, count = Path(sys.argv[1]), int(sys.argv[2])
if not path.exists():
    value = {"text": "x" * 1000}
    write_store((Row("s", str(i), i, path, value, "text") for i in range(count)), path)
else:
    import ctypes, os
    s = RowStore(path)
    s.take(np.random.default_rng(0).integers(0, len(s), 20_000))
    print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    # Anonymous memory: pages of the mapped file belong to the system and can be taken back.
    def run(name: str, count: int) -> str:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    used = {}
    for name, count in (("small", 4_000), ("large", 40_000)):
        run(name, count)
        used[name] = int(run(name, count))
    # 36,000 rows more of 1 kB are 36 MB; less than a fifth of that is allowed for noise.
    assert used["large"] - used["small"] < 7_000
