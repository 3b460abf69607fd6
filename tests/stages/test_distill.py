"""Who teaches which rows: names in the recipe become checkpoints; what is wrong with them is said before training."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from evertune.check import check_recipe
from evertune.errors import CheckpointError, RecipeError
from evertune.model.checkpoint import Checkpoint, describe
from evertune.plan import make_plan
from evertune.recipe.load import load_recipe
from evertune.stages import KINDS, Past, Place
from evertune.train.distill_spec import DistillSpec
from tests.check.folders import RECIPE, write_folder
from tests.model.folders import change_json, write_adapter_folder
from tests.tiny import write_tiny_model

STAGE = """\
  - name: second
    stages:
      - sft: {data: [general], steps: 2}
      - distill: {data: [cards, general], %s}
"""


def _write(folder: Path, model: Path, distill: str) -> Path:
    recipe = write_folder(folder, model)
    recipe.write_text(RECIPE + STAGE % distill)
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Checkpoint]:
    """By label, what a run would have made before the distill stage; all stand on the recipe's own base."""
    folder = tmp_path_factory.mktemp("made")
    base = describe(shutil.copytree(tiny_model, folder / "model"))
    adapters = [write_adapter_folder(base, folder / str(seed), seed=seed) for seed in (1, 2)]
    return dict(zip(("base", "first/1-sft", "second/1-sft"), (base, *adapters), strict=True))


def _allowed(recipe: Path) -> Path:
    """The recipe with leave for academic methods."""
    recipe.write_text(recipe.read_text() + "academic: allow\n")
    return recipe


def _order(
    recipe: Path,
    made: Mapping[str, Checkpoint],
    *,
    promoted: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, float]] | None = None,
) -> DistillSpec:
    plan = make_plan(load_recipe(recipe))
    past = Past(made, {"first": "first/1-sft"} if promoted is None else promoted, values or {})
    place = Place(
        plan, plan.recipe.rounds[1], 1, [made["first/1-sft"], made["second/1-sft"]], made["first/1-sft"], past=past
    )
    order = KINDS["distill"].order(place)
    assert isinstance(order, DistillSpec)
    return order


def _taught(order: DistillSpec, made: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """By source, the labels of its teachers."""
    labels = {one.digest: label for label, one in made.items()}
    return {source: [labels[one.checkpoint.digest] for one in order.of(source)] for source in order.routes}


@pytest.mark.parametrize(
    ("written", "label"),
    [
        ("round:first", "first/1-sft"),
        ("stage:first/1-sft", "first/1-sft"),
        ("stage:sft", "second/1-sft"),
        ("stage:second/1-sft", "second/1-sft"),
        ("champion", "first/1-sft"),
        ("start", "second/1-sft"),
        ("base", "base"),
    ],
)
def test_a_teacher_may_be_named_in_many_ways(tmp_path, tiny_model, made, written, label):
    order = _order(_write(tmp_path, tiny_model, f"teachers: ['{written}']"), made)
    assert _taught(order, made) == {"cards": [label], "general": [label]}


def test_a_teacher_may_be_a_path(tmp_path, tiny_model, made):
    recipe = _write(tmp_path, tiny_model, "teachers: expert")
    expert = write_adapter_folder(describe(tmp_path / "model"), tmp_path / "expert", seed=7)
    assert [one.checkpoint.digest for one in _order(recipe, made).teachers] == [expert.digest]


def test_rows_go_to_the_teachers_of_their_source(tmp_path, tiny_model, made):
    teachers = "teachers: [{checkpoint: 'round:first', sources: cards}, {checkpoint: base, weight: 3}]"
    order = _order(_write(tmp_path, tiny_model, teachers), made)
    assert _taught(order, made) == {"cards": ["first/1-sft", "base"], "general": ["base"]}
    assert [one.weight for one in order.of("cards")] == [1.0, 3.0]


def test_the_best_of_the_run_teaches_each_skill(tmp_path, tiny_model, made):
    recipe = _write(tmp_path, tiny_model, "teachers: run, route: best, skills: {general: facts}")
    values = {
        "base": {"cards": 0.1, "facts": 0.6},
        "first/1-sft": {"cards": 0.9, "facts": 0.6},
        "second/1-sft": {"cards": 0.5, "facts": 0.5},
    }
    # cards is measured by the probe of its name. Of equals the last: it has seen the most since.
    order = _order(recipe, made, values=values)
    assert _taught(order, made) == {"cards": ["first/1-sft"], "general": ["first/1-sft"]}
    # How a teacher was found does not count, only who it is.
    named = _write(tmp_path / "named", tiny_model, "teachers: 'round:first'")
    assert _order(named, made).key == order.key
    assert order.settings()["route"] == "best"


def test_names_weights_of_a_lone_teacher_and_places_do_not_count(tmp_path, tiny_model, made):
    keys = [
        _order(_write(tmp_path / str(i), tiny_model, teachers), made).key
        for i, teachers in enumerate(
            (
                "teachers: 'round:first'",
                "teachers: champion",
                "teachers: [{checkpoint: 'stage:first/1-sft', weight: 7, sources: [cards, general]}]",
            )
        )
    ]
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    "change",
    [
        "teachers: base",
        "teachers: ['round:first', base]",
        "teachers: [{checkpoint: 'round:first', weight: 2}, base]",
        "teachers: [{checkpoint: 'round:first', sources: cards}, {checkpoint: base, sources: general}]",
        "teachers: 'round:first', weight: 0.6",
        "teachers: 'round:first', temperature: 2",
        "teachers: 'round:first', loss: reverse_kl",
        "teachers: 'round:first', loss: jsd",
        "teachers: 'round:first', loss: jsd, beta: 0.4",
        "teachers: 'round:first', words: 32",
        "teachers: 'round:first', words: all",
        "teachers: 'round:first', compress: true",
        "teachers: 'round:first', on_policy: {}",
        "teachers: 'round:first', on_policy: {share: 0.7}",
        "teachers: 'round:first', answers: {}",
        "teachers: 'round:first', answers: {}, weight: 0",
        "teachers: 'round:first', answers: {samples: 2}",
        "teachers: 'round:first', demonstration: {}",
        "teachers: 'round:first', demonstration: {text: Be brief.}",
    ],
)
def test_everything_that_the_result_depends_on_is_in_the_key(tmp_path, tiny_model, made, change):
    plain = _order(_write(tmp_path / "a", tiny_model, "teachers: 'round:first'"), made).key
    assert _order(_allowed(_write(tmp_path / "b", tiny_model, change)), made).key != plain


def test_the_resolved_recipe_resolves_to_itself(tmp_path, tiny_model):
    recipe = load_recipe(_write(tmp_path, tiny_model, "teachers: [base, {checkpoint: 'round:first', sources: cards}]"))
    stage = recipe.resolved["rounds"][1]["stages"][1]["distill"]
    assert [one["sources"] for one in stage["teachers"]] == [["cards", "general"], ["cards"]]
    assert (stage["weight"], stage["temperature"], stage["words"], stage["skills"]) == (0.5, 1.0, 64, {})


def test_compressing_starts_at_the_base_and_begins_at_the_stack(tmp_path, tiny_model, made):
    recipe = _write(tmp_path, tiny_model, "teachers: start, compress: true")
    order = _order(recipe, made)
    assert order.start.digest == made["base"].digest
    assert order.compressed is not None
    assert order.compressed.digest == made["second/1-sft"].digest
    assert _taught(order, made)["cards"] == ["second/1-sft"]


# Bad input.


@pytest.mark.parametrize(
    ("distill", "told"),
    [
        (
            "teachers: 'round:second'",
            "found 'round:second', expected one of: round:first, stage:sft, stage:first/1-sft",
        ),
        ("teachers: 'stage:dpo'", "found 'stage:dpo', expected one of: round:first, stage:sft"),
        ("teachers: 'stage:second/2-distill'", "found 'stage:second/2-distill'"),
        ("teachers: []", "teachers"),
        ("loss: jsd", "'teachers' is missing"),
        ("teachers: [{checkpoint: base, sources: cards}]", "no teacher teaches the rows of 'general'"),
        (
            "teachers: [{checkpoint: base, sources: letters}]",
            "found 'letters', expected a source of this stage's 'data'",
        ),
        ("teachers: base, skills: {cards: cards}", "'skills' goes with 'route: best' only"),
        ("teachers: run", "the teacher 'run' goes with 'route: best' only"),
        ("teachers: run, route: best", "no probe 'general' measures 'general'; probes has: cards, facts"),
        ("teachers: [run, expert], route: best", "this run, which has none of 'expert'; expected a checkpoint of"),
        ("teachers: base, loss: jsd, beta: 1.0", "beta"),
        ("teachers: base, temperature: 0", "temperature"),
        ("teachers: base, compress: true, tune: full", "'compress' makes an adapter"),
        ("teachers: base, on_policy: {share: 0}", "on_policy.share"),
        ("teachers: base, weight: 0", "'weight: 0' learns nothing of a teacher"),
        ("teachers: base, answers: {}, on_policy: {}", "give 'answers' or 'on_policy', not both"),
        ("teachers: [base, start], answers: {}", "several teachers cannot write one answer: give 'cards' one"),
        ("teachers: base, answers: {keep: verified}", "'cards' has no verifier, expected one in data.cards"),
        ("teachers: base, answers: {}, demonstration: {}", "give 'answers' or 'demonstration', not both"),
        ("teachers: base, demonstration: {text: ''}", "demonstration.text: found nothing, expected a text"),
        ("teachers: start, demonstration: {}", "found an academic method, On-policy self-distillation (SDFT)"),
        ("teachers: base, words: 0", "distill.words: found 0, expected 'all' or a number above 0"),
    ],
)
def test_what_is_wrong_is_one_line_of_the_recipe(tmp_path, tiny_model, distill, told):
    with pytest.raises(RecipeError, match="recipe.yaml:") as error:
        load_recipe(_write(tmp_path, tiny_model, distill))
    assert told in error.value.message


def test_texts_have_no_question_to_put_a_demonstration_behind(tmp_path, tiny_model):
    recipe = _allowed(_write(tmp_path, tiny_model, "teachers: start, demonstration: {}"))
    (tmp_path / "texts.jsonl").write_text('{"text": "Once there was a fox."}\n')
    recipe.write_text(
        recipe.read_text()
        .replace("data:\n", "data:\n  texts: {path: texts.jsonl, format: text}\n", 1)
        .replace("[cards, general], teachers", "[cards, texts], teachers")
    )
    with pytest.raises(RecipeError, match="demonstration: 'texts' has format 'text', expected messages"):
        load_recipe(recipe)


def test_a_round_that_promoted_nothing_cannot_teach_as_a_round(tmp_path, tiny_model, made):
    recipe = _write(tmp_path, tiny_model, "teachers: 'round:first'")
    with pytest.raises(RecipeError, match="'round:first' has promoted nothing.*'stage:first/1-sft'"):
        _order(recipe, made, promoted={})


def test_a_teacher_without_a_score_cannot_be_chosen_by_it(tmp_path, tiny_model, made):
    recipe = _write(tmp_path, tiny_model, "teachers: [base], route: best, skills: {general: facts}")
    with pytest.raises(RecipeError, match="no score of the teacher 'base' on probe 'cards'"):
        _order(recipe, {name: one for name, one in made.items() if name != "base"})


def test_a_teacher_that_is_not_there_is_named(tmp_path, tiny_model, made):
    with pytest.raises(CheckpointError, match="teacher 'nowhere'"):
        _order(_write(tmp_path, tiny_model, "teachers: nowhere"), made)


def test_whole_weights_cannot_be_compressed(tmp_path, tiny_model, made):
    with pytest.raises(RecipeError, match="there is no adapter to compress"):
        _order(_write(tmp_path, tiny_model, "teachers: start, compress: true"), {**made, "second/1-sft": made["base"]})


# What a check can say before anything is trained.


def _findings(recipe: Path) -> list[tuple[str, str]]:
    report = check_recipe(load_recipe(recipe))
    return [(one.place, one.message) for one in report.findings if one.severity == "error"]


@pytest.fixture
def place() -> str:
    return "rounds[1].stages[1].distill"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))


def test_a_check_counts_the_answers_of_teachers(tmp_path, tiny_model):
    recipe = _write(tmp_path, tiny_model, "teachers: [{checkpoint: 'round:first', sources: cards}, base]")
    report = check_recipe(load_recipe(recipe))
    assert _findings(recipe) == []
    # Two teachers for 24 cards, one for 12 general rows.
    assert "about 60 answers of teachers" in report.stages[-1].summary
    alone = check_recipe(load_recipe(_write(tmp_path, tiny_model, "teachers: base")))
    assert report.stages[-1].disk_bytes > alone.stages[-1].disk_bytes


def test_a_check_finds_a_teacher_with_another_vocabulary(tmp_path, tiny_model, place):
    recipe = _write(tmp_path, tiny_model, "teachers: [base, wide]")
    wide = write_tiny_model(tmp_path / "wide")
    change_json(wide / "config.json", vocab_size=300)
    ((where, told),) = _findings(recipe)
    assert where == f"{place}.teachers[1]"
    assert "teacher 'wide' has a vocabulary of 300 words, expected the student's 261" in told


def test_a_check_finds_a_teacher_with_another_tokenizer(tmp_path, tiny_model, place):
    recipe = _write(tmp_path, tiny_model, "teachers: [other]")
    write_tiny_model(tmp_path / "other", template="llama2")
    ((where, told),) = _findings(recipe)
    assert (where, "another tokenizer" in told) == (f"{place}.teachers[0]", True)


def test_a_check_lets_a_teacher_with_another_tokenizer_write(tmp_path, tiny_model):
    recipe = _write(tmp_path, tiny_model, "teachers: [other], answers: {}, weight: 0")
    write_tiny_model(tmp_path / "other", template="llama2")
    assert _findings(recipe) == []


def test_a_check_finds_a_teacher_that_is_not_there(tmp_path, tiny_model, place):
    ((where, _),) = _findings(_write(tmp_path, tiny_model, "teachers: [nowhere]"))
    assert where == f"{place}.teachers[0]"


def test_a_check_finds_that_too_many_words_are_asked_for(tmp_path, tiny_model, place):
    ((where, told),) = _findings(_write(tmp_path, tiny_model, "teachers: [base, champion], words: 131"))
    assert where == f"{place}.words"
    assert "131 words of 2 teachers" in told
