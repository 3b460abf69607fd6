"""`evertune data mix`, `select` and `inspect` through the command line."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evertune.data.inspect import bars
from evertune.data.stream import Stream
from evertune.errors import EvertuneError
from tests.data.test_sift import chat, lines, run, write
from tests.tiny import write_tiny_model


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    sizes = {"a": 30, "b": 10, "old": 25}
    return {
        name: write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(count)])
        for name, count in sizes.items()
    }


def test_a_mix_is_the_stream_written_out(tmp_path: Path, files: dict[str, Path]) -> None:
    out = tmp_path / "mix.jsonl"
    run("data", "mix", files["a"], files["b"], "--replay", files["old"], "--share", 0.2, "--seed", 7, "--out", out)
    stream = Stream({"a": 30, "b": 10}, None, {"old": 25}, 0.2, 7)
    expected = [f"{one.source} {one.index}" for one in map(stream.pick, range(stream.rows_per_epoch))]
    assert [one["text"] for one in lines(out)] == expected
    manifest = json.loads((tmp_path / "mix.jsonl.manifest.json").read_text())
    assert manifest["rows"] == {"a": 30, "b": 10, "replay:old": 10}
    assert manifest["share"] == 0.2


def test_weights_passes_temperature_and_a_number_of_rows(tmp_path: Path, files: dict[str, Path]) -> None:
    def mixed(*options: object) -> Counter[str]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        run("data", "mix", *options, "--out", out)
        return Counter(one["text"].split()[0] for one in lines(out))

    assert mixed(f"{files['a']}=1", f"{files['b']}=3") == {"a": 10, "b": 30}
    assert mixed(files["a"], files["b"], "--passes", "b=2") == {"a": 30, "b": 20}
    assert mixed(files["a"], files["b"], "--temperature", 1e9) == {"a": 20, "b": 20}
    assert mixed(files["a"], "--rows", 7) == {"a": 7}


def test_weights_by_tokens_count_a_models_tokens(tmp_path: Path) -> None:
    # A byte-level tokenizer: 10 and 30 bytes a row.
    short = write(tmp_path / "short.jsonl", [{"text": f"{i:010d}"} for i in range(40)])
    long = write(tmp_path / "long.jsonl", [{"text": f"{i:030d}"} for i in range(40)])
    model = write_tiny_model(tmp_path / "m")
    out = tmp_path / "mix.jsonl"
    run("data", "mix", f"{short}=1", f"{long}=1", "--by", "tokens", "--model", model, "--out", out)
    assert Counter(len(one["text"]) for one in lines(out)) == {10: 60, 30: 20}


def test_what_is_odd_about_a_mix_is_told(files: dict[str, Path]) -> None:
    printed = run("data", "mix", f"{files['a']}=1", f"{files['b']}=9", "--epochs", 2)
    assert "warning: 'b' is shown 7.2 times: its 10 rows may be learnt by heart." in printed
    assert "warning: 22 of 30 rows of 'a' are not shown." in printed
    assert "Nothing was written" in printed


def test_a_mix_in_parquet(tmp_path: Path, files: dict[str, Path]) -> None:
    run("data", "mix", files["a"], "--out", tmp_path / "mix.parquet")
    assert pq.read_table(tmp_path / "mix.parquet").num_rows == 30


@pytest.mark.parametrize(
    "options, message",
    [
        (["{a}=1", "{b}"], "found weights for some files"),
        (["{a}=x"], "expected a name, '=' and a number"),
        (["{a}=1", "--by", "tokens"], "--by tokens needs --model"),
        (["{a}", "--by", "tokens", "--model", "tiny-random"], "--by tokens needs weights"),
        (["{a}", "--share", "0.5"], "--share needs --replay"),
        (["{empty}", "--format", "messages"], r"empty\.jsonl: found no rows"),
        (["{a}", "--passes", "z=2"], "found 'z', expected one of the sources a"),
        (["{a}", "--out", "{b}"], "found something there, expected a new file"),
        (["{a}", "--out", "mix.csv"], "found a name that ends with '.csv'"),
    ],
)
def test_a_mix_that_makes_no_sense_is_named(
    tmp_path: Path, files: dict[str, Path], options: list[str], message: str
) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(EvertuneError, match=message):
        run("data", "mix", *(one.format(**files, empty=empty) for one in options))


def test_select_keeps_a_budget(tmp_path: Path) -> None:
    rows = [chat(f"question {i}", "yes" if i % 10 else "no") for i in range(100)]
    source = write(tmp_path / "rows.jsonl", rows)
    for policy, kept in (("reservoir", 20), ("class_balanced", 20), ("coverage", 20)):
        run("data", "select", source, "--rows", 20, "--policy", policy, "--out", tmp_path / policy)
        assert len(lines(tmp_path / policy / "rows.jsonl")) == kept
    said = Counter(one["messages"][1]["content"] for one in lines(tmp_path / "class_balanced/rows.jsonl"))
    assert said == {"yes": 10, "no": 10}


def test_select_by_loss_keeps_what_the_model_finds_strange(tmp_path: Path) -> None:
    from evertune.data.rows import read_rows
    from evertune.probe.rows import answer_bits

    model = write_tiny_model(tmp_path / "m")
    source = write(tmp_path / "rows.jsonl", [chat("q", f"{'ab' * (i % 7)} {i} é") for i in range(20)])
    options = ("--policy", "highest_loss", "--model", model)
    run("data", "select", source, "--rows", 3, *options, "--out", tmp_path / "out")
    bits = answer_bits(str(model))(read_rows(source, format="messages", source="s"))
    expected = sorted(bits.argsort()[-3:].tolist())
    kept = [one["messages"][1]["content"] for one in lines(tmp_path / "out/rows.jsonl")]
    assert [int(one.split()[-2]) for one in kept] == expected
    with pytest.raises(EvertuneError, match="needs --model"):
        run("data", "select", source, "--rows", 3, "--policy", "highest_loss")


def test_inspect_counts_and_shows(tmp_path: Path) -> None:
    rows = [
        chat("What is the capital of France, if one may ask?", "Paris."),
        chat("Name it.", "Париж."),
        chat("A", "B"),
    ]
    source = write(tmp_path / "rows.jsonl", [*rows, rows[0]])
    with source.open("a") as file:
        file.write("nonsense\n")
    model = write_tiny_model(tmp_path / "m")
    (found,) = json.loads(run("data", "inspect", source, "--model", model, "--samples", 2, "--json"))
    assert (found["rows"], found["quarantined"], found["format"]) == (4, 1, "messages")
    assert found["duplicates"] == {"exact": 1, "near": 0}
    assert found["turns"] == {"user assistant": 4}
    assert found["scripts"]["CYRILLIC"] > 0
    assert sum(found["histogram"]["counts"]) == 4
    assert len(found["samples"]) == 2
    tokens = json.loads(run("data", "inspect", write(tmp_path / "one.jsonl", [rows[2]]), "--model", model, "--json"))
    # Six special tokens, 28 bytes of system text, 22 of roles, 3 line ends behind, and two letters.
    assert tokens[0]["tokens"] == 6 + 28 + 22 + 3 + 2
    printed = run("data", "inspect", source)
    assert "4 rows of format messages" in printed
    assert f"cannot be read: {source}:5: found malformed JSON" in printed
    assert "begin alike  'What is the capital' 2" in printed


def test_bars_are_in_proportion() -> None:
    assert bars([8, 4, 1, 0], width=1) == ["█", "▌", "▏", ""]
    assert bars([]) == []
