"""The table of methods: whole, true to the code and to the schema, and what runs record comes from it."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from evertune import method_pages
from evertune.errors import RecipeError
from evertune.methods import (
    MARKS,
    MEANING,
    SECTIONS,
    STANDINGS,
    methods,
    named,
    standing_of,
    timeline,
    used_in,
    weakest,
)
from evertune.recipe import merging, schema
from tests.command import evertune
from tests.recipe.texts import VALID, load_text

ROOT = Path(__file__).parent.parent
SHIPPED = ("production", "research", "academic")
MODELS = vars(merging) | vars(schema)
# Options of the recipe that choose between things, but no method: the plain case, or a container of others.
NO_METHOD = {
    "Tune.full": "the plain case",
    "Training.tune": "holds lora and full",
    "Defaults.tune": "holds lora and full",
    "Recipe.defaults": "holds replay, anchor and tune",
    "Recipe.numerics": "how numbers are computed",
    "Recipe.rescue_budget": "how much is tried",
    "Recipe.launch": "on how many processes",
    "Stage.federated": "its aggregate is the method",
    "Probe.verifier": "how an answer is checked",
    "Recipe.history": "what promoted rounds leave for replay",
    "Recipe.monitor": "when a person is told",
    "Training.guard_stop": "when a stage ends",
    "Rl.server": "where answers are made",
    "VerifierPart.check": "how an answer is checked",
    "Merge.models": "what is merged",
    "Merge.scale": "a number, or numbers by tensor",
    "Merge.t": "a number, or numbers by tensor",
    "Merge.density": "a number, or numbers by tensor",
    "MergeModel.weight": "a number, or numbers by tensor",
    "MergeModel.density": "a number, or numbers by tensor",
    "Match.value": "a number, or numbers by tensor",
    "Training.mix": "how the rows of several sources are counted",
}


@pytest.mark.parametrize("method", methods().values(), ids=lambda one: one.id)
def test_a_row_is_whole_and_its_links_lead_to_code(method: Any) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.id)
    assert method.section in SECTIONS
    assert method.standing in STANDINGS
    assert 1985 <= method.year <= 2026
    assert method.papers
    for paper in method.papers:
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}( \(.*\))?|[A-Z][\w, -]+ \d{4}( \(.*\))?|engineering pattern", paper), (
            paper
        )
    for text in (method.summary, method.formula, method.evidence, method.failure, method.default):
        assert text.strip()
        for marks in re.findall(r"\[([a-z]+(?:, [a-z]+)*)\]", text):
            assert set(marks.split(", ")) <= set(MARKS) or text is method.formula, text
    assert bool(method.where) != bool(method.because), "code, or a reason why there is none"
    for place in method.where:
        file, _, name = place.partition(":")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), f"{place} leads nowhere"


def test_production_needs_published_evidence_and_academic_says_none_or_where() -> None:
    for method in methods().values():
        if method.standing == "production":
            assert "None" not in method.evidence[:4], method.id


def test_a_link_into_the_code_that_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    broken = replace(methods()["replay"], where=("evertune/data/stream.py:Strem",))
    with pytest.raises(AssertionError, match="leads nowhere"):
        test_a_row_is_whole_and_its_links_lead_to_code(broken)


def _options() -> dict[str, Any]:
    """`Model.field` -> annotation, of every field of the schema."""
    models = [one for one in MODELS.values() if isinstance(one, type) and issubclass(one, schema.Config)]
    return {f"{one.__name__}.{name}": field.annotation for one in models for name, field in one.model_fields.items()}


def _is_choice(key: str, annotation: Any) -> bool:
    """An option that turns something on: a key of a one-key model, or an optional model of its own."""
    model = MODELS[key.partition(".")[0]]
    if issubclass(model, schema.OneKey):
        return model is not schema.Verifier
    parts = getattr(annotation, "__args__", (annotation,))
    return any(isinstance(one, type) and issubclass(one, schema.Config) for one in parts)


def test_every_recipe_key_that_selects_a_method_has_its_row() -> None:
    options = _options()
    named_keys = {key.partition("=")[0] for method in methods().values() for key in method.keys}
    assert named_keys <= set(options), "a row names a key that the schema does not have"
    containers = {"DataSource", "Probe", "Round", "Stage", "Rung", "Margins"}
    choices = {key for key, annotation in options.items() if _is_choice(key, annotation)}
    choices = {key for key in choices if not _holds_only(options[key], containers) or key.startswith("Stage.")}
    inherited = {f"{model}.{name}" for model in _trained() for name in schema.Training.model_fields}
    assert choices - inherited - named_keys - set(NO_METHOD) == set()
    assert set(NO_METHOD) <= set(options)


@pytest.mark.parametrize("key", ["Merge.method", "Federated.aggregate"])
def test_every_word_that_names_a_method_has_its_row(key: str) -> None:
    words = get_args(_options()[key])
    assert len(words) > 5
    assert {f"{key}={word}" for word in words} <= {one for method in methods().values() for one in method.keys}


def test_an_academic_merge_in_a_recipe_needs_leave_too(tmp_path: Path) -> None:
    stage = "merge: {method: model_stock, base: start, models: {a: {path: origin}}}"
    text = VALID[: VALID.index("      - sft")] + f"      - {stage}\n"
    with pytest.raises(RecipeError, match=r"merge.method: found an academic method, Model Stock \(model_stock\)"):
        load_text(tmp_path, text)
    load_text(tmp_path, text.replace("name: team\n", "name: team\nacademic: allow\n"))


def _holds_only(annotation: Any, names: set[str]) -> bool:
    parts = [one for one in getattr(annotation, "__args__", (annotation,)) if isinstance(one, type)]
    models = {one.__name__ for one in parts if issubclass(one, schema.Config)}
    return models <= names


def _trained() -> list[str]:
    """Names of the stages that inherit the settings of training: a key is named once, where it is declared."""
    return [
        one.__name__ for one in vars(schema).values() if isinstance(one, type) and schema.Training in one.__mro__[1:]
    ]


def test_the_recipe_page_names_the_row_of_each_key() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for method in methods().values():
        for key in method.keys:
            model, name = key.partition("=")[0].split(".")
            sections = [one for one in page.split("\n## ") if one.startswith((f"{model}\n", *_heirs(model)))]
            rows = [line for one in sections for line in one.splitlines() if line.startswith(f"| `{name}` ")]
            assert rows, key
            assert all(f"methods.md#{method.id})" in row for row in rows), key


def _heirs(model: str) -> tuple[str, ...]:
    return tuple(f"{one}\n" for one in _trained()) if model == "Training" else ()


def test_a_checkpoint_is_as_well_founded_as_its_weakest_method() -> None:
    assert weakest([]) == "production"
    assert standing_of(["lora", "replay"]) == "production"
    assert standing_of(["lora", "anchored_sft_kl"]) == "research"
    assert standing_of(["anchored_sft_kl", "ewc", "lora"]) == "academic"
    # What the table does not know was not looked at.
    assert standing_of(["lora", "somebodys_own"]) == "research"
    assert named(["lora", "ewc", "ewc", "si"], "academic") == ["EWC (ewc)", "Synaptic Intelligence (si)"]


def test_methods_are_inherited_from_everything_a_checkpoint_was_made_from() -> None:
    def body(digest: str, start: str | None, *used: str, parents: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"digest": digest, "start": start, "methods": list(used), "parents": list(parents)}

    # base -> a (ewc) -> b (lora); a rescue c lies between a and b.
    ledger = [
        body("base", None),
        body("a", "base", "sft", "ewc"),
        body("b", "a", "sft", "lora"),
        body("c", "base", "wise_ft", parents=("b",)),
        body("d", "base", "sft"),
    ]
    assert used_in(ledger, "b") == ("sft", "ewc", "lora")
    assert used_in(ledger, "c") == ("sft", "ewc", "lora", "wise_ft")
    assert used_in(ledger, "d") == ("sft",)
    assert used_in(ledger, "unknown") == ()
    # A stage that changed nothing has its start's digest: no endless walk.
    assert used_in([body("a", "a", "sft")], "a") == ("sft",)


def test_the_pages_are_what_the_table_says() -> None:
    remedy = "run `make docs`"
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == method_pages.methods_page(), remedy
    assert (ROOT / "docs" / "timeline.md").read_text(encoding="utf-8") == method_pages.timeline_page(), remedy


def test_every_link_of_the_pages_leads_somewhere() -> None:
    text = method_pages.methods_page() + method_pages.timeline_page()
    headings = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert headings == set(methods())
    assert set(re.findall(r"methods\.md#(\w+)\)", text)) <= headings
    for file in re.findall(r"\]\(\.\./([\w/.]+)\)", text):
        assert (ROOT / file).is_file(), file


def test_the_timeline_is_in_order_and_knows_its_methods() -> None:
    years = [one.year for one in timeline()]
    assert years == sorted(years)
    assert {name for one in timeline() for name in one.methods} <= set(methods())


def test_the_command_lists_by_standing() -> None:
    text = evertune("methods", "--standing", "academic")
    assert re.search(r"^  ewc +academic", text, re.MULTILINE)
    assert "replay " not in text
    assert MEANING["academic"] in text


def test_the_command_prints_every_field_as_json() -> None:
    body = json.loads(evertune("methods", "--json"))
    assert [one["id"] for one in body["methods"]] == list(methods())
    assert {one["standing"] for one in body["methods"]} == set(SHIPPED)
    assert set(body["methods"][0]) == set(methods()["replay"].to_json())


def test_the_command_shows_one_in_full() -> None:
    text = evertune("methods", "ewc")
    assert text.startswith("EWC (ewc): academic, not production-validated")
    assert methods()["ewc"].formula in text


def test_an_unknown_method_is_one_clear_error() -> None:
    assert "found no method 'ewcc'. Did you mean 'ewc'?" in evertune("methods", "ewcc", code=3)
    told = evertune("methods", "ewc", "--standing", "production", code=3)
    assert "found --standing production, but 'ewc' is academic" in told
