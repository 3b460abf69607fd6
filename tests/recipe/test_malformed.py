"""Malformed recipes: each is one clear error that names the place, what was found and what to do."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from evertune.errors import RecipeError
from evertune.recipe.load import load_recipe
from evertune.recipe.problems import problem_lines
from tests.recipe.texts import VALID, changed, load_text

# name -> (text, what the one line of the error must hold)
MALFORMED: dict[str, tuple[str, list[str]]] = {
    # the file
    "empty": ("", ["team.yaml: the file is empty", "evertune init"]),
    "only a comment": ("# nothing\n", ["the file is empty"]),
    "only null": ("~\n", ["team.yaml:1: found a single value", "expected one mapping"]),
    "a list": ("- evertune: 1\n", ["team.yaml:1: found a list"]),
    "a word": ("evertune\n", ["team.yaml:1: found a single value"]),
    "two documents": (VALID + "---\nname: other\n", ["team.yaml:20: found a second document"]),
    "a control character": (changed("name: team", "name: te\x07am"), ["team.yaml:2: found the character 0x07"]),
    "an open bracket": (changed("data: [tickets]", "data: [tickets"), ["team.yaml:17", "not valid YAML"]),
    "a tab as indent": (changed("  - name: first", "\t- name: first"), ["team.yaml:13", "not valid YAML"]),
    "an open quote": (changed("name: team", "name: 'team"), ["team.yaml:", "not valid YAML"]),
    "an unknown alias": (changed("[tickets]", "*missing"), ["team.yaml:16", "undefined alias 'missing'"]),
    "a Python tag": (
        changed("name: team", "name: !!python/object/apply:os.system [id]"),
        ["team.yaml:2: found the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system'"],
    ),
    "a tag that lies": (changed("lr: 1e-4", "lr: !!int quick"), ["team.yaml:17: found the YAML tag"]),
    "a merge key": (changed("workspace: run", "workspace: run\n<<: {seed: 1}"), ["team.yaml:5: unknown key '<<'"]),
    "a list as key": (changed("name: team", "? [a]\n: team"), ["team.yaml:2: found a list as a key"]),
    "half a character": (changed("name: team", 'name: "\\ud800"'), ["team.yaml:2, name: found the character 0xd800"]),
    "a null byte in a path": (changed("workspace: run", 'workspace: "a\\0b"'), ["team.yaml:4, workspace", "0x0000"]),
    # keys
    "the same key twice": (
        changed("workspace: run", "workspace: run\nname: again"),
        ["team.yaml:5, name: this key stands twice", "team.yaml:2"],
    ),
    "the same key twice, deep": (
        changed("lr: 1e-4", "lr: 1e-4\n          lr: 2e-4"),
        ["team.yaml:18, rounds[0].stages[0].sft.lr: this key stands twice", "team.yaml:17"],
    ),
    "an unknown key": (
        changed("replay:", "replya:"),
        ["team.yaml:18, rounds[0].stages[0].sft: unknown key 'replya'. Did you mean 'replay'?"],
    ),
    "an unknown key on top": (changed("base:", "bass:"), ["team.yaml:3: unknown key 'bass'. Did you mean 'base'?"]),
    "an unknown key like none": (
        changed("kind: choice", "kind: choice, zzz: 1"),
        ["team.yaml:11, probes.facts: unknown key 'zzz'. Known: path, kind"],
    ),
    "an unknown key under a bare name": (
        changed("verifier: exact", "verifier: {exact: {case: lower}}"),
        ["team.yaml:10, probes.tickets.verifier.exact: unknown key 'case'. It takes no options."],
    ),
    "options for full": (
        changed("lr: 1e-4", "tune: {full: {rank: 4}}"),
        ["rounds[0].stages[0].sft.tune.full: unknown key 'rank'. It takes no options."],
    ),
    "a missing key": (changed("name: team\n", ""), ["team.yaml:1: the key 'name' is missing"]),
    "a missing key, deep": (
        changed("  - name: first\n    stages:", "  - stages:"),
        ["team.yaml:13, rounds[0]: the key 'name' is missing"],
    ),
    "an unknown kind of stage": (changed("- sft:", "- stf:"), ["stages[0]: unknown key 'stf'. Did you mean 'sft'?"]),
    # values
    "another version": (changed("evertune: 1", "evertune: 2"), ["team.yaml:1, evertune: found 2, expected 1"]),
    "a number as a name": (changed("name: first", "name: 2026"), ["team.yaml:13", "found 2026", "Put it in quotes"]),
    "a name with spaces": (changed("name: team", "name: The Team"), ["team.yaml:2, name: found 'The Team'", "name of"]),
    "a name that climbs": (changed("name: first", "name: ../x"), ["team.yaml:13, rounds[0].name: found '../x'"]),
    "a source's name with a capital": (changed("general: {", "General: {"), ["team.yaml:7", "'General'", "name of"]),
    "an empty path": (changed("workspace: run", 'workspace: ""'), ["team.yaml:4, workspace: found nothing"]),
    "a learning rate as text": (
        changed("lr: 1e-4", "lr: '1e-4'"),
        ["team.yaml:17, rounds[0].stages[0].sft.lr: found '1e-4', expected a number."],
    ),
    "a negative learning rate": (changed("lr: 1e-4", "lr: -1e-4"), ["team.yaml:17", "expected a number above 0"]),
    "a huge learning rate": (changed("lr: 1e-4", "lr: 1e30"), ["team.yaml:17", "expected a number at most 1"]),
    "not a number": (changed("lr: 1e-4", "lr: .nan"), ["team.yaml:17", "found .nan, expected a finite number"]),
    "infinite": (changed("lr: 1e-4", "clip: .inf"), ["team.yaml:17", "found .inf, expected a finite number"]),
    "beyond a float": (changed("lr: 1e-4", "lr: 1e999"), ["team.yaml:17", "found 1e999, expected a finite number"]),
    "five thousand digits": (changed("lr: 1e-4", f"steps: {'9' * 5000}"), ["team.yaml:17", "at most 30 digits"]),
    "negative epochs": (changed("lr: 1e-4", "epochs: -3"), ["sft.epochs: found -3, expected a number above 0"]),
    "a part of a step": (changed("lr: 1e-4", "steps: 1.5"), ["sft.steps: found 1.5, expected a whole number"]),
    "true for a number": (changed("lr: 1e-4", "epochs: true"), ["sft.epochs: found true, expected a number"]),
    "no for a truth value": (
        changed("lr: 1e-4", "gradient_checkpointing: no"),
        ["found 'no', expected true or false"],
    ),
    "a share of all": (changed("share: 0.2", "share: 1.0"), ["team.yaml:18", "expected a number below 1"]),
    "a huge warm-up": (changed("lr: 1e-4", "warmup: 1e9"), ["sft.warmup: found 1000000000.0, expected", "below 1"]),
    "a rank of 0": (changed("lr: 1e-4", "tune: {lora: {rank: 0}}"), ["sft.tune.lora.rank: found 0", "above 0"]),
    "an unknown word": (
        changed("kind: choice", "kind: choise"),
        ["team.yaml:11, probes.facts.kind: found 'choise'", "Did you mean 'choice'?"],
    ),
    "an unknown bare name": (changed("lr: 1e-4", "tune: fully"), ["sft.tune: found 'fully', expected lora, full"]),
    "a list for a mapping": (changed("{path: q.jsonl, kind: choice}", "[q.jsonl]"), ["probes.facts: found a list"]),
    "a number for names": (changed("data: [tickets]", "data: 5"), ["sft.data: found 5, expected a list or a mapping"]),
    "no names": (changed("data: [tickets]", "data: []"), ["sft.data: found nothing, expected one entry or more"]),
    "no weights": (changed("data: [tickets]", "data: {}"), ["sft.data: found nothing, expected one entry or more"]),
    "a weight of 0": (
        changed("data: [tickets]", "data: {tickets: 0}"),
        ["team.yaml:16, rounds[0].stages[0].sft.data.tickets: found 0, expected a number above 0"],
    ),
    "a name twice": (changed("data: [tickets]", "data: [tickets, tickets]"), ["sft.data: 'tickets' stands twice"]),
    "no rounds": (VALID[: VALID.index("rounds:")] + "rounds: []\n", ["team.yaml:12, rounds: found nothing"]),
    "a stage of nothing": (
        VALID[: VALID.index("      - sft:")] + "      - {}\n",
        ["a stage has exactly one key of: sft"],
    ),
    "epochs and steps": (changed("lr: 1e-4", "epochs: 1\n          steps: 5"), ["'epochs' or 'steps', not both"]),
    "a batch smaller than its part": (changed("lr: 1e-4", "batch_rows: 2"), ["'micro_batch_rows' is larger"]),
    # what does not go together
    "a source that is not there": (
        changed("data: [tickets]", "data: [ticket]"),
        ["team.yaml:16, rounds[0].stages[0].sft.data: no data source 'ticket'", "data has: tickets, general, prefs"],
    ),
    "a replay source that is not there": (
        changed("from: [general]", "from: [old]"),
        ["team.yaml:18, rounds[0].stages[0].sft.replay.from: no data source 'old'"],
    ),
    "a source of another format": (changed("data: [tickets]", "data: [prefs]"), ["'prefs' has format 'preference'"]),
    "a role for no probe": (
        changed("    stages:", "    roles: {fact: watch}\n    stages:"),
        ["team.yaml:14, rounds[0].roles.fact: no probe 'fact'", "tickets, facts"],
    ),
    "two rounds of one name": (
        VALID + "  - name: first\n    stages: [{sft: {data: tickets}}]\n",
        ["team.yaml:19, rounds[1].name: 'first' is also the name of rounds[0]"],
    ),
    "a source called history": (
        changed("general: {", "history: {").replace("[general]", "[history]"),
        ["data.history"],
    ),
    "a probe without a kind": (changed(", kind: choice", ""), ["team.yaml:11, probes.facts: 'kind' is missing"]),
    "a probe from nowhere": (changed("path: q.jsonl, ", ""), ["probes.facts: give either 'path' with 'kind'"]),
    "a probe from two places": (changed("kind: choice", "kind: choice, lm_eval: arc"), ["give either 'path'"]),
    "a generating probe unchecked": (
        changed("verifier: exact, ", ""),
        ["'verifier' is needed for the kinds 'generate' and 'episode'"],
    ),
    "two verifiers": (
        changed("verifier: exact", "verifier: {exact: {}, math: {}}"),
        ["verifier: a verifier has exactly one key", "found exact, math"],
    ),
    "a setting nobody reads": (
        changed("kind: choice", "kind: choice, max_new_tokens: 9"),
        ["probes.facts: 'max_new_tokens' is read by generate, episode only"],
    ),
    "a safe target": (changed("role: target", "role: target, safety: true"), ["'safety: true' needs role 'guard'"]),
    "a safe probe made target": (
        changed("kind: choice", "kind: choice, safety: true").replace(
            "    stages:", "    roles: {facts: target}\n    stages:"
        ),
        ["rounds[0].roles.facts: found 'target', expected 'guard'"],
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_recipe_is_one_clear_error(name: str, tmp_path: Path) -> None:
    text, expected = MALFORMED[name]
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "team.yaml"))
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_the_recipe_they_were_made_from_is_valid(tmp_path: Path) -> None:
    assert load_text(tmp_path).recipe.name == "team"


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "team.yaml"
    path.write_bytes(b"evertune: 1\nname: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"team\.yaml:2: found byte 0xe9, expected UTF-8"):
        load_recipe(path)


def test_a_folder_a_missing_file_and_an_impossible_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "a\0b.yaml")


def test_a_file_that_is_no_recipe_by_its_size_is_not_parsed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="more than 1,048,576 bytes"):
        load_text(tmp_path, "a" * (1 << 20) + "bc")


def test_ten_problems_at_most_are_told_each_on_its_line(tmp_path: Path) -> None:
    sources = "".join(f"  s{i}: {{path: x, colour: red}}\n" for i in range(12))
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, VALID.replace("data:\n", f"data:\n{sources}", 1))
    lines = str(caught.value).splitlines()
    assert [line.split(", ")[0].rpartition(":")[2] for line in lines[:-1]] == [str(i) for i in range(6, 16)]
    assert lines[-1] == "... and 2 more."


# Each doubles what stands before it: nine lines, a thousand million values.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than 20,000 values once aliases are filled in"),
        ("a: &a [*a]\n", "more than 32 levels once aliases are filled in"),
        ("b: &b 1\na: [" + "*b, " * 101 + "1]\n", "more than 100 aliases"),
        ("a: " + "[" * 33 + "]" * 33 + "\n", "more than 32 levels"),
        ("a: " + "[" * 200_000 + "\n", "more than 32 levels"),
        ("a: [" + "1, " * 20_001 + "1]\n", "more than 20,000 values"),
    ],
    ids=["bomb", "itself", "aliases", "deep", "very deep", "many"],
)
def test_texts_that_blow_up_are_refused_at_once(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value)


PIECES = [
    "{",
    "}",
    "[",
    "]",
    ":",
    "\n",
    "&a ",
    "*a",
    "!!int ",
    "'",
    '"',
    "#",
    "|",
    "%",
    "null",
    "1e999",
    ".nan",
    "\t",
    "\\",
]
EDITS = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 9), st.sampled_from(PIECES) | st.text(max_size=3)),
    min_size=1,
    max_size=4,
)


@given(EDITS)
@settings(max_examples=150, deadline=None)
def test_any_damage_is_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    text = VALID
    for place, removed, piece in edits:
        text = text[:place] + piece + text[place + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert load_recipe(path).digest
    except RecipeError as error:
        assert str(error).startswith(str(path))


def test_a_rule_of_the_schema_that_has_no_words_of_its_own_keeps_pydantics() -> None:
    class Odd(BaseModel):
        steps: Annotated[int, Field(multiple_of=4)]
        kind: Annotated[str, Field(max_length=2)] | Literal["long"]

    with pytest.raises(ValidationError) as caught:
        Odd.model_validate({"steps": 3, "kind": "middle"})
    places = {(): "r.yaml:1", ("steps",): "r.yaml:1", ("kind",): "r.yaml:2"}
    lines = problem_lines(caught.value, {"steps": 3, "kind": "middle"}, places, root=Odd)
    assert lines[0] == "r.yaml:1, steps: found 3: Input should be a multiple of 4."
    assert lines[1].startswith("r.yaml:2, kind: found 'middle'")
