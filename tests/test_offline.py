"""Nothing leaves the machine: every connection a run attempts, in any of its processes, is counted by an audit hook."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parent.parent / "recipes" / "debug.yaml"

# Loaded by every Python process of the run, children of the fork server included.
HOOK = """
import os, socket, sys

def _watch(event, args):
    if event in ("socket.connect", "socket.sendto") and getattr(args[0], "family", None) != socket.AF_UNIX:
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{event} {args[1:]!r}\\n")
    if event == "socket.getaddrinfo":
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{event} {args[0]!r}\\n")

sys.addaudithook(_watch)
"""


def _connections(tmp_path: Path, command: list[str]) -> list[str]:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "connections.txt"
    log.touch()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env = {**keep, "PYTHONPATH": str(tmp_path / "hook"), "CONNECTIONS": str(log), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], env=env, check=True, capture_output=True, timeout=240)
    return log.read_text().splitlines()


def test_the_counter_sees_a_connection(tmp_path: Path) -> None:
    attempt = (
        "import socket; s = socket.socket(); s.settimeout(1)\ntry: s.connect(('127.0.0.1', 9))\nexcept OSError: pass"
    )
    assert len(_connections(tmp_path, ["-c", attempt])) == 1


@pytest.mark.path
def test_a_whole_run_opens_no_connection(tmp_path: Path) -> None:
    command = ["-m", "evertune", "run", str(RECIPE), "--quiet", "--set", f"workspace={tmp_path / 'run'}"]
    assert _connections(tmp_path, command) == []
