"""What the recipe names is read in full, and what is wrong with it is found before anything runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from evertune.check import check_recipe, look, render_samples
from evertune.recipe.load import load_recipe
from tests.check.folders import chat, check, said, write_rows
from tests.tiny import write_tiny_tokenizer


def test_a_folder_in_which_everything_is_right_has_no_findings(recipe: Path) -> None:
    report = check(recipe)
    assert report.findings == ()
    assert not report.has_errors
    assert [one.label for one in report.stages] == ["first/1-sft"]


def test_compiling_without_a_compiler_and_liger_without_liger_are_errors(recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(look.importlib.util, "find_spec", lambda name: None)
    found = said(check(recipe, "numerics.compile=true", "numerics.kernels=liger"), "error")
    assert [place for place, _ in found] == ["numerics.kernels", "numerics.compile"]
    assert "'no-such-compiler' is not there" in found[1][1]
    monkeypatch.setenv("CXX", "true")
    assert said(check(recipe, "numerics.compile=true"), "error") == []


def _append(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def _empty(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("") and None


def _edit_model(name: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


# name -> (what is done to the folder, where the error stands, what it says)
WRONG: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a row that is no JSON": (_append("cards.jsonl", "{oops\n"), "data.cards", "cards.jsonl:25"),
    "an empty file": (_empty("general.jsonl"), "data.general", "found no rows"),
    "a missing file": (lambda folder: (folder / "cards.jsonl").unlink(), "data.cards", "found nothing there"),
    "an item without an answer": (_append("probe-cards.jsonl", '{"prompt": "x"}\n'), "probes.cards", ":11"),
    "an empty probe": (_empty("probe-facts.jsonl"), "probes.facts", "found no rows"),
    "a leak": (
        _append("cards.jsonl", json.dumps(chat("asked 3", "kind 3")) + "\n"),
        "data.cards",
        "cards.jsonl:25 holds item 'probe-cards:4' of probe 'cards' (exact)",
    ),
    "a leak in other words' clothes": (
        _append("general.jsonl", json.dumps(chat(" WHICH  7!", "b")) + "\n"),
        "data.general",
        "general.jsonl:13 holds item 'probe-facts:8' of probe 'facts' (normalised)",
    ),
    "no model": (lambda folder: shutil.rmtree(folder / "model"), "base", "no folder"),
    "no tokenizer": (lambda folder: (folder / "model/tokenizer.json").unlink(), "base", "no tokenizer.json"),
    "no chat template": (
        lambda folder: (folder / "model/chat_template.jinja").unlink(),
        "base",
        "no chat template, and data.cards, data.general, probes.cards, probes.facts need one",
    ),
    "a stop token that is never trained": (
        lambda folder: (
            (folder / "model/chat_template.jinja").write_text(
                "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
                "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
                "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
            )
            and None
        ),
        "base",
        "would never train a stop token",
    ),
    "quantised weights": (_edit_model("config.json", "quantization_config", {"bits": 4}), "base", "quantised"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_an_error_with_its_place(name: str, recipe: Path) -> None:
    change, place, told = WRONG[name]
    change(recipe.parent)
    report = check(recipe)
    assert report.has_errors
    assert any(where == place and told in message for where, message in said(report, "error")), report.findings


def test_a_row_that_is_too_long_is_an_error_or_a_warning_as_the_recipe_says(recipe: Path) -> None:
    _append("cards.jsonl", json.dumps(chat("long " * 30, "x")) + "\n")(recipe.parent)
    limit = "rounds[0].stages[0].sft.max_tokens=150"
    [(place, told)] = said(check(recipe, limit), "error")
    assert place == "rounds[0].stages[0].sft (cards)"
    assert "cards.jsonl:25" in told
    report = check(recipe, limit, "rounds[0].stages[0].sft.too_long=drop")
    [(place, told)] = said(report, "warning")
    assert told.startswith("1 of 25 rows are longer than max_tokens 150")
    assert not report.has_errors
    # The dropped row is not counted: two epochs of 24 rows and 6 replayed are 8 steps of 8, one row in five replayed.
    assert (report.stages[0].new_rows, report.stages[0].replay_rows) == (52, 12)


def test_a_leak_in_a_source_that_no_stage_reads_is_none(recipe: Path) -> None:
    _append("general.jsonl", json.dumps(chat("asked 3", "x")) + "\n")(recipe.parent)
    assert check(recipe).has_errors
    assert not check(recipe, "rounds[0].stages[0].sft.replay={share: 0}").has_errors


def test_many_leaks_are_summed_up(recipe: Path) -> None:
    write_rows(recipe.parent / "cards.jsonl", [chat(f"asked {i}", "x") for i in range(9)])
    told = [message for _, message in said(check(recipe), "error")]
    assert len(told) == 6
    assert told[-1] == "4 more rows hold items of probes."


def test_rows_that_repeat_are_counted(recipe: Path) -> None:
    _append("cards.jsonl", (json.dumps(chat("Card 1!", "kind 1")) + "\n") * 2)(recipe.parent)
    [(place, told)] = said(check(recipe), "note")
    assert place == "data.cards"
    assert told.startswith("2 of 26 rows repeat an earlier one")
    assert "cards.jsonl:25" in told


def test_several_errors_are_all_told(recipe: Path) -> None:
    _empty("cards.jsonl")(recipe.parent)
    _empty("probe-facts.jsonl")(recipe.parent)
    shutil.rmtree(recipe.parent / "model")
    assert [place for place, _ in said(check(recipe), "error")] == ["data.cards", "probes.facts", "base"]


def test_checkpoints_named_by_path_are_looked_at(recipe: Path) -> None:
    other = recipe.parent / "other"
    shutil.copytree(recipe.parent / "model", other)
    start, anchor = "rounds[0].start=other", "rounds[0].stages[0].sft.anchor={to: other}"
    assert not check(recipe, start, anchor).has_errors
    write_tiny_tokenizer(other, template="llama2")
    places = [place for place, told in said(check(recipe, start, anchor), "error") if "another tokenizer" in told]
    assert places == ["rounds[0].start", "rounds[0].stages[0].sft.anchor.to"]
    shutil.rmtree(other)
    assert [place for place, _ in said(check(recipe, start), "error")] == ["rounds[0].start"]
    # An anchor that is off is not looked for.
    assert not check(recipe, "rounds[0].stages[0].sft.anchor={kl: 0, to: other}").has_errors


def test_plain_text_needs_no_chat_template(recipe: Path) -> None:
    (recipe.parent / "model/chat_template.jinja").unlink()
    write_rows(recipe.parent / "text.jsonl", [{"text": f"a line {i} of plain words"} for i in range(12)])
    write_rows(recipe.parent / "probe-text.jsonl", [{"text": f"another line {i}"} for i in range(12)])
    report = check(
        recipe,
        "data={text: {path: text.jsonl, format: text}}",
        "probes={text: {path: probe-text.jsonl, kind: bits_per_byte, role: target}}",
        "rounds[0].stages[0].sft.data=text",
        "rounds[0].stages[0].sft.replay={share: 0}",
    )
    assert said(report, "error") == []
    assert report.stages[0].counted_tokens < report.stages[0].tokens


def test_weights_are_read_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(recipe)
    read: list[Path] = []
    monkeypatch.setattr("evertune.model.checkpoint.digest_file", lambda path: read.append(path) or "0" * 64)
    check(recipe)
    assert read == []
    os.utime(recipe.parent / "model/model.safetensors")
    check(recipe)
    assert [one.name for one in read] == ["model.safetensors"]


def test_nothing_is_written_where_the_recipe_lies(recipe: Path) -> None:
    before = sorted(str(one) for one in recipe.parent.rglob("*"))
    check(recipe)
    after = sorted(str(one) for one in recipe.parent.rglob("*"))
    assert [one for one in after if "/home" not in one] == before


def test_samples_show_what_is_counted(recipe: Path) -> None:
    # The tiny template puts a system turn first; of it all only the answer and its stop token count.
    [first, second] = check(recipe, sample=2).samples
    assert (first.source, first.id, second.id) == ("cards", "cards:1", "cards:2")
    assert [text for text, counted in first.segments if counted] == ["kind 0<|im_end|>"]
    shown = "".join(text for text, _ in first.segments)
    assert shown.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\ncard 0<|im_end|>\n<|im_start|>assistant\nkind 0<|im_end|>\n" in shown
    assert render_samples(load_recipe(recipe), 1) == [first]


REPORT_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["recipe", "ok", "findings", "stages", "disk", "samples"],
    "properties": {
        "recipe": {"type": "string"},
        "ok": {"type": "boolean"},
        "findings": {
            "type": "array",
            "items": {
                "required": ["severity", "place", "message", "remedy"],
                "properties": {"severity": {"enum": ["error", "warning", "note"]}},
            },
        },
        "stages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": [
                    "label",
                    "new_rows",
                    "replay_rows",
                    "steps",
                    "tokens",
                    "counted_tokens",
                    "seconds",
                    "disk_bytes",
                    "done",
                ]
            },
        },
        "disk": {"required": ["needed_bytes", "free_bytes"]},
        "samples": {"type": "array", "minItems": 1, "items": {"required": ["source", "id", "segments"]}},
    },
}


def test_the_json_has_the_documented_shape(recipe: Path) -> None:
    _append("cards.jsonl", json.dumps(chat("asked 3", "kind 3")) + "\n")(recipe.parent)
    body = json.loads(json.dumps(check(recipe, sample=1).to_json()))
    validate(body, REPORT_SCHEMA)
    assert body["ok"] is False


def test_the_printed_report_names_everything_and_survives_brackets(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evertune.check import print_report

    write_rows(recipe.parent / "cards.jsonl", [chat(f"[bold]card {i}[/]", f"[/] {i}") for i in range(24)])
    print_report(check_recipe(load_recipe(recipe), sample=1))
    out = capsys.readouterr().out
    assert "[bold]card 0[/]" in out
    assert "«[/] 0<|im_end|>»" in out
    assert "recipe.yaml: fine; 1 of 1 stages to do" in out
    (recipe.parent / "model/tokenizer.json").unlink()
    print_report(check(recipe))
    out = capsys.readouterr().out
    assert "error  base:" in out
    assert "recipe.yaml: 1 error" in out


@pytest.mark.parametrize(("value", "color"), [(None, None), ("", None), ("1", False)])
def test_no_color_is_heard(
    recipe: Path, value: str | None, color: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evertune.check import print_report, printing

    seen = []
    monkeypatch.setattr(printing.typer, "echo", lambda text, color: seen.append(color))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    print_report(check(recipe))
    assert set(seen) == {color}
