"""Rows of promoted rounds come back as they were."""

from pathlib import Path

import pytest

from evertune.data.history import write_history
from evertune.data.rows import read_rows


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
