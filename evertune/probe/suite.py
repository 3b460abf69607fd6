"""Probes: fixed sets of items, read and checked before any model is loaded. Their digest is their identity."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evertune.data.leak import ProbeText
from evertune.data.rows import Row, messages_of, read_rows
from evertune.errors import DataError, ProbeError
from evertune.hashing import digest_file, digest_json
from evertune.verifiers import validate

Kind = Literal["choice", "generate", "bits_per_byte", "lm_eval"]
ITEM_VERSION = 1
_FORMATS = {"choice": ("choice",), "generate": ("verifiable", "choice"), "bits_per_byte": ("text", "messages")}


@dataclass(frozen=True)
class ProbeItem:
    """One item.

    Attributes:
        id: unique within the probe.
        messages: the turns shown to the model; for `bits_per_byte` of answers, with the gold answer last.
        text: for `bits_per_byte` of plain text.
        choices, answer: the choices and the right index; or the expected answer of a generating probe.
        cluster: items that are not independent share one.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    text: str | None
    choices: tuple[str, ...]
    answer: Any
    cluster: str

    @property
    def prompt(self) -> str:
        """What a person sees of the item: its last user turn, or its text."""
        if self.text is not None:
            return self.text
        return next((one["content"] for one in reversed(self.messages) if one["role"] != "assistant"), "")


@dataclass(frozen=True)
class Probe:
    """A probe of our own kinds, with its items."""

    name: str
    kind: Kind
    role: str
    safety: bool
    items: tuple[ProbeItem, ...]
    verifier: Mapping[str, Any]
    normalise: str
    max_new_tokens: int
    margin: float | None
    digest: str

    @property
    def chance(self) -> float | None:
        """Score of a model that guesses, for `choice`."""
        if self.kind != "choice":
            return None
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def prompts(self) -> dict[str, str]:
        return {item.id: item.prompt for item in self.items}

    def texts(self) -> list[ProbeText]:
        """What must not occur in training data."""
        return [ProbeText(self.name, item.id, item.prompt) for item in self.items]


@dataclass(frozen=True)
class LmEvalProbe:
    """A task of lm-evaluation-harness; its items are known only when it runs."""

    name: str
    task: str
    metric: str | None
    limit: int | None
    role: str
    safety: bool
    margin: float | None
    digest: str
    kind: Kind = field(default="lm_eval", init=False)
    chance: None = field(default=None, init=False)

    def prompts(self) -> dict[str, str]:
        return {}

    def texts(self) -> list[ProbeText]:
        return []


AnyProbe = Probe | LmEvalProbe


def load_probe(name: str, *, settings: Mapping[str, Any], root: Path) -> AnyProbe:
    """Read a probe's items and check each.

    Args:
        settings: the recipe's fields of this probe, as plain values; absent ones take the schema's defaults.
        root: what paths are relative to.

    Raises:
        ProbeError: a file or an item is wrong; with file, line, what was found and what was expected.
    """
    common = {"role": settings.get("role", "guard"), "safety": settings.get("safety", False)}
    if settings.get("lm_eval") is not None:
        return _lm_eval_probe(name, settings, root, common)
    kind = settings["kind"]
    rows = _read(name, root / settings["path"], kind, settings.get("limit"))
    verifier = dict(settings.get("verifier") or {})
    items = tuple(_item(row, kind, settings.get("system"), verifier) for row in rows)
    identity = {
        "version": ITEM_VERSION,
        "kind": kind,
        "verifier": verifier,
        "normalise": settings.get("normalise", "bytes") if kind == "choice" else "",
        "max_new_tokens": settings.get("max_new_tokens", 64) if kind == "generate" else 0,
        "items": [
            [one.id, [dict(turn) for turn in one.messages], one.text, list(one.choices), one.answer, one.cluster]
            for one in items
        ],
    }
    return Probe(
        name=name,
        kind=kind,
        items=items,
        verifier=verifier,
        normalise=settings.get("normalise", "bytes"),
        max_new_tokens=settings.get("max_new_tokens", 64),
        margin=settings.get("margin"),
        digest=digest_json(identity),
        **common,
    )


def _lm_eval_probe(name: str, settings: Mapping[str, Any], root: Path, common: dict[str, Any]) -> LmEvalProbe:
    task = settings["lm_eval"]
    identity: dict[str, Any] = {"task": task, "metric": settings.get("metric"), "limit": settings.get("limit")}
    if task.endswith((".yaml", ".yml")):
        place = root / task
        if not place.is_file():
            raise ProbeError(f"probes.{name}.lm_eval: there is no task file {place}.")
        task = str(place)
        identity["task"] = digest_file(place)
        data = sorted(one for one in place.parent.iterdir() if one.name.endswith((".jsonl", ".json", ".parquet")))
        identity["data"] = [digest_file(one) for one in data]
    return LmEvalProbe(
        name=name,
        task=task,
        metric=settings.get("metric"),
        limit=settings.get("limit"),
        margin=settings.get("margin"),
        digest=digest_json(identity),
        **common,
    )


def _read(name: str, path: Path, kind: str, limit: int | None) -> list[Row]:
    """Rows in the first format that fits the first row; the error is of the format that fits best."""
    formats = _FORMATS[kind]
    last: DataError | None = None
    for one in formats:
        try:
            read_rows(path, format=one, source=name, limit=1)
        except DataError as error:
            last = last or error
            continue
        try:
            return read_rows(path, format=one, source=name, limit=limit)
        except DataError as error:
            raise ProbeError(f"probe '{name}': {error.message}", remedy=error.remedy) from error
    if last is None:
        raise AssertionError(f"probe kind {kind} has no format")
    raise ProbeError(f"probe '{name}': {last.message}", remedy=last.remedy) from last


def _item(row: Row, kind: str, system: str | None, verifier: Mapping[str, Any]) -> ProbeItem:
    value = row.value
    plain = kind == "bits_per_byte" and "messages" not in value
    messages = [] if plain else messages_of(value)
    if system is not None and messages:
        messages = [{"role": "system", "content": system}, *(one for one in messages if one["role"] != "system")]
    choices = tuple(value["choices"]) if "choices" in value else ()
    answer: Any = value.get("answer")
    if choices and isinstance(answer, str):
        answer = choices.index(answer)
    if kind == "generate":
        answer = choices[answer] if choices else answer
        validate(verifier, answer, place=row.place)
        choices = ()
    cluster = value.get("cluster")
    if cluster is not None and not isinstance(cluster, str):
        raise ProbeError(f"{row.place}: 'cluster' is {cluster!r}, expected a text.")
    return ProbeItem(
        id=row.id,
        messages=tuple(messages),
        text=value["text"] if plain else None,
        choices=choices,
        answer=answer,
        cluster=cluster or row.id,
    )
