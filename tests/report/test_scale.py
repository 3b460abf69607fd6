"""The page of a run with few and many rounds and probes: whole, without a script, and no larger than a mail takes."""

import pytest

from evertune.report import build_report, render
from tests.report.html_tree import parse
from tests.report.large import large_story


@pytest.mark.parametrize("rounds, probes", [(1, 2), (30, 2), (1, 40), (30, 40)])
def test_the_page_holds_every_round_and_probe(rounds: int, probes: int) -> None:
    page = render(build_report(large_story(rounds, probes)))
    tree = parse(page)
    assert "<script" not in page
    # What most mail servers take is 10 MB.
    assert len(page) < 6_000_000
    matrix = next(one for one in tree.all("table") if "matrix" in one.attributes.get("class", ""))
    heads = [one.text for one in matrix.all("th") if one.attributes.get("scope") == "col"]
    assert len(heads) == 1 + probes
    strips = [one for one in tree.all("ol") if "strip" in one.attributes.get("class", "")]
    assert sum(len(one.all("li")) for one in strips) == rounds
    # The first screen of a phone is not all cards: earlier rounds are folded.
    assert len(strips[-1].all("li")) <= 8
    ids = [one.attributes["id"] for one in tree.walk() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    ladders = rounds // 7
    assert page.count("what each rung gained and lost") == ladders
