"""Pilots of replay shares on the debug recipe: halving, the curve, the pick, and going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest

from evertune import advice
from evertune.advice import Advice, Pilot, advice_lines, advise_replay
from evertune.errors import RecipeError
from evertune.recipe.load import load_recipe
from tests.command import RECIPE, evertune


def pilot(share: float, retention: float, gain: float, *, is_kept: bool = True, rung: int = 1) -> Pilot:
    around = (retention - 0.01, retention + 0.01), (gain - 0.01, gain + 0.01)
    return Pilot(share, rung, 10, 5, retention, around[0], gain, around[1], is_kept)


def answers(
    monkeypatch: pytest.MonkeyPatch, of: dict[float, tuple[float, float, bool]]
) -> list[tuple[float, int, int]]:
    """Let pilots answer without training; returns what was asked for."""
    asked: list[tuple[float, int, int]] = []

    def run(_: Any, share: float, rung: int, rows: int) -> Pilot:
        asked.append((share, rung, rows))
        retention, gain, is_kept = of[share]
        return pilot(share, retention, gain, is_kept=is_kept, rung=rung)

    monkeypatch.setattr(advice, "_run", run)
    return asked


def test_the_weaker_half_is_dropped_at_each_rung(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, overrides=[f"workspace={tmp_path}/run"])
    (tmp_path / "run/pilots").mkdir(parents=True)
    # Without replay most is gained and a guard is lost; 0.1 keeps all and gains more than 0.2 and 0.3.
    outcome = {
        0.0: (-0.2, 0.9, False), 0.05: (-0.1, 0.8, False), 0.1: (0.0, 0.5, True), 0.2: (0.01, 0.3, True),
        0.3: (0.02, 0.1, True),
    }  # fmt: skip
    asked = answers(monkeypatch, outcome)
    found = advise_replay(loaded, round_name="two", rows=100)
    assert [rows for _, _, rows in asked] == [25] * 5 + [50] * 2 + [100] * 2
    assert {share for share, rung, _ in asked if rung > 1} == {0.1, 0.2}
    assert (found.pick, [one.rung for one in found.pilots]) == (0.1, [1, 1, 3, 3, 1])
    assert json.loads((tmp_path / "run/pilots/advice.json").read_text())["pick"] == 0.1


def test_where_every_share_loses_a_guard_the_least_loss_is_picked_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = load_recipe(RECIPE, overrides=[f"workspace={tmp_path}/run"])
    (tmp_path / "run/pilots").mkdir(parents=True)
    answers(monkeypatch, {0.1: (-0.3, 0.9, False), 0.3: (-0.1, 0.1, False)})
    found = advise_replay(loaded, round_name="two", shares=[0.1, 0.3])
    assert found.pick == 0.3
    assert "no share kept every guard" in found.reason


def test_two_shares_that_cannot_be_told_apart_are_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, overrides=[f"workspace={tmp_path}/run"])
    (tmp_path / "run/pilots").mkdir(parents=True)
    answers(monkeypatch, {0.1: (0.0, 0.505, True), 0.3: (0.0, 0.5, True)})
    assert "too close to call" in advise_replay(loaded, round_name="two", shares=[0.1, 0.3]).reason


def test_the_curve_is_drawn_to_scale() -> None:
    curve = Advice("r", 0, [pilot(0.1, -0.05, 0.1), pilot(0.3, 0.0, 0.05)], 0.1, "because.")
    drawn = [line for line in advice_lines(curve) if "|" in line]
    assert [line.split("|")[0].split() for line in drawn] == [
        ["retention", "0.1"], ["retention", "0.3"], ["gain", "0.1"], ["gain", "0.3"],
    ]  # fmt: skip
    # From -0.06 to 0.11 on 60 places: 0.1 stands at place round(0.16 / 0.17 * 59) = 56.
    assert drawn[2].split("|")[1].index("o") == 56
    assert "pick: share 0.1: because." in advice_lines(curve)


@pytest.mark.parametrize("shares", [[0.1], [0.1, 1.0], [-0.1, 0.2]])
def test_shares_that_are_none_are_named(shares: list[float]) -> None:
    with pytest.raises(RecipeError, match="expected two or more from 0 to below 1"):
        advise_replay(load_recipe(RECIPE), shares=shares)


def test_an_unknown_round_and_nothing_to_replay_are_named(tmp_path: Path) -> None:
    loaded = load_recipe(RECIPE, overrides=[f"workspace={tmp_path}/run"])
    with pytest.raises(RecipeError, match="no round 'none' in .*; it has: one, two, three"):
        advise_replay(loaded, round_name="none")
    only = load_recipe(
        RECIPE, overrides=[f"workspace={tmp_path}/run", "rounds[0].stages[0].sft.replay={share: 0.1, from: [history]}"]
    )
    with pytest.raises(RecipeError, match="'history' is empty before a round is promoted"):
        advise_replay(only, round_name="one")


@pytest.mark.path
def test_real_pilots_print_a_curve_and_are_not_run_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.read_text().replace("demo/", f"{RECIPE.parent}/demo/")
    recipe.write_text(text.replace("workspace: ../runs/debug", f"workspace: {tmp_path}/run"))
    asked = ("advise", "replay", recipe, "--round", "two", "--shares", "0,0.3", "--rows", "8")
    printed = evertune(*asked)
    assert "rung 1 of 1: 8 rows of each source at the shares 0, 0.3" in printed
    assert "retention" in printed and "pick: share" in printed
    found = json.loads((tmp_path / "run/pilots/advice.json").read_text())
    assert [one["share"] for one in found["pilots"]] == [0.0, 0.3]
    assert all(one["retention_ci90"][0] <= one["retention"] <= one["retention_ci90"][1] for one in found["pilots"])
    made = {
        one: one.stat().st_mtime_ns
        for one in (tmp_path / "run/pilots").glob("two/*/objects/*/adapter_model.safetensors")
    }
    assert len(made) == 2
    evertune(*asked)
    assert {one: one.stat().st_mtime_ns for one in made} == made
    assert len(list((tmp_path / "run/pilots").glob("two/*/objects/*/adapter_model.safetensors"))) == 2
