from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from evertune.errors import ProbeError
from evertune.probe.scores import ItemScores, check_paired

COMMON: dict[str, Any] = {
    "probe": "p",
    "kind": "choice",
    "direction": "higher",
    "ids": ("a", "b", "c"),
    "score": np.array([1.0, 0.0, 1.0]),
    "cluster": ("x", "x", "y"),
    "items_digest": "i" * 64,
    "template_digest": "t" * 64,
}
FULL = {
    **COMMON,
    "prediction": ("yes", "no", "ümläut <b>"),
    "expected": ("yes", "yes", "no"),
    "valid": np.array([True, False, True]),
    "stopped": np.array([False, False, True]),
    "gap": np.array([0.5, 0.25, 1e-300]),
    "weight": np.array([10.0, 30.0, 60.0]),
}


def test_value_is_the_mean_and_with_weights_all_bits_by_all_bytes() -> None:
    assert ItemScores(**COMMON).value == pytest.approx(2 / 3)
    # 2 bits per byte over 10 bytes and 1 over 30: 50 bits in 40 bytes.
    loss = ItemScores(**{**COMMON, "ids": ("a", "b"), "score": [2.0, 1.0], "cluster": ("a", "b"), "weight": [10, 30]})
    assert loss.value == pytest.approx(50 / 40)


@pytest.mark.parametrize("fields", [COMMON, FULL])
def test_what_is_written_is_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    written = ItemScores(**fields)
    written.write_parquet(tmp_path / "a.parquet")
    read = ItemScores.read_parquet(tmp_path / "a.parquet")
    for name in ItemScores.__dataclass_fields__:
        left, right = getattr(written, name), getattr(read, name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right, name


def test_equal_scores_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ItemScores(**FULL).write_parquet(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_a_plain_table_with_its_identity(tmp_path: Path) -> None:
    ItemScores(**FULL).write_parquet(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    names = ["item_id", "score", "cluster", "prediction", "expected", "valid", "stopped", "gap", "weight"]
    assert table.column_names == names
    assert b'"items_digest":"iiii' in table.schema.metadata[b"evertune.scores"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_names_its_item(bad: float) -> None:
    with pytest.raises(ProbeError, match=r"probe 'p': the score of item 'b' is .*1 of 3 items"):
        ItemScores(**{**COMMON, "score": np.array([1.0, bad, 0.0])})


def test_no_items_and_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ProbeError, match="no items"):
        ItemScores(**{**COMMON, "ids": (), "score": [], "cluster": ()})
    with pytest.raises(ValueError, match="2 entries of 'score' for 3 items"):
        ItemScores(**{**COMMON, "score": [1.0, 0.0]})


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    with pytest.raises(ProbeError, match="not a readable file of item scores"):
        ItemScores.read_parquet(place)
    place.write_bytes(b"PAR1 no parquet")
    with pytest.raises(ProbeError, match="not a readable file of item scores"):
        ItemScores.read_parquet(place)
    parquet.write_table(pa.table({"item_id": ["a"]}), place)
    with pytest.raises(ProbeError, match="KeyError"):
        ItemScores.read_parquet(place)


def test_altered_tables_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    ItemScores(**FULL).write_parquet(place)
    table = parquet.read_table(place)
    parquet.write_table(table.drop_columns(["cluster"]), place)
    with pytest.raises(ProbeError, match="columns item_id, score, prediction"):
        ItemScores.read_parquet(place)
    holes = table.set_column(1, table.schema.field("score"), pa.array([1.0, None, 0.0]))
    parquet.write_table(holes, place)
    with pytest.raises(ProbeError, match="1 empty entries in column 'score'"):
        ItemScores.read_parquet(place)
    metadata = {b"evertune.scores": table.schema.metadata[b"evertune.scores"].replace(b'"version":1', b'"version":9')}
    parquet.write_table(table.replace_schema_metadata(metadata), place)
    with pytest.raises(ProbeError, match="version 9, expected 1"):
        ItemScores.read_parquet(place)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "generate", "kind of the probe"),
        ("direction", "lower", "direction of the score"),
        ("items_digest", "j" * 64, "digest of the items .* differs: jjjjjjjjjjjj and iiiiiiiiiiii"),
        ("template_digest", "u" * 64, "tokenizer and chat template"),
        ("ids", ("a", "b", "d"), "list of items"),
        ("cluster", ("x", "y", "y"), "clusters"),
    ],
)
def test_only_what_was_measured_alike_is_paired(name: str, value: Any, message: str) -> None:
    one = ItemScores(**COMMON)
    check_paired(one, ItemScores(**{**COMMON, "score": [0.0, 0.0, 0.0]}))
    with pytest.raises(ProbeError, match=message):
        check_paired(ItemScores(**{**COMMON, name: value}), one)
