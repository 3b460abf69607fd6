"""What is done to a recipe's rows before any of them is trained on."""

import json
from pathlib import Path

import pytest

from evertune.data.cleaned import Cleaner, Given, find_seen, row_digests, text_digests
from evertune.data.leak import ProbeText
from evertune.data.rows import Row, read_rows
from evertune.errors import DataError, RecipeError
from evertune.hashing import digest_file
from evertune.workspace import Workspace

ITEMS = [ProbeText("trains", "i1", "When does the train from Turin reach Milan?"), ProbeText("talk", "i2", "Hello")]
LEAKY = ["fine", "When does the train from Turin reach Milan?", "also fine", "hello!"]


def given(path: Path, texts: list[str]) -> Given:
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return Given("notes", path, "text", None, digest_file(path))


def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "w", create=True)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_source_without_leaks_is_used_as_it_lies(tmp_path: Path) -> None:
    source = given(tmp_path / "rows.jsonl", ["fine", "also fine"])
    found = Cleaner(ITEMS, on_leak="error").clean(source, workspace(tmp_path))
    assert (found.path, found.digest) == (source.path, source.digest)
    assert found.removed == {"leaks": {}, "bad": 0}


def test_a_leak_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    source = given(tmp_path / "rows.jsonl", LEAKY)
    with pytest.raises(DataError) as caught:
        Cleaner(ITEMS, on_leak="error").clean(source, workspace(tmp_path))
    assert "source 'notes': found 2 rows that hold items of probes" in str(caught.value)
    assert f"{source.path}:2 holds item 'i1' of probe 'trains' (exact)" in str(caught.value)


def test_a_leak_is_left_out_when_asked_and_told_by_probe(tmp_path: Path) -> None:
    source = given(tmp_path / "rows.jsonl", LEAKY)
    place = workspace(tmp_path)
    found = Cleaner(ITEMS, on_leak="remove").clean(source, place)
    assert [row.value["text"] for row in read_rows(found.path, format="text", source="s")] == ["fine", "also fine"]
    assert found.removed == {"leaks": {"trains": 1, "talk": 1}, "bad": 0}
    assert found.digest != source.digest
    told = [json.loads(line) for line in (found.path.parent / "leaks.jsonl").read_text().splitlines()]
    assert [(one["line"], one["probe"], one["item"], one["how"]) for one in told] == [
        (2, "trains", "i1", "exact"),
        (4, "talk", "i2", "normalised"),
    ]
    again = Cleaner(ITEMS, on_leak="remove").clean(source, place)
    assert again == found


def test_a_new_probe_is_looked_for_in_old_rows(tmp_path: Path) -> None:
    source, place = given(tmp_path / "rows.jsonl", ["fine", "A question of tomorrow's probe."]), workspace(tmp_path)
    Cleaner(ITEMS, on_leak="error").clean(source, place)
    with pytest.raises(DataError, match="item 'i3' of probe 'new'"):
        Cleaner([*ITEMS, ProbeText("new", "i3", "a question of tomorrow's probe")], on_leak="error").clean(
            source, place
        )


def test_bad_rows_are_left_out_when_asked_and_counted(tmp_path: Path) -> None:
    source = given(tmp_path / "rows.jsonl", ["fine", "also fine"])
    with source.path.open("a") as file:
        file.write('{"text": ""}\nnonsense\n')
    cleaner = Cleaner(ITEMS, on_leak="error")
    with pytest.raises(DataError, match=":3: found nothing in 'text'"):
        cleaner.clean(source, workspace(tmp_path))
    found = cleaner.clean(source, workspace(tmp_path), on_bad="quarantine")
    assert found.removed == {"leaks": {}, "bad": 2}
    kept = [json.loads(line) for line in (found.path.parent / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["line"], one["bytes"]) for one in kept] == [(3, '{"text": ""}'), (4, "nonsense\n")]


def test_a_source_of_nothing_but_leaks_is_refused(tmp_path: Path) -> None:
    source = given(tmp_path / "rows.jsonl", LEAKY[1:2])
    with pytest.raises(DataError, match="each of its 1 rows holds an item"):
        Cleaner(ITEMS, on_leak="remove").clean(source, workspace(tmp_path))


def test_a_row_that_someone_asked_to_remove_is_left_out(tmp_path: Path) -> None:
    source, place = given(tmp_path / "rows.jsonl", ["fine", "Private, of a person.", "also fine"]), workspace(tmp_path)
    cleaner = Cleaner(ITEMS, on_leak="error")
    before = cleaner.clean(source, place)
    found = cleaner.clean(source, place, without=text_digests("private of a person"))
    assert [row.value["text"] for row in read_rows(found.path, format="text", source="s")] == ["fine", "also fine"]
    assert found.removed == {"leaks": {}, "bad": 0, "asked": 1}
    assert before.path == source.path
    folder = found.path.parent
    assert find_seen(folder, text_digests("Private, of a person.")) == ([], [2])
    assert find_seen(folder, text_digests("Fine!")) == ([1], [])
    assert find_seen(folder, text_digests("absent")) == ([], [])


def test_a_turn_of_nothing_but_marks_is_no_other_one() -> None:
    # Normalised all of them are empty: to remove "..." would remove every row in which someone says "?".
    row = Row("s", "r", 1, Path("r"), {"messages": chat("What is it?", "?!")}, "messages")
    assert set(text_digests(" ?! ")) <= set(row_digests(row))
    for other in ("...", "?", "", "  "):
        assert set(row_digests(row)).isdisjoint(text_digests(other))


def test_a_row_is_known_by_its_turns_and_as_a_whole() -> None:
    turns = chat("Why is it so?", "Because of the rain.")
    row = Row("s", "r", 1, Path("r"), {"messages": turns, "id": "r"})
    known = set(row_digests(row))
    assert set(text_digests("why is it so")) <= known
    assert set(text_digests("Because of the rain")) <= known
    assert set(text_digests(json.dumps({"messages": turns}))) <= known
    assert known.isdisjoint(text_digests(json.dumps({"messages": [turns[0], {"role": "assistant", "content": "No."}]})))


def test_rows_that_break_a_rule_are_left_out_and_told_by_rule(tmp_path: Path) -> None:
    # Words: 1, 2, 3, 4 and 5; the median of the source is 3. `openly` has a code block that nobody closed.
    texts = ["one", "one two", "one two three", "one two three four", "one two three four openly\n```"]
    source, place = given(tmp_path / "rows.jsonl", texts), workspace(tmp_path)
    found = Cleaner([], on_leak="error").clean(source, place, keep=["words>=q0.5", "defaults"])
    assert [row.value["text"] for row in read_rows(found.path, format="text", source="s")] == texts[2:4]
    assert found.removed == {"leaks": {}, "bad": 0, "rules": {"words>=q0.5": 2, "open_fence<=0": 1}}
    told = [json.loads(line) for line in (found.path.parent / "filtered.jsonl").read_text().splitlines()]
    assert [(one["line"], one["rule"], one["value"]) for one in told] == [
        (1, "words>=q0.5", 1.0),
        (2, "words>=q0.5", 2.0),
        (5, "open_fence<=0", 1.0),
    ]
    assert Cleaner([], on_leak="error").clean(source, place).digest == source.digest


def test_a_probe_item_in_a_row_that_a_rule_leaves_out_stops_nothing(tmp_path: Path) -> None:
    source, place = given(tmp_path / "rows.jsonl", ["a b c d e f g h", "hello!"]), workspace(tmp_path)
    found = Cleaner(ITEMS, on_leak="error").clean(source, place, keep=["words>=2"])
    assert found.removed["rules"] == {"words>=2": 1}


@pytest.mark.parametrize(
    "rule, message",
    [
        ("tall>=3", "names no known signal"),
        ("words", "expected such as"),
        ("notes:words>=3", "names a source"),
        ("words<=q1.5", "expected 0 to 1"),
    ],
)
def test_a_rule_that_is_none_is_refused(tmp_path: Path, rule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Cleaner([], on_leak="error").clean(given(tmp_path / "r.jsonl", ["a"]), workspace(tmp_path), keep=[rule])
