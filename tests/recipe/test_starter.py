"""`evertune init`: a recipe that passes its own check as it is, and never writes over anything."""

from pathlib import Path

import pytest

from evertune.check import check_recipe
from evertune.data.rows import read_rows
from evertune.errors import RecipeError
from evertune.model.bundled import home
from evertune.recipe.load import load_recipe
from evertune.recipe.starter import write_starter

NAMES = ["recipe.yaml", "orders.jsonl", "general.jsonl", "probe-orders.jsonl", "probe-knowledge.jsonl"]


def test_the_starter_has_no_findings_on_another_base_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))
    write_starter(tmp_path / "new")
    report = check_recipe(load_recipe(tmp_path / "new" / "recipe.yaml", overrides=[f"base={tiny_model}"]))
    assert report.findings == ()
    # Three epochs of 40 rows and 10 replayed are 19 steps of 8, one row in five replayed.
    assert (report.stages[0].new_rows, report.stages[0].steps) == (122, 19)


@pytest.mark.skipif(not (home() / "models" / "smollm2-135m").is_dir(), reason="the bundled model is not fetched")
def test_the_starter_as_it_is_has_no_findings(tmp_path: Path) -> None:
    write_starter(tmp_path)
    assert check_recipe(load_recipe(tmp_path / "recipe.yaml")).findings == ()


def test_what_is_asked_was_not_trained(tmp_path: Path) -> None:
    write_starter(tmp_path)
    trained = {row.value["messages"][0]["content"] for row in _rows(tmp_path, "orders.jsonl", "messages")}
    asked = {row.value["prompt"] for row in _rows(tmp_path, "probe-orders.jsonl", "verifiable")}
    assert (len(trained), len(asked)) == (40, 20)
    assert not trained & asked


def test_every_question_has_one_right_choice_of_four(tmp_path: Path) -> None:
    write_starter(tmp_path)
    items = [row.value for row in _rows(tmp_path, "probe-knowledge.jsonl", "choice")]
    assert all(len(set(item["choices"])) == 4 and item["answer"] in item["choices"] for item in items)
    # A model that always takes one place is right by chance only.
    places = [item["choices"].index(item["answer"]) for item in items]
    assert [places.count(place) for place in range(4)] == [6, 6, 6, 6]


def test_the_same_files_are_written_again(tmp_path: Path) -> None:
    first, second = write_starter(tmp_path / "a"), write_starter(tmp_path / "b")
    assert [path.name for path in first] == NAMES
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RecipeError, match="exists; nothing was written"):
        write_starter(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RecipeError, match="is a file, expected a folder"):
        write_starter(tmp_path / "taken")


def _rows(folder: Path, name: str, format: str) -> list:
    return read_rows(folder / name, format=format, source="x")
