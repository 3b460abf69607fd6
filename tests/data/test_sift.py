"""`evertune data`: files in, files out, through the command line."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from evertune.cli import app
from evertune.data.rows import read_rows
from evertune.errors import EvertuneError


def run(*arguments: Any, code: int = 0) -> str:
    """What a command prints; an error of ours is raised as the command line would see it."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if isinstance(result.exception, EvertuneError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    chat("What is the capital of France, if one may ask so early in the day?", "Paris."),
    chat("what is the capital of France, if one may ask so early in the day", "paris"),
    chat("What is the capital of France, if one may ask so early in the day of today?", "Paris."),
    chat("Name a colour.", "Blue."),
]


def test_what_stays_what_goes_and_a_manifest(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    printed = run("data", "dedup", source, "--out", tmp_path / "out", "--threshold", 0.6)
    kept, removed = lines(tmp_path / "out/rows.jsonl"), lines(tmp_path / "out/removed.jsonl")
    assert kept == [ROWS[2], ROWS[3]]
    assert [(one["line"], one["reason"], one["of"]) for one in removed] == [
        (1, "near-duplicate", f"{source}:3"),
        (2, removed[1]["reason"], removed[1]["of"]),
    ]
    assert {one["reason"] for one in removed} == {"near-duplicate", "exact duplicate"}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["sources"]["rows"] == {
        "read": 4, "kept": 2, "removed": {"near-duplicate": 1, "exact duplicate": 1},
    }  # fmt: skip
    assert manifest["outputs"][0]["rows"] == 2
    assert "rows: 4 rows, 2 stay (50.0%)" in printed


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in/rows.jsonl", ROWS)
    assert "Nothing was written" in run("data", "dedup", source)
    assert [one.name for one in tmp_path.rglob("*")] == ["in", "rows.jsonl"]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_rows_stay_for_shuffled_files_and_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    rng = random.Random(workers)
    rows = [chat(" ".join(random.Random(i % 150).choices("abcdefgh", k=14)) + f" {i % 3}", "yes") for i in range(400)]
    whole = write(tmp_path / "whole.jsonl", rows)
    run("data", "dedup", whole, "--out", tmp_path / "expected")
    shuffled = rng.sample(rows, len(rows))
    one, other = write(tmp_path / "one.jsonl", shuffled[:133]), write(tmp_path / "other.jsonl", shuffled[133:])
    run("data", "dedup", other, one, "--out", tmp_path / "found", "--workers", workers)
    expected = sorted(map(json.dumps, lines(tmp_path / "expected/whole.jsonl")))
    found = [*lines(tmp_path / "found/one.jsonl"), *lines(tmp_path / "found/other.jsonl")]
    assert sorted(map(json.dumps, found)) == expected
    assert 10 < len(expected) < 200


def test_rows_of_another_file_win(tmp_path: Path) -> None:
    replay = write(tmp_path / "replay.jsonl", ROWS)
    new = write(tmp_path / "new.jsonl", [chat("Name a colour!", "blue")])
    run("data", "dedup", replay, "--against", new, "--out", tmp_path / "out", "--threshold", 1.0)
    removed = lines(tmp_path / "out/removed.jsonl")
    assert (removed[-1]["line"], removed[-1]["of"]) == (4, f"{new}:1")
    assert not (tmp_path / "out/new.jsonl").exists()


def test_an_index_remembers_earlier_rounds(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", ROWS)
    second = write(tmp_path / "second.jsonl", [ROWS[3], chat("Name a city.", "Rome.")])
    run("data", "dedup", first, "--index", tmp_path / "index", "--extend", "--out", tmp_path / "1")
    for name in ("2", "3"):  # without --extend the index stays as it is
        run("data", "dedup", second, "--index", tmp_path / "index", "--out", tmp_path / name)
        assert lines(tmp_path / name / "second.jsonl") == [chat("Name a city.", "Rome.")]
    removed = lines(tmp_path / "2/removed.jsonl")
    assert (removed[0]["reason"], removed[0]["of"]) == ("exact duplicate of an earlier round", f"{first}:4")


@pytest.mark.parametrize("options", [[], ["--out", "taken"], ["--out", "new", "--as", "parquet"]])
def test_rows_that_were_not_written_are_not_in_the_index(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # They would be repeats of themselves in the next attempt, and gone.
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "taken/file.jsonl", ROWS)
    source = write(tmp_path / "rows.jsonl", [{"text": "a b c", "id": "x"}, {"text": "d e f", "id": 3}])
    with pytest.raises(EvertuneError):
        run("data", "dedup", source, "--index", "index", "--extend", *options)
    run("data", "dedup", source, "--index", "index", "--extend", "--out", "out")
    assert len(lines(tmp_path / "out/rows.jsonl")) == 2


def test_bad_rows_go_to_quarantine_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(path.read_bytes() + b'{"messages": 3}\n{"messa\n' + json.dumps(ROWS[3]).encode() + b"\n")
    printed = run("data", "dedup", path, "--out", tmp_path / "out")
    found = lines(tmp_path / "out/quarantine.jsonl")
    assert [(one["line"], one["bytes"]) for one in found] == [(5, '{"messages": 3}'), (6, '{"messa\n')]
    assert found[0]["problem"].startswith("found a number in 'messages', expected a list of turns")
    assert "2 rows could not be read: see quarantine.jsonl" in printed


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_every_kind_of_file_is_read(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa

    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / f"rows{suffix}"
    table = pa.Table.from_pylist(ROWS)
    if suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif suffix == ".jsonl.zst":
        path.write_bytes(pa.Codec("zstd").compress(data, asbytes=True))
    elif suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert [row.value for row in read_rows(path, format="messages", source="s")] == ROWS
    run("data", "dedup", path, "--as", "parquet", "--out", tmp_path / "out", "--threshold", 1.0)
    assert len(pq.read_table(tmp_path / "out/rows.parquet").to_pylist()) == 3


def test_broken_compression_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"this is no zstd")
    with pytest.raises(EvertuneError, match=r"rows.jsonl.zst:1: found broken zstd data"):
        read_rows(path, format="text", source="s")


def test_a_name_of_datasets_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    folder = tmp_path / "mine"
    write(folder / "train.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert [row.value for row in read_rows(Path("datasets:mine"), format="messages", source="s")] == ROWS
    with pytest.raises(EvertuneError, match="datasets:mine: cannot be loaded"):
        read_rows(Path("datasets:mine:nosuchsplit"), format="messages", source="s")


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(EvertuneError, match="expected a new or empty folder"):
        run("data", "dedup", source, "--out", tmp_path)
    for command in (
        ["filter"],
        ["select", "--rows", 1, "--policy", "highest_loss"],
    ):  # before a model is even looked for
        with pytest.raises(EvertuneError, match="expected a new or empty folder"):
            run("data", *command, source, "--model", tmp_path / "none", "--out", tmp_path)


def test_rows_that_fit_no_one_schema_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"text": "a b c", "id": "x"}, {"text": "d e f", "id": 3}])
    with pytest.raises(EvertuneError, match=r"rows.parquet: found rows that fit no one schema"):
        run("data", "dedup", source, "--as", "parquet", "--out", tmp_path / "out")
    assert not (tmp_path / "out/rows.parquet").exists()


def test_two_sources_of_one_name_take_their_folders(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "train.jsonl", [ROWS[i]]) for i, name in enumerate("ab")]
    run("data", "dedup", *paths, "--out", tmp_path / "out", "--threshold", 1.0)
    assert (tmp_path / "out/a-train.jsonl").exists() and (tmp_path / "out/b-train.jsonl").exists()


def test_lines_that_stay_are_copied_byte_for_byte(tmp_path: Path) -> None:
    kept = [
        b'{"text":  "caf\\u00e9 one", "n": 1.50}',
        '{"text": "café two", "big": 1e5}\r'.encode(),
        b' {"text": "three"}',
    ]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n\n".join([kept[0], b'{"text": "x", "text": "y"}', kept[1], kept[0], kept[2]]))
    run("data", "dedup", source, "--out", tmp_path / "out")
    assert (tmp_path / "out/rows.jsonl").read_bytes() == b"".join(one + b"\n" for one in kept)
    (removed,) = lines(tmp_path / "out/removed.jsonl")
    assert (removed["line"], removed["of"], removed["row"]) == (7, f"{source}:1", {"text": "café one", "n": 1.5})


def test_a_rule_of_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(EvertuneError, match=r"the rule 'row:words>=3' is of source 'row'; there are: rows\."):
        run("data", "filter", source, "--keep", "row:words>=3")


def test_a_bad_first_row_speaks_for_nothing_and_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    path.write_bytes(b"\xef\xbb\xbf{}\n{cut\n" + path.read_bytes())
    told = run("data", "dedup", path)
    assert "2 rows could not be read" in told
    assert f"{path}:1: found a byte order mark" in told
    path.write_bytes(b"{cut\n")
    with pytest.raises(EvertuneError, match="rows.jsonl:1: found malformed JSON"):
        run("data", "dedup", path)


def test_a_finished_result_is_not_taken_for_a_broken_one(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", ROWS)
    arguments = ["data", "dedup", source, "--index", tmp_path / "index", "--extend", "--out", tmp_path / "out"]
    run(*arguments)
    with pytest.raises(EvertuneError, match=r"found a finished result there .* Use it, or choose another --out"):
        run(*arguments)
