"""Rows of promoted rounds come back as they were."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evertune.data.history import Budget, choose, write_history
from evertune.data.rows import Row, read_rows
from evertune.errors import DataError


@pytest.mark.parametrize(
    "format, lines",
    [
        ("text", '{"text": "caf\u00e9 \u2028 \U0001f600", "topic": [1, null]}\n\n{"text": "b", "id": "own"}\n'),
        (
            "messages",
            '{"messages": [{"role": "user", "content": "a\\nb"}, {"role": "assistant", "content": "c"}], "id": 3}\n',
        ),
    ],
)
def test_rows_come_back_with_their_ids_and_fields(tmp_path: Path, format: str, lines: str) -> None:
    (tmp_path / "source.jsonl").write_text(lines, encoding="utf-8")
    rows = read_rows(tmp_path / "source.jsonl", format=format, source="s")
    write_history(tmp_path / "kept.jsonl", rows)
    again = read_rows(tmp_path / "kept.jsonl", format=format, source="history/one/s")
    assert [row.id for row in again] == [row.id for row in rows]
    assert [{**row.value, "id": 0} for row in again] == [{**row.value, "id": 0} for row in rows]


def made(lengths: list[int]) -> list[Row]:
    return [
        Row("s", f"r{i}", i, Path("f"), {"text": "x" * size, "kind": i % 2}, "text") for i, size in enumerate(lengths)
    ]


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    rows=st.integers(1, 40),
    limit=st.integers(1, 1500),
    policy=st.sampled_from(["reservoir", "class_balanced", "coverage"]),
)
def test_what_is_kept_fits_both_budgets_in_the_rows_order(
    lengths: list[int], rows: int, limit: int, policy: str
) -> None:
    given_rows = made(lengths)
    budget = Budget(rows=rows, bytes=limit, policy=policy, by="kind")  # type: ignore[arg-type]
    kept = choose(given_rows, budget, seed=1)
    assert kept == [row for row in given_rows if row in kept]
    assert 1 <= len(kept) <= rows
    with tempfile.TemporaryDirectory() as folder:
        write_history(Path(folder) / "kept.jsonl", kept)
        assert (Path(folder) / "kept.jsonl").stat().st_size <= limit or len(kept) == 1
    assert choose(given_rows, budget, seed=1) == kept


def test_a_bound_of_bytes_keeps_long_rows_as_likely_as_short_ones() -> None:
    # Half of the rows are ten times as long; of those kept about half must be, over many seeds.
    rows = made([20, 200] * 20)
    kept = [row for seed in range(300) for row in choose(rows, Budget(bytes=1500), seed)]
    long = sum(len(row.value["text"]) == 200 for row in kept) / len(kept)
    assert 0.4 < long < 0.55


def test_classes_come_alike_where_the_policy_says_so() -> None:
    rows = [Row("s", f"r{i}", i, Path("f"), {"text": "x", "kind": i < 3}, "text") for i in range(30)]
    kept = choose(rows, Budget(rows=6, policy="class_balanced", by="kind"), seed=0)
    assert sum(row.value["kind"] for row in kept) == 3
    with pytest.raises(DataError, match="found no field 'kin', expected the row's class"):
        choose(rows, Budget(rows=6, policy="class_balanced", by="kin"), seed=0)
