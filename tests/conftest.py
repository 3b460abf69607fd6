"""Shared fixtures: quiet, offline, two threads at most, and the tiny model made once a session."""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from pathlib import Path

import pytest
from hypothesis import settings

from tests.command import RECIPE, DebugRun, evertune
from tests.tiny import write_tiny_model

# A shell that starts the tests in the background has told them, and what they start, to ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Elsewhere property tests look at new cases each time; CI repeats its own, so that a red build is about the change.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only tiny ChatML model folder."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory) -> DebugRun:
    """The debug recipe, run once through the command line. Copy the workspace before changing it."""
    workspace = tmp_path_factory.mktemp("path") / "run"
    return DebugRun(workspace, evertune("run", RECIPE, "--set", f"workspace={workspace}"))
