"""A small run of the workspace and the ledger alone, to be killed at every step: `python -m tests.pipeline FOLDER`.

Three stages, each with a resume point, an object of two files and an event; then a promotion and `current.json`.
Exit code 0; 5 after an `EvertuneError`, whose message is printed.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from evertune.errors import EvertuneError
from evertune.hashing import digest_json
from evertune.ledger import Ledger, adopt_orphans, record_event, verify_workspace, write_current
from evertune.workspace import Workspace, verify_folder

STAGES = 3


def run(folder: Path) -> None:
    """Do what is missing."""
    workspace = Workspace.open(folder, create=True)
    with workspace.lock(purpose="test"):
        workspace.recover()
        ledger = Ledger.open(folder / "ledger.sqlite", create=True)
        adopt_orphans(workspace, ledger)
        _record(workspace, ledger, "run", {"name": "test"})
        for stage in range(STAGES):
            key = digest_json({"stage": stage})
            _resume_point(workspace, key, stage)
            workspace.publish(kind="checkpoint", key=key, record={"stage": stage}, write=partial(_write, stage=stage))
            _record(workspace, ledger, "checkpoint", {"label": f"{stage}", "digest": key[:8], "object": key})
        _record(workspace, ledger, "promotion", {"label": "2", "checkpoint": digest_json({"stage": 2})[:8]})
        write_current(workspace, ledger)


def facts(folder: Path) -> dict[str, Any]:
    """What every finished run must agree in; asserts that it is whole and that nothing is left over."""
    workspace = Workspace.open(folder, create=False)
    ledger = Ledger.open(folder / "ledger.sqlite", create=False)
    assert verify_workspace(workspace, ledger) == []
    assert list(workspace.tmp.iterdir()) == []
    assert list(workspace.quarantine.iterdir()) == []
    points = sorted(workspace.work.glob("*/*"))
    assert len(points) == STAGES
    assert not [problem for point in points for problem in verify_folder(point)]
    return {
        "tree": ledger.tree(),
        "kinds": [(event.seq, event.kind, event.key) for event in ledger.events()],
        "objects": {one.key: one.tree for one in workspace.manifests()},
        "files": sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()),
    }


def _record(workspace: Workspace, ledger: Ledger, kind: str, body: dict[str, Any]) -> None:
    record_event(workspace, ledger, kind, digest_json(body), body, {"time": time.time()})


def _resume_point(workspace: Workspace, key: str, stage: int) -> None:
    place = workspace.work / key / "step-000001"
    if not place.exists():
        workspace.publish_folder(place, record={"step": 1}, write=partial(_write, stage=stage))


def _write(folder: Path, stage: int) -> None:
    (folder / "weights.bin").write_bytes(bytes([stage]) * 5000)
    (folder / "deep").mkdir()
    (folder / "deep" / "notes.txt").write_text(f"stage {stage}")


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except EvertuneError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}")
        sys.exit(5)
