"""The door for penalties and gradient rules of other packages, and the line that keeps academic ones out."""

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import RecipeError
from evertune.methods import methods
from evertune.recipe.fields import Config
from evertune.recipe.load import load_recipe
from evertune.recipe.plugins import GROUPS, Plugin, find_plugin, installed
from tests.recipe.texts import changed, first_sft, load_text

PLACE = "          lr: 1e-4\n"


def with_plugins(text: str, *, academic: str | None = "allow") -> str:
    recipe = changed(PLACE, f"{PLACE}          {text}\n")
    return recipe if academic is None else recipe.replace("name: team\n", f"name: team\nacademic: {academic}\n")


def refused(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_text(folder, text)
    return str(caught.value)


def test_the_entry_points_that_are_installed_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for kind, group in GROUPS.items():
        known = set(project["entry-points"][group])
        assert known <= set(installed(kind)), "install again: pip install --no-deps --editable ."


def test_an_academic_method_is_refused_unless_the_recipe_allows_it(tmp_path: Path) -> None:
    told = refused(tmp_path, with_plugins("penalties: {ewc: {}}", academic=None))
    assert "team.yaml:18, rounds[0].stages[0].sft.penalties.ewc: found an academic method, EWC (ewc)" in told
    assert "expected 'academic: allow' at the top of the recipe" in told
    assert told.count("\n") <= 1
    assert "academic: allow" in refused(tmp_path, with_plugins("gradient_rules: {agem: {}}", academic="refuse"))
    loaded = load_text(tmp_path, with_plugins("penalties: {ewc: {}}"))
    assert first_sft(loaded).penalties["ewc"].fisher == "true"


def test_a_research_method_needs_no_leave(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, with_plugins("penalties: {l2sp: }", academic=None))
    assert first_sft(loaded).penalties["l2sp"].weight == 0.01


def test_what_sees_whole_weights_is_refused_where_they_lie_in_shards(tmp_path: Path) -> None:
    launch = "launch: {command: torchrun --nproc-per-node 2, fsdp: %s}\n"
    recipe = with_plugins("penalties: {ewc: {}}").replace("name: team\n", "name: team\n" + launch)
    told = refused(tmp_path, recipe % "true")
    assert "rounds[0].stages[0].sft.penalties.ewc: found a plug-in with 'launch.fsdp'; expected none" in told
    load_text(tmp_path, recipe % "false")


def test_compiling_what_lies_in_shards_is_refused(tmp_path: Path) -> None:
    launch = "launch: {command: torchrun --nproc-per-node 2, fsdp: %s}\nnumerics: {compile: true}\n"
    recipe = with_plugins("weight_decay: 0.0").replace("name: team\n", "name: team\n" + launch)
    assert "numerics.compile: found true with 'launch.fsdp'" in refused(tmp_path, recipe % "true")
    load_text(tmp_path, recipe % "false")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("penalties: {ewcc: {}}", "penalties: found the penalty 'ewcc', expected one that is installed: ewc, l2sp, "),
        (
            "gradient_rules: {ewc: {}}",
            "gradient_rules: found the gradient rule 'ewc', expected one that is installed: agem",
        ),
        ("penalties: [ewc]", "penalties: expected a mapping from names to options"),
        ("penalties: {ewc: {wieght: 2}}", "penalties.ewc: unknown key 'wieght'. Did you mean 'weight'?"),
        ("penalties: {ewc: {weight: heavy}}", "penalties.ewc.weight: found 'heavy', expected a number."),
        ("penalties: {ewc: {weight: -1}}", "penalties.ewc.weight: found -1, expected a number at least 0"),
        ("penalties: {ewc: {fisher: ture}}", "expected 'true' or 'empirical'. Did you mean 'true'?"),
        ("penalties: {ewc: {from: [ticket]}}", "no data source 'ticket'; data has: tickets, general, prefs"),
        ("penalties: {ewc: {from: [prefs]}}", "'prefs' has format 'preference'; a memory reads messages and text"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, told: str, tmp_path: Path) -> None:
    found = refused(tmp_path, with_plugins(text))
    assert told in found
    assert "rounds[0].stages[0].sft" in found


def test_the_resolved_recipe_holds_every_option_and_resolves_to_itself(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, with_plugins("penalties: {online_ewc: {decay: 0.5, from: [general]}}"))
    resolved = loaded.resolved
    options = resolved["rounds"][0]["stages"][0]["sft"]["penalties"]["online_ewc"]
    assert options == {
        "from": ["general"], "memory_rows": 256, "weight": 1.0, "fisher": "true", "normalise": True, "decay": 0.5,
    }  # fmt: skip
    import yaml

    (tmp_path / "again.yaml").write_text(yaml.safe_dump(resolved))
    assert load_recipe(tmp_path / "again.yaml").resolved == resolved


@pytest.mark.parametrize("kind", GROUPS)
def test_each_academic_plug_in_has_a_row_that_names_its_key_and_its_code(kind: Any) -> None:
    for name in installed(kind):
        plugin = find_plugin(kind, name)
        if plugin.make.startswith("evertune."):
            row = methods()[plugin.method]
            owner = "Sft" if kind == "objective" else "Training"
            assert f"{owner}.{kind}={name}" in row.keys
            assert row.standing == plugin.standing
            for field in plugin.options.model_json_schema()["properties"].values():
                assert field.get("description"), (name, field)


class Options(Config):
    """Of a plug-in of another package."""

    strength: float = 1.0


def entry(name: str, value: str, group: str = "evertune.penalties") -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, group)


OURS = Plugin("their_method", Options, "tests.recipe.test_plugins:make", own_standing="production")
NOT_A_PLUGIN = "something else"


def _install(monkeypatch: pytest.MonkeyPatch, *found: importlib.metadata.EntryPoint) -> None:
    def entry_points(*, group: str, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
        return [one for one in found if one.group == group and name in (None, one.name)]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_another_packages_penalty_comes_in_by_the_same_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, entry("theirs", "tests.recipe.test_plugins:OURS"))
    loaded = load_text(tmp_path, with_plugins("penalties: {theirs: {strength: 2.0}}", academic=None))
    assert first_sft(loaded).penalties["theirs"].strength == 2.0
    # Nobody but its author says that it is in production anywhere.
    assert find_plugin("penalties", "theirs").standing == "research"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("tests.recipe.test_plugins:NOT_A_PLUGIN", "expected a Plugin"),
        ("tests.recipe.no_such_module:X", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_broken_plug_in_is_a_recipe_error(
    value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, entry("theirs", value))
    assert re.search(told, refused(tmp_path, with_plugins("penalties: {theirs: {}}", academic=None)))


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, entry("theirs", "tests.recipe.test_plugins:OURS"), entry("theirs", "another:OURS"))
    assert "two packages" in refused(tmp_path, with_plugins("penalties: {theirs: {}}", academic=None))
