"""The recipe's page: complete, and the one that is committed."""

import re
from pathlib import Path

import pytest

from evertune.recipe.json_schema import recipe_json_schema
from evertune.recipe.presets import PRESETS
from evertune.recipe.reference import reference_text, write_reference

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_text(), "run `make docs`"


def test_every_field_has_a_row_with_its_type_and_its_meaning() -> None:
    schema = recipe_json_schema()
    models = [*schema["$defs"].values(), schema]
    mappings = [one for model in models for one in (model, *model.get("anyOf", [])) if "properties" in one]
    assert sum(len(one["properties"]) for one in mappings) > 80
    text = reference_text()
    for one in mappings:
        for key in one["properties"]:
            rows = re.findall(rf"^\| `{key}` \| (.+) \| (.*) \| (.+) \|$", text, re.MULTILINE)
            assert rows, key
            assert all(kind and meaning.strip() for kind, _, meaning in rows), key


def test_every_link_leads_to_a_section() -> None:
    text = reference_text()
    sections = {one.lower() for one in re.findall(r"^## (\w+)", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= sections


@pytest.mark.parametrize(
    "row",
    [
        "| `rank` | whole number above 0 to 1,024 | `16` |",
        "| `share` | number from 0 below 1 | `0.2` |",
        "| `data` | text or list of text or mapping to number above 0 | **required** |",
        "| `tune` | [Tune](#tune) |  |",
        "| `targets` | `all-linear` or list of text | `all-linear` |",
    ],
)
def test_types_and_ranges_are_those_of_the_schema(row: str) -> None:
    assert row in reference_text()


def test_the_presets_are_a_table_with_sources() -> None:
    presets = reference_text().partition("## Presets")[2]
    assert f"| | {' | '.join(PRESETS)} |" in presets
    assert "| `replay_share` | 0.3 | 0.2 | 0.2 |" in presets
    assert "| `tune` | LoRA, rank 16 | LoRA, rank 16 | full |" in presets
    assert len(re.findall(r"^- `\w+`: .*arXiv:\d{4}\.\d{5}", presets, re.MULTILINE)) >= 4


def test_writing_it_writes_the_same_bytes_again(tmp_path: Path) -> None:
    write_reference(tmp_path / "a.md")
    write_reference(tmp_path / "b.md")
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()
