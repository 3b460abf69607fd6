"""What a stage gets: its own values, else the defaults', else the preset's."""

from pathlib import Path
from typing import Any

import pytest

from evertune.recipe.presets import PRESETS, SOURCES, ResolvedSft, resolve_recipe, resolve_stage
from evertune.recipe.schema import Recipe
from tests.recipe.texts import VALID, first_sft, load_text

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
BARE = VALID[: VALID.index("          lr:")]


def resolve(folder: Path, *, stage: str = "", defaults: str = "{}", preset: str = "balanced") -> ResolvedSft:
    """The one stage of a recipe, with some lines of its own."""
    text = f"preset: {preset}\ndefaults: {defaults}\n{BARE}{stage}"
    loaded = load_text(folder, text)
    return resolve_stage(loaded.recipe, first_sft(loaded))


def test_a_stage_that_says_nothing_gets_the_preset(tmp_path: Path) -> None:
    for name, preset in PRESETS.items():
        found = resolve(tmp_path, preset=name)
        assert found.tune == preset.tune
        assert found.lr == (preset.full_lr if name == "full" else preset.lora_lr)
        assert (found.epochs, found.steps) == (preset.epochs, None)
        assert (found.replay.share, found.replay.sources) == (preset.replay_share, ["history"])
        assert (found.anchor.kl, found.anchor.to, found.anchor.on) == (preset.anchor_kl, "start", "replay")


def test_the_learning_rate_follows_what_is_trained(tmp_path: Path) -> None:
    assert resolve(tmp_path, stage="          tune: full\n").lr == PRESETS["balanced"].full_lr
    assert resolve(tmp_path, stage="          tune: lora\n", preset="full").lr == PRESETS["full"].lora_lr
    assert resolve(tmp_path, defaults="{tune: full}").lr == PRESETS["balanced"].full_lr


def test_steps_take_the_place_of_the_presets_epochs(tmp_path: Path) -> None:
    found = resolve(tmp_path, stage="          steps: 7\n")
    assert (found.epochs, found.steps) == (None, 7)


def test_replay_and_anchor_are_filled_field_by_field(tmp_path: Path) -> None:
    # Whole replacement would lose the sources of the defaults where a stage changes only the share, and the preset's
    # share where the defaults name only sources.
    found = resolve(
        tmp_path,
        preset="gentle",
        defaults="{replay: {from: [general]}, anchor: {on: new}}",
        stage="          replay: {dedup: false}\n          anchor: {to: base}\n",
    )
    assert (found.replay.share, found.replay.sources, found.replay.dedup) == (0.3, ["general"], False)
    assert (found.anchor.kl, found.anchor.on, found.anchor.to) == (0.1, "new", "base")


def test_what_a_stage_says_stands_over_the_defaults(tmp_path: Path) -> None:
    found = resolve(
        tmp_path,
        defaults="{tune: full, replay: {share: 0.3}, anchor: {kl: 0.2}}",
        stage="          tune: lora\n          replay: {share: 0}\n          anchor: {kl: 0}\n          lr: 3e-4\n",
    )
    assert (found.replay.share, found.anchor.kl, found.lr) == (0, 0, 3e-4)
    assert found.tune.lora is not None


def test_every_number_of_a_preset_has_its_source() -> None:
    numbers = set(PRESETS["balanced"].__dataclass_fields__) - {"summary"}
    assert set(SOURCES) == numbers


def test_gentle_never_changes_more_than_balanced() -> None:
    gentle, balanced = PRESETS["gentle"], PRESETS["balanced"]
    assert gentle.lora_lr < balanced.lora_lr
    assert gentle.full_lr < balanced.full_lr
    assert gentle.epochs < balanced.epochs
    assert gentle.replay_share > balanced.replay_share
    assert gentle.anchor_kl > balanced.anchor_kl


def _has_gap(stage: dict[str, Any]) -> bool:
    gaps = {name for name, value in stage.items() if value is None}
    return (
        bool(gaps - {"epochs", "steps", "clip", "ema", "mix", "guard_stop", "keep_steps"})
        or not {"epochs", "steps"} - gaps
    )


def test_a_resolved_recipe_leaves_nothing_open(tmp_path: Path) -> None:
    stage = load_text(tmp_path, BARE).resolved["rounds"][0]["stages"][0]["sft"]
    assert not _has_gap(stage)


@pytest.mark.parametrize("path", [*RECIPES, None], ids=lambda path: path.name if path else "bare")
def test_a_resolved_recipe_is_a_recipe_that_resolves_to_itself(path: Path | None, tmp_path: Path) -> None:
    resolved = load_text(tmp_path, path.read_text() if path else BARE).resolved
    assert resolve_recipe(Recipe.model_validate(resolved)) == resolved


@pytest.mark.parametrize("kind", ["dpo", "rl"])
@pytest.mark.parametrize(
    ("said", "ratio"),
    [
        ("", None),
        (", replay_ratio: 0.2", 0.2),
        (", replay_weight: 1.0", "fixed"),
        (", replay_weight: 0.5", "fixed"),
        (", replay_ratio: null", "fixed"),
    ],
)
def test_replayed_rows_beside_another_loss_get_a_share_of_its_gradient(
    kind: str, said: str, ratio: float | str | None, tmp_path: Path
) -> None:
    data = {"dpo": "prefs", "rl": "tickets"}[kind]
    valid = VALID.replace("tickets.jsonl}", "tickets.jsonl, verifier: exact}")
    text = valid[: valid.index("      - sft")] + f"      - {kind}: {{data: [{data}]{said}}}\n"
    loaded = load_text(tmp_path, text)
    stage = loaded.recipe.rounds[0].stages[0].settings
    preset = {"dpo": PRESETS["balanced"].dpo_replay_ratio, "rl": PRESETS["balanced"].rl_replay_ratio}[kind]
    wanted = {None: preset, "fixed": None}.get(ratio, ratio)
    assert resolve_stage(loaded.recipe, stage).replay_ratio == wanted
    again = Recipe.model_validate(resolve_recipe(loaded.recipe))
    assert resolve_stage(again, again.rounds[0].stages[0].settings).replay_ratio == wanted
