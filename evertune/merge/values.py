"""Settings that differ from tensor to tensor: one number, a gradient over depth, blocks of layers, or globs.

    weight: 0.5                                      everywhere
    weight: [0.2, 0.8]                               from the first layer to the last, straight between
    weight: {blocks: [0.2, 0.5, 0.8]}                thirds of the layers
    weight: [{match: "*.mlp.*", value: 0.8}, {value: 0.5}]    the first entry that matches; the last has no match

Globs are anchored: `model.layers.1.*` is layer 1, not layer 10.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from evertune.errors import MergeError
from evertune.recipe.merging import Blocks, Match

_LAYER = re.compile(r"\.(\d+)\.")
_FIRST = re.compile(r"(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings|embeddings?)\.")


class Depths:
    """How deep each tensor lies: 0 for the embedding and the first layer, 1 for the last layer and what follows it."""

    def __init__(self, names: Iterable[str]) -> None:
        self._layers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
        self.count = max(self._layers.values(), default=0) + 1

    def depth(self, name: str) -> float:
        """In [0, 1]."""
        layer = self.layer(name)
        return layer / (self.count - 1) if self.count > 1 else 0.0

    def layer(self, name: str) -> int:
        """Number of the layer; the first for embeddings, the last for the final norm and the head."""
        return self._layers.get(name, 0 if _FIRST.search(name) else self.count - 1)


def resolve(value: float | list[float] | list[Match] | Blocks, name: str, depths: Depths, setting: str) -> float:
    """The value of a setting for one tensor.

    Raises:
        MergeError: no entry of a list of globs matches.
    """
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Blocks):
        return value.blocks[depths.layer(name) * len(value.blocks) // depths.count]
    first = value[0] if value else None
    if isinstance(first, Match):
        for one in value:
            assert isinstance(one, Match)
            if one.match is None or fnmatch.fnmatchcase(name, one.match):
                return resolve(one.value, name, depths, setting)
        raise MergeError(f"{setting}: no entry matches {name}.", remedy="Add a last entry with a value and no 'match'.")
    return _gradient([float(one) for one in value if not isinstance(one, Match)], depths.depth(name))


def check_value(value: object, names: Sequence[str], setting: str) -> list[str]:
    """A problem for each part of a value that reaches no tensor: a glob that matches none, an entry after one that
    matches all, more blocks than layers."""
    entries = [one for one in value if isinstance(one, Match)] if isinstance(value, list) else []
    layers = Depths(names).count
    problems = [
        f"{setting}: found {len(one.blocks)} blocks, the model has {layers} layers to divide among them."
        for one in [value, *(each.value for each in entries)]
        if isinstance(one, Blocks) and len(one.blocks) > layers
    ]
    for i, one in enumerate(entries):
        if one.match is None:
            if i < len(entries) - 1:
                problems.append(f"{setting}: the entry after the one without 'match' is never reached.")
        elif not any(fnmatch.fnmatchcase(name, one.match) for name in names):
            hint = "" if one.match.startswith("*") else f"; globs are for whole names: try '*{one.match.rstrip('*')}*'"
            problems.append(f"{setting}: '{one.match}' matches no tensor{hint}.")
    return problems


def _gradient(anchors: Sequence[float], depth: float) -> float:
    """The straight line through equally spaced anchors, at a depth in [0, 1]."""
    place = depth * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 1)
    high = min(low + 1, len(anchors) - 1)
    return anchors[low] + (place - low) * (anchors[high] - anchors[low])
