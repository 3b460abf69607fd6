"""What a check remembers of rows: the second one says what the first did, and what changed is read again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evertune.check import CheckReport, Disk, lengths, look
from evertune.check.lengths import Lengths
from evertune.data.encode import encode_pairs, encode_prompts, encode_rows
from evertune.data.rows import Row
from evertune.errors import CheckpointError
from evertune.model.codec import load_codec
from tests.check.folders import chat, said, write_rows
from tests.check.folders import check as whole_check

# Of the byte-level tokenizer: 9 bytes, the first of which nothing predicts; 3 and the stop token, behind 66 of the
# prompt and before a line end; a call of 59; both conversations of a pair; the prompt alone.
LENGTHS = [(9, 8), (71, 4), (127, 60), (144, 10), (66, 0)]
DROPPED = ("rounds[0].stages[0].sft.max_tokens=100", "rounds[0].stages[0].sft.too_long=drop")


def check(recipe: Path, *overrides: str) -> CheckReport:
    """All but what is free on the disk, which others write to."""
    return replace(whole_check(recipe, *overrides), disk=Disk(0, 0))


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called: from then on a check that reads a tokenizer fails."""

    def read(folder: Path) -> None:
        raise AssertionError(f"{folder} was read")

    return lambda: monkeypatch.setattr(look, "_load_codec", read)


@pytest.mark.parametrize("overrides", [(), DROPPED])
def test_the_second_check_says_the_same_and_reads_no_tokenizer(
    recipe: Path, no_tokenizer: Callable[[], None], overrides: tuple[str, ...]
) -> None:
    if overrides:
        _some_long(recipe.parent)
    first = check(recipe, *overrides)
    assert bool(overrides) == any("longer than max_tokens" in told for _, told in said(first, "warning"))
    no_tokenizer()
    assert check(recipe, *overrides) == first


def _some_long(folder: Path) -> None:
    write_rows(folder / "cards.jsonl", [chat(f"card {i}", "kind " * (1 + 9 * (i % 2))) for i in range(24)])


def _longer_row(folder: Path) -> None:
    write_rows(folder / "cards.jsonl", [chat(f"card {i}", "many words of one kind") for i in range(24)])


def _other_place(folder: Path) -> None:
    (folder / "cards.jsonl").write_text("\n" + (folder / "cards.jsonl").read_text())


def _other_template(folder: Path) -> None:
    file = folder / "model/chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", " and so on<|im_end|>", 1))


def _other_tokens(folder: Path) -> None:
    file = folder / "model/tokenizer.json"
    body = json.loads(file.read_text())
    body["normalizer"] = {"type": "Replace", "pattern": {"String": "k"}, "content": "kk"}
    file.write_text(json.dumps(body))


@pytest.mark.parametrize("change", [_longer_row, _other_place, _other_template, _other_tokens])
def test_what_changed_is_read_again(
    recipe: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _some_long(recipe.parent)
    first = check(recipe, *DROPPED)
    change(recipe.parent)
    found = check(recipe, *DROPPED)
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "another-home"))
    assert found == check(recipe, *DROPPED)
    assert change is _other_place or found.stages[0].tokens != first.stages[0].tokens


def test_another_limit_is_another_question(recipe: Path) -> None:
    _some_long(recipe.parent)
    first = check(recipe, *DROPPED)
    wider = check(recipe, DROPPED[0].replace("100", "120"), DROPPED[1])
    assert said(first, "warning") and not said(wider, "warning")
    assert check(recipe, *DROPPED) == first


DAMAGED = [
    "{",
    "[]",
    "[" * 100_000,
    '{"rows": 3, "words": []}',
    '{"source": "a", "rows": [[1]], "dropped": []}',
    '{"source": "a", "rows": [["x", Infinity, 1]], "dropped": [], "words": Infinity}',
    '{"source": "a", "rows": [["x", -3, -4]], "dropped": []}',
]


@pytest.mark.parametrize("kept", DAMAGED, ids=lambda kept: kept[:20])
def test_what_cannot_be_read_is_made_again(recipe: Path, kept: str) -> None:
    first = check(recipe)
    files = list(lengths.home().glob("lengths/*.json"))
    assert len(files) == 3
    for file in files:
        file.write_text(kept)
    assert check(recipe) == first
    assert kept not in {file.read_text() for file in files}


def test_without_a_place_to_keep_it_every_check_reads(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check(recipe)
    monkeypatch.setenv("EVERTUNE_HOME", str(recipe.parent / "another-home"))
    (recipe.parent / "another-home").mkdir()
    (recipe.parent / "another-home/lengths").write_text("in the way")
    assert check(recipe) == first == check(recipe)


def test_what_is_wrong_with_a_tokenizer_is_said_each_time(recipe: Path) -> None:
    file = recipe.parent / "model/chat_template.jinja"
    file.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    first = check(recipe)
    assert any("stop token" in told for _, told in said(first, "error"))
    assert check(recipe) == first


def test_so_many_are_kept_and_no_more(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "KEPT", 2)
    check(recipe)
    check(recipe, *DROPPED)
    assert len(list(lengths.home().glob("lengths/*"))) == 2


def test_what_is_kept_has_so_many_bytes_and_no_more(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "KEPT_BYTES", 600)
    check(recipe)
    kept = list(lengths.home().glob("lengths/*"))
    assert kept and sum(file.stat().st_size for file in kept) <= 600


def test_a_checkpoint_with_another_tokenizer_is_told_where_the_base_s_own_cannot_be_read_any_more(
    recipe: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, recipe.parent / "other")
    overrides = ("rounds[0].start=other",)
    assert not said(check(recipe, *overrides), "error")
    real = look._load_codec

    def read(folder: Path) -> object:
        if folder.name == "model":
            raise CheckpointError(f"{folder}: no tokenizer.json.")
        return real(folder)

    monkeypatch.setattr(look, "_load_codec", read)
    assert [place for place, _ in said(check(recipe, *overrides), "error")] == ["base"]


def test_the_number_goes_up_with_what_the_lengths_mean(tiny_model: Path) -> None:
    """Where this fails, raise LENGTHS_VERSION: what was kept before is about rows encoded otherwise."""
    codec = load_codec(tiny_model)

    def row(format: str, **value: object) -> Row:
        return Row("s", "s:1", 1, Path("s.jsonl"), value, format)

    question, answer = [{"role": "user", "content": "how many?"}], {"role": "assistant", "content": "two"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    limits: dict[str, Any] = {"max_tokens": 1000, "too_long": "error"}
    found = [
        Lengths.of(encode([one], codec, **limits)).rows[0]
        for encode, one in (
            (encode_rows, row("text", text="two words")),
            (encode_rows, row("messages", messages=[*question, answer])),
            (encode_rows, row("messages", messages=[*question, called])),
            (encode_pairs, row("preference", prompt=question, chosen="two", rejected="three")),
            (encode_prompts, row("verifiable", prompt=question, answer="2")),
        )
    ]
    assert (lengths.LENGTHS_VERSION, [(one.tokens, one.counted) for one in found]) == (1, LENGTHS)
