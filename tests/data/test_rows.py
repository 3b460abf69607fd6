"""Rows of a source: files found, ids given, errors placed."""

import json
import os
from pathlib import Path

import pytest

from evertune.data.rows import digest_rows, files_of, messages_of, read_rows
from evertune.errors import DataError


def write(path: Path, *values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def chat(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}


def test_a_row_keeps_its_source_place_and_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat("x"), {**chat("y"), "id": "second", "topic": "t"})
    first, second = read_rows(path, format="messages", source="s")
    assert (first.source, first.id, first.line, first.file, first.format) == ("s", "a:1", 1, path, "messages")
    assert (second.id, second.place, second.value["topic"]) == ("second", f"{path}:2", "t")


def test_an_id_that_is_no_text_is_not_used(tmp_path: Path) -> None:
    rows = read_rows(
        write(tmp_path / "a.jsonl", {**chat("x"), "id": 3}, {**chat("y"), "id": 3}), format="messages", source="s"
    )
    assert [row.id for row in rows] == ["a:1", "a:2"]


def test_the_same_id_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "x", "id": "same"})
    write(tmp_path / "b.jsonl", {"text": "y"}, {"text": "z", "id": "same"})
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "*.jsonl", format="text", source="s")
    assert f"{tmp_path}/b.jsonl:2: found the id 'same', also at {tmp_path}/a.jsonl:1" in str(caught.value)


def test_files_of_the_same_name_get_different_ids(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "train.jsonl", {"text": folder})
    rows = read_rows(tmp_path / "*" / "train.jsonl", format="text", source="s")
    assert [row.id for row in rows] == ["a/train.jsonl:1", "b/train.jsonl:1"]


def test_a_glob_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    assert [row.id for row in read_rows(tmp_path / "*.jsonl", format="text", source="s")] == ["a:1", "b:1"]
    assert [path.stem for path in files_of(tmp_path / "**" / "*.jsonl")] == ["a", "b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows[1].jsonl", {"text": "a"})
    assert files_of(path) == [path]


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"words": "not looked at"})
    assert len(read_rows(path, format="text", source="s", limit=2)) == 2


def test_a_wrong_row_names_line_format_and_what_would_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat("x"), {"text": "plain"})
    with pytest.raises(DataError) as caught:
        read_rows(path, format="messages", source="s")
    assert str(caught.value) == (
        f"{path}:2: found the fields text, expected 'messages' (format 'messages'). The row fits format 'text'."
    )


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", {"text": "a"})
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in [
        ("gone.jsonl", "found nothing there, expected a file"),
        ("gone-*.jsonl", "found no file that matches"),
        ("folder", "found a folder, expected a file or a glob"),
        ("fold*", "found a folder"),
        ("a.csv", "found a name that ends with '.csv', expected .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow"),
        ("pipe.jsonl", "found a device or a pipe"),
        ("x" * 300 + ".jsonl", "cannot be read: File name too long"),
    ]:
        for read in (lambda path: read_rows(path, format="text", source="s"), digest_rows):
            with pytest.raises(DataError) as caught:
                read(tmp_path / name)
            assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl: found no rows, expected one or more"):
        read_rows(tmp_path / "a.jsonl", format="text", source="s")


def test_the_digest_is_of_bytes_not_of_names(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"text": "a"})
    same = write(tmp_path / "same.jsonl", {"text": "a"})
    other = write(tmp_path / "other.jsonl", {"text": "b"})
    assert digest_rows(one) == digest_rows(same) != digest_rows(other)
    assert digest_rows(one) != digest_rows(tmp_path / "*.jsonl")


def test_the_digest_tells_where_files_end(tmp_path: Path) -> None:
    write(tmp_path / "x" / "1.jsonl", {"text": "a"}, {"text": "b"})
    write(tmp_path / "x" / "2.jsonl", {"text": "c"})
    write(tmp_path / "y" / "1.jsonl", {"text": "a"})
    write(tmp_path / "y" / "2.jsonl", {"text": "b"}, {"text": "c"})
    assert digest_rows(tmp_path / "x" / "*.jsonl") != digest_rows(tmp_path / "y" / "*.jsonl")


def test_an_unreadable_file_has_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        read_rows(path, format="text", source="s")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        digest_rows(path)


def test_turns_hold_role_and_content_only() -> None:
    turn = {"role": "user", "content": "Hi", "name": "Ada"}
    assert messages_of({"messages": [turn]}) == [{"role": "user", "content": "Hi"}]
    assert messages_of({"prompt": "Hi"}) == [{"role": "user", "content": "Hi"}]
    assert messages_of({"prompt": [turn]}) == [{"role": "user", "content": "Hi"}]
