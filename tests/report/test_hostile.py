"""Nothing from data becomes markup: whatever a field holds, the page has the same elements, and shows the text."""

import functools
import re
from collections import Counter

import pytest

from evertune.report import build_report, render
from evertune.report.text import visible
from tests.report.hostile import HOSTILE, poisoned
from tests.report.html_tree import Node, parse

ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "title", "open"),
    *("aria-label", "aria-labelledby", "role", "tabindex", "scope", "colspan", "span"),
    *("viewbox", "preserveaspectratio", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "d", "points"),
    *("width", "height", "fill-opacity", "text-anchor"),
}
STRINGS = tuple(one.format(fire="document.title='fired'", url="http://127.0.0.1:9") for one in HOSTILE)


def _page(poison: str, *, own_words: bool = False) -> Node:
    return parse(render(build_report(poisoned(poison, own_words=own_words))))


def _tags(page: Node) -> Counter[str]:
    return Counter(node.tag for node in page.walk())


@functools.cache
def _benign_tags(length: int) -> Counter[str]:
    return _tags(_page("x" * length))


def _check_attributes(page: Node) -> None:
    for node in page.walk():
        unknown = set(node.attributes) - ATTRIBUTES
        assert not unknown, f"<{node.tag}> has {unknown}"
        assert node.attributes.get("href", "#").startswith("#")
        assert node.tag not in ("script", "img", "iframe", "object", "embed", "link", "base", "form", "input")


def test_there_are_enough_strings() -> None:
    assert len(STRINGS) >= 30


@pytest.mark.parametrize("i", range(len(STRINGS)))
def test_a_hostile_string_in_every_field_stays_text(i: int) -> None:
    page = _page(STRINGS[i])
    # Letters of the same length take its place: were one character of it markup, the elements would differ.
    assert _tags(page) == _benign_tags(len(visible(STRINGS[i])))
    _check_attributes(page)
    shown = visible(STRINGS[i])
    flips = [cell.raw for table in page.all("table", class_="flips") for cell in table.all("td")]
    assert any(text.startswith(shown) for text in flips)
    assert len(shown) > 50 or f"{shown}northwind" in page.one("header").raw


def test_the_programs_own_words_may_be_hostile_too() -> None:
    for string in STRINGS[::4]:
        _check_attributes(_page(string, own_words=True))


def test_hidden_characters_are_spelled_out() -> None:
    for string in STRINGS:
        page = render(build_report(poisoned(string)))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2060-\u2069\u2028\u2029\ufeff]", page)
    assert "[U+202E]gnp.exe[U+202C]" in render(build_report(poisoned("\u202egnp.exe\u202c")))


def test_a_lone_surrogate_can_be_written() -> None:
    assert "[U+D800]" in visible("\ud800")
    visible("\ud800").encode("utf-8")


def test_a_very_long_text_is_cut_and_kept_whole_in_a_fold() -> None:
    long = "word " * 2_000
    page = _page(long)
    cell = page.one("table", class_="flips").all("td")[0]
    assert len(cell.text) > len(long)
    first = cell.children[0]
    assert isinstance(first, str)
    assert len(first) <= 320
    assert long in cell.one("details").one("pre").raw
    assert len(page.one("h1").text) <= 600
    assert all(len(label.text) < 130 for label in page.one("table", class_="matrix").all("th"))
