import pytest

from evertune.report.text import cut, duration, in_unit, moment, number, percent, points, signed, unit_word, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nin two lines", "plain\ttext\nin two lines"),
        ("a\u202eb", "a[U+202E]b"),
        ("bell\x07", "bell[U+0007]"),
        ("zero\u200bwidth", "zero[U+200B]width"),
        ("car\rriage", "car[U+000D]riage"),
        # Joiners belong to Persian and to families of emoji, and have no business between ASCII letters.
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),
        ("pay\u200dpal", "pay[U+200D]pal"),
        ("\u200d", "[U+200D]"),
        ("e\u0301", "e\u0301"),
        ("Z" + "\u0351" * 6, "Z" + "\u0351" * 4 + "[U+0351]" * 2),
    ],
)
def test_what_is_hidden_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_numbers_have_a_real_minus_and_no_negative_zero() -> None:
    assert number(-0.5, 1) == "\u22120.5"
    assert signed(-0.0123, 3) == "\u22120.012"
    assert signed(-0.0001, 3) == "+0.000"
    assert points(0.713) == "+71.3"
    assert percent(0.9896) == "99.0 %"


def test_what_is_missing_is_said() -> None:
    assert number(None) == percent(None) == duration(None) == moment(None) == "not recorded"
    assert signed(None) == points(None) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.76, "0.8 s"), (48.2, "48 s"), (268.8, "4 min 29 s"), (11_100, "3 h 05 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_cut_text_has_the_asked_length_at_most() -> None:
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abcde…"


def test_differences_are_in_the_gates_unit() -> None:
    assert (in_unit(-0.013, "points"), unit_word("points")) == ("\u22121.3", "points")
    assert (in_unit(0.0051, "percent"), unit_word("percent")) == ("+0.5", "%")
    assert (in_unit(4.25, "score"), unit_word("score")) == ("+4.250", "")
