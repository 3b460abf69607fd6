"""Probes: fixed sets of items, read and checked before any model is loaded. Their digest is their identity.

    choice           {"prompt" | "messages", "choices": [...], "answer": index or text}
    generate         {"prompt" | "messages", "answer"}, or a choice item: its right choice is the answer
    episode          {"prompt" | "messages", "environment", "answer", "state", "goal"}: see agents/
    bits_per_byte    {"text"}, or {"messages"} that end with the assistant's gold answer

Every item may have an `id` (file and line stand in for it) and a `cluster`: items that are not independent of each
other, such as questions on one passage, share one.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evertune.agents import check_task
from evertune.data.leak import ProbeText
from evertune.data.lines import values_of
from evertune.data.rows import Row, files_of, messages_of, read_rows
from evertune.errors import DataError, ProbeError, WorkspaceError
from evertune.hashing import digest_json
from evertune.model.bundled import home
from evertune.probe.task_files import require_lm_eval, task_identity
from evertune.verifiers import located, placed, validate

Kind = Literal["choice", "generate", "bits_per_byte", "episode", "lm_eval"]
# Raised by hand when the meaning of an item changes: old scores are then made anew.
ITEM_VERSION = 1


@dataclass(frozen=True)
class ProbeItem:
    """One item.

    Attributes:
        id: unique within the probe.
        messages: the turns shown to the model; for `bits_per_byte` of answers, with the gold answer last.
        text: for `bits_per_byte` of plain text; then there are no messages.
        choices: texts to choose from, for `choice`.
        answer: index of the right choice; or what a generated answer is checked against.
        task: for `episode`, the environment with its `state` and `goal`; empty for other kinds.
        cluster: items that are not independent share one; an item that stands alone has its id.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    text: str | None
    choices: tuple[str, ...]
    answer: Any
    cluster: str
    task: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What a person sees of the item: its last turn that is not the assistant's, or its text."""
        if self.text is not None:
            return self.text
        return next((one["content"] for one in reversed(self.messages) if one["role"] != "assistant"), "")


@dataclass(frozen=True)
class Probe:
    """A probe of our own kinds, with its items. `digest` covers the items and all that shapes their scores."""

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
    held_out: bool = False
    samples: int = 1
    temperature: float | None = None
    max_steps: int = 1

    @property
    def chance(self) -> float | None:
        """Score of a model that guesses, for `choice`: the mean of 1 / choices."""
        if self.kind != "choice":
            return None
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def prompts(self) -> dict[str, str]:
        """What a person sees of each item, by id."""
        return {item.id: item.prompt for item in self.items}

    def texts(self) -> list[ProbeText]:
        """What must not occur in training data."""
        return [ProbeText(self.name, item.id, item.prompt) for item in self.items]


@dataclass(frozen=True)
class LmEvalProbe:
    """A task of lm-evaluation-harness, by name or by the path of its YAML. Its items are known when it runs."""

    name: str
    task: str
    metric: str | None
    limit: int | None
    role: str
    safety: bool
    margin: float | None
    digest: str
    held_out: bool = False
    kind: Kind = field(default="lm_eval", init=False)
    chance: None = field(default=None, init=False)

    def prompts(self) -> dict[str, str]:
        """Nothing: lm-eval keeps its prompts to itself."""
        return {}

    def texts(self) -> list[ProbeText]:
        """What must not occur in training data, as lm-eval makes it from the task; read once and then kept.

        Raises:
            ProbeError: lm-eval or the task's data is not on this machine.
        """
        return [ProbeText(self.name, item, text) for item, text in _known_texts(self)]


def _known_texts(probe: LmEvalProbe) -> list[list[str]]:
    """Ids and texts of a task's items. lm-eval takes seconds to load a task, so they are kept beside the fetched models
    under what identifies the task."""
    place = home() / "lm-eval-items" / f"{probe.digest}.json"
    if place.is_file():
        with contextlib.suppress(ValueError):
            return [[str(item), str(text)] for item, text in json.loads(place.read_text(encoding="utf-8"))]
    require_lm_eval(probe.name)
    from evertune.probe.lm_eval import task_texts
    from evertune.workspace.disk import write_atomically

    found = [[item, text] for item, text in task_texts(probe)]
    with contextlib.suppress(OSError, WorkspaceError):  # where nothing can be kept, it is read each time
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(found).encode())
    return found


AnyProbe = Probe | LmEvalProbe


def load_probe(name: str, *, settings: Mapping[str, Any], root: Path) -> AnyProbe:
    """Read a probe's items and check each.

    Args:
        settings: the recipe's fields of this probe, as plain values; absent ones take the schema's defaults.
        root: what paths are relative to.

    Raises:
        ProbeError: a file or an item is wrong, with file, line, what was found and what was expected; or lm-eval is
            asked for and not installed.
    """
    if settings.get("lm_eval") is not None:
        return _lm_eval_probe(name, settings, root)
    kind = settings["kind"]
    verifier = located(settings["verifier"], root) if settings.get("verifier") else {}
    try:
        rows = _read(name, root / settings["path"], kind, settings.get("limit"))
    except DataError as error:
        raise ProbeError(f"probe '{name}': {error.message}", remedy=error.remedy) from error
    items = tuple(_item(row, kind, settings.get("system"), verifier) for row in rows)
    normalise = settings.get("normalise", "bytes")
    max_new_tokens = settings.get("max_new_tokens", 64)
    max_steps = settings.get("max_steps", 6) if kind == "episode" else 1
    samples, temperature = settings.get("samples", 1), settings.get("temperature")
    identity = {
        "version": ITEM_VERSION,
        "kind": kind,
        "verifier": verifier,
        "normalise": normalise if kind == "choice" else None,
        "max_new_tokens": max_new_tokens if kind in ("generate", "episode") else None,
        **({"max_steps": max_steps, "tasks": [dict(one.task) for one in items]} if kind == "episode" else {}),
        **({"samples": samples, "temperature": temperature} if samples > 1 else {}),
        "items": [
            [one.id, [dict(turn) for turn in one.messages], one.text, list(one.choices), one.answer, one.cluster]
            for one in items
        ],
    }
    return Probe(
        name=name,
        kind=kind,
        role=settings.get("role", "guard"),
        safety=settings.get("safety", False),
        items=items,
        verifier=placed(verifier, root.absolute()) if verifier else {},
        normalise=normalise,
        max_new_tokens=max_new_tokens,
        margin=settings.get("margin"),
        digest=digest_json(identity),
        held_out=settings.get("held_out", False),
        samples=samples,
        temperature=temperature,
        max_steps=max_steps,
    )


def _lm_eval_probe(name: str, settings: Mapping[str, Any], root: Path) -> LmEvalProbe:
    task, metric, limit = settings["lm_eval"], settings.get("metric"), settings.get("limit")
    require_lm_eval(name)
    if task.endswith((".yaml", ".yml")):
        task = str(root / task)
    return LmEvalProbe(
        name=name,
        task=task,
        metric=metric,
        limit=limit,
        role=settings.get("role", "guard"),
        safety=settings.get("safety", False),
        margin=settings.get("margin"),
        digest=digest_json({"metric": metric, "limit": limit, **task_identity(name, task)}),
        held_out=settings.get("held_out", False),
    )


def _read(name: str, path: Path, kind: str, limit: int | None) -> list[Row]:
    """Rows in the format that the fields of the first row speak for."""
    first: dict[str, Any] = next((value for file in files_of(path) for _, value in values_of(file)), {})
    format = {
        "choice": "choice",
        "generate": "choice" if "choices" in first else "verifiable",
        "episode": "verifiable",
        "bits_per_byte": "messages" if "messages" in first else "text",
    }[kind]
    return read_rows(path, format=format, source=name, limit=limit)


def _item(row: Row, kind: str, system: str | None, verifier: Mapping[str, Any]) -> ProbeItem:
    value = row.value
    text = value["text"] if row.format == "text" else None
    choices: tuple[str, ...] = tuple(value["choices"]) if row.format == "choice" else ()
    answer: Any = None if kind == "bits_per_byte" else value.get("answer")
    if choices and isinstance(answer, str):
        answer = choices.index(answer)
    if kind == "generate":
        answer = choices[answer] if choices else answer
        choices = ()
        validate(verifier, answer, place=row.place)
    if kind == "episode":
        problem = check_task(value)
        if problem:
            raise ProbeError(f"{row.place}: {problem}.", remedy="Correct the item (docs/agents.md).")
        validate(verifier, answer, place=row.place)
    cluster = value.get("cluster", row.id)
    if not isinstance(cluster, str):
        raise ProbeError(
            f"{row.place}: found {cluster!r} in 'cluster', expected a text.", remedy="Name clusters by texts."
        )
    return ProbeItem(
        id=row.id,
        messages=() if text is not None else _turns(row, system),
        text=text,
        choices=choices,
        answer=answer,
        cluster=cluster,
        task={name: value.get(name) for name in ("environment", "state", "goal")} if kind == "episode" else {},
    )


def _turns(row: Row, system: str | None) -> tuple[Mapping[str, str], ...]:
    turns = messages_of(row.value)
    if system is None:
        return tuple(turns)
    if turns[0]["role"] == "system":
        raise ProbeError(
            f"{row.place}: found a system turn in the item, and the probe sets 'system' too; expected one of them.",
            remedy="Remove 'system' from the probe, or the turn from its items.",
        )
    return ({"role": "system", "content": system}, *turns)
