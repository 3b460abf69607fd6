"""The command line as a user runs it: a process of its own, its output, its exit code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE = RECIPES / "debug.yaml"


class DebugRun(NamedTuple):
    """A workspace in which the debug recipe has run, and what the run printed."""

    workspace: Path
    printed: str


def evertune(*arguments: str | Path, code: int = 0) -> str:
    """Run the command; returns what it printed. No traceback may appear, whatever the exit code."""
    command = [sys.executable, "-m", "evertune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "CI": "1"})
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr
