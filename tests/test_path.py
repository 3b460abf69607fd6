"""The whole line on a tiny model, through the command line as a user runs it."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command import RECIPE, RECIPES, DebugRun, evertune


def _json(*arguments: str | Path) -> Any:
    return json.loads(evertune(*arguments, "--json"))


@pytest.fixture(scope="module")
def finished(debug_run: DebugRun) -> tuple[Path, str]:
    """A workspace in which the debug recipe has run, and what the run printed."""
    return debug_run.workspace, debug_run.printed


pytestmark = pytest.mark.path


def test_check_passes_and_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "evertune", "check", str(RECIPE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "transformers", "accelerate", "peft"}


def test_the_run_prints_the_matrix_and_a_verdict_per_round(finished: tuple[Path, str]) -> None:
    _, printed = finished
    for label in ("base", "one/1-sft", "two/1-sft", "three/1-sft"):
        assert label in printed
    for decision in ("PROMOTE  one/1-sft", "INCONCLUSIVE  two/1-sft", "PROMOTE  three/1-sft"):
        assert decision in printed
    assert "report:" in printed


def test_the_ledger_tells_the_whole_story(finished: tuple[Path, str]) -> None:
    body = _json("log", finished[0])
    kinds = [event["kind"] for event in body["events"]]
    assert kinds[0] == "run"
    assert kinds.count("verdict") == 3
    assert kinds.count("promotion") == 2
    assert [one["round"] for one in body["rounds"]] == ["one", "two", "three"]
    assert {event["body"]["label"] for event in body["events"] if event["kind"] == "checkpoint"} >= {
        "base",
        "one/1-sft",
    }


def test_an_unchanged_rerun_trains_nothing(finished: tuple[Path, str]) -> None:
    workspace, _ = finished
    before = _json("log", workspace)["head"]
    began = time.monotonic()
    printed = evertune("run", RECIPE, "--set", f"workspace={workspace}")
    assert "0 stages trained, 0 probes scored" in printed
    assert _json("log", workspace)["head"] == before
    # No bound on wall time is asserted; the figure is printed for a reader of the log.
    sys.stderr.write(f"unchanged rerun: {time.monotonic() - began:.1f} s\n")


def test_an_unchanged_rerun_imports_no_torch_in_any_process(finished: tuple[Path, str]) -> None:
    # Children inherit -X importtime and write to the same place.
    command = [sys.executable, "-X", "importtime", "-m", "evertune", "run", str(RECIPE)]
    done = subprocess.run(
        [*command, "--set", f"workspace={finished[0]}"], capture_output=True, text=True, timeout=60, check=True
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "evertune.run" in imported
    assert not imported & {"torch", "transformers", "accelerate", "peft"}


def test_a_changed_last_round_runs_that_round_only(finished: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    workspace = tmp_path / "copy"
    shutil.copytree(finished[0], workspace)
    changed = ("--set", f"workspace={workspace}", "--set", "rounds[2].stages[0].sft.lr=0.011")
    assert "1 stages trained" in evertune("run", RECIPE, *changed)


def test_a_changed_margin_of_one_probe_is_judged_anew(finished: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    workspace = tmp_path / "copy"
    shutil.copytree(finished[0], workspace)
    printed = evertune("run", RECIPE, "--set", f"workspace={workspace}", "--set", "probes.knowledge.margin=0.6")
    assert "0 stages trained, 0 probes scored" in printed
    verdicts = [event["body"] for event in _json("log", workspace)["events"] if event["kind"] == "verdict"]
    margins = [one["margin"] for body in verdicts for one in body["probes"] if one["probe"] == "knowledge"]
    assert margins.count(0.5) == margins.count(0.6) > 0


def test_verify_is_clean_and_names_an_altered_file(finished: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    workspace = tmp_path / "copy"
    shutil.copytree(finished[0], workspace)
    assert _json("verify", workspace)["clean"] is True
    weights = next(workspace.glob("objects/*/model.safetensors"))
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights.name in evertune("verify", workspace, code=5)


def test_show_says_what_to_deploy(finished: tuple[Path, str]) -> None:
    body = _json("show", finished[0])
    assert body["label"]
    assert body["digest"]
    assert "deploy" in body


def test_export_writes_a_model_that_opens(finished: tuple[Path, str], tmp_path: Path) -> None:
    evertune("export", finished[0], "one/1-sft", "--out", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "model" / "README.md").read_text().startswith("---")


def test_rollback_and_promote_move_the_champion(finished: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    workspace = tmp_path / "copy"
    shutil.copytree(finished[0], workspace)
    evertune("promote", workspace, "one/1-sft", "--reason", "tried by hand")
    assert _json("log", workspace)["champion"]["label"] == "one/1-sft"
    evertune("rollback", workspace, "base", "--reason", "and back")
    assert _json("log", workspace)["champion"]["label"] == "base"
    assert _json("verify", workspace)["clean"] is True


def test_report_is_one_file_without_a_script(finished: tuple[Path, str], tmp_path: Path) -> None:
    evertune("report", finished[0], "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "<script" not in page
    assert "two/1-sft" in page


def test_every_shipped_recipe_passes_check() -> None:
    for recipe in sorted(RECIPES.glob("*.yaml")):
        if "data/" not in recipe.read_text() or (RECIPES / "data").exists():
            evertune("check", recipe)


def test_other_versions_make_results_anew_only_where_the_recipe_is_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evertune import plan
    from evertune.recipe.load import load_recipe

    def keys(policy: str) -> tuple[str, str]:
        overrides = [f"workspace={tmp_path}", f"numerics.versions={policy}"]
        made = plan.make_plan(load_recipe(RECIPE, overrides=overrides))
        return made.keyed("0" * 64), made.probe_key(made.base, made.probes[0])

    recorded, strict = keys("recorded"), keys("strict")
    assert recorded[0] == "0" * 64
    versions = plan.package_versions()
    monkeypatch.setattr(plan, "package_versions", lambda: {**versions, "torch": "0.0"})
    assert keys("recorded") == recorded
    assert all(one != other for one, other in zip(keys("strict"), strict, strict=True))


def test_a_strict_run_goes_through_and_again_does_nothing(tmp_path: Path) -> None:
    arguments = ("run", RECIPE, "--set", f"workspace={tmp_path / 'run'}", "--set", "numerics.versions=strict")
    assert "3 stages trained" in evertune(*arguments)
    assert "0 stages trained, 0 probes scored" in evertune(*arguments)


def test_the_ledger_names_versions_and_commit(finished: tuple[Path, str]) -> None:
    import importlib.metadata

    run = next(event["body"] for event in _json("log", finished[0])["events"] if event["kind"] == "run")
    assert run["versions"]["torch"] == importlib.metadata.version("torch")
    # This checkout is installed as it lies (make test), so its commit is known.
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RECIPES, capture_output=True, text=True, check=True)
    assert run["commit"] == head.stdout.strip()
