"""The verifier `ifeval`: for each constraint an output that meets it and one that just does not."""

from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.verifiers import check, validate
from evertune.verifiers.ifeval import CONSTRAINTS, sentences

# constraint, arguments, an output that meets it, outputs that do not
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("keywords:existence", {"keywords": ["good", "bad"]}, "Good or BAD.", ["Good only."]),
    (
        "keywords:frequency",
        {"keyword": "a", "frequency": 2, "relation": "at least"},
        "A cat, a dog.",
        ["A cat and any."],
    ),
    ("keywords:frequency", {"keyword": "no", "frequency": 1, "relation": "less than"}, "Nobody knows.", ["Oh no."]),
    ("keywords:forbidden_words", {"forbidden_words": ["night"]}, "A knightly tale.", ["At Night."]),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, "q Q", ["q"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", ["One, two."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Only one", ["One? Two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "don't stop now", ["don't stop"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", ["a b", "a\n***\n", "a***b***c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "President"},
        "One.\n\n'President' it is.",
        ["President.\n\nOne.", "One.\nPresident it is.", "One.\n\nTwo.\n\nPresident."],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", ["[name] of []"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Hi.\nP.P.S. more", ["Hi. More.\nP.S. more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\nps more", ["Hi, caps. End."]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", ["* a", "* a\n* b\n* c", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, "Well: My answer is maybe.", ["Maybe."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", ["*a* and * *"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        ["SECTION 1\na\nSection 2"],
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', ['{"a": 1', "a"]),
    ("detectable_format:title", {}, "<<poem of joy>>\nJoy.", ["<<  >>", "<poem>"]),
    ("combination:two_responses", {}, "one\n******\ntwo", ["one", "one******one", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", ["It. Say it."]),
    ("startend:end_checker", {"end_phrase": "Call me."}, 'Now. call me."', ["Call me. Now."]),
    ("startend:quotation", {}, ' "all of it" ', ['"begun', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG cat",
        ["A Big cat"],
    ),
    ("change_case:english_capital", {}, "ALL, 1.", ["ALL, a."]),
    ("change_case:english_lowercase", {}, "all, 1.", ["all, A."]),
    ("punctuation:no_comma", {}, "no; none.", ["one, two"]),
]


def _answer(*constraints: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    # As the data set has it: every argument's name in every row, null where it is not read.
    return {
        "instruction_id_list": [name for name, _ in constraints],
        "kwargs": [{"unread": None, **arguments} for _, arguments in constraints],
    }


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_a_constraint_tells_the_two_apart(name: str, arguments: dict[str, Any], right: str, wrong: list[str]) -> None:
    answer = _answer((name, arguments))
    validate({"ifeval": {}}, answer, place="rows.jsonl:1")
    assert check({"ifeval": {}}, output=right, answer=answer).score == 1.0
    for output in wrong:
        found = check({"ifeval": {}}, output=output, answer=answer)
        assert (found.score, found.error) == (0.0, None), output


def test_every_constraint_is_tried() -> None:
    assert {name for name, *_ in CASES} == set(CONSTRAINTS)


def test_all_constraints_must_hold() -> None:
    answer = _answer(("punctuation:no_comma", {}), ("change_case:english_lowercase", {}))
    scores = [check({"ifeval": {}}, output=one, answer=answer).score for one in ("a b", "a, b", "A b", "")]
    assert scores == [1.0, 0.0, 0.0, 0.0]


def test_an_empty_output_meets_nothing_and_has_not_the_form() -> None:
    found = check({"ifeval": {}}, output=" \n", answer=_answer(("punctuation:no_comma", {})))
    assert (found.score, found.valid) == (0.0, False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("One. Two! Three?", 3), ('He said "no." Then he left', 2), ("At 3.5 per cent", 1), ("...", 1), ("", 0)],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("no commas", "expected an object with 'instruction_id_list'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "two lists of one length"),
        (_answer(("language:response_language", {"language": "vi"})), "a language takes a detector"),
        (_answer(("keywords:frequency", {"keyword": "a"})), "cannot be checked with"),
        (_answer(("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "exactly"})), "'exactly'"),
    ],
)
def test_what_cannot_be_checked_is_refused_with_its_place(answer: Any, words: str) -> None:
    with pytest.raises(ProbeError) as caught:
        validate({"ifeval": {}}, answer, place="rows.jsonl:3")
    assert "rows.jsonl:3" in str(caught.value)
    assert words in str(caught.value)
