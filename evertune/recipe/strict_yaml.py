"""YAML read strictly: what another reader would guess, lose in silence or blow up on is an error with its line.

    1e-5, 1E5, .5      numbers; YAML 1.1 reads some of them as texts
    no, yes, on, off   texts; only true and false are truth values
    .nan, .inf, 1e999  refused: no setting has such a value
    a: 1, a: 2         refused: the last would win
    tags, merge keys   refused: plain mappings, lists and single values only

Bytes, values, depth and aliases are counted while the text is parsed, before anything is built from it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evertune.errors import RecipeError

FILE_BYTES = 1 << 20
VALUES = 20_000
DEPTH = 32
ALIASES = 100
# Longer whole numbers are no setting, and Python refuses to read those of some thousand digits.
DIGITS = 30

Steps = tuple[str | int, ...]
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """What a file holds, and where.

    Attributes:
        value: mappings, lists, texts, numbers, truth values and None.
        places: `file:line` of every key and list entry, by its path.
    """

    value: Any
    places: dict[Steps, str]


def read_yaml(path: Path) -> Document:
    """The one mapping of a YAML file.

    Raises:
        RecipeError: the file cannot be read, is no YAML, passes a cap, or holds anything but one mapping.
    """
    file = str(path)
    node = _compose(_read(path), f"{file}:")
    if node is None:
        raise RecipeError(f"{file}: the file is empty, expected a mapping.", remedy="'evertune init' writes one.")
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise RecipeError(
            f"{file}:{line}: found {_node_kind(node)}, expected one mapping.", remedy="See 'evertune init'."
        )
    return _build(node, f"{file}:")


def parse_value(text: str, place: str) -> Any:
    """A value as it would stand in a file, such as `1e-4`, `[a, b]` or `{share: 0.3}`; None for nothing.

    Args:
        place: what messages begin with.

    Raises:
        RecipeError: the text is no YAML value.
    """
    node = _compose(text, place)
    return None if node is None else _build(node, place).value


def spell(path: Steps) -> str:
    """A path as people write it: `rounds[0].stages[0].sft`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


class _Loader(yaml.SafeLoader):
    """The parser, with the core scalars of YAML 1.2. A tag, and more values, depth or aliases than a recipe has, are
    errors where they stand."""

    def __init__(self, text: str, place: str) -> None:
        super().__init__(text)
        self._place = place
        self._values = self._aliases = self._depth = 0

    def get_event(self) -> Any:
        event: Any = super().get_event()
        self._values += isinstance(event, yaml.NodeEvent)
        self._aliases += isinstance(event, yaml.AliasEvent)
        self._depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        where = _at(self._place, event.start_mark.line + 1)
        if getattr(event, "tag", None) is not None:
            raise RecipeError(f"{where}: found the YAML tag '{event.tag}'.", remedy="Remove it.")
        for count, cap, what in (
            (self._values, VALUES, "values"),
            (self._aliases, ALIASES, "aliases"),
            (self._depth, DEPTH, "levels"),
        ):
            if count > cap:
                raise RecipeError(f"{where}: more than {cap:,} {what}.")
        return event

    def documents(self) -> Iterator[Any]:
        while self.check_node():
            yield self.get_node()


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: found a folder, expected a file.", remedy="Name the recipe's YAML file.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: cannot be read: {reason}.", remedy="Check the path.") from error
    if len(data) > FILE_BYTES:
        raise RecipeError(f"{path}: more than {FILE_BYTES:,} bytes.", remedy="Is this a recipe? Rows go to data files.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = f"{path}:{line}: found byte {data[error.start]:#04x}, expected UTF-8."
        raise RecipeError(found, remedy="Save the file as UTF-8.") from error


def _compose(text: str, place: str) -> yaml.Node | None:
    """The node of the one document, after the caps. `place` is `file:` (a line follows) or the name of a flag."""
    try:
        documents = list(_Loader(text, place).documents())
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(f"{_at(place, line)}: found the character {error.character:#04x}.") from error
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        where = _at(place, mark.line + 1) if mark else place.removesuffix(":")
        told = "; ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"{where}: not valid YAML: {told}.", remedy="Check indents, quotes and brackets.") from error
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        raise RecipeError(f"{_at(place, line)}: found a second document, expected one.", remedy="Remove it and '---'.")
    return documents[0] if documents else None


def _build(root: yaml.Node, place: str) -> Document:
    places: dict[Steps, str] = {}
    value = _value(root, (), places, place)
    return Document(value, places)


def _value(node: yaml.Node, path: Steps, places: dict[Steps, str], place: str) -> Any:
    here = _at(place, node.start_mark.line + 1)
    # An alias is written once and counts each time it is used.
    if len(places) > VALUES:
        raise RecipeError(f"{here}: more than {VALUES:,} values once aliases are filled in.")
    if len(path) > DEPTH:
        raise RecipeError(f"{here}: more than {DEPTH} levels once aliases are filled in.")
    places.setdefault(path, here)
    if isinstance(node, yaml.MappingNode):
        return dict(_entries(node, path, places, place))
    if isinstance(node, yaml.SequenceNode):
        return [_value(one, (*path, i), places, place) for i, one in enumerate(node.value)]
    return _scalar(node, f"{here}, {spell(path)}" if path else here)


def _entries(node: yaml.MappingNode, path: Steps, places: dict[Steps, str], place: str) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        here = _at(place, key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{here}: found {_node_kind(key_node)} as a key; keys are words.")
        # Keys are what is written: a round or a source may be called 2026 or no.
        key = _text(key_node.value, here)
        inner = (*path, key)
        if key in seen:
            found = f"{here}, {spell(inner)}: this key stands twice, first at {places[inner]}."
            raise RecipeError(found, remedy="Remove one of the two.")
        seen.add(key)
        places[inner] = here
        yield key, _value(value_node, inner, places, place)


def _scalar(node: yaml.Node, place: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], _text(node.value, place)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text.lstrip("+-")) <= DIGITS:
        return int(text)
    if kind in ("int", "float"):
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if not math.isfinite(number) or kind == "int":
            raise RecipeError(f"{place}: found {text[:DIGITS]}, expected a finite number of at most {DIGITS} digits.")
        return number
    return text


def _text(text: str, place: str) -> str:
    unusable = _UNUSABLE.search(text)
    if unusable:
        raise RecipeError(f"{place}: found the character {ord(unusable.group()):#06x} in a text.", remedy="Remove it.")
    return text


def _at(place: str, line: int) -> str:
    """`file:line` for a file; a flag has one line and keeps its name."""
    return f"{place}{line}" if place.endswith(":") else place


def _node_kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
