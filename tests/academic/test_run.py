"""A run with an academic method says so wherever a person looks."""

import json
from pathlib import Path

import pytest

from tests.command import evertune

RECIPE = """\
evertune: 1
name: careful
academic: allow
base: model
workspace: run
data:
  rows: {path: rows.jsonl}
  general: {path: general.jsonl}
probes:
  choices: {path: choices.jsonl, kind: choice}
gate: {min_items: 2, min_clusters: 2, margin: {probe: 0.9, pooled: 0.9}}
rescue: [discard]
rounds:
  - name: first
    stages:
      - sft:
          data: [rows]
          steps: 2
          tune: full
          replay: {share: 0.0}
          anchor: {kl: 0.0}
          penalties: {ewc: {from: [general], memory_rows: 3}}
          gradient_rules: {agem: {from: [general], rows: 2}}
  - name: second
    stages:
      - sft: {data: [rows], steps: 1, tune: full, replay: {share: 0.0}, anchor: {kl: 0.0}}
"""


def _chat(prompt: str, answer: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text("\n".join(_chat(f"ask {i}", f"say {i}") for i in range(8)) + "\n")
    (tmp_path / "general.jsonl").write_text("\n".join(_chat(f"old {i}", f"yes {i}") for i in range(4)) + "\n")
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return tmp_path


@pytest.mark.path
def test_an_academic_method_is_named_in_log_verdict_report_and_card(place: Path) -> None:
    recipe = place / "recipe.yaml"
    checked = evertune("check", recipe)
    assert "keeps 2 float32 copies of the trained weights" in checked
    printed = evertune("run", recipe)
    assert "academic first/1-sft made with EWC (ewc), A-GEM (agem): not production-validated" in printed
    told = "Made with academic methods, not production-validated: EWC (ewc), A-GEM (agem)."
    assert told in printed
    events = json.loads(evertune("log", place / "run", "--json"))["events"]
    made = [one["body"] for one in events if one["kind"] == "checkpoint" and one["body"]["steps"]]
    assert [one["methods"] for one in made] == [["sft", "ewc", "agem"], ["sft"]]
    assert [one["standing"] for one in made] == ["academic", "production"]
    assert made[0]["plugins"][0]["memory_rows"] == {"general": 3}
    verdicts = [one["body"] for one in events if one["kind"] == "verdict"]
    assert verdicts[0]["standing"] == "academic"
    assert told in verdicts[0]["reasons"]
    page = (place / "run" / "report.html").read_text()
    header = page[page.index("<header>") : page.index("</header>")]
    assert "Academic, not production-validated:" in header
    assert "EWC" in header
    assert "  academic: ewc, agem\n" in evertune("log", place / "run")
    evertune("export", place / "run", "first/1-sft", "--out", place / "out")
    card = (place / "out" / "README.md").read_text()
    assert "**academic**: not production-validated" in card
    assert "| A-GEM (agem) | academic | arXiv:1812.00420 |" in card


def test_a_method_that_cannot_work_on_an_adapter_is_found_by_check(place: Path) -> None:
    text = RECIPE.replace("tune: full\n          replay", "tune: lora\n          replay")
    text = text.replace("{ewc: {from: [general], memory_rows: 3}}", "{si: {}}")
    (place / "recipe.yaml").write_text(text)
    told = evertune("check", place / "recipe.yaml", code=3)
    assert "rounds[0].stages[0].sft.penalties.si" in told
    assert "found tune: lora, expected full, which si works on" in told


@pytest.mark.parametrize(("tune", "copies"), [("full", True), ("lora", False)])
def test_a_frozen_start_beside_all_weights_is_stated_before_it_is_loaded(tune: str, copies: bool, place: Path) -> None:
    text = RECIPE.replace("tune: full\n          replay", f"tune: {tune}\n          replay")
    text = text.replace("penalties: {ewc: {from: [general], memory_rows: 3}}", "objective: {asft: {}}")
    text = text.replace("          gradient_rules: {agem: {from: [general], rows: 2}}\n", "")
    (place / "recipe.yaml").write_text(text)
    told = evertune("check", place / "recipe.yaml")
    assert ("sft.objective.asft: keeps 1 float32 copy of the trained weights" in told) == copies


ANCHORED = (
    "penalties: {ewc: {from: [general], memory_rows: 3}}\n          gradient_rules: {agem: {from: [general], rows: 2}}"
)
LORA = "tune: {lora: {rank: 4}}\n          replay"


@pytest.mark.parametrize(
    ("first", "tune", "told"),
    [
        ("gradient_rules: {progressive: {}}", LORA, "found lateral 8 and tune.lora.rank 4: the new column has no row"),
        ("gradient_rules: {packnet: {}}\n          ema: {decay: 0.9}", "", "found ema: an average mixes kept weights"),
        ("gradient_rules: {packnet: {keep: 1.0}}", "", "packnet.keep: found 1.0, expected a number below 1.0"),
        ("objective: {dft: {}, asft: {}}", "", "sft.objective: found 2 of them, expected one entry at most"),
    ],
)
def test_what_a_method_cannot_work_with_is_found_by_check(first: str, tune: str, told: str, place: Path) -> None:
    text = RECIPE.replace(ANCHORED, first)
    (place / "recipe.yaml").write_text(text.replace("tune: full\n          replay", tune) if tune else text)
    assert told in evertune("check", place / "recipe.yaml", code=3)


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("gradient_rules: {ogd: {from: [general, rows], memory_rows: 5}}", "ogd: keeps 10 float32 copies of"),
        ("gradient_rules: {gem: {from: [general, rows]}}", "gem: keeps 3 float32 copies of"),
        # 12 bytes for each of 64 words and 4 for the rest, at 256 rows of 1024 tokens.
        (
            "gradient_rules: {derpp: {}}",
            "derpp: keeps 1 float32 copy of the trained weights and up to 202.4 MB of outputs",
        ),
        ("penalties: {ewc: {from: [general]}}", "penalties.ewc: is an academic method, not production-validated"),
    ],
)
def test_what_a_method_keeps_follows_its_options(first: str, told: str, place: Path) -> None:
    (place / "recipe.yaml").write_text(RECIPE.replace(ANCHORED, first))
    assert told in evertune("check", place / "recipe.yaml")


def test_history_counts_as_the_sources_of_the_rounds_before(place: Path) -> None:
    text = RECIPE.replace(ANCHORED, "gradient_rules: {gem: {}}")
    later = text[text.index("  - name: second") :].replace("tune: full", "tune: full, gradient_rules: {gem: {}}")
    third = later.replace("second", "third").replace("[rows]", "[general]")
    fourth = later.replace("second", "fourth")
    (place / "recipe.yaml").write_text(text[: text.index("  - name: second")] + later + third + fourth)
    told = evertune("check", place / "recipe.yaml")
    for i, kept in enumerate(("1 float32 copy", "2 float32 copies", "2 float32 copies", "3 float32 copies")):
        assert f"rounds[{i}].stages[0].sft.gradient_rules.gem: keeps {kept} of the trained weights" in told


def test_a_round_in_between_that_loses_what_a_method_carries_is_warned_of(place: Path) -> None:
    text = RECIPE.replace(ANCHORED, "gradient_rules: {packnet: {}}")
    last = (
        text[text.index("  - name: second") :]
        .replace("second", "third")
        .replace("tune: full", "tune: full, gradient_rules: {packnet: {}}")
    )
    (place / "recipe.yaml").write_text(text + last)
    told = evertune("check", place / "recipe.yaml")
    assert "rounds[2].stages[0].sft.gradient_rules.packnet: begins anew: what an earlier stage left" in told
    assert "is lost at rounds[1].stages[0].sft, which does not name it" in told
    (place / "recipe.yaml").write_text(text.replace("second", "third"))
    told = evertune("check", place / "recipe.yaml")
    assert "begins anew" not in told
    assert "a rescue by interpolation leaves nothing" not in told
    (place / "recipe.yaml").write_text(text.replace("rescue: [discard]", "rescue: [interpolate: {}]"))
    assert "packnet: a rescue by interpolation leaves nothing" in evertune("check", place / "recipe.yaml")


def test_a_rule_of_dpo_stages_in_an_sft_stage_is_found_by_check(place: Path) -> None:
    text = RECIPE.replace("{agem: {from: [general], rows: 2}}", "{copr: {}}")
    (place / "recipe.yaml").write_text(text)
    told = evertune("check", place / "recipe.yaml", code=3)
    assert "sft.gradient_rules.copr: found sft, expected dpo" in told
