"""Child processes for heavy work: one per job, forked from a server that has imported torch once.

The parent never imports torch. A child that runs out of memory or crashes is an error with a name, not the end of the
run; a child whose parent dies kills itself, so that no orphan writes into a workspace that a new run has taken over.
"""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from evertune import errors, worker
from evertune.hashing import canonical_json

PRELOAD = "evertune.preload"
# In the workspace: what the launcher and its processes have said in the last stage.
LAUNCH_LOG = "launch.log"
STOP_SECONDS = 60.0
ENVIRONMENT = {
    # Waiting OpenMP threads sleep instead of spinning: up to ten times less CPU on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    # glibc gives a freed chunk of logits back to the system instead of keeping a hole that only smaller ones fit; the
    # second is what it keeps at the heap's end, by itself next to nothing once the first is set: what a chunk of logits
    # and a reference's beside it need, which would otherwise be given back, asked for and cleared for every chunk.
    "MALLOC_MMAP_THRESHOLD_": "15000000",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "TOKENIZERS_PARALLELISM": "false",
    # Nothing leaves the machine.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_MODE": "offline",
    "TRACKIO_DISABLE_TELEMETRY": "1",
}


class Bug(Exception):
    """An unexpected exception in a child, with its traceback: exit code 1."""


class Workers:
    """Starts one child per job.

    Args:
        start_method: `forkserver`, or `fork` when this process has already imported torch and run nothing with it.
        launch: command put before `-m evertune.worker` for training jobs, such as `torchrun --nproc-per-node 2`.
    """

    def __init__(self, *, start_method: str = "forkserver", launch: str | None = None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload([PRELOAD])
        self._launch = launch

    def run(self, job: worker.Job, *, watch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Perform a job in a child and return its result; `watch` is called about twice a second.

        Raises:
            EvertuneError: the error the child raised, with its message.
            TrainingError: the child died without a word (out of memory, a crash).
            Bug: the child raised anything else.
            KeyboardInterrupt: after the child has had time to save where it is.
        """
        if self._launch and job.get("is_launched"):
            answer = self._run_launched(job, watch)
        else:
            answer = self._run_child(job, watch)
        if "error" in answer:
            raise _raise_again(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _run_child(self, job: worker.Job, watch: Callable[[], None]) -> dict[str, Any]:
        if self._context.get_start_method() == "forkserver":
            _start_server()
        ours, theirs = self._context.Pipe()
        # A forked child holds a copy of our end and must close it to see us die; a served one never gets it.
        inherited = ours if self._context.get_start_method() == "fork" else None
        child = self._context.Process(target=_child, args=(job, theirs, inherited), name=f"evertune-{job['kind']}")
        child.start()
        theirs.close()
        try:
            while not ours.poll(0.5):
                watch()
                if not child.is_alive() and not ours.poll(0):
                    raise _died(job, child.exitcode)
            answer: dict[str, Any] = ours.recv()
        except EOFError:
            child.join(5)
            raise _died(job, child.exitcode) from None
        except KeyboardInterrupt:
            _stop(child)
            raise
        child.join()
        if answer.get("interrupted"):
            raise KeyboardInterrupt
        return answer

    def _run_launched(self, job: worker.Job, watch: Callable[[], None]) -> dict[str, Any]:
        place = Path(job["workspace"]) / "tmp" / f"job-{uuid.uuid4().hex}.json"
        place.write_bytes(canonical_json(job))
        command = [*shlex.split(self._launch or ""), "-m", "evertune.worker", str(place)]
        if command[0] == "-m":
            command = [sys.executable, *command]
        # What is installed beside this Python comes first: it need not be activated.
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        command[0] = shutil.which(command[0], path=places) or command[0]
        # Launchers say much, and after an error of ours a traceback of theirs: it is kept for when it is needed.
        log = Path(job["workspace"]) / LAUNCH_LOG
        try:
            with log.open("wb") as output:
                child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise errors.RecipeError(
                f"launch: cannot start {command[0]!r}: {error.strerror}.", remedy="Install it or change 'launch'."
            ) from error
        try:
            while child.poll() is None:
                watch()
                time.sleep(0.5)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait(STOP_SECONDS)
            raise
        answer_place = place.with_suffix(".result.json")
        if not answer_place.exists():
            raise _died(job, child.returncode, log=log)
        answer: dict[str, Any] = json.loads(answer_place.read_bytes())
        return answer


def _start_server() -> None:
    """Start the fork server, unless it runs, deaf to Ctrl-C: a terminal sends it to every process, and the server would
    die of it with a traceback while it imports. Its children listen again, see `_child`."""
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _child(job: worker.Job, pipe: Connection, inherited: Connection | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if inherited is not None:
        inherited.close()
    # The parent never sends: a receive that returns means that it is gone.
    threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    try:
        answer: dict[str, Any] = {"result": worker.perform(job)}
    except KeyboardInterrupt:
        answer = {"interrupted": True}
    except BaseException as error:
        answer = {"error": worker.report_error(error)}
    pipe.send(answer)


def _die_with_parent(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


def _stop(child: Any) -> None:
    """Let an interrupted child save its resume point; then end it."""
    if child.is_alive() and child.pid:
        os.kill(child.pid, signal.SIGINT)
    child.join(STOP_SECONDS)
    if child.is_alive():
        child.kill()
        child.join()


def _died(job: worker.Job, code: int | None, *, log: Path | None = None) -> errors.TrainingError:
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    hint = "Out of memory is the usual cause: lower micro_batch_rows. " if code == -signal.SIGKILL else ""
    if log is not None:
        hint += f"It said: {_complaint(log)!r}; all of it is in {log}. "
    return errors.TrainingError(
        f"the process of job '{job['kind']}' ({job.get('label', '')}) died with {how}.",
        remedy=f"{hint}The same command goes on from the last resume point.",
    )


def _complaint(log: Path) -> str:
    """The last line that names an error, or else the last one."""
    lines = [one.strip() for one in log.read_text(encoding="utf-8", errors="replace").splitlines() if one.strip()]
    named = [one for one in lines if re.match(r"[\w.]*(Error|Exception)\b", one) and "ChildFailedError" not in one]
    return (named or lines or ["nothing"])[-1]


def _raise_again(error: dict[str, Any]) -> Exception:
    if error["type"] == "bug":
        return Bug(error["traceback"])
    kind: type[errors.EvertuneError] = getattr(errors, error["type"])
    return kind(error["message"], remedy=error["remedy"])
