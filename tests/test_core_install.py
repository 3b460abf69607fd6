"""An install without any extra works, and imports nothing of the annex: extras are hidden from every process."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "debug.yaml"
# Distributions whose module is not their name.
MODULES = {
    "lm-eval": "lm_eval",
    "mlflow-skinny": "mlflow",
    "liger-kernel": "liger_kernel",
    "dp-accounting": "dp_accounting",
}
# Extras that are for tests and tools, not for a feature, and pull in what the core needs as well.
NOT_FEATURES = {"dev"}

# Loaded by every Python process, children of the fork server included: what an extra brings cannot be found, and what
# is imported of the annex is written down when the process ends.
HOOK = """
import atexit, os, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in os.environ["HIDDEN"].split() else find(name, path, target)

def tell():
    annex = sorted(name for name in sys.modules if name.startswith(("evertune.academic", "evertune.flower")))
    if annex:
        with open(os.environ["ANNEX"], "a") as file:
            file.write(" ".join(annex) + "\\n")

PathFinder.find_spec = staticmethod(find_others)
atexit.register(tell)
"""


def _hidden() -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [
        re.split(r"[\[<>=~]", one)[0] for extra, all_ in extras.items() if extra not in NOT_FEATURES for one in all_
    ]
    return sorted({MODULES.get(name, name.replace("-", "_")) for name in names})


def _run(tmp_path: Path, *arguments: str | Path) -> tuple[str, str]:
    """What the command printed, and the modules of the annex that were imported in any process."""
    (tmp_path / "hook").mkdir(exist_ok=True)
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "annex.txt"
    log.touch()
    path = os.pathsep.join([str(tmp_path / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "HIDDEN": " ".join(_hidden()), "ANNEX": str(log), "CI": "1"}
    command = [sys.executable, "-m", "evertune", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, log.read_text()


def test_the_extras_are_hidden_and_the_annex_is_seen(tmp_path: Path) -> None:
    assert {"flwr", "dp_accounting", "lm_eval", "cma", "ray"} <= set(_hidden())
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    env = {**os.environ, "HIDDEN": "wave", "ANNEX": str(tmp_path / "annex.txt")}
    path = os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])
    code = "import evertune.academic\ntry: import wave\nexcept ImportError: print('hidden')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "hidden\n"
    assert (tmp_path / "annex.txt").read_text() == "evertune.academic\n"


def test_a_core_install_checks_a_recipe_and_lists_all_methods(tmp_path: Path) -> None:
    printed, annex = _run(tmp_path, "check", RECIPE, "--set", f"workspace={tmp_path / 'run'}")
    assert "debug.yaml: fine" in printed
    printed, _ = _run(tmp_path, "methods", "--standing", "academic")
    assert "ewc" in printed
    assert annex == ""


@pytest.mark.path
def test_a_core_install_runs_a_recipe(tmp_path: Path) -> None:
    _, annex = _run(tmp_path, "run", RECIPE, "--quiet", "--set", f"workspace={tmp_path / 'run'}")
    assert annex == ""
    assert (tmp_path / "run" / "report.html").is_file()
