"""Values as words: numbers with their sign, hidden characters made visible, long texts cut. The template's filters."""

import re
import time
import unicodedata
from typing import Any

import yaml

MISSING = "not recorded"
# Joiners that ordinary text in many scripts, and emoji, cannot do without.
JOINERS = "\u200c\u200d"
MARKS_IN_A_ROW = 4
PLAIN = re.compile(r"[\x20-\x7e\n\t]*")


def visible(text: Any) -> str:
    """Text with control, format and bidirectional characters spelled out, so that what is shown is what is there.

    New lines and tabs stay; so do joiners between two characters beyond ASCII, and up to four combining marks in a row.
    """
    source = str(text)
    if PLAIN.fullmatch(source):
        return source
    parts: list[str] = []
    marks = 0
    for i, char in enumerate(source):
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        hidden = category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and char not in "\n\t"
        if char in JOINERS and 0 < i < len(source) - 1:
            hidden = source[i - 1].isascii() or source[i + 1].isascii()
        parts.append(f"[U+{ord(char):04X}]" if hidden or marks > MARKS_IN_A_ROW else char)
    return "".join(parts)


def next_command(workspace: str, run: str, label: str, decision: str) -> str:
    """What a person would type after a verdict. Not in the ledger: what happened does not depend on where it lies."""
    if decision == "PROMOTE":
        return f"evertune export {workspace} --out {run}-model"
    return f"evertune show {workspace} {label}"


def cut(text: str, length: int) -> str:
    """The first `length` characters, with an ellipsis when there are more."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number; a minus is a real minus sign."""
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "\u2212")


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign; nothing for None. What rounds to zero has no minus."""
    if value is None:
        return ""
    text = f"{value:+.{digits}f}"
    return (text.replace("-", "+") if float(text) == 0 else text).replace("-", "\u2212")


def points(value: float | None) -> str:
    """A difference of scores in points: 0.713 is +71.3."""
    return "" if value is None else signed(100 * value, 1)


def in_unit(value: float | None, unit: str) -> str:
    """A signed difference as the gate counts it: points and per cent are hundredths, a score is plain."""
    return signed(value, 3) if unit == "score" else "" if value is None else signed(100 * value, 1)


def unit_word(unit: str) -> str:
    """The word after a difference: `points`, `%` of the loss, or nothing for a score outside [0, 1]."""
    return {"points": "points", "percent": "%"}.get(unit, "")


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return MISSING if value is None else f"{number(100 * value, digits)} %"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as `48 s`, `4 min 29 s` or `3 h 05 min`."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(value: float | None) -> str:
    """Unix seconds as a UTC date and time."""
    return MISSING if value is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value))


def as_yaml(value: Any) -> str:
    """A value as YAML, keys in their order."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


FILTERS = {
    "visible": visible,
    "cut": cut,
    "number": number,
    "signed": signed,
    "points": points,
    "in_unit": in_unit,
    "unit_word": unit_word,
    "percent": percent,
    "count": count,
    "duration": duration,
    "moment": moment,
    "yaml": as_yaml,
}
