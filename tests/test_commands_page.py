"""docs/commands.md names every command, and every field that `--json` prints."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from evertune.cli import app
from tests.command import RECIPE, DebugRun, evertune

PAGE = (Path(__file__).parent.parent / "docs" / "commands.md").read_text(encoding="utf-8")


def _commands(group: Any, above: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{above}{name} ")
        else:
            yield above + name


def test_every_command_is_on_the_page() -> None:
    commands = list(_commands(typer.main.get_group(app)))
    assert "model get" in commands
    assert [name for name in commands if f"`{name} " not in PAGE and f"`{name}`" not in PAGE] == []


def _documented(section: str) -> set[str]:
    text = PAGE[PAGE.index(f"\n### {section}\n") :]
    end = re.search(r"\n#{2,3} ", text[4:])
    return set(re.findall(r'"([a-z_0-9]+)"', text[: end.start() + 4] if end else text))


@pytest.mark.path
@pytest.mark.parametrize("command", ["check", "log", "show", "verify"])
def test_every_field_of_the_json_is_on_the_page(command: str, debug_run: DebugRun) -> None:
    body = json.loads(evertune(command, RECIPE if command == "check" else debug_run.workspace, "--json"))
    undocumented = set(body) - _documented(command)
    assert undocumented == set()
    for name in ("findings", "stages", "rounds", "events", "problems"):
        for one in body.get(name, ()):
            assert set(one) - _documented(command) == set(), name


@pytest.mark.path
def test_every_field_of_a_verdict_is_on_the_page(debug_run: DebugRun, tmp_path: Path) -> None:
    objects = {
        one["body"]["label"]: one["body"]
        for one in json.loads(evertune("log", debug_run.workspace, "--json"))["events"]
        if one["kind"] == "checkpoint"
    }
    folder = debug_run.workspace / "objects" / objects["one/1-sft"]["object"]
    arguments = ("--against", folder, "--probes", RECIPE, "--workspace", tmp_path / "gate", "--json")
    body = json.loads(evertune("gate", folder, *arguments, code=4))
    assert set(body) - _documented("gate") == set()
    assert body["decision"] == "INCONCLUSIVE"  # a model against itself gains nothing on a target
    for flips in body["flips"].values():
        assert flips == []
