"""Loading: YAML 1.2 scalars, lines, paths, overrides, and what counts for the digest."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evertune.errors import RecipeError
from evertune.recipe.load import load_recipe
from evertune.recipe.strict_yaml import parse_value
from tests.recipe.texts import VALID, changed, first_sft, load_text

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1e+3", 1000.0),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("012", 12),
        ("+3", 3),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("~", None),
        ("null", None),
        ("", None),
        ("2026-11", "2026-11"),
        ("2026-11-24", "2026-11-24"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        ("'1e-5'", "1e-5"),
        ('"no"', "no"),
        ("nan", "nan"),
        ("[a, 1, {b: 2}]", ["a", 1, {"b": 2}]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**29), 10**29))
def test_every_number_is_read_back_as_python_writes_it(number: float) -> None:
    assert parse_value(repr(number), "here") == number


def test_a_whole_number_serves_where_a_number_is_wanted(tmp_path: Path) -> None:
    assert first_sft(load_text(tmp_path, changed("lr: 1e-4", "lr: 1"))).lr == 1


def test_a_byte_order_mark_and_windows_line_ends_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "team.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    loaded = load_recipe(path)
    assert loaded.recipe == load_text(tmp_path).recipe
    assert loaded.places["rounds", 0, "name"] == f"{path}:13"


def test_a_name_stands_for_a_list_of_one(tmp_path: Path) -> None:
    short = changed("data: [tickets]", "data: tickets").replace("from: [general]", "from: general")
    assert load_text(tmp_path, short).digest == load_text(tmp_path).digest


def test_aliases_may_be_used(tmp_path: Path) -> None:
    text = changed("share: 0.2,", "share: 0.2,").replace("replay: {", "replay: &usual {")
    text += "  - name: second\n    stages: [{sft: {data: tickets, replay: *usual}}]\n"
    assert load_text(tmp_path, text).recipe.rounds[1].stages[0].sft == first_sft(load_text(tmp_path)).model_copy(
        update={"lr": None}
    )


def test_every_place_is_known_by_its_line(tmp_path: Path) -> None:
    places = load_text(tmp_path).places
    assert places["probes", "facts", "kind"] == f"{tmp_path / 'team.yaml'}:11"
    assert places["rounds", 0, "stages", 0, "sft", "data", 0] == f"{tmp_path / 'team.yaml'}:16"


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "team.yaml").write_text(VALID)
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(Path("inner/team.yaml"))
    monkeypatch.chdir("/")
    assert loaded.folder == tmp_path / "inner"
    assert loaded.resolve("tickets.jsonl") == tmp_path / "inner" / "tickets.jsonl"
    assert loaded.resolve("/data/x.jsonl") == Path("/data/x.jsonl")


def test_the_digest_is_of_the_meaning_not_of_the_text(tmp_path: Path) -> None:
    plain = load_text(tmp_path)
    moved = "# a comment\n" + changed("name: team\nbase: smollm2-135m\n", "base: smollm2-135m\nname: team\n")
    assert load_text(tmp_path, moved).digest == plain.digest
    assert load_text(tmp_path, changed("lr: 1e-4", "lr: 0.0001")).digest == plain.digest
    # The preset's values are part of the meaning: written out, they change nothing; another preset does.
    assert load_text(tmp_path, changed("lr: 1e-4", "lr: 1e-4\n          epochs: 2")).digest == plain.digest
    assert load_text(tmp_path, changed("lr: 1e-4", "lr: 1e-4\n          epochs: 3")).digest != plain.digest
    assert load_text(tmp_path, "preset: gentle\n" + VALID).digest != plain.digest


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_loads(recipe: Path) -> None:
    assert load_recipe(recipe).recipe.rounds


def test_an_override_changes_one_value(tmp_path: Path) -> None:
    flags = (
        "rounds[0].stages[-1].sft.lr=5e-5",
        "rounds[-1].stages[0].sft.tune={lora: {rank: 8}}",
        "rounds[0].stages[0].sft.data=[general]",
        "gate.margin.probe=0.1",
        "seed=7",
        "seed=9",
        "workspace=a=b",
    )
    loaded = load_text(tmp_path, overrides=flags)
    sft = first_sft(loaded)
    assert (sft.lr, sft.tune.lora.rank, sft.data) == (5e-5, 8, ["general"])
    assert (loaded.recipe.gate.margin.probe, loaded.recipe.seed, loaded.recipe.workspace) == (0.1, 9, "a=b")


def test_an_override_of_nothing_takes_a_value_away(tmp_path: Path) -> None:
    assert first_sft(load_text(tmp_path, overrides=("rounds[0].stages[0].sft.lr=",))).lr is None


def test_an_override_fills_a_mapping_that_was_left_empty(tmp_path: Path) -> None:
    text = VALID.replace("rounds:", "defaults:\nrounds:")
    assert load_text(tmp_path, text, overrides=("defaults.anchor.kl=0.2",)).recipe.defaults.anchor is not None


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("seed", "found no '='"),
        ("=3", "found the path ''"),
        ("rounds[0=x", "found the path 'rounds[0'"),
        ("rounds..name=x", "found the path 'rounds..name'"),
        ("rounds[1].name=x", "rounds has 1 entries, so there is no [1]"),
        ("rounds[-2].name=x", "rounds has 1 entries, so there is no [-2]"),
        ("rounds.name=x", "rounds is no mapping, so it has no key 'name'"),
        ("name[0]=x", "name is no list, so it has no entry [0]"),
        ("rounds[0].stages[0].sft.lrr=1", "rounds[0].stages[0].sft: unknown key 'lrr'. Did you mean 'lr'?"),
        ("rounds[-1].stages[-1].sft.lr=quick", "rounds[0].stages[0].sft.lr: found 'quick', expected a number"),
        ("rounds[0].stages[0].sft.lr=quick", "rounds[0].stages[0].sft.lr: found 'quick', expected a number"),
        ("rounds[0].stages[0].sft.replay={share: 2}", "sft.replay.share: found 2, expected a number below 1"),
        ("gaet.alpha=0.1", "unknown key 'gaet'. Did you mean 'gate'?"),
        ("seed=[1", "not valid YAML"),
        ("seed=.nan", "found .nan, expected a finite number"),
        ("seed=!!int 3", "found the YAML tag"),
        ("seed=1\n---\n2", "found a second document"),
        ("name=\x07", "found the character 0x07"),
        ("probes.tickets.verifier.math={}", "Set the whole of it: probes.tickets.verifier={exact: {math: ...}}"),
    ],
)
def test_a_wrong_override_is_named_by_its_flag(flag: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, overrides=(flag,))
    message = str(caught.value)
    assert message.startswith(f"--set {flag!r}")
    assert told in message
    assert "\n" not in message


def test_what_an_override_did_not_touch_keeps_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, changed("share: 0.2", "share: 2"), overrides=("rounds[0].stages[0].sft.lr=1e-5",))
    assert str(caught.value).startswith(f"{tmp_path / 'team.yaml'}:18, rounds[0].stages[0].sft.replay.share")


def test_loading_leaves_nothing_behind(tmp_path: Path) -> None:
    load_text(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["team.yaml"]
    shutil.rmtree(tmp_path)
