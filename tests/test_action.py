"""The CI action's own script, run by bash as a runner does, on real logs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.logs import write_lm_eval
from tests.test_gate import FACTS, flipped

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "actions" / "gate" / "action.yml").read_text())


def act(folder: Path, arguments: str, **inputs: str) -> tuple[int, str, str]:
    """Exit code, outputs and summary of the action's judging step."""
    (step,) = [one for one in ACTION["runs"]["steps"] if one.get("id") == "gate"]
    # `evertune` on the path is this checkout's.
    (folder / "bin").mkdir(exist_ok=True)
    command = folder / "bin" / "evertune"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m evertune "$@"\n')
    command.chmod(0o755)
    values = {name: one.get("default", "") for name, one in ACTION["inputs"].items()} | inputs
    values["arguments"] = arguments
    env = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB")}
    for name, expression in step["env"].items():
        env[name] = values[expression.removeprefix("${{ inputs.").removesuffix(" }}")]
    env |= {"PATH": f"{folder / 'bin'}:{env['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {name: str(folder / name) for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    outputs, summary = folder / "GITHUB_OUTPUT", folder / "GITHUB_STEP_SUMMARY"
    return (
        done.returncode,
        outputs.read_text() if outputs.exists() else done.stderr,
        summary.read_text() if summary.exists() else "",
    )


@pytest.mark.parametrize(
    ("lost", "more", "inconclusive", "code", "decision"),
    [
        (40, "", "fail", 2, "HOLD"),
        (0, "", "fail", 0, "PROMOTE"),
        (0, "--set gate.min_items=301", "pass", 0, "INCONCLUSIVE"),
        (0, "--set gate.min_items=301", "fail", 4, "INCONCLUSIVE"),
    ],
)
def test_the_job_ends_as_the_verdict_says(
    tmp_path: Path, lost: int, more: str, inconclusive: str, code: int, decision: str
) -> None:
    write_lm_eval(tmp_path / "old", FACTS.astype(float))
    write_lm_eval(tmp_path / "new", flipped(FACTS, lost).astype(float))
    done = act(tmp_path, f"--from-lm-eval old new --set gate.min_items=201 {more}", inconclusive=inconclusive)
    assert done[0] == code
    assert f"decision={decision}\n" in done[1]
    assert done[2].startswith(f"## {decision}: ")
    assert (tmp_path / "gate-result" / "gate.json").is_file()


def test_wrong_input_is_no_verdict(tmp_path: Path) -> None:
    code, said, summary = act(tmp_path, "--from-lm-eval nothing here", inconclusive="pass")
    assert (code, summary) == (3, "")
    assert "nothing does not exist" in said
