"""One stream under several methods: equal new rows, R from each ledger, resumable, shared where it is the same."""

import json
from pathlib import Path

import pytest

from evertune.comparison import compare, interval_over, orders_of, tasks_of
from evertune.comparison_table import comparison_lines, comparison_page
from evertune.errors import RecipeError
from evertune.ledger import Ledger
from evertune.recipe.load import load_recipe
from tests.command import evertune

RECIPE = """\
evertune: 1
name: stream
academic: allow
base: model
workspace: run
data:
  sums: {path: sums.jsonl}
  names: {path: names.jsonl}
probes:
  sums: {path: asked-sums.jsonl, kind: choice, role: watch}
  spelling: {path: asked-names.jsonl, kind: choice, role: watch}
  rest: {path: rest.jsonl, kind: choice}
defaults:
  tune: {lora: {rank: 4}}
  replay: {share: 0.5}
rounds:
  - name: sums
    roles: {sums: target}
    stages:
      - sft: {data: [sums], epochs: 2, lr: 0.01, batch_rows: 4}
  - name: names
    roles: {spelling: target}
    stages:
      - sft: {data: [names], epochs: 2, lr: 0.01, batch_rows: 4}
"""


def _chat(prompt: str, answer: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, word in (("sums", "add"), ("names", "spell")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{_chat(f'{word} {i}', 'xyz'[i % 3])}\n" for i in range(8)))
        items = [{"prompt": f"please {word} {i}0", "choices": ["x", "y", "z"], "answer": i % 3} for i in range(6)]
        (tmp_path / f"asked-{name}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    (tmp_path / "rest.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    return tmp_path / "recipe.yaml"


@pytest.mark.path
def test_a_comparison_is_a_set_of_ordinary_runs_that_goes_on(place: Path) -> None:
    command = ("compare", place, "--methods", "naive,replay,ewc", "--seeds", "1", "--with", "ewc={memory_rows: 2}")
    printed = evertune(*command)
    assert "ewc: ewc keeps 2 float32 copies of the trained weights" in printed
    found = json.loads((place.parent / "run" / "compare" / "comparison.json").read_text())
    assert found["tasks"] == ["sums", "names"]
    assert [one["method"] for one in found["methods"]] == ["naive", "replay", "ewc"]
    assert len(found["runs"]) == 3
    for one in found["runs"]:
        R = one["matrix"]
        assert one["average"] == pytest.approx((R[1][0] + R[1][1]) / 2)
        assert one["backward"] == pytest.approx(R[1][0] - R[0][0])
        assert one["forgetting"] == pytest.approx(R[0][0] - R[1][0])
        assert one["peak_bytes"] > 1e8
    naive, replay, ewc = found["methods"]
    # 8 rows twice, in 4 steps of 4: as many new rows whatever is replayed, which is as many rows again in the second.
    assert naive["new_rows"] == replay["new_rows"] == ewc["new_rows"] == 32
    assert (naive["steps"], replay["steps"]) == (8, 12)
    assert ewc["against_first"]["mean"] == pytest.approx(found["runs"][2]["average"] - found["runs"][0]["average"])
    # Each is a run like any other, and says what it used.
    folder = place.parent / "run" / "compare" / "ewc" / "order-1-seed-1"
    events = Ledger.open(folder / "ledger.sqlite", create=False).events("checkpoint")
    assert [one.body["methods"] for one in events][1:] == [["sft", "lora"], ["sft", "lora", "ewc"]]
    assert "objects read, all clean" in evertune("verify", folder)
    # The first task is the same under every method, and is trained once.
    adapters = {
        method: {one.parent.name: one for one in place.parent.glob(f"run/compare/{method}/*/objects/*/adapter_model.*")}
        for method in ("naive", "replay", "ewc")
    }
    (key,) = set.intersection(*map(set, adapters.values()))
    assert [one[key].stat().st_nlink for one in adapters.values()] == [3, 3, 3]
    # The same command again does nothing, and says the same.
    stamps = {path: path.stat().st_mtime_ns for path in place.parent.glob("run/compare/*/*/ledger.sqlite")}
    again = evertune(*command)
    assert again.splitlines()[-6:] == printed.splitlines()[-6:]
    assert stamps == {path: path.stat().st_mtime_ns for path in place.parent.glob("run/compare/*/*/ledger.sqlite")}


def test_orders_are_the_recipes_its_reverse_and_drawn_ones() -> None:
    assert orders_of(["a", "b", "c"], 2) == [("a", "b", "c"), ("c", "b", "a")]
    assert len(set(orders_of(["a", "b", "c"], 6))) == 6
    assert orders_of(list("abcdef"), 5)[2:] == orders_of(list("abcdef"), 7)[2:5]
    with pytest.raises(RecipeError, match="expected 1 to 2"):
        orders_of(["a", "b"], 3)


def test_an_interval_over_runs_is_students() -> None:
    # Three runs, mean 2, deviation 1: half width t(0.95, 2) / sqrt 3 = 2.91999 / 1.73205.
    found = interval_over([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci90"] == pytest.approx([2 - 1.68586, 2 + 1.68586], abs=1e-4)
    assert interval_over([4.0]) == {"mean": 4.0, "ci90": None}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("epochs: 2, lr: 0.01, batch_rows: 4}\n  - name: names", "steps: 2}\n  - name: names", "a length in steps"),
        ("roles: {spelling: target}", "roles: {}", "found 0 targets and 0 probes with the name of a source"),
        (
            "      - sft: {data: [names], epochs: 2, lr: 0.01, batch_rows: 4}",
            "      - merge: {method: linear, models: {a: {path: origin}}}",
            "found merge, expected sft",
        ),
    ],
)
def test_what_is_no_stream_of_tasks_is_refused(before: str, after: str, told: str, place: Path) -> None:
    place.write_text(RECIPE.replace(before, after))
    with pytest.raises(RecipeError, match=told):
        tasks_of(load_recipe(place))


@pytest.mark.parametrize(
    ("methods", "options", "seeds", "told"),
    [
        (["naive", "ewcc"], {}, [0], "found the method 'ewcc', expected naive, or parts joined by"),
        (["naive", "naive"], {}, [0], "expected different ones"),
        (["naive"], {"ewc": {"weight": 2.0}}, [0], "options of 'ewc', which is in no method here"),
        (["ewc"], {"ewc": {"weigth": 2.0}}, [0], "unknown key 'weigth'"),
        (["naive"], {}, [-1], "expected different ones, none below 0"),
        (["si"], {}, [0], "'si' does not pass 'evertune check'(.|\n)*found tune: lora, expected full"),
    ],
)
def test_a_method_that_is_none_is_refused_before_anything_is_trained(
    methods: list[str], options: dict[str, dict[str, float]], seeds: list[int], told: str, place: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        compare(load_recipe(place), methods, options=options, seeds=seeds)
    assert not list(place.parent.glob("run/compare/*/*/ledger.sqlite"))


def test_the_table_says_what_it_does_not_know(place: Path) -> None:
    from evertune.comparison import Comparison, RunResult

    run = RunResult("naive", ("a", "b"), 0, [[0.5, 0.1], [0.4, 0.6]], 0.5, -0.1, 0.1, None, 4, 16, 100, 2.0, 10_000_000)
    lines = comparison_lines(Comparison(["a", "b"], ["naive"], [("a", "b")], [0], [run]))
    assert lines[3].split() == ["naive", "50.0", "-10.0", "10.0", "-", "16", "100", "2", "10"]
    assert "one run a method, so no intervals" in lines[-1]


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_trained(place: Path) -> None:
    page = place.parent / "nowhere" / "page.md"
    told = evertune("compare", place, "--methods", "naive", "--page", page, code=3)
    assert "--page: no folder" in told
    assert not (place.parent / "run").exists()


def test_the_page_has_every_run_and_keeps_what_was_written_by_hand() -> None:
    from evertune.comparison import Comparison, RunResult

    rest = {"forgetting": 0.1, "general": None, "steps": 4, "new_rows": 16, "tokens": 100, "seconds": 2.0}
    runs = [
        RunResult("naive", order, 0, [[0.5, 0.1], last], sum(last) / 2, -0.1, peak_bytes=10_000_000, **rest)
        for order, last in ((("a", "b"), [0.4, 0.6]), (("b", "a"), [0.2, 0.8]))
    ]
    made = Comparison(["a", "b"], ["naive"], [("a", "b"), ("b", "a")], [0], runs)
    page = comparison_page(made, command="evertune compare x.yaml", facts="2026-11-26, two cores")
    assert "    evertune compare x.yaml\n" in page
    # a is at 40 after the first order, at 80 after the second; b at 60 and 20.
    assert "| naive | 60.0 | 40.0 |" in page
    assert "| naive | 2 | 0 | 50.0 | -10.0 | - |" in page
    assert page.endswith("## Reading\n\nNot written yet.\n")
    again = comparison_page(made, command="evertune compare x.yaml", facts="later", before="old\n## Reading\n\nMine.\n")
    assert again.endswith("## Reading\n\nMine.\n")
    assert "old" not in again
