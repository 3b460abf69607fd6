"""The table of all methods with their standing, and what a recipe or a checkpoint uses of it. No torch, no other room.

The rows are `methods.yaml`, a file to read and to correct; this module is its shape and the questions put to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Standing = Literal["production", "research", "academic"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)
"""From the strongest evidence to the weakest."""

MEANING: dict[Standing, str] = {
    "production": "a published report of a shipped model family says it used the method or its exact algebra",
    "research": "replicated, or in major libraries, but no such report was found: validate it yourself",
    "academic": "not production-validated; a recipe must say `academic: allow`",
}
MARKS = {
    "read": "in the primary text",
    "secondary": "in a text about it",
    "code": "in source or configuration",
    "memory": "from memory, not checked",
}
SECTIONS = {
    "rounds": "Continual, in production",
    "measurement": "Forgetting measured",
    "replay": "Replay and data",
    "drift": "Small drift",
    "anchors": "KL to a reference",
    "merging": "Merging and averaging",
    "distillation": "Distillation",
    "stages": "Stages and what erodes between them",
    "academic": "Not production-validated",
    "federated": "Federated",
}
TABLE = Path(__file__).with_name("methods.yaml")


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        id: its name in recipes, ledgers and reports.
        year: of the first paper that describes it.
        papers: `arXiv:<id>` or a name and a year; the first introduces it or is its best account.
        evidence: published production use, or what else speaks for it; see `MARKS`.
        failure: how it is known to fail.
        default: values to begin with, and where they come from.
        keys: recipe keys that select it, as `Model.field` of the schema.
        where: what implements it, as `file:name` seen from the repository's root.
        because: why nothing does; "" where something does.
    """

    id: str
    name: str
    section: str
    standing: Standing
    year: int
    papers: tuple[str, ...]
    summary: str
    formula: str
    evidence: str
    failure: str
    default: str
    keys: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    because: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, every field present."""
        return {name: list(one) if isinstance(one, tuple) else one for name, one in vars(self).items()}


@dataclass(frozen=True)
class KeyPaper:
    """One line of the timeline; `methods` are ids of rows that it is about."""

    year: int
    paper: str
    what: str
    methods: tuple[str, ...]


@cache
def methods() -> Mapping[str, Method]:
    """The table: id -> row, in the order of the file."""
    return {row["id"]: _method(row) for row in _read()["methods"]}


@cache
def timeline() -> Sequence[KeyPaper]:
    """Key papers by year."""
    return [
        KeyPaper(**{**row, "year": int(row["year"]), "methods": tuple(row["methods"])}) for row in _read()["timeline"]
    ]


def weakest(standings: Iterable[Standing]) -> Standing:
    """The standing of what rests on all of these: that of its weakest part; `production` where there is none."""
    return max(standings, key=STANDINGS.index, default="production")


def standing_of(ids: Iterable[str]) -> Standing:
    """The standing of a stage that used these methods. One that the table does not know is `research` at best.

    A method of another package may call itself what it likes: only this table's evidence was looked at.
    """
    table = methods()
    return weakest(table[one].standing if one in table else "research" for one in ids)


def used_in(checkpoints: Sequence[Mapping[str, Any]], digest: str) -> tuple[str, ...]:
    """Methods that went into a checkpoint: its own, and those of everything it was made from.

    Args:
        checkpoints: bodies of the ledger's checkpoint events, of which `digest`, `start`, `methods` and, where it was
            made from several, `parents` (digests) are read.
        digest: of the checkpoint; one that no event knows has no methods.

    Returns:
        Ids in the order they were first used.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()

    def visit(one: str) -> None:
        if one in seen:
            return
        seen.add(one)
        for body in checkpoints:
            if body["digest"] == one:
                for parent in (body["start"], *body.get("parents", ())):
                    if parent is not None:
                        visit(parent)
                found.update(dict.fromkeys(body["methods"]))

    visit(digest)
    return tuple(found)


def named(ids: Iterable[str], standing: Standing) -> list[str]:
    """`Name (id)` of the methods of one standing, for a sentence about them."""
    table = methods()
    known = [one if one not in table else f"{table[one].name} ({one})" for one in ids if standing_of([one]) == standing]
    return list(dict.fromkeys(known))


def _method(row: Mapping[str, Any]) -> Method:
    fields: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in row.items()}
    return Method(**{**fields, "year": int(row["year"])})


@cache
def _read() -> dict[str, Any]:
    # libyaml's parser, where PyYAML was built with it: a tenth of the time, and every command that judges reads this.
    # Half of the rest would go into guessing whether each text is a number or a date.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    table: dict[str, Any] = _plain(yaml.compose(TABLE.read_text(encoding="utf-8"), Loader=loader))
    return table


def _plain(node: Any) -> Any:
    """Mappings, lists and texts."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(one) for key, one in node.value}
    return [_plain(one) for one in node.value] if isinstance(node, yaml.SequenceNode) else node.value
