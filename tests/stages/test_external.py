"""Another trainer's command: its result is a checkpoint like any, its failure an error with its last words."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evertune.check import check_recipe
from evertune.errors import CheckpointError, DataError, RecipeError, TrainingError
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Place, external
from evertune.stages.external import ExternalSpec
from evertune.workspace import Workspace
from tests.check.folders import RECIPE, said, write_folder

SCRIPT = Path(__file__).parent / "trainer.py"
NAME = "model.layers.0.mlp.up_proj.weight"


def _command(what: str) -> str:
    return f"'{sys.executable}' trainer.py {what} {{model}} {{data}} {{output}} {{seed}}"


def _write(folder: Path, model: Path, what: str = "whole", **stage: Any) -> Path:
    """A recipe with one external stage over the folder's rows; returns its path."""
    recipe = write_folder(folder, model)
    (folder / "trainer.py").write_text(SCRIPT.read_text())
    settings = {"command": _command(what), "data": ["cards"], "files": ["trainer.py"], **stage}
    lines = "".join(f"\n          {name}: {_yaml(value)}" for name, value in settings.items())
    head = RECIPE[: RECIPE.index("      - sft:")].replace("base: model", "base: model\nseed: 3")
    recipe.write_text(f"{head}      - external:{lines}\n")
    return recipe


def _yaml(value: Any) -> str:
    return '"' + value.replace('"', '\\"') + '"' if isinstance(value, str) else str(value)


def _order(recipe: Path, start: Checkpoint | None = None) -> ExternalSpec:
    plan = make_plan(load_recipe(recipe))
    place = Place(plan, plan.recipe.rounds[0], 0, made=[start or plan.base], champion=plan.base)
    order = KINDS["external"].order(place)
    assert isinstance(order, ExternalSpec)
    return order


def _perform(recipe: Path, start: Checkpoint | None = None) -> tuple[ExternalSpec, Workspace]:
    order = _order(recipe, start)
    workspace = Workspace.open(recipe.parent / "run", create=True)
    KINDS["external"].perform(order.to_json(), workspace)
    return order, workspace


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[ExternalSpec, Workspace]:
    """A stage that a command has made."""
    return _perform(_write(tmp_path_factory.mktemp("done"), tiny_model))


def test_what_the_command_made_is_a_checkpoint_with_the_starts_tokenizer(
    done: tuple[ExternalSpec, Workspace], tiny_model: Path
) -> None:
    order, workspace = done
    made = workspace.path(order.key)
    before, after = load_file(tiny_model / "model.safetensors"), load_file(made / "model.safetensors")
    # 0.01 for each unit of the seed, 3, and 0.001 for each row of cards, 24.
    torch.testing.assert_close(after.pop(NAME), before.pop(NAME) + 0.03 + 0.024, rtol=0, atol=1e-6)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (made / "chat_template.jinja").read_bytes() == (tiny_model / "chat_template.jinja").read_bytes()
    assert not [file for file in made.rglob("*") if file.suffix in (".bin", ".pt", ".txt")]
    open_model(describe(made), dtype="float32")


def test_the_record_says_what_was_run_and_on_what(done: tuple[ExternalSpec, Workspace]) -> None:
    order, workspace = done
    manifest = workspace.manifest(order.key)
    assert manifest is not None
    facts = manifest.record["checkpoint"]
    assert (facts["stage"], facts["form"], facts["start"]) == ("external", "model", order.start.digest)
    assert [(one["source"], one["rows"]) for one in facts["data"]] == [("cards", 24)]
    assert facts["settings"]["command"] == order.command
    assert facts["settings"]["files"].keys() == {"trainer.py"}
    assert facts["drift"]["to_start"] > 0
    log = (workspace.path(order.key) / "external.log").read_text()
    assert "trainer whole with seed 3" in log
    assert "attempt" in log.splitlines()[0], "the first line is the command"
    assert not (workspace.work / order.key / "attempt").exists()


def test_an_adapter_stands_on_the_start(tmp_path: Path, tiny_model: Path) -> None:
    order, workspace = _perform(_write(tmp_path, tiny_model, "adapter"))
    made = describe(workspace.path(order.key))
    assert made.form == "adapter"
    assert made.stands_on is not None
    assert made.stands_on.digest == order.start.digest
    # A second one gets the first folded in, and stands on it.
    (tmp_path / "second").mkdir()
    second, other = _perform(_write(tmp_path / "second", tiny_model, "adapter"), start=made)
    stack = describe(other.path(second.key)).stack
    assert [one.digest for one in stack[:2]] == [order.start.digest, made.digest]
    assert len(stack) == 3
    assert "attempt/model" in (other.path(second.key) / "external.log").read_text()


def test_the_key_changes_with_what_the_result_depends_on_and_with_nothing_else(
    tmp_path: Path, tiny_model: Path
) -> None:
    recipe = _write(tmp_path, tiny_model)
    key = _order(recipe).key
    assert _order(_write(tmp_path / "moved", tiny_model)).key == _order(_write(tmp_path / "again", tiny_model)).key
    text = recipe.read_text()
    for old, new, is_same in (
        ("seed: 3", "seed: 4", False),
        ("trainer.py whole", "trainer.py other", False),
        ("dtype", "dtype", True),
        ("files: ['trainer.py']", "hours: 2.0\n          files: ['trainer.py']", True),
    ):
        recipe.write_text(text.replace(old, new))
        assert (_order(recipe).key == key) == is_same, new
    recipe.write_text(text)
    (tmp_path / "trainer.py").write_text(SCRIPT.read_text() + "# changed\n")
    assert _order(recipe).key != key
    (tmp_path / "trainer.py").write_text(SCRIPT.read_text())
    (tmp_path / "cards.jsonl").write_text((tmp_path / "cards.jsonl").read_text().replace("kind 1", "sort 1"))
    assert _order(recipe).key != key


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("fail", TrainingError, ["first/1-external", "exit code 7", "the card fell out", "external.log"]),
        ("nothing", CheckpointError, ["has left nothing here", "save_pretrained"]),
        ("pickle", CheckpointError, ["only pickled weights"]),
        ("nan", CheckpointError, ["NaN or Inf", NAME]),
    ],
)
def test_a_failure_is_an_error_with_a_name_and_leaves_no_object(
    what: str, error: type[Exception], words: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    recipe = _write(tmp_path, tiny_model, what)
    with pytest.raises(error) as caught:
        _perform(recipe)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    workspace = Workspace.open(tmp_path / "run", create=False)
    assert _checkpoints(workspace) == []
    assert (workspace.work / _order(recipe).key / "external.log").is_file()
    # The same order again, with a trainer that works: nothing of the first attempt is in the way.
    order = replace(_order(recipe), command=_command("whole"))
    KINDS["external"].perform(order.to_json(), workspace)
    assert _checkpoints(workspace) == [order.key]


def _checkpoints(workspace: Workspace) -> list[str]:
    return [one.key for one in workspace.manifests() if one.kind == "checkpoint"]


def _is_gone(marker: str) -> bool:
    """Whether no process has the marker in its command line, once a killed one has had time to go."""
    deadline = time.monotonic() + 20
    while _is_running(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _is_running(marker)


def _is_running(marker: str) -> bool:
    """Whether a process has the marker in its command line."""
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in one.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model, "sleep", hours=3.0 / 3600)
    with pytest.raises(TrainingError, match="stopped after 0.000833333 hours"):
        _perform(recipe)
    assert _is_gone(str(tmp_path))


def test_a_request_to_stop_ends_the_command(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model, "sleep")
    asleep = tmp_path / "run" / "work" / _order(recipe).key / "attempt" / "output" / "asleep"

    def interrupt() -> None:
        while not asleep.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        _perform(recipe)
    assert _is_gone(str(tmp_path))


def test_words_are_not_read_by_a_shell(tmp_path: Path, tiny_model: Path) -> None:
    spec = replace(_order(_write(tmp_path, tiny_model)), command="train --out {output} '{{a b}}' $HOME;ls {seed}")
    words = spec.words(model=Path("/m"), data=Path("/d"), output=Path("/with space/o"))
    assert words == ["train", "--out", "/with space/o", "{a b}", "$HOME;ls", "3"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train {modle} {output}", "found the placeholder {modle}"),
        ("train {model}", "found no {output}"),
        ("train '{output}", "found a command that cannot be read (No closing quotation)"),
        ("train {output} {", "found a command that cannot be read"),
        ("train {output.x}", "found the placeholder {output.x}"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_when_the_recipe_is_read(
    command: str, words: str, tmp_path: Path, tiny_model: Path
) -> None:
    recipe = _write(tmp_path, tiny_model, command=command)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert "rounds[0].stages[0].external.command" in str(caught.value)
    assert words in str(caught.value)


def test_a_file_that_is_missing_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model, files=["other.py"])
    with pytest.raises(RecipeError, match=r"'other.py' cannot be read"):
        _order(recipe)
    assert ("rounds[0].stages[0].external.files", "other.py: found no file, expected one.") in said(
        check_recipe(load_recipe(recipe)), "error"
    )


def test_a_check_counts_its_rows_and_looks_for_the_program(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    [stage] = check_recipe(load_recipe(recipe)).stages
    assert (stage.label, stage.new_rows, stage.steps) == ("first/1-external", 24, 0)
    assert stage.summary == "24 rows for another trainer's command, at most 24 h"
    recipe = _write(tmp_path / "other", tiny_model, command="no-such-trainer {output}")
    [(place, told)] = said(check_recipe(load_recipe(recipe)), "error")
    assert place == "rounds[0].stages[0].external.command"
    assert "no program 'no-such-trainer'" in told


def test_rows_of_a_command_are_searched_for_probe_items(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    probe = (tmp_path / "probe-cards.jsonl").read_text()
    (tmp_path / "probe-cards.jsonl").write_text(probe.replace("asked 3", "card 3"))
    assert [place for place, _ in said(check_recipe(load_recipe(recipe)), "error")] == ["data.cards"]


def test_a_wrong_row_stops_it_before_the_command_starts(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    (tmp_path / "cards.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"cards.jsonl:1"):
        _perform(recipe)


def test_the_tables_of_kinds_agree() -> None:
    from evertune.check.stages import LOOKS
    from evertune.recipe.presets import RESOLVERS
    from evertune.recipe.schema import Retrain, Stage

    kinds = set(Stage.model_fields)
    assert kinds == set(KINDS) == set(LOOKS)
    assert len(set(RESOLVERS) - {Retrain}) == len(kinds), "a retrain is an sft stage where a round is consolidated"


def test_the_last_words_are_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"$ train\n" + b"".join(b"line %d\n\n" % i for i in range(9)) + b"\xff bad\n")
    assert external._last_words(log) == "Its last words: line 5 | line 6 | line 7 | line 8 | \ufffd bad."
    log.write_text("$ train\n")
    assert external._last_words(log) == "It said nothing."
