"""Item scores out of logs that other tools wrote: what a log says of a task, and whether two logs may be compared.

A reader of a format (`lm_eval_logs.py`, `inspect_logs.py`) gives `LoggedTask`s; `pair_logs` refuses two sides that were
not measured alike and says what differs, then makes the `ItemScores` that the gate reads.
"""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from evertune.errors import ProbeError
from evertune.hashing import digest_json
from evertune.probe.scores import ItemScores

DIFFERENCES_SHOWN = 3
SHOWN_CHARACTERS = 60
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LoggedItem:
    """One scored item of a log.

    Attributes:
        id: of the item, unique within the task; each sample of an item has its own.
        asked: what must be the same on both sides, by name: `prompt`, `target`, or digests of them.
        score: finite, in the metric's unit.
        prompt, prediction, expected: what a person is shown; half a surrogate pair, which JSON can hold and no file
            in UTF-8 can, is shown as U+FFFD.
        cluster: items that are not independent share one.
    """

    id: str
    asked: Mapping[str, Any]
    score: float
    prompt: str
    prediction: str
    expected: str
    cluster: str

    def __post_init__(self) -> None:
        for name in ("prompt", "prediction", "expected"):
            object.__setattr__(self, name, _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", getattr(self, name)))


@dataclass(frozen=True)
class LoggedTask:
    """A task of a log: its settings that must agree between two sides, and its items.

    `samples` is how many samples each item has; they follow each other.
    """

    name: str
    place: str
    direction: Literal["higher", "lower"]
    settings: Mapping[str, Any]
    items: tuple[LoggedItem, ...]
    samples: int = 1


class PairedLogs(NamedTuple):
    """Both sides by task, and the prompts by task and item."""

    before: dict[str, ItemScores]
    after: dict[str, ItemScores]
    prompts: dict[str, dict[str, str]]


def pair_logs(old: Mapping[str, LoggedTask], new: Mapping[str, LoggedTask], *, kind: str) -> PairedLogs:
    """The item scores of two logs, after every check that they are of the same items asked in the same way.

    Args:
        kind: where they come from, as the evidence names it.

    Raises:
        ProbeError: the sides differ in tasks, settings, items or prompts; every kind of difference is named.
    """
    differences = _task_differences(old, new)
    for name in sorted(set(old) & set(new)):
        differences += [f"{name}: {one}" for one in _differences(old[name], new[name])]
    if differences:
        lines = "\n".join(f"  {one}" for one in differences)
        raise ProbeError(
            f"the two sides were not measured alike, so their difference says nothing of the models:\n{lines}\n",
            remedy="Run both with the same tasks, limits, few-shot examples and chat template.",
        )
    prompts = {name: {item.id: item.prompt for item in task.items} for name, task in new.items()}
    digests = {name: _digest(task) for name, task in new.items()}
    sides = [
        {name: _scores(side[name], items_digest=digests[name], kind=kind) for name in sorted(side)}
        for side in (old, new)
    ]
    return PairedLogs(before=sides[0], after=sides[1], prompts=prompts)


def _digest(task: LoggedTask) -> str:
    """Identity of a task's items and of how they were asked."""
    try:
        return digest_json([[item.id, dict(item.asked)] for item in task.items])
    except UnicodeEncodeError as error:
        raise ProbeError(
            f"{task.place}: task '{task.name}' has an id or a prompt with half of a surrogate pair, "
            "\\ud800 to \\udfff, which is no character.",
            remedy="Correct the items and ask them again.",
        ) from error


def settings_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per setting that differs; of two long texts, the first place where they part."""
    return [
        f"{name}: {_both(old.get(name), new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _task_differences(old: Mapping[str, LoggedTask], new: Mapping[str, LoggedTask]) -> list[str]:
    found = []
    for side, mine, other in (("old", old, new), ("new", new, old)):
        alone = sorted(set(mine) - set(other))
        if alone:
            found.append(f"tasks only on the {side} side: {', '.join(alone)}")
    return found


def _differences(old: LoggedTask, new: LoggedTask) -> list[str]:
    found = settings_differences(old.settings, new.settings)
    if old.direction != new.direction:
        found.append(f"direction of the metric: {_both(old.direction, new.direction)}")
    if old.samples != new.samples:
        found.append(f"samples of each item: {_both(old.samples, new.samples)}")
        return found
    before, after = ({item.id: item for item in task.items} for task in (old, new))
    for side, mine, other in (("old", before, after), ("new", after, before)):
        alone = [name for name in mine if name not in other]
        if alone:
            found.append(f"{len(alone)} items only on the {side} side: {_listed(alone)}")
    names = dict.fromkeys(name for item in old.items for name in item.asked)
    for name in names:
        changed = [one for one in before if one in after and before[one].asked.get(name) != after[one].asked.get(name)]
        if changed:
            first = changed[0]
            parted = _both(before[first].asked.get(name), after[first].asked.get(name))
            found.append(f"{name} of {len(changed)} of {len(before)} items, first of item {first!r}: {parted}")
    clusters = [one for one in before if one in after and before[one].cluster != after[one].cluster]
    if clusters:
        found.append(f"cluster of {len(clusters)} items, first of item {clusters[0]!r}")
    return found


def _scores(task: LoggedTask, *, items_digest: str, kind: str) -> ItemScores:
    repeated = [name for name, count in Counter(item.id for item in task.items).items() if count > 1]
    if repeated:
        raise ProbeError(f"{task.place}: item {repeated[0]!r} of task '{task.name}' stands twice.")
    items = sorted(task.items, key=lambda item: _natural(item.id))
    return ItemScores(
        probe=task.name,
        kind=kind,
        direction=task.direction,
        ids=tuple(item.id for item in items),
        score=[item.score for item in items],  # type: ignore[arg-type]
        cluster=tuple(item.cluster for item in items),
        prediction=tuple(item.prediction for item in items),
        expected=tuple(item.expected for item in items),
        items_digest=items_digest,
        template_digest=digest_json(dict(task.settings)),
        samples=task.samples,
    )


def _natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which 10 stands after 9."""
    parts = "".join(char if char.isdigit() else f"\0{char}\0" for char in text).split("\0")
    return tuple((0, int(one), "") if one.isdigit() else (1, 0, one) for one in parts if one)


def _both(old: Any, new: Any) -> str:
    """The two values; where long texts differ, what stands around the first difference."""
    if isinstance(old, str) and isinstance(new, str) and max(len(old), len(new)) > SHOWN_CHARACTERS:
        begin = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        begin = max(0, begin - 15)
        old, new = (f"...{text[begin : begin + SHOWN_CHARACTERS]}..." for text in (old, new))
    return f"{old!r} on the old side, {new!r} on the new"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(one) for one in names[:DIFFERENCES_SHOWN])
    return shown if len(names) <= DIFFERENCES_SHOWN else f"{shown} and {len(names) - DIFFERENCES_SHOWN} more"


def closest(name: str, known: Sequence[str]) -> str:
    """`Did you mean ...?` for a name that is not among the known ones, or the known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"There is: {', '.join(known)}."
