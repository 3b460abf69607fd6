"""A job on several processes, as a launcher would start it, without paying for the imports each time."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evertune import worker
from evertune.train.sink import Metrics, from_lines
from evertune.workspace import Workspace

SECONDS = 240

Before = Callable[[], None]


def perform_on(
    count: int, kind: str, spec: Any, workspace: Workspace, folder: Path, *, before: Before | None = None
) -> dict[str, Any]:
    """What the main process answers: `{"result": ...}` or `{"error": ...}`.

    Args:
        before: called in each process before the job; a function of a module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "job.json"
    place.write_text(json.dumps({"kind": kind, "workspace": str(workspace.root), "spec": spec.to_json()}))
    answer = place.with_suffix(".result.json")
    answer.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evertune.preload"])
    port = _free_port()
    children = [
        context.Process(target=_perform, args=(rank, count, port, str(place), before), daemon=True)
        for rank in range(count)
    ]
    for one in children:
        one.start()
    children[0].join(SECONDS)
    for one in children[1:]:
        # As a launcher does: where the main process has failed, nobody waits for it in vain.
        one.join(0 if children[0].exitcode else 30)
        if one.is_alive():
            one.kill()
    assert answer.exists(), f"no answer; exit codes {[one.exitcode for one in children]}"
    found: dict[str, Any] = json.loads(answer.read_bytes())
    return found


def published_curve(workspace: Workspace, spec: Any) -> list[Metrics]:
    """The metrics of every step, as the published checkpoint holds them."""
    return from_lines((workspace.path(spec.key) / "metrics.jsonl").read_bytes())


def _perform(rank: int, count: int, port: int, place: str, before: Before | None) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if before is not None:
        before()
    os._exit(worker.main(place))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
