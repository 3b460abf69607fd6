"""Children: their errors keep their names, their deaths are told, and they die with their parent."""

import multiprocessing
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evertune import process, worker
from evertune.errors import DataError, TrainingError
from evertune.workspace import Workspace
from tests.command import RECIPE


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "run", create=True)


def _job(workspace: Workspace, kind: str, **facts: Any) -> worker.Job:
    return {"kind": kind, "workspace": str(workspace.root), "label": "test", **facts}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the tests' own, performed by the real worker in a forked child."""

    def refuse(job: worker.Job, workspace: Workspace) -> dict[str, Any]:
        raise DataError("rows.jsonl:3: found nothing", remedy="Fill it.")

    def stumble(job: worker.Job, workspace: Workspace) -> dict[str, Any]:
        raise ZeroDivisionError("our own mistake")

    def die(job: worker.Job, workspace: Workspace) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def wait(job: worker.Job, workspace: Workspace) -> dict[str, Any]:
        Path(job["place"]).write_text(str(os.getpid()))
        time.sleep(60)
        return {}

    def answer(job: worker.Job, workspace: Workspace) -> dict[str, Any]:
        return {"pid": os.getpid()}

    for name, one in (("refuse", refuse), ("stumble", stumble), ("die", die), ("wait", wait), ("answer", answer)):
        monkeypatch.setitem(worker._JOBS, name, one)


def test_a_result_comes_from_another_process(workspace: Workspace, jobs: None) -> None:
    assert process.Workers(start_method="fork").run(_job(workspace, "answer"))["pid"] != os.getpid()


def test_an_error_keeps_its_name_and_its_remedy(workspace: Workspace, jobs: None) -> None:
    with pytest.raises(DataError, match="rows.jsonl:3: found nothing Fill it"):
        process.Workers(start_method="fork").run(_job(workspace, "refuse"))


def test_a_bug_travels_with_its_traceback(workspace: Workspace, jobs: None) -> None:
    with pytest.raises(process.Bug, match="ZeroDivisionError: our own mistake"):
        process.Workers(start_method="fork").run(_job(workspace, "stumble"))


def test_a_killed_child_is_told_with_its_signal(workspace: Workspace, jobs: None) -> None:
    with pytest.raises(TrainingError, match="SIGKILL.*[Mm]emory"):
        process.Workers(start_method="fork").run(_job(workspace, "die"))


def _wait_for_ever(root: str, place: str) -> None:
    process.Workers(start_method="fork").run({"kind": "wait", "workspace": root, "label": "test", "place": place})


def test_a_child_dies_with_its_parent(workspace: Workspace, jobs: None, tmp_path: Path) -> None:
    place = tmp_path / "pid"
    parent = multiprocessing.get_context("fork").Process(target=_wait_for_ever, args=(str(workspace.root), str(place)))
    parent.start()
    while not (place.exists() and place.read_text()):
        time.sleep(0.02)
    child = int(place.read_text())
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
    # And a new run does not wait for it: the worker's lock is free.
    assert workspace.recover().swept == ()


def test_threads_that_wait_do_not_spin() -> None:
    process.Workers(start_method="fork")
    assert os.environ["OMP_WAIT_POLICY"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# After one large matrix has come and gone, glibc keeps the next in its heap, where a small one stands behind it. What
# is smaller than a chunk of logits comes and goes all the time, and is not to be asked of the system each time.
_ALLOCATIONS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def filled(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place

libc.free(libc.malloc(30_000_000))
before = resident()
large, small = filled(25_000_000), filled(100_000)
libc.free(large)
kept = resident() - before
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    libc.free(filled(5_000_000))
small = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
for _ in range(10):
    for one in [filled(12_000_000) for _ in range(8)]:
        libc.free(one)
print(kept, small, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults - small)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_a_freed_matrix_leaves_no_hole_and_smaller_ones_are_used_again() -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _ALLOCATIONS]
    told = subprocess.run(
        command, env={**others, **process.ENVIRONMENT}, capture_output=True, text=True, check=True
    ).stdout
    kept, small, chunks = map(int, told.split())
    assert kept < 5_000_000
    assert small < 3 * 5_000_000 / resource.getpagesize()
    # A chunk's logits in their types, and a reference's beside them: asked of the system once, not ten times.
    assert chunks < 2 * 8 * 12_000_000 / resource.getpagesize()


@pytest.mark.path
def test_ctrl_c_at_a_terminal_ends_in_one_sentence(tmp_path: Path) -> None:
    # A terminal sends the signal to the whole process group: to the fork server too, here while it imports.
    arguments = ["evertune", "run", str(RECIPE), "--set", f"workspace={tmp_path / 'run'}"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("CI", None)
        os.execv(sys.executable, [sys.executable, "-m", *arguments])
    said = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other end is closed.
            break
        if b"scoring" in part and b"scoring" not in said:
            os.write(terminal, b"\x03")
        said += part
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert b"Stopped. What is finished is kept" in said
    assert b"Traceback" not in said
    assert code == 130


def test_a_launcher_that_fails_is_one_error_with_what_it_said(workspace: Workspace, capfd) -> None:
    """And the rest of its words are in a file, not on the terminal."""
    code = "import sys; print('first', file=sys.stderr); raise ValueError('no such option')"
    workers = process.Workers(start_method="fork", launch=f'"{sys.executable}" -c "{code}"')
    with pytest.raises(TrainingError, match="died with exit code 1") as caught:
        workers.run(_job(workspace, "sft", is_launched=True))
    log = workspace.root / process.LAUNCH_LOG
    assert "It said: 'ValueError: no such option'" in caught.value.remedy and str(log) in caught.value.remedy
    assert log.read_text().startswith("first\nTraceback")
    assert capfd.readouterr().err == ""
