"""A run as seen from another terminal: rounds, the newest scores, and how far the stage in training is. Reads only."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.display import last_line, progress
from evertune.lineage import current_events, open_workspace
from evertune.report import build_report
from evertune.workspace import Workspace

WORDS = {
    "PROMOTE": "promoted",
    "HOLD": "held",
    "INCONCLUSIVE": "inconclusive",
    "OPEN": "under way",
    "PLANNED": "to come",
    "PASSED": "passed, not promoted yet",
}
QUIET_SECONDS = 30.0


@dataclass(frozen=True)
class Snapshot:
    """What a workspace holds now. `is_over` says that no round is open or to come."""

    lines: tuple[str, ...]
    is_over: bool


def take_snapshot(folder: Path, *, now: Callable[[], float] = time.time) -> Snapshot:
    """Rounds with how each ended, the newest row of scores, and the stage that writes metrics at present.

    Raises:
        WorkspaceError: the folder is no workspace.
    """
    opened = open_workspace(folder)
    found = build_report(current_events(opened.ledger))
    lines = [f"{found.name or folder.name}: {found.sentence}", ""]
    for one in found.rounds:
        rescued = f", {len(one.rescues)} rescue{'s' * (len(one.rescues) > 1)} tried" if one.rescues else ""
        lines.append(f"  {one.name:<24} {WORDS.get(one.state, one.state)}{rescued}")
    if found.matrix.rows:
        row = found.matrix.rows[-1]
        cells = [
            f"{column.name} {cell.value:.3f}"
            for column, cell in zip(found.matrix.columns, row.cells, strict=True)
            if cell is not None
        ]
        lines += ["", f"  newest scores, {row.label}: {', '.join(cells)}"]
    training = _in_training(opened.workspace, now())
    if training:
        lines += ["", f"  in training: {training}"]
    is_over = bool(found.rounds) and all(one.state not in ("OPEN", "PLANNED", "PASSED") for one in found.rounds)
    return Snapshot(tuple(lines), is_over and not training)


def snapshots(folder: Path, *, every_seconds: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[Snapshot]:
    """A snapshot now and then, until the last round is over."""
    while True:
        found = take_snapshot(folder)
        yield found
        if found.is_over:
            return
        sleep(every_seconds)


def _in_training(workspace: Workspace, now: float) -> str:
    """The newest metrics of a stage that is not finished, written in the last half minute; "" where there are none."""
    files = [one for one in workspace.work.glob("*/metrics.jsonl") if workspace.manifest(one.parent.name) is None]
    newest = max(files, key=lambda one: one.stat().st_mtime, default=None)
    if newest is None or now - newest.stat().st_mtime > QUIET_SECONDS:
        return ""
    state: dict[str, Any] | None = last_line(newest)
    return progress(state, now - newest.parent.stat().st_ctime) if state is not None else ""
