"""The page a person opens: its structure, its numbers, what it never holds, and that it is the same each time."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evertune.errors import WorkspaceError
from evertune.report import build_report, render, write_report
from evertune.report.page import FOLDER
from tests.report.hostile import everything
from tests.report.html_tree import Node, parse, table_rows
from tests.report.story import PROBES, SCORES, chain, facts, probe, story, verdict


@pytest.fixture(scope="module")
def html() -> str:
    return render(build_report(story()))


@pytest.fixture(scope="module")
def page(html: str) -> Node:
    return parse(html)


def test_the_first_screen_has_the_sentence_the_rounds_and_three_numbers(page: Node) -> None:
    header = page.one("header")
    assert header.one("h1").text == "Round 2-protected PROMOTED. Kept 4 of 4 guarded skills; routing +71.0 points."
    strip = [item.text for item in header.one("ol", class_="strip").all("li")]
    assert [text.split()[:2] for text in strip] == [["PROMOTED", "1"], ["HELD", "2-plain"], ["PROMOTED", "2-protected"]]
    transfer, retention, gain = (box.text for box in page.one("dl", class_="figures").all("div"))
    assert "−1.0 points 90% interval −6.7 to +4.7" in transfer
    assert "99.0 % mean of taught skills" in retention
    assert "99.0 % worst: cards" in retention
    assert "+71.0 points, routing 90% interval +68.0 to +74.0, 100 items." in gain


def test_the_matrix_shows_every_recorded_score(page: Node) -> None:
    table = page.one("table", class_="matrix")
    heads = [cell.text.split()[0] for cell in table.one("thead").all("tr")[1].all("th")]
    assert heads == ["checkpoint", *PROBES]
    rows = table_rows(table)
    assert [row[0].text.split()[0] for row in rows] == list(SCORES)
    for row in rows:
        label = row[0].text.split()[0]
        for name, cell in zip(PROBES, row[1:], strict=True):
            body = probe(label, name)
            assert cell.text.startswith(f"{body['value']:.3f}")
            assert f"{body['n']} items" in cell.attributes["title"]


def test_state_is_told_by_word_and_mark_and_not_by_colour_alone(page: Node) -> None:
    rows = {row[0].text.split()[0]: row for row in table_rows(page.one("table", class_="matrix"))}
    assert "not promoted" in rows["2-plain/1-sft"][0].text
    assert "champion" in rows["2-protected/1-sft"][0].text
    assert rows["2-plain/1-sft"][4].text == "0.110 ▼ −0.850 ✕ lost"
    assert rows["1/1-sft"][4].text == "0.960 ▲ +0.960 ✓ gained"
    assert rows["2-protected/1-sft"][3].text == "1.197 ▲ +0.002 worse ✓ kept"


def test_each_verdict_shows_its_evidence(page: Node) -> None:
    body = verdict("2-plain", "2-plain/1-sft", "1/1-sft", "HOLD", target="routing")
    section = page.all("section", class_="round")[1]
    assert section.one("h3").text == "HELD 2-plain"
    table = section.all("table", class_="evidence")[0]
    told = {row[0].text: [cell.text for cell in row] for row in table_rows(table) if row[0].tag == "th"}
    for one in body["probes"]:
        if one["role"] == "form":
            assert one["probe"] not in told
            continue
        cells = told[one["probe"]]
        assert cells[2:4] == [f"{one['before']:.3f}", f"{one['after']:.3f}"]
        assert cells[4].replace("−", "-").removesuffix(" %") == f"{100 * one['difference']:+.1f}"
    assert told["cards"][-1] == "✕ lost"
    assert told["cards"][-2] == "< 0.001"
    assert told["routing"][-1] == "✓ gained"


def test_changed_items_stand_side_by_side(page: Node) -> None:
    table = page.all("table", class_="flips")[0]
    assert [cell.text for cell in table.one("thead").all("th")] == [
        *("item", "prompt", "expected", "before", "after", "score"),
    ]
    assert [cell.text for cell in table_rows(table)[1]][2:] == [
        *("Becker, Elena / K-152 / Turin", "Becker, Elena / K-152 / Turin", "Accounts desk", "1.00 → 0.00"),
    ]


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("kept", ["cards", "1/1-sft", "99.0 %", "Form of the answers", "99 % / 4 %"]),
        ("rescue", ["0.40", "written and judged", "✕ fails", "cards −34.0", "worst guard"]),
        ("training", ["0.00290", "+0.095", "−0.139", "KL 0.1 to start on replay, forward", "anchored_sft_kl"]),
        ("data", ["general 50, history/1/cards 30", "30.0 %", "29.6 %", "200", "no replay"]),
        ("cost", ["16,000", "24,000", "67 %", "4 min 29 s", "What the base was trained on is in neither number"]),
        ("lineage", ["2-plain/rescue-0.4", "not promoted", "champion"]),
        ("reproduce", ["Seed 13", "evertune run RECIPE.yaml", "torch", "2.13.0", "base: smollm2-135m"]),
    ],
)
def test_below_stands_how_it_came_about(page: Node, heading: str, words: list[str]) -> None:
    section = next(one for one in page.all("section") if one.attributes.get("aria-labelledby") == heading)
    for word in words:
        assert word in section.text


def test_standing_that_is_not_production_is_on_the_first_screen() -> None:
    header = parse(render(build_report(chain(everything())))).one("header").text
    assert "Academic, not production-validated: 1/1-sft" in header
    assert "Of research standing: SFT with KL to frozen reference." in header
    assert "Stage 3/1-sft failed: loss is NaN at step 7" in header
    assert "Decided by hand: 1/1-sft promoted. Reason given: the release needs it" in header


def test_an_empty_ledger_says_not_recorded_everywhere() -> None:
    page = parse(render(build_report([])))
    assert page.one("h1").text == "The ledger is empty: nothing has been run."
    sections = [one for one in page.all("section") if one.attributes.get("aria-labelledby") != "figures-head"]
    assert len(sections) == 11
    assert all("Not recorded" in one.text for one in sections)


def test_facts_that_were_not_measured_say_so() -> None:
    found = facts()
    for kind, _, body, volatile in found:
        if kind == "checkpoint" and body["steps"]:
            body |= {"drift": None, "interference": None, "replay": None, "data": [], "losses": [], "final": {}}
            volatile.clear()
    page = parse(render(build_report(chain(found))))
    assert page.one("h2", id="training")
    training = next(one for one in page.all("section") if one.attributes.get("aria-labelledby") == "training")
    assert training.text.count("not recorded") >= 3 * 5


def test_a_screen_reader_finds_its_way(page: Node) -> None:
    assert page.one("html").attributes["lang"] == "en"
    assert len(page.all("main")) == len(page.all("header")) == len(page.all("footer")) == len(page.all("h1")) == 1
    ids = {node.attributes["id"] for node in page.walk() if "id" in node.attributes}
    links = [node.attributes["href"].removeprefix("#") for node in page.all("a")]
    assert page.all("a")[0].text == "Skip to the scores"
    assert set(links) <= ids
    for node in page.walk():
        if "aria-labelledby" in node.attributes:
            assert node.attributes["aria-labelledby"] in ids
    for table in page.all("table"):
        assert table.all("caption")
        assert all(cell.attributes.get("scope") for cell in table.all("th"))
    for svg in page.all("svg"):
        assert svg.attributes["role"] == "img"
        assert svg.attributes["aria-label"]
    for scrolling in page.all("div", class_="scroll"):
        # Without a tabindex the keyboard cannot scroll it.
        assert scrolling.attributes["tabindex"] == "0"
        assert scrolling.attributes["aria-label"]
    levels = [int(node.tag[1]) for node in page.walk() if re.fullmatch("h[1-6]", node.tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_the_page_holds_no_script_and_names_no_place_to_load_from(html: str, page: Node) -> None:
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert not page.all("script")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:|src=|\son[a-z]+=", html)


def test_only_the_style_sheet_is_trusted() -> None:
    for template in FOLDER.glob("*.j2"):
        trusted = re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}|autoescape", template.read_text(encoding="utf-8"))
        assert trusted == (["{{ style|safe }}"] if template.name == "page.html.j2" else [])
    for source in FOLDER.glob("*.py"):
        assert "Markup" not in source.read_text(encoding="utf-8")


def test_the_same_events_give_the_same_bytes_in_another_process(html: str, tmp_path: Path) -> None:
    code = (
        "from evertune.report import *; from tests.report.story import story; import sys; "
        "sys.stdout.buffer.write(render(build_report(story())).encode())"
    )
    root = Path(__file__).parents[2]
    for seed in ("0", "7"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        assert done.stdout.decode() == html


def test_the_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new folder" / "report.html"
    write_report(story(), out)
    before = out.read_bytes()
    assert [one.name for one in out.parent.iterdir()] == ["report.html"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkspaceError, match="cannot be written: No space left on device"):
        write_report([], out)
    assert out.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkspaceError, match="report.html cannot be written"):
        write_report([], tmp_path / "file" / "report.html")


def test_text_reaches_contrast_4_5_in_both_schemes_and_print() -> None:
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root \{.*?\}", style, re.S)
    ]
    assert len(schemes) == 3
    inks = ("text", "dim", "accent", "good", "bad", "open")
    for colours in schemes:
        for ground in ("ground", "card"):
            for ink in inks:
                assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for ground in ("good", "bad", "open", "note"):
            for ink in ("text", "dim", ground):
                if ink != "note":
                    assert _contrast(colours[ink], colours[f"{ground}-ground"]) >= 4.5, (ink, ground)


def test_contrast_is_computed_as_wcag_says() -> None:
    assert _contrast("#000", "#fff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def _contrast(a: str, b: str) -> float:
    """WCAG 2.2 contrast ratio of two colours."""
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_was_left_out_before_training_is_listed_by_probe(page: Node) -> None:
    table = next(one for one in page.all("table") if "What each stage was trained on" in one.text)
    assert "2 with items of arithmetic; 1 unreadable" in table.text


def test_what_each_stage_did_is_a_table_of_stages_and_capabilities(page: Node) -> None:
    assert not page.all("h2", id="erosion"), "one stage a round: the verdict says it all"
    page = parse(render(build_report(chain(everything()))))
    [section] = [one for one in page.all("section") if one.all("h2", id="erosion")]
    assert [one.text for one in section.one("thead").all("th")] == ["stage", "since", "copying", "cards"]
    rows = [[cell.text for cell in row] for row in table_rows(section.one("table"))]
    assert rows[0][:2] == ["2-plain/1-sft", "base"]
    assert rows[0][2].split() == ["\u221220.0", "\u221230.0", "to", "\u221210.0", "worn", "away"]
    assert rows[0][3].endswith("gained")
    assert rows[1][3] == "not scored"
