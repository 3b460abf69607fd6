"""An rl stage in a recipe: its order and key, its verifiers, and what a check says before anything is trained."""

import json
from pathlib import Path

import pytest

from evertune.agents.tasks import make_tasks
from evertune.errors import ProbeError, RecipeError
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Place
from evertune.train.spec import RlSpec
from evertune.workspace import Workspace
from tests.check.folders import RECIPE, check, said, write_folder, write_rows

STAGE = (
    "      - rl: {data: [sums], steps: 4, batch_rows: 4, group: 2, max_new_tokens: 4, kl_to: start,\n"
    "             replay: {share: 0.25, from: [general]}}\n"
)
SOURCE = "  sums: {path: sums.jsonl, format: verifiable, verifier: math}\n"


def _write(folder: Path, model: Path) -> Path:
    recipe = write_folder(folder, model)
    write_rows(folder / "sums.jsonl", [{"prompt": f"{i} and 1?", "answer": f"{i + 1}"} for i in range(12)])
    numerics = "numerics: {dtype: float32, device: cpu}\n"
    recipe.write_text(numerics + RECIPE.replace("data:\n", f"data:\n{SOURCE}", 1) + STAGE)
    return recipe


def _order(recipe: Path, *overrides: str) -> RlSpec:
    plan = make_plan(load_recipe(recipe, overrides=overrides))
    order = KINDS["rl"].order(Place(plan, plan.recipe.rounds[0], 1, made=[plan.base] * 2, champion=plan.base))
    assert isinstance(order, RlSpec)
    return order


def test_the_recipe_and_the_preset_fill_the_order(tmp_path: Path, tiny_model: Path) -> None:
    order = _order(_write(tmp_path, tiny_model))
    assert (order.group, order.steps, order.kl, order.lr, order.share) == (2, 4, 0.01, 2e-5, 0.25)
    assert order.verifiers == {"sums": {"math": {}}}
    assert order.kl_to.digest == order.start.digest


@pytest.mark.parametrize(
    "change",
    [
        "group=4", "max_new_tokens=5", "max_steps=5", "temperature=0.9", "rollout_steps=2", "iterations=2",
        "scale=false", "average=answers", "ratio=sequence", "clip_low=0.1", "clip_high=0.3", "kl=0.02",
        "replay_weight=0.5", "replay_ratio=0.2", "protect={sums: {at_least: 0.5}}", "max_kl=0.1", "min_entropy=0.1",
        "steps=5", "kl_to=other", "guard_stop={every: 2}",
    ],
)  # fmt: skip
def test_every_setting_is_part_of_the_key(change: str, tmp_path: Path, tiny_model: Path) -> None:
    from tests.tiny import write_tiny_model

    recipe = _write(tmp_path, tiny_model)
    write_tiny_model(tmp_path / "other", seed=5)
    assert _order(recipe, f"rounds[0].stages[1].rl.{change}").key != _order(recipe).key


def test_the_verifier_is_part_of_the_key(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    assert _order(recipe, "data.sums.verifier=exact").key != _order(recipe).key


def test_the_stage_runs_with_the_recipes_verifier(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    order = _order(recipe, "data.sums.verifier={regex: '(?s).*'}")
    workspace = Workspace.open(tmp_path / "run", create=True)
    facts = KINDS["rl"].perform(order.to_json(), workspace)["checkpoint"]
    # The pattern matches whatever is said.
    assert facts["final"]["reward"] == 1.0
    assert facts["final"]["flat"] == 1.0
    assert facts["steps"] == 4
    lines = (workspace.path(order.key) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["new_rows"] == 6, "three questions of two answers, and one replayed row"


def test_a_guard_that_falls_ends_the_stage(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    # At a rate of 1 whatever the model could do is gone after a step; prose may cost 0.5 % more bits.
    ruined = ("lr=1.0", "tune=full", "kl=0", "replay_weight=1", "guard_stop={every: 1}")
    ruin = [f"rounds[0].stages[1].rl.{one}" for one in ruined]
    write_rows(tmp_path / "prose.jsonl", [{"text": f"The {i}th of the ships came home in the rain."} for i in range(8)])
    order = _order(recipe, *ruin, "probes.prose={path: prose.jsonl, kind: bits_per_byte}")
    assert order.guard_stop is not None
    facts = KINDS["rl"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))["checkpoint"]
    assert facts["steps"] == 2
    [warning] = [one for one in facts["warnings"] if one["name"] == "stopped_early"]
    assert "since the stage began" in warning["text"]


def test_a_function_of_ones_own_rewards(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    (tmp_path / "checks.py").write_text("def longer(output, answer):\n    return len(output) > 2\n")
    change = "data.sums.verifier={function: 'checks:longer'}"
    assert not check(recipe, change).has_errors
    order = _order(recipe, change)
    assert str(tmp_path) not in json.dumps(order.settings())
    facts = KINDS["rl"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))["checkpoint"]
    assert 0.0 < facts["final"]["reward"] <= 1.0
    assert "verifier_errors" not in json.dumps(facts.get("warnings", []))
    (tmp_path / "checks.py").write_text("def longer(output, answer):\n    return len(output) > 3\n")
    assert _order(recipe, change).key != order.key
    moved = tmp_path / "moved"
    moved.mkdir()
    for one in tmp_path.iterdir():
        if one.is_file():
            (moved / one.name).write_bytes(one.read_bytes())
    (moved / "model").symlink_to(tmp_path / "model")
    assert _order(moved / recipe.name, change).key == _order(recipe, change).key
    [(place, told)] = said(check(recipe, "data.sums.verifier={function: 'checks:absent'}"), "error")
    assert place == "data.sums.verifier"
    assert "does not define at its top level" in told


def test_rows_with_a_known_answer_of_any_shape_can_be_asked(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    write_rows(
        tmp_path / "sums.jsonl", [{"prompt": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(12)]
    )
    facts = ("data.sums.format=choice", "data.sums.verifier=exact")
    assert not check(recipe, *facts).has_errors
    order = _order(recipe, *facts, "rounds[0].stages[1].rl.steps=1")
    KINDS["rl"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))
    assert not check(recipe, "rounds[0].stages[1].rl.data=[cards]", "data.cards.verifier=exact").has_errors


def test_a_check_counts_questions_and_shows_them(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    stage = check(recipe).stages[1]
    assert (stage.label, stage.new_rows, stage.replay_rows, stage.steps) == ("first/2-rl", 12, 4, 4)
    [shown] = [one for one in check(recipe, sample=1).samples if one.source == "sums"]
    assert [counted for _, counted in shown.segments] == [False]
    assert shown.segments[0][0].endswith("<|im_start|>assistant\n")


def test_longer_answers_and_more_of_them_take_longer(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evertune.check.estimate.CORE_FLOPS", {"bfloat16": 1e5, "float32": 1e5})
    recipe = _write(tmp_path, tiny_model)

    def seconds(*overrides: str) -> int:
        return check(recipe, *(f"rounds[0].stages[1].rl.{one}" for one in overrides)).stages[1].seconds

    plain = seconds("replay={share: 0}", "group=8", "max_new_tokens=64")
    assert seconds("replay={share: 0}", "group=16", "max_new_tokens=64") == pytest.approx(2 * plain, rel=0.05)
    assert seconds("replay={share: 0}", "group=8", "max_new_tokens=128") > 1.5 * plain


def test_an_answer_that_nothing_could_equal_is_an_error_by_file_and_line(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    write_rows(tmp_path / "sums.jsonl", [{"prompt": "1?", "answer": "1"}, {"prompt": "2?", "answer": None}])
    [(place, told)] = said(check(recipe), "error")
    assert place == "data.sums"
    assert "sums.jsonl:2" in told
    with pytest.raises(ProbeError, match="sums.jsonl:2"):
        KINDS["rl"].perform(_order(recipe).to_json(), Workspace.open(tmp_path / "run", create=True))


def test_nothing_that_holds_the_policy_is_a_warning(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    assert not said(check(recipe), "warning")
    [(place, told)] = said(check(recipe, "rounds[0].stages[1].rl.kl=0"), "warning")
    assert place == "rounds[0].stages[1].rl"
    assert "'kl' is 0" in told


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("rl: {data: [general]}", "'general' has no verifier; rl needs data.general.verifier"),
        ("rl: {data: [sums], group: 1}", "rl.group: found 1"),
        ("rl: {data: [sums], kl: 0, max_kl: 0.1}", "'max_kl' needs 'kl' above 0"),
        ("rl: {data: [sums], anchor: {on: both, cache: hidden}}", "needs 'cache: off'"),
        ("rl: {data: [sums], temperature: 0}", "rl.temperature: found 0"),
        ("rl: {data: [sums], batch_rows: 2, group: 4, micro_batch_rows: 9}", "larger than 'batch_rows'"),
        ("rl: {data: [sums], protect: {cards: {at_least: 0.5}}}", "'protect' names 'cards', which is no source"),
        ("rl: {data: [sums], protect: {sums: {}}}", "protect.sums: the key 'at_least' is missing"),
        ("rl: {data: [sums], replay_weight: 2, replay_ratio: 0.2}", "do not go together"),
        ("rl: {data: [sums], average: mean}", "rl.average: found 'mean'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(stage: str, words: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    recipe.write_text(recipe.read_text().replace(STAGE, f"      - {stage}\n"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert words in str(caught.value)


EPISODES = "data.sums={path: tasks.jsonl, format: episode, verifier: exact}"


def test_a_source_of_tasks_is_played(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    tasks = [
        {key: value for key, value in one.items() if key != "trajectory"} for one in make_tasks("files", 4, seed=1)
    ]
    write_rows(tmp_path / "tasks.jsonl", tasks)
    assert not said(check(recipe, EPISODES), "error")
    order = _order(recipe, EPISODES, "rounds[0].stages[1].rl.steps=1")
    facts = KINDS["rl"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))["checkpoint"]
    # A random model never ends a turn in time: no episode has an answer.
    assert (facts["final"]["reward/sums"], facts["final"]["stopped"]) == (0.0, 0.0)
    assert facts["final"]["length"] == 4.0
    with pytest.raises(RecipeError, match="'sums' has format 'episode'; episodes are played in this process"):
        load_recipe(recipe, overrides=[EPISODES, "rounds[0].stages[1].rl.server={url: 'http://x/v1', model: m}"])
    write_rows(tmp_path / "tasks.jsonl", [{**tasks[0], "environment": "shell"}])
    [(place, told), *_] = said(check(recipe, EPISODES), "error")
    assert place == "data.sums"
    assert "tasks.jsonl:1: found the environment 'shell', expected one of calculator" in told


def test_parts_of_a_reward_are_logged_each(tmp_path: Path, tiny_model: Path) -> None:
    recipe = _write(tmp_path, tiny_model)
    parts = "{any: {weight: 3, check: {regex: '(?s).*'}}, none: {check: {regex: 'a{99}'}}}"
    order = _order(recipe, f"data.sums.verifier={{parts: {parts}}}", "rounds[0].stages[1].rl.steps=2")
    facts = KINDS["rl"].perform(order.to_json(), Workspace.open(tmp_path / "run", create=True))["checkpoint"]
    found = {name: value for name, value in facts["final"].items() if name.startswith("reward")}
    assert found == {"reward": 0.75, "reward/sums": 0.75, "reward/sums/any": 1.0, "reward/sums/none": 0.0}
    with pytest.raises(RecipeError, match=r"parts.any.weight: found 0"):
        load_recipe(recipe, overrides=["data.sums.verifier={parts: {any: {weight: 0, check: exact}}}"])
