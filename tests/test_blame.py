"""The walk from a probe that fell to a stage, a source, and a check, through real runs of a tiny model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evertune.blame import blame
from evertune.commands.blame import blame_lines
from evertune.errors import DataError, RecipeError
from evertune.lineage import log_body, open_workspace
from evertune.listing import log_lines
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.run import run_recipe

DEMO = Path(__file__).parent.parent / "recipes" / "demo"
RECIPE = """
evertune: 1
name: blamed
base: tiny-random
workspace: run
seed: 3
data:
  cards: {{path: {demo}/cards.jsonl, limit: 12}}
  general: {{path: {demo}/general.jsonl, limit: 12}}
  junk: {{path: junk.jsonl, format: text}}
probes:
  prose: {{path: {demo}/probe-prose.jsonl, kind: bits_per_byte, limit: 8}}
gate: {{min_items: 2, min_clusters: 2}}
numerics: {{dtype: float32, device: cpu}}
rescue: [discard]
defaults: {{replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
rounds:
  - name: one
    stages:
      - sft: {{data: [general], steps: 14, lr: 0.01, batch_rows: 8, tune: full}}
      - sft: {{data: [cards, junk, general], steps: 6, lr: 0.01, batch_rows: 8, tune: {{lora: {{rank: 4}}}},
              keep_steps: 2}}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> LoadedRecipe:
    folder = tmp_path_factory.mktemp("blamed")
    rng = random.Random(1)
    lines = [json.dumps({"text": "".join(rng.choice("QZXJ#%@~^|") for _ in range(60))}) + "\n" for _ in range(24)]
    (folder / "junk.jsonl").write_text("".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE.format(demo=DEMO))
    loaded = load_recipe(folder / "recipe.yaml")
    run_recipe(loaded)
    return loaded


@pytest.mark.path
def test_the_planted_source_is_found_checked_and_recorded(done: LoadedRecipe) -> None:
    found = blame(done, "prose", rows=8, items=4, retrain=True)
    assert [one["label"] for one in found["steps"]] == ["one/1-sft", "one/2-sft"]
    assert found["steps"][0]["difference"] > 0 > found["steps"][1]["difference"]
    assert found["stage"] == "one/2-sft"
    assert found["sources"][0]["source"] == "junk"
    # 48 rows in 6 steps over 12, 24 and 12 rows.
    assert {one["source"]: one["shown"] for one in found["sources"]} == {"cards": 12.0, "junk": 24.0, "general": 12.0}
    assert found["rows"][0]["place"].startswith(str(done.folder / "junk.jsonl"))
    # The checkpoints that the stage kept, after 2 and 4 of its 6 steps.
    assert [step for step, _ in found["inside"]] == [2, 4]
    assert len({value for _, value in found["inside"]} | {found["steps"][1][one] for one in ("before", "after")}) == 4
    assert [share for share, _ in found["points"]] == [0.0, pytest.approx(2 / 6), pytest.approx(4 / 6), 1.0]
    assert all(len(one["along"]) == 4 for one in found["sources"])
    without = found["without"]
    assert (without["source"], without["steps"]) == ("junk", 6)
    assert without["without"] < without["with"]
    assert without["ci90"][0] > 0
    printed = "\n".join(blame_lines(found, recipe=Path("recipe.yaml")))
    assert "Confirmed" in printed
    opened = open_workspace(done.folder / "run")
    recorded = [event for event in opened.ledger.events() if event.kind == "blame"]
    assert [event.body for event in recorded] == [found]
    assert "prose: junk in one/2-sft" in "\n".join(log_lines(log_body(opened)))
    # Asked again, nothing is made and the same is found; nothing of the run is made again either.
    assert blame(done, "prose", rows=8, items=4, retrain=True) == found
    outcome = run_recipe(done)
    assert (outcome.stages_run, outcome.probes_run) == (0, 0)


@pytest.mark.path
def test_a_probe_that_did_not_fall_has_nothing_to_blame(done: LoadedRecipe) -> None:
    found = blame(done, "prose", label="one/1-sft")
    assert found["stage"] is None
    assert "nothing to blame" in list(blame_lines(found, recipe=Path("r.yaml")))[-1]


@pytest.mark.path
def test_wrong_questions_and_changed_data_are_errors(done: LoadedRecipe) -> None:
    with pytest.raises(RecipeError, match="no probe 'poetry'"):
        blame(done, "poetry")
    with pytest.raises(RecipeError, match="no checkpoint 'two/1-sft' of a round"):
        blame(done, "prose", label="two/1-sft")
    rows: list[dict[str, Any]] = [json.loads(one) for one in (done.folder / "junk.jsonl").read_text().splitlines()]
    (done.folder / "junk.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows[:-1]))
    with pytest.raises(DataError, match="source 'junk' has other rows than when 'one/2-sft' was trained"):
        blame(load_recipe(done.path), "prose", rows=8, items=4)
