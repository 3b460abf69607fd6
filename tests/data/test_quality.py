"""Signals by hand, rules, quantiles per source, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.data.quality import (
    DEFAULT_RULES,
    SIGNALS,
    asked_and_said,
    bounds_of,
    broken_rule,
    parse_rule,
    signals_of,
)
from evertune.data.rows import Row
from evertune.errors import EvertuneError, RecipeError
from tests.data.test_sift import chat, lines, run, write

NAMES = list(SIGNALS)


def row(asked: str, said: str) -> Row:
    return Row("s", "r", 1, Path("r"), chat(asked, said))


def signal(name: str, said: str, asked: str = "Why?") -> float:
    return signals_of(row(asked, said), [name])[0]


SEEN: list[tuple[str, str, float]] = [
    ("words", "Two words.", 2),
    ("characters", "Two words.", 10),
    ("prompt_words", "irrelevant", 1),
    ("repetition", "a b c d e f g h i j k l", 0.0),
    ("repetition", "a b c d " * 5, 1 - 4 / 17),  # 20 words: 17 runs of four, 4 of them different
    ("repetition", "too short " * 4, 0.0),
    ("repeated_lines", "one line\nanother line\none line\none line", 0.5),
    ("repeated_lines", "one line\none line", 0.0),
    ("symbols", "ab!?", 0.5),
    ("symbols", "कि को", 0.0),  # vowel signs are marks, and part of the writing
    ("broken", "It is â€œfineâ€\u009d here", 1000 * 2 / 21),
    ("broken", "Ein schöner Tag für Ärzte", 0.0),
    ("broken", "a\ufffdb\x00c", 1000 * 2 / 5),
    ("refusal", "I'm sorry, but I can't help with that.", 1),
    ("refusal", "As an AI language model, I have no taste.", 1),
    ("refusal", "I’m very sorry to hear about your cat.", 1),  # a phrase, not a meaning: hence not among the defaults
    ("refusal", "The word sorry comes from Old English.", 0),
    ("refusal", "对不起，我不能回答。", 1),
    ("unended", "This answer has more than twelve words and then it simply stops in the", 1),
    ("unended", "This answer has more than twelve words and then it ends with a mark.", 0),
    ("unended", "This answer has more than twelve words and a closing fence at the end:\n```", 0),
    ("unended", "Building", 0),
    ("open_fence", "```python\nprint(1)\n```", 0),
    ("open_fence", "Here:\n```python\nprint(1)", 1),
    ("placeholders", "Dear [NAME], you owe {{amount}} and ****.", 3),
    ("placeholders", "a[0] = {1: {2: 3}}; **bold** and a list [1]", 0),
]


@pytest.mark.parametrize("name, said, value", SEEN)
def test_a_signal_by_hand(name: str, said: str, value: float) -> None:
    assert signal(name, said) == pytest.approx(value)


def test_an_answer_in_another_script_than_the_question() -> None:
    question = "Welche Farbe hat der Himmel an einem klaren Tag?"
    assert signal("other_script", "Der Himmel ist an einem klaren Tag blau.", question) == 0.0
    assert signal("other_script", "Небо в ясный день голубое, как васильки", question) == 1.0
    assert signal("other_script", "東京の空は、とても青いです。カタカナもひらがなもある", "東京の空は何色ですか") == 0.0


def test_every_signal_is_named_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    assert [name for name in SIGNALS if f"`{name}`" not in page] == []
    assert [rule for rule in DEFAULT_RULES if rule not in page] == []


def test_what_is_asked_and_what_is_said() -> None:
    def of(value: dict[str, Any], format: str) -> tuple[str, str]:
        return asked_and_said(Row("s", "r", 1, Path("r"), value, format))

    assert of(chat("Why?", "Because."), "messages") == ("Why?", "Because.")
    assert of({"text": "words"}, "text") == ("", "words")
    assert of({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "preference") == ("Why?", "Because.")
    assert of({"prompt": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}, "verifiable") == ("1 + 1?", "1 + 1 = 2")
    assert of({"prompt": "Which?", "choices": ["a", "b"], "answer": 1}, "choice") == ("Which?", "b")


@pytest.mark.parametrize("text", ["words>3", "words", ">=3", "words>=x", "words==3", ""])
def test_a_malformed_rule_is_named(text: str) -> None:
    with pytest.raises(RecipeError, match="found the rule"):
        parse_rule(text, NAMES)


def test_an_unknown_signal_and_a_quantile_outside_are_named() -> None:
    with pytest.raises(RecipeError, match="names no known signal; there are: words"):
        parse_rule("wordz>=3", NAMES)
    with pytest.raises(RecipeError, match="has the quantile 2, expected 0 to 1"):
        parse_rule("words>=q2", NAMES)


@pytest.mark.parametrize("text", ["words>=3", "tickets:words<=q0.5", "broken<=-1", "words>=1e-05"])
def test_a_rule_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_rule(text, NAMES)) == text


def test_a_quantile_is_that_of_the_source() -> None:
    rule, other = parse_rule("words<=q0.5", NAMES), parse_rule("b:words>=3", NAMES)
    assert bounds_of([rule, other], "a", {"words": np.array([1.0, 2, 3])}) == {rule: 2.0}
    assert bounds_of([rule, other], "b", {"words": np.array([10.0, 20, math.nan])}) == {rule: 15.0, other: 3.0}


def test_a_value_that_is_no_number_breaks_its_rule() -> None:
    rule = parse_rule("words<=9", NAMES)
    assert broken_rule({rule: 9.0}, {"words": 9.0}) is None
    assert broken_rule({rule: 9.0}, {"words": 9.5}) == (rule, 9.5)
    assert broken_rule({rule: 9.0}, {"words": math.nan}) is not None


def test_the_command_keeps_by_rules_and_quantiles_of_each_source(tmp_path: Path) -> None:
    short = write(tmp_path / "short.jsonl", [chat("?", "word " * n) for n in (1, 2, 3, 4)])
    long = write(tmp_path / "long.jsonl", [chat("?", " ".join(map(str, range(n)))) for n in (10, 20, 30, 40)])
    printed = run("data", "filter", short, long, "--keep", "words<=q0.5", "--no-defaults", "--out", tmp_path / "out")
    assert len(lines(tmp_path / "out/short.jsonl")) == 2
    assert len(lines(tmp_path / "out/long.jsonl")) == 2
    removed = lines(tmp_path / "out/removed.jsonl")
    assert [(one["source"], one["reason"], one["value"], one["bound"]) for one in removed] == [
        ("short", "words<=q0.5", 3, 2.5), ("short", "words<=q0.5", 4, 2.5),
        ("long", "words<=q0.5", 30, 25), ("long", "words<=q0.5", 40, 25),
    ]  # fmt: skip
    assert "words<=q0.5, for example:" in printed
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["bounds"]["long"] == {"words<=q0.5": 25}


def test_a_dry_run_shows_samples_of_what_each_rule_would_drop(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("Greet.", f"Dear [NAME], hello {i}.") for i in range(9)])
    printed = run("data", "filter", source, "--samples", 2)
    assert "placeholders<=0, for example:" in printed
    assert printed.count("Dear [NAME]") == 2
    assert "Nothing was written" in printed


def test_the_signals_are_listed(tmp_path: Path) -> None:
    printed = run("data", "filter", tmp_path / "x.jsonl", "--signals")
    assert all(name in printed for name in SIGNALS)


def test_decontaminate_removes_and_names_probe_and_item(tmp_path: Path) -> None:
    probe = write(tmp_path / "exam.jsonl", [{"prompt": "When does the train from Turin reach Milan?", "answer": "11"}])
    rows = [chat("when does the train from turin reach milan", "11"), chat("Name a colour.", "Blue.")]
    source = write(tmp_path / "rows.jsonl", rows)
    run("data", "decontaminate", source, "--probes", probe, "--out", tmp_path / "out")
    assert lines(tmp_path / "out/rows.jsonl") == [rows[1]]
    (gone,) = lines(tmp_path / "out/removed.jsonl")
    assert (gone["line"], gone["probe"], gone["item"], gone["reason"]) == (
        1, "exam.jsonl", "exam:1", "normalised: 'exam.jsonl'",
    )  # fmt: skip


def test_a_signal_of_a_model_needs_the_model(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [chat("a", "b")])
    with pytest.raises(EvertuneError, match="names no known signal"):
        run("data", "filter", source, "--keep", "answer_bits<=5")
