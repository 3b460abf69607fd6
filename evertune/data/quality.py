"""What can be seen of a row without a model: named signals, and the rules that keep or drop by them.

A signal is a number. What is said (the last answer, a preference row's chosen one, or the plain text) is looked at
unless the name begins with `prompt_`. A rule is a signal, a comparison and a bound:

    words>=3        repetition<=0.3        answer_bits<=q0.9

`q0.9` is the 0.9 quantile of the signal in the row's own source: never over all sources, where the strange ones would
lose all their rows. A rule that begins with a source's name and a colon holds for that source alone.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from evertune.data.rows import Row, messages_of
from evertune.errors import RecipeError

# Texts of patterns: `re` compiles them at their first use, and most commands that read rows use none.
_WORD = r"\w+"
_FENCE = r"(?m)^\s*(```|~~~)"
# UTF-8 read as Latin-1 or Windows-1252, the replacement character, and controls that no text has.
_BROKEN = (
    "Ã[\u0080-\u00bf©¨ª«¬®±²³´µ¶·¸¹º»¼½¾¿]|â€[\u0080-\u00bf™œ\u009d“”¦¢]|Â[\u00a0-\u00bf]|ï»¿|\ufffd"
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufdd0-\ufdef\ufffe\uffff]"
)
_REFUSAL = (
    r"(?i)^\W*(i('|’)?m (very )?(sorry|afraid)\b|sorry,? (but )?i\b|i apologi[sz]e\b|unfortunately,? i (can|am)"
    r"|i (can ?not|can('|’)t|won('|’)t|am not able to|am unable to|must (decline|refuse))\b"
    r"|as an? (ai|artificial intelligence|(large )?language model|assistant)\b"
    r"|es tut mir leid|leider kann ich|als ki|je suis désolé|désolé,? (mais )?je|en tant qu('|’)ia"
    r"|lo siento|como (una )?ia"
    r"|mi dispiace|sinto muito|对不起|很抱歉|抱歉，|作为一个(人工智能|ai|语言模型)|申し訳(ありません|ございません))"
)
_PLACEHOLDER = (
    r"(?i)\[(redacted|removed|deleted|censored|name|insert[^\]]{0,40}|your [^\]]{1,40}|url|link|image|citation needed"
    r"|pii|e-?mail|phone|address|company)( ?[_#]?\d+)?\]"
    r"|<(redacted|removed|mask|name|url|email|phone|toxic|censored|unk)>"
    r"|\{\{[^{}\n]{0,60}\}\}|\blorem ipsum\b|\bNAME_\d+\b|(?<![\w*])\*{4,}(?![\w*])"
    r"|\bTODO:|\bFIXME\b|\bplaceholder text\b"
)
_ENDS = r"""[.!?…。！？؟।:;)\]}"'”’»」』`*|>=%\d\u3002]$|[\U0001f300-\U0001faff]$"""


@dataclass(frozen=True)
class Signal:
    """One thing that can be seen of a row.

    Attributes:
        compute: the number, of what is asked and what is said.
        meaning: what the number says, with its range.
    """

    compute: Callable[[str, str], float]
    meaning: str


def _words(text: str) -> int:
    return len(re.findall(_WORD, text))


def _repetition(text: str, width: int = 4) -> float:
    words = re.findall(_WORD, text.casefold())
    runs = len(words) - width + 1
    if runs < 8:
        return 0.0
    return 1 - len({tuple(words[i : i + width]) for i in range(runs)}) / runs


def _repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    return 1 - len(set(lines)) / len(lines) if len(lines) > 3 else 0.0


def _symbols(text: str) -> float:
    shown = [one for one in text if not one.isspace()]
    odd = sum(not one.isalnum() and unicodedata.category(one)[0] != "M" for one in shown)
    return odd / len(shown) if shown else 0.0


def _other_script(text: str, beside: str) -> float:
    """Share of letters in another script than the one that the text and what stands beside it are mostly in."""
    own = scripts_of(text)
    if own.total() < 20:
        return 0.0
    main = (scripts_of(beside) or own).most_common(1)[0][0]
    return 1 - own[main] / own.total()


def scripts_of(text: str) -> Counter[str]:
    """Letters of a text by the script they are of."""
    return Counter(_script_of(one) for one in text if one.isalpha())


@lru_cache(maxsize=65536)
def _script_of(letter: str) -> str:
    """The first word of the letter's Unicode name: LATIN, CYRILLIC, ARABIC; Japanese and Chinese writing is one."""
    if letter.isascii():
        return "LATIN"
    name = unicodedata.name(letter, "?").split(" ")[0].split("-")[0]
    return {"HIRAGANA": "CJK", "KATAKANA": "CJK", "FULLWIDTH": "LATIN", "MODIFIER": "LATIN"}.get(name, name)


def _broken(text: str) -> float:
    return 1000 * len(re.findall(_BROKEN, text)) / len(text) if text else 0.0


def _unended(text: str) -> float:
    end = text.rstrip()[-2:]
    return float(_words(text) >= 12 and bool(end) and not re.search(_ENDS, end))


SIGNALS: dict[str, Signal] = {
    "words": Signal(lambda _, said: _words(said), "words of what is said"),
    "characters": Signal(lambda _, said: len(said), "characters of what is said"),
    "prompt_words": Signal(lambda asked, _: _words(asked), "words of all that is asked"),
    "repetition": Signal(lambda _, said: _repetition(said), "share of runs of 4 words that came before in it, 0 to 1"),
    "repeated_lines": Signal(lambda _, said: _repeated_lines(said), "share of lines that came before in it, 0 to 1"),
    "symbols": Signal(
        lambda _, said: _symbols(said), "share of characters that are no letters, digits, spaces, 0 to 1"
    ),
    "other_script": Signal(
        lambda asked, said: _other_script(said, asked), "share of letters not in the script of the prompt, 0 to 1"
    ),
    "broken": Signal(
        lambda asked, said: max(_broken(asked), _broken(said)),
        "characters of broken encoding (Ã©, â€™, U+FFFD, controls) in 1,000, of prompt or answer",
    ),
    "refusal": Signal(lambda _, said: float(bool(re.search(_REFUSAL, said[:200]))), "1 where it begins with a refusal"),
    "unended": Signal(lambda _, said: _unended(said), "1 where 12 words or more end without a mark, fence or bracket"),
    "open_fence": Signal(
        lambda _, said: float(len(re.findall(_FENCE, said)) % 2), "1 where a code block is not closed"
    ),
    "placeholders": Signal(
        lambda _, said: len(re.findall(_PLACEHOLDER, said)),
        "left-over placeholders: [NAME], [redacted], {{field}}, ****, lorem ipsum",
    ),
}

# Bounds are heuristics. Repeated lines: Gopher (Rae et al. 2021, arXiv:2112.11446, table A1) drops pages with 30 % of
# them; runs of words likewise. The others drop what is broken by its form. `other_script` is not here: translation is a
# task. Nor are `refusal` and `unended`: to refuse may be what is taught, and a label or a list ends without a mark.
DEFAULT_RULES = (
    "characters>=1",
    "repetition<=0.3",
    "repeated_lines<=0.3",
    "broken<=1",
    "open_fence<=0",
    "placeholders<=0",
)

QUALITY_VERSION = 1  # raised by hand when a signal's meaning changes
DEFAULTS = "defaults"

_RULE = re.compile(
    r"(?:(?P<source>[\w-]+):)?(?P<signal>[a-z_]+)(?P<sign><=|>=)(?P<quantile>q?)(?P<bound>-?\d+(?:\.\d+)?(?:e-?\d+)?)"
)


@dataclass(frozen=True)
class Rule:
    """Keep a row whose signal is at most, or at least, a bound.

    Attributes:
        source: the source it holds for; all where "".
        is_quantile: the bound is a quantile of the signal in the source.
    """

    source: str
    signal: str
    at_most: bool
    bound: float
    is_quantile: bool

    def __str__(self) -> str:
        place = f"{self.source}:" if self.source else ""
        return f"{place}{self.signal}{'<=' if self.at_most else '>='}{'q' * self.is_quantile}{self.bound:g}"


def parse_rule(text: str, known: Sequence[str]) -> Rule:
    """A rule from its text.

    Raises:
        RecipeError: it is not of the form above, or names no known signal.
    """
    found = _RULE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise RecipeError(f"found the rule {text!r}, expected such as 'words>=3' or 'repetition<=q0.95'.")
    if found["signal"] not in known:
        raise RecipeError(f"the rule {text!r} names no known signal; there are: {', '.join(known)}.")
    bound = float(found["bound"])
    if found["quantile"] and not 0.0 <= bound <= 1.0:
        raise RecipeError(f"the rule {text!r} has the quantile {bound:g}, expected 0 to 1.")
    return Rule(found["source"] or "", found["signal"], found["sign"] == "<=", bound, bool(found["quantile"]))


def read_rules(texts: Sequence[str]) -> list[Rule]:
    """The rules of one source, as a recipe writes them: `defaults` stands for the default rules.

    Raises:
        RecipeError: as `parse_rule`, or a rule names a source.
    """
    written = [one for text in texts for one in (DEFAULT_RULES if text == DEFAULTS else (text,))]
    rules = [parse_rule(one, list(SIGNALS)) for one in written]
    for rule in rules:
        if rule.source:
            raise RecipeError(f"the rule '{rule}' names a source, expected none: it stands in one.")
    return list(dict.fromkeys(rules))


def broken_rules(rows: Sequence[Row], rules: Sequence[Rule], source: str) -> dict[int, tuple[Rule, float]]:
    """By number, the rows of a source that break a rule, with the first rule each breaks and the row's value."""
    names = list(dict.fromkeys(rule.signal for rule in rules))
    columns = np.array([signals_of(row, names) for row in rows]).reshape(len(rows), len(names))
    values = dict(zip(names, columns.T, strict=True))
    bounds = bounds_of(rules, source, values)
    found = {}
    for number in range(len(rows)):
        broken = broken_rule(bounds, {name: float(each[number]) for name, each in values.items()})
        if broken is not None:
            found[number] = broken
    return found


def rows_by_rule(broken: Iterable[tuple[Rule, float]]) -> dict[str, int]:
    """Rows that break rules, by rule."""
    return dict(Counter(str(rule) for rule, _ in broken))


def signals_of(row: Row, names: Sequence[str]) -> list[float]:
    """The values of some signals for a row."""
    asked, said = asked_and_said(row)
    return [float(SIGNALS[name].compute(asked, said)) for name in names]


def asked_and_said(row: Row) -> tuple[str, str]:
    """The text of all turns but the last answer, and that answer; of a plain text nothing and the text."""
    if row.format == "text":
        return "", row.value["text"]
    turns = messages_of(row.value)
    if row.format == "messages":
        return "\n".join(one["content"] for one in turns[:-1]), turns[-1]["content"]
    asked = "\n".join(one["content"] for one in turns)
    if row.format == "preference":
        chosen = row.value["chosen"]
        return asked, chosen if isinstance(chosen, str) else "\n".join(one["content"] for one in chosen)
    answer = row.value["answer"]
    if row.format == "choice":
        return asked, answer if isinstance(answer, str) else row.value["choices"][answer]
    return asked, str(row.value.get("solution") or ("" if answer is None else answer))


def bounds_of(rules: Sequence[Rule], source: str, values: Mapping[str, NDArray[np.float64]]) -> dict[Rule, float]:
    """The rules that hold for a source, with their bounds: a quantile is that of the source's own finite values."""
    found = {}
    for rule in rules:
        if rule.source in ("", source):
            own = values[rule.signal]
            own = own[np.isfinite(own)]
            found[rule] = float(np.quantile(own, rule.bound)) if rule.is_quantile and len(own) else rule.bound
    return found


def broken_rule(bounds: Mapping[Rule, float], values: Mapping[str, float]) -> tuple[Rule, float] | None:
    """The first rule that a row breaks, with the row's value. A value that is not a number breaks it: the model could
    not score the row."""
    for rule, bound in bounds.items():
        value = values[rule.signal]
        if not (value <= bound if rule.at_most else value >= bound):
            return rule, value
    return None
