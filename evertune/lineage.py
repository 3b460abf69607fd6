"""Questions to a workspace's ledger: what happened, which checkpoint carries a label, who is champion; and the two
answers a person may give: promote and roll back."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.errors import RecipeError, WorkspaceError
from evertune.hashing import digest_json
from evertune.ledger import Event, Ledger, champion, record_event, write_current
from evertune.model.checkpoint import Checkpoint, describe
from evertune.workspace import Workspace

# What rounds are told by.
MADE = ("checkpoint", "probe", "erosion", "consolidation", "look", "verdict", "rescue", "settled")
# What other commands find out about a run; it stays however the recipe is changed.
FINDINGS = ("audit", "baseline", "blame")


@dataclass(frozen=True)
class Opened:
    """A workspace with its ledger, opened to read or, under the lock, to decide."""

    workspace: Workspace
    ledger: Ledger


def open_workspace(folder: Path) -> Opened:
    """Open an existing workspace.

    Raises:
        WorkspaceError: the folder is not a workspace.
    """
    place = folder / "ledger.sqlite"
    if not place.is_file():
        raise WorkspaceError(
            f"{folder} is not a workspace: it holds no ledger.sqlite.",
            remedy="Name the folder that the recipe's 'workspace' gives.",
        )
    return Opened(Workspace.open(folder, create=False), Ledger.open(place, create=False))


def current_events(ledger: Ledger) -> list[Event]:
    """The events that tell of the last run: of several with one label (edited data), the newest stands."""
    newest: dict[tuple[Any, ...], Event] = {}
    for event in of_last_run(ledger.events()):
        body = event.body
        name = (event.kind, body.get("round"), body.get("label"), body.get("probe"), body.get("rung"))
        unique = event.kind in ("promotion", "rollback", "failure")
        newest[(*name, event.seq) if unique else name] = event
    return sorted(newest.values(), key=lambda event: event.seq)


def of_last_run(events: Sequence[Event]) -> list[Event]:
    """The events that the last run stands on: all of them, until a recipe is changed.

    The run of a changed recipe records no second time what it finds recorded. So it says in a `position` which of the
    older events it has come to; the others are history. What is newer than the last position counts.
    """
    positions = [event for event in events if event.kind == "position"]
    if not positions:
        return list(events)
    last = positions[-1]
    named = {(kind, key) for kind, key in last.body["stands_on"]}
    # What a person decided after a verdict counts where the run comes to that verdict.
    settled = {"base", *(key for kind, key in named if kind == "settled")}
    return [
        event
        for event in events
        if event.seq >= last.seq
        or (event.kind, event.key) in named
        or event.kind in FINDINGS
        or event.body.get("after") in settled
    ]


def next_position(
    events: Sequence[Event], recipe_digest: str, reached: Collection[tuple[str, str]], *, is_over: bool
) -> tuple[str, dict[str, Any]] | None:
    """Key and body of the position that a run has to record so that `of_last_run` tells of it; None where it does so.

    A run that is started again is behind what it recorded before: what is not its own is known only at its end.

    Args:
        reached: kinds and keys of the events that the run has recorded or found, in order; its own `run` among them.
    """
    told = of_last_run(events)
    known = {(event.kind, event.key) for event in told}
    positions = [event for event in events if event.kind == "position"]
    runs = [event for event in events if event.kind == "run" and (event.kind, event.key) not in reached]
    before = [event.body["recipe_digest"] for event in positions or runs]
    is_same = not before or before[-1] == recipe_digest
    is_stale = is_over and any(event.kind in MADE and (event.kind, event.key) not in reached for event in told)
    if is_same and known.issuperset(reached) and not is_stale:
        return None
    body = {"recipe_digest": recipe_digest, "stands_on": [list(one) for one in reached]}
    return digest_json({**body, "after": positions[-1].key if positions else None}), body


def checkpoint_events(ledger: Ledger) -> list[Event]:
    """Every checkpoint that was ever recorded; those that the last run stands on come last, to be preferred."""
    current = [event for event in current_events(ledger) if event.kind == "checkpoint"]
    return [*ledger.events("checkpoint"), *current]


def find_checkpoint(opened: Opened, label: str | None) -> tuple[Event, Checkpoint]:
    """The checkpoint event of a label, and its folder; the champion when no label is given.

    Raises:
        RecipeError: no checkpoint has this label.
    """
    events = checkpoint_events(opened.ledger)
    if label is None:
        now = champion(opened.ledger)
        label = str(now.body["label"]) if now else "base"
    for event in reversed(events):
        if event.body["label"] == label:
            return event, describe(checkpoint_path(opened, event))
    known = ", ".join(dict.fromkeys(event.body["label"] for event in events))
    raise RecipeError(f"no checkpoint '{label}' in {opened.workspace.root}; it has: {known}.")


def checkpoint_path(opened: Opened, event: Event) -> Path:
    """Where the checkpoint of an event lies: an object of the workspace, or the folder it came from."""
    if event.body["object"]:
        return opened.workspace.path(event.body["object"])
    return Path(event.volatile["path"])


def promote(opened: Opened, label: str, *, reason: str) -> Event:
    """Make a recorded checkpoint the champion by a person's decision."""
    return _decide(opened, "promotion", label, {"by": "user", "round": None, "reason": reason})


def roll_back(opened: Opened, label: str | None, *, reason: str) -> Event:
    """Return to an earlier champion: the named one, or the one before the present one."""
    line = [event for event in opened.ledger.events() if event.kind in ("promotion", "rollback")]
    if not line:
        raise RecipeError(f"nothing was promoted in {opened.workspace.root}: there is nothing to roll back.")
    present = str(line[-1].body["label"])
    if label is None:
        earlier = [str(event.body["label"]) for event in line if event.body["label"] != present]
        label = earlier[-1] if earlier else "base"
    return _decide(opened, "rollback", label, {"from": present, "reason": reason})


def _decide(opened: Opened, kind: str, label: str, facts: dict[str, Any]) -> Event:
    event, checkpoint = find_checkpoint(opened, label)
    settled = [one.key for one in current_events(opened.ledger) if one.kind == "settled"]
    body = {
        **facts,
        "label": label,
        "checkpoint": event.body["digest"],
        "after": settled[-1] if settled else "base",
    }
    stamp = {"time": time.time(), "path": str(checkpoint.path)}
    with opened.workspace.lock(purpose=kind):
        done = record_event(opened.workspace, opened.ledger, kind, digest_json({**body, **stamp}), body, stamp)
        write_current(opened.workspace, opened.ledger)
    return done


def log_body(opened: Opened) -> dict[str, Any]:
    """The ledger as plain values, for `evertune log --json`.

    Shape: `{"workspace", "head", "tree", "champion": {"label", "checkpoint"} | null, "rounds": [{"round", "decision",
    "label", "champion_label", "reasons", "rescue": [{"rung", "alpha", "decision"}]}], "events": [{"seq", "kind",
    "key", "hash", "time", "body"}]}`; `rounds` has one entry per judged round, in order.
    """
    events = opened.ledger.events()
    now = champion(opened.ledger)
    return {
        "workspace": str(opened.workspace.root),
        "head": opened.ledger.head(),
        "tree": opened.ledger.tree(),
        "champion": {"label": now.body["label"], "checkpoint": now.body["checkpoint"]} if now else None,
        "rounds": _rounds(current_events(opened.ledger)),
        "events": [
            {
                "seq": event.seq,
                "kind": event.kind,
                "key": event.key,
                "hash": event.hash,
                "time": event.volatile.get("time"),
                "body": event.body,
            }
            for event in events
        ],
    }


def _rounds(events: Sequence[Event]) -> list[dict[str, Any]]:
    rounds = []
    for event in events:
        if event.kind != "verdict":
            continue
        name = event.body["round"]
        rescues = [one.body for one in events if one.kind == "rescue" and one.body["round"] == name]
        rounds.append(
            {
                "round": name,
                "decision": event.body["decision"],
                "label": event.body["label"],
                "champion_label": event.body["champion_label"],
                "reasons": event.body["reasons"],
                "rescue": [{key: one[key] for key in ("rung", "alpha", "decision")} for one in rescues],
            }
        )
    return rounds
