"""A federated stage through the command line: clients in processes, judged and reported like any stage."""

import json
from pathlib import Path

import pytest

from evertune.recipe.load import load_recipe
from evertune.recipe.presets import resolve_recipe
from evertune.recipe.schema import Recipe
from tests.command import evertune

RECIPE = """\
evertune: 1
name: two-towns
academic: allow
base: model
workspace: run
data:
  berlin: {path: berlin.jsonl}
  paris: {path: paris.jsonl}
probes:
  choices: {path: choices.jsonl, kind: choice}
gate: {min_items: 2, min_clusters: 2, margin: {probe: 0.9, pooled: 0.9}}
rescue: [discard]
rounds:
  - name: first
    stages:
      - federated: {clients: {berlin: [berlin], paris: [paris]}, exchanges: 1, steps: 1, rank: 4, norm_bound: 50}
  - name: second
    stages:
      - sft: {data: [berlin], steps: 1, replay: {share: 0.5, from: [history]}, anchor: {kl: 0.0}}
"""


def _rows(word: str, count: int) -> str:
    turns = [
        [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "yes"}] for i in range(count)
    ]
    return "\n".join(json.dumps({"messages": one}) for one in turns) + "\n"


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "berlin.jsonl").write_text(_rows("east", 8))
    (tmp_path / "paris.jsonl").write_text(_rows("west", 4))
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return tmp_path


@pytest.mark.path
def test_a_federated_round_is_probed_judged_and_reported(place: Path) -> None:
    printed = evertune("run", place / "recipe.yaml")
    assert "academic first/1-federated made with FLoRA (stacking) (flora_stack): not production-validated" in printed
    events = json.loads(evertune("log", place / "run", "--json"))["events"]
    made = {one["body"]["label"]: one["body"] for one in events if one["kind"] == "checkpoint"}
    exchange = made["first/1-federated"]["exchanges"][0]
    assert exchange["weights"] == {"berlin": pytest.approx(2 / 3), "paris": pytest.approx(1 / 3)}
    assert exchange["error"] < 1e-6
    # The clients' rows are not in the history: nothing of theirs is replayed.
    assert made["second/1-sft"]["replay_rows"] == 0
    page = (place / "run" / "report.html").read_text()
    assert "Exchanges of" in page
    assert "&lt; 0.000001" in page
    assert "all clean" in evertune("verify", place / "run")


@pytest.mark.parametrize("own", ["norm_bound: 50", "too_large: refuse", "trim: 0.2"])
def test_a_federated_stage_with_its_defaults_filled_in_is_a_recipe_again(own: str, place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace("norm_bound: 50", own))
    resolved = resolve_recipe(load_recipe(place / "recipe.yaml").recipe)
    assert resolve_recipe(Recipe.model_validate(resolved)) == resolved


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("academic: allow\n", "", "federated.aggregate: found an academic method, FLoRA"),
        ("rank: 4", "rank: 4, ranks: {rome: 2}", "ranks: found no client 'rome'; clients has: berlin, paris"),
        ("rank: 4", "rank: 4, aggregate: fedavg, ranks: {paris: 2}", "needs a rule that averages products"),
        ("paris: [paris]", "paris: [parys]", "no data source 'parys'"),
        ("steps: 1, rank", "steps: 1, epochs: 1, rank", "give 'epochs' or 'steps', not both"),
        ("norm_bound: 50", "too_large: clip", "'too_large' is what is done above norm_bound, and there is none"),
        ("rank: 4", "rank: 4, trim: 0.1", "'trim' is read by aggregate: trimmed_mean; found flora"),
        ("rank: 4", "rank: 4, max_tokens: 4", "rows longer than expected: max_tokens is 4"),
        ("rank: 4", "rank: 4, aggregate: flor", "Did you mean 'flora'?"),
    ],
)
def test_what_is_wrong_is_one_clear_error(old: str, new: str, told: str, place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    assert told in evertune("check", place / "recipe.yaml", code=3)
