"""The verifier `ifeval`: constraints on form that a program can check, as IFEval defines them (Zhou et al. 2023,
arXiv:2311.07911, table 1), written from those definitions.

Where a definition leaves room, this is how it is read: words are runs of letters, digits and apostrophes; a sentence
ends at `.`, `!` or `?` before white space or the end, and what stands after the last one counts if it holds a word;
paragraphs of `number_paragraphs` are parted by `***`, those of `nth_paragraph_first_word` by empty lines. So scores are
near those of the authors' program, not the same. `language:response_language` is not here: it takes a language
detector, and a wrong guess would be counted as the model's.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from evertune.errors import ProbeError
from evertune.verifiers.outcome import Outcome
from evertune.verifiers.plain import check_no_options

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_BULLET = re.compile(r"^\s*(?:\*(?!\*)|-)\s+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*")
_TITLE = re.compile(r"<<[^\n<>]*\S[^\n<>]*>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Check = Callable[..., bool]


def follows_instructions(_: Any, output: str, answer: Mapping[str, Any]) -> Outcome:
    """The output meets every constraint of the answer, `{"instruction_id_list": [...], "kwargs": [{...}, ...]}`.

    Valid: it is not empty. An empty output meets none.
    """
    if not output.strip():
        return Outcome(0.0, False)
    found = [
        CONSTRAINTS[name](output, **_given(arguments))
        for name, arguments in zip(answer["instruction_id_list"], answer["kwargs"], strict=True)
    ]
    return Outcome(float(all(found)), True)


def check_instructions(argument: Any, answer: Any, *, place: str) -> None:
    """Refuse options, and an answer whose constraints are not known or lack an argument.

    Raises:
        ProbeError: with the place.
    """
    check_no_options(argument, place=place, kind="ifeval")
    names, arguments = (
        answer.get(key) if isinstance(answer, dict) else None for key in ("instruction_id_list", "kwargs")
    )
    if not isinstance(names, list) or not isinstance(arguments, list) or not names or len(names) != len(arguments):
        raise ProbeError(
            f"{place}: found {answer!r} in 'answer', expected an object with 'instruction_id_list' and 'kwargs', two "
            "lists of one length, for the verifier 'ifeval'."
        )
    for name, given in zip(names, arguments, strict=True):
        if name not in CONSTRAINTS:
            raise ProbeError(
                f"{place}: found the constraint {name!r}, expected one of {', '.join(sorted(CONSTRAINTS))}.",
                remedy="Leave the row out; a language takes a detector, and none is here."
                if str(name).startswith("language")
                else "Correct the id.",
            )
        try:
            CONSTRAINTS[name]("A trial. It has two sentences.", **_given(given))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ProbeError(f"{place}: the constraint {name!r} cannot be checked with {given!r}: {error}.") from error


def _given(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments without those that are null: the data set writes every name in every row."""
    return {name: value for name, value in (arguments or {}).items() if value is not None}


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def sentences(text: str) -> int:
    """How many sentences a text has."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(words(rest))


def _holds(count: int, relation: str, bound: int) -> bool:
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise ValueError(f"found the relation {relation!r}, expected 'at least' or 'less than'")


def _occurrences(text: str, keyword: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(one), text, re.IGNORECASE) for one in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(_occurrences(text, keyword), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(_occurrences(text, one) for one in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(sentences(text), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _holds(len(words(text)), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text.strip())
    return len(parts) == num_paragraphs and all(one.strip() for one in parts)


def _nth_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [one for one in re.split(r"\n\s*\n", text.strip()) if one.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = words(parts[nth_paragraph - 1])[:1]
    return [one.lower() for one in first] == [first_word.lower()]


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    # P.S. and P.P.S. with or without dots and spaces, at the beginning of a line.
    letters = [re.escape(one) for one in postscript_marker if one.isalnum()]
    return re.search(r"^\s*" + r"\.?\s?".join(letters), text, re.IGNORECASE | re.MULTILINE) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(_BULLET.findall(text)) == num_bullets


def _constrained(text: str) -> bool:
    return any(one in text for one in _CONSTRAINED)


def _highlights(text: str, num_highlights: int) -> bool:
    return len([one for one in _HIGHLIGHT.findall(text) if one.strip("* ")]) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    bare = re.sub(r"^\s*```(?:json)?|```\s*$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return _TITLE.search(text) is not None


def _two_responses(text: str) -> bool:
    parts = [one.strip() for one in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(text: str) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(one.isupper() for one in words(text)), capital_relation, capital_frequency)


def _upper(text: str) -> bool:
    return text.isupper()


def _lower(text: str) -> bool:
    return text.islower()


def _no_comma(text: str) -> bool:
    return "," not in text


CONSTRAINTS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_comma,
}
