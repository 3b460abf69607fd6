"""A judgement for other readers: JUnit XML for a CI system's test view, Markdown for its summary page."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

Body = Mapping[str, Any]

MARKS = {"pass": "pass", "harm": "**harm**", "too_few": "too few items", "undecided": "undecided", "watch": "watched"}
MEANINGS = {
    "PROMOTE": "nothing was lost beyond its margin",
    "HOLD": "something was lost",
    "INCONCLUSIVE": "the evidence is too thin to decide",
}
# Characters that XML 1.0 cannot hold, whatever they are written as.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def to_junit(body: Body) -> str:
    """One test case per comparison and one for the decision.

    Harm, and a promotion that is not shown, are failures (`harm`, `inconclusive`); a watched probe that nothing waits
    for is skipped, so that it never turns a build red.
    """
    cases = [_case(one) for one in _comparisons(body)]
    decision = ElementTree.Element("testcase", classname="evertune.gate", name="decision")
    if body["decision"] != "PROMOTE":
        _add_failure(decision, body["decision"].lower(), "\n".join(body["reasons"]))
    cases.append(decision)
    failures = sum(case.find("failure") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    name = f"evertune gate: {body['label']} against {body['champion_label']}"
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": str(skipped)}
    suite = ElementTree.Element("testsuite", {"name": _clean(name), "time": "0", **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for key in ("decision", "candidate", "champion", "source", "digest"):
        if body.get(key) is not None:
            ElementTree.SubElement(properties, "property", name=key, value=_clean(str(body[key])))
    suite.extend(cases)
    suites = ElementTree.Element("testsuites", {"name": "evertune", **counts})
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(body: Body) -> str:
    """The decision, its reasons, the table of comparisons, and the items that changed most, folded."""
    decision = body["decision"]
    lines = [
        f"## {decision}: {MEANINGS[decision]}",
        "",
        f"`{_code(body['label'])}` against `{_code(body['champion_label'])}`",
        "",
        *[f"- {_escape(one)}" for one in body["reasons"]],
        "",
        "| probe | against | items | before | after | difference | 90 % interval | margin | p (Holm) | outcome |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---|",
        *[_row(one) for one in _comparisons(body)],
        "",
    ]
    if body.get("items_asked") is not None:
        lines += [f"Asked {body['items_asked']:,} of {body['items_in_all']:,} items of each model, in batches.", ""]
    for probe, items in sorted(body["flips"].items()):
        lines += _flips(probe, items)
    lines += [f"Evidence digest `{body['digest'][:16]}`, {body['made_by']}.", ""] if "digest" in body else []
    return "\n".join(lines)


def _comparisons(body: Body) -> Sequence[Body]:
    return [*([body["pooled"]] if body["pooled"] else []), *body["probes"]]


def _case(one: Body) -> ElementTree.Element:
    against = "" if one["reference"] == "champion" else " against the best"
    case = ElementTree.Element(
        "testcase", classname=f"evertune.gate.{one['role']}", name=_clean(one["probe"] + against)
    )
    if one["outcome"] == "harm":
        _add_failure(case, "harm", one["reason"])
    elif one["outcome"] in ("too_few", "undecided"):
        _add_failure(case, "inconclusive", one["reason"])
    elif one["outcome"] == "watch":
        ElementTree.SubElement(case, "skipped", message="watched: nothing waits for it")
    ElementTree.SubElement(case, "system-out").text = _clean(one["reason"])
    return case


def _add_failure(case: ElementTree.Element, kind: str, text: str) -> None:
    failure = ElementTree.SubElement(case, "failure", type=kind, message=_clean(text.split("\n")[0]))
    failure.text = _clean(text)


def _row(one: Body) -> str:
    scale, sign = {"points": (100, ""), "percent": (100, " %"), "score": (1, "")}[one["unit"]]
    low, high = one["ci90"]
    margin = "" if one["margin"] is None else f"{-one['margin'] * scale:.1f}{sign}"
    p = "" if one["p_holm"] is None else f"{one['p_holm']:.3f}" if one["p_holm"] >= 0.001 else "< 0.001"
    cells = (
        _escape(one["probe"]),
        one["reference"],
        f"{one['n']:,}",
        f"{one['before']:.3f}",
        f"{one['after']:.3f}",
        f"{one['difference'] * scale:+.1f}{sign}",
        f"{low * scale:+.1f} to {high * scale:+.1f}",
        margin,
        p,
        MARKS[one["outcome"]],
    )
    return f"| {' | '.join(cells)} |"


def _flips(probe: str, items: Sequence[Body]) -> list[str]:
    worse = [one for one in items if one["before"] != one["after"] or one["before_score"] != one["after_score"]]
    if not worse:
        return []
    rows = [
        f"| {_cell(one['id'])} | {_cell(one['prompt'])} | {_cell(one['expected'])} | {_cell(one['before'])} | "
        f"{_cell(one['after'])} | {one['before_score']:.2f} → {one['after_score']:.2f} |"
        for one in worse
    ]
    return [
        # Inside a tag Markdown is not read, so a backslash would be shown.
        f"<details><summary>{html.escape(_one_line(probe))}: items that changed most</summary>",
        "",
        "| item | prompt | expected | before | after | score |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "</details>",
        "",
    ]


def _cell(text: str) -> str:
    flat = _one_line(text)
    return _escape(flat if len(flat) <= 160 else f"{flat[:157]}...")


def _escape(text: str) -> str:
    """Text that stays text: no table cell ends early, and no markup or tag begins."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for char in "\\`*_[]|~$#":
        text = text.replace(char, f"\\{char}")
    return text.replace("\r", " ").replace("\n", " ")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _code(text: str) -> str:
    return _one_line(text.replace("`", "'"))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
