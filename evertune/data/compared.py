"""What two rows are compared by: their texts, normalised, in the form of their format.

    both      every turn with its role, a preference row's two answers, a choice row's choices, or the plain text
    prompt    what is asked: every turn before the last answer; of plain text, the text
    answer    what is said: the last answer, both answers of a preference row, the `answer`; of plain text, the text

Two rows with one question and two answers differ under `both`, which is the default: they are two things to learn.
`prompt` finds them, for a set that asks everything once; `answer` finds one boilerplate answer to many questions.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal

from evertune.data.rows import Row, messages_of

Part = Literal["both", "prompt", "answer"]

_INVISIBLE = re.compile("[\u00ad\u034f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_APOSTROPHES = re.compile("['`\u2018\u2019\u201b]")
_DASHES = re.compile("[\u2010-\u2015\u2212]")
# Marks of a sentence. One before a digit is part of a number (1.5, .5, 10:30), one before "=" of a sign (!=): it stays.
_MARKS = re.compile('["\u201c-\u201f\u00ab\u00bb\u2039\u203a\u300c\u300d\u3001\u3002\u00bf\u00a1]|[.,;:!?]+(?![\\d=])')

_ASCII_MARKS = re.compile("[.,;:!?]+(?![0-9=])")
_ASCII_QUOTES = str.maketrans('"', " ", "'`")


def normalise_text(text: str) -> str:
    """Text for comparison: two texts that a reader takes for the same become equal, two that mean different things not.

    Compatibility forms become one (NFKC), case is folded, invisible characters and apostrophes go, dashes become "-",
    quotes and the marks . , ; : ! ? become a space unless a digit or "=" follows, and white space becomes single
    spaces. Other signs stay: "5*3" and "5/3", "-5" and "5", f(x) and f[x] differ. May be empty.
    """
    if text.isascii():
        # The same, as most text needs it: the rest below is about characters that ASCII has not.
        return " ".join(_ASCII_MARKS.sub(" ", text.lower().translate(_ASCII_QUOTES)).split())
    # Before folding: an invisible character keeps a letter from its accent, and NFKC splits the spacing acute accent.
    visible = _INVISIBLE.sub("", text).replace("\u00b4", "")
    folded = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", visible).casefold())
    return " ".join(_MARKS.sub(" ", _DASHES.sub("-", unicodedata.normalize("NFKC", folded))).split())


def compared_text(row: Row, part: Part = "both") -> str:
    """The text that stands for a row: one line a turn, `role: normalised content`, or the normalised plain text.

    A role is no word of a normalised text, so no plain text spells a conversation. May be empty.
    """
    return compared_value(row.value, row.format, part)


def compared_value(value: dict[str, Any], format: str, part: Part = "both") -> str:
    """The same, of a row's value and format."""
    if format == "text":
        return normalise_text(value["text"])
    asked, said = list(_asked(value, format)), list(_said(value, format))
    lines = {"both": [*asked, *said], "prompt": asked, "answer": said}[part]
    return "\n".join(f"{role}: {normalise_text(content)}" for role, content in lines)


def _asked(value: dict[str, Any], format: str) -> Iterator[tuple[str, str]]:
    turns = messages_of(value)
    for one in turns[:-1] if format == "messages" else turns:
        yield one["role"], one["content"]


def _said(value: dict[str, Any], format: str) -> Iterator[tuple[str, str]]:
    if format == "messages":
        last = messages_of(value)[-1]
        yield last["role"], last["content"]
    elif format == "preference":
        for name in ("chosen", "rejected"):
            given = value[name]
            turns = [{"role": "assistant", "content": given}] if isinstance(given, str) else given
            yield from ((f"{name} {one['role']}", one["content"]) for one in turns)
    else:
        for one in value.get("choices", ()):
            yield "choice", one
        answer = value["answer"]
        yield "answer", answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True, ensure_ascii=False)
