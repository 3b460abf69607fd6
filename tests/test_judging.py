"""The gate on its own: two checkpoints, two logs, two tables; evidence that replays; renderings for CI systems."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from evertune.cli import app
from evertune.display import Display
from evertune.errors import IntegrityError, ProbeError, RecipeError
from evertune.judgement import judged, replay
from evertune.judging import judge_logs, judge_models, judge_tables
from evertune.probe.scores import ItemScores
from evertune.recipe.schema import Gate
from evertune.renderings import to_junit, to_markdown
from evertune.suites import load_gate, load_suite
from tests.logs import inspect_log, write_inspect, write_lm_eval
from tests.test_gate import FACTS, GUARD, flipped, generated, prose, scores
from tests.tiny import write_tiny_model

GATE = load_gate(["gate.margin.probe=0.05", "gate.margin.pooled=0.05", "gate.margin.format=0.05"])


def sides(lost: int) -> tuple[dict[str, ItemScores], dict[str, ItemScores]]:
    values = np.linspace(1.0, 1.2, 300)
    before = {"facts": scores("facts", FACTS), "sums": generated("sums", FACTS), "prose": prose(values)}
    after = {
        **before,
        "facts": scores("facts", flipped(FACTS, lost, 9 if lost == 18 else 0)),
        "prose": prose(values * 1.0001),
    }
    return before, after


def judge_sides(lost: int) -> dict[str, Any]:
    before, after = sides(lost)
    done = judged(
        candidate="new | <b>", baseline="old", digests={"candidate": "c", "baseline": "b"}, source="here",
        facts=dict.fromkeys(before, GUARD), settings=GATE.model_dump(), before=before, after=after,
        flips={"facts": [{"id": "i1", "prompt": "a | b\n<script>", "expected": "x", "before": "x", "after": "y`",
                          "before_score": 1.0, "after_score": 0.0}]},
    )  # fmt: skip
    return done.to_json()


def write(path: Path, body: dict[str, Any]) -> Path:
    path.write_text(json.dumps(body, sort_keys=True))
    return path


@pytest.mark.parametrize(("lost", "decision"), [(0, "PROMOTE"), (40, "HOLD"), (18, "INCONCLUSIVE")])
def test_evidence_replays_to_the_same_verdict(tmp_path: Path, lost: int, decision: str) -> None:
    body = judge_sides(lost)
    assert body["decision"] == decision
    assert replay(write(tmp_path / "e.json", body)) == body


def test_altered_evidence_is_refused_whichever_way_it_was_altered(tmp_path: Path) -> None:
    from evertune.hashing import digest_json

    body = judge_sides(40)
    body["decision"] = "PROMOTE"
    with pytest.raises(IntegrityError, match="it was altered after it was made"):
        replay(write(tmp_path / "e.json", body))
    # A digest made anew does not help: the items tell another story.
    del body["digest"]
    body["digest"] = digest_json(body)
    with pytest.raises(IntegrityError, match="decision is 'PROMOTE', replayed 'HOLD'"):
        replay(write(tmp_path / "e.json", body))
    # Nor are words taken over that say something else than the numbers.
    words = judge_sides(40)
    true = words["reasons"]
    words["reasons"] = ["facts +50.0 points.", *true[1:]]
    words["probes"][0]["reason"] = "nothing was lost"
    told = replay(write(tmp_path / "e.json", signed(words)))
    assert told["reasons"] == true
    assert told["probes"][0]["reason"] != "nothing was lost"
    assert replay(write(tmp_path / "e.json", told)) == told
    with pytest.raises(ProbeError, match="found version None in 'evertune_evidence', expected 1"):
        replay(write(tmp_path / "e.json", {"a": 1}))


def signed(body: dict[str, Any]) -> dict[str, Any]:
    """The body with a digest that fits."""
    from evertune.hashing import digest_json

    plain = {name: value for name, value in body.items() if name != "digest"}
    return {**plain, "digest": digest_json(plain)}


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("flips"),
        lambda body: body.pop("label"),
        lambda body: body.update(flips={"facts": [{"id": "i1"}]}),
        lambda body: body.update(items_asked="many"),
        lambda body: body["settings"].update(alpha=0),
        lambda body: body["items"]["facts"].update(samples=0),
        lambda body: body["items"]["facts"].update(weight=[0] * 300),
    ],
)
def test_evidence_that_is_not_whole_is_one_error(tmp_path: Path, change: Any) -> None:
    body = judge_sides(40)
    change(body)
    with pytest.raises(ProbeError, match="not evidence of this version"):
        replay(write(tmp_path / "e.json", signed(body)))


def test_junit_has_a_failure_for_each_thing_that_stands_in_the_way() -> None:
    held = ElementTree.fromstring(to_junit(judge_sides(40)))
    suite = held[0]
    cases = {one.attrib["name"]: one for one in suite.iter("testcase")}
    failed = {name for name, one in cases.items() if one.find("failure") is not None}
    assert failed == {"all guards", "facts", "decision"}
    assert cases["facts"].find("failure").attrib["type"] == "harm"  # type: ignore[union-attr]
    assert int(suite.attrib["failures"]) == 3
    assert int(suite.attrib["tests"]) == len(cases)
    promoted = ElementTree.fromstring(to_junit(judge_sides(0)))
    assert promoted.attrib["failures"] == "0"


def test_junit_holds_characters_that_xml_does_not_know() -> None:
    body = judge_sides(40)
    body["label"] = "a\x00\x1b\ud83d\ufffe\uffff & <"
    text = to_junit(body).encode("utf-8")
    assert "a\ufffd\ufffd\ufffd\ufffd\ufffd & <" in ElementTree.fromstring(text)[0].attrib["name"]


def test_half_a_surrogate_pair_in_an_answer_is_shown_and_in_a_prompt_refused(tmp_path: Path) -> None:
    old, new = (inspect_log(["C"] * (300 - lost) + ["I"] * lost) for lost in (0, 60))
    for one in new["samples"]:
        next(iter(one["scores"].values()))["answer"] = "half \ud83d"
    places = [write_inspect(tmp_path / f"{name}.eval", log) for name, log in (("old", old), ("new", new))]
    done = judge_logs("inspect", *places, gate=Gate(), roles={}, metrics={})
    assert json.dumps(done.to_json(), ensure_ascii=False).encode("utf-8").count("half \ufffd".encode()) == 5
    for log in (old, new):
        log["samples"][0]["input"] = "half \ud83d"
    places = [write_inspect(tmp_path / f"{name}.eval", log) for name, log in (("old", old), ("new", new))]
    with pytest.raises(ProbeError, match="half of a surrogate pair"):
        judge_logs("inspect", *places, gate=Gate(), roles={}, metrics={})


def test_markdown_shows_the_numbers_and_lets_no_text_become_markup() -> None:
    text = to_markdown(judge_sides(40))
    assert text.startswith("## HOLD: something was lost\n")
    row = next(line for line in text.splitlines() if line.startswith("| facts | champion"))
    # 40 of 300 items: 13.3 points.
    assert [cell.strip() for cell in row.split("|")][3:7] == ["300", "0.667", "0.533", "-13.3"]
    assert "<script>" not in text
    assert "a \\| b &lt;script&gt;" in text
    assert "y\\`" in text
    body = judge_sides(40)
    body["reasons"], body["flips"] = ["# head"], {"a_<b>": body["flips"]["facts"]}
    text = to_markdown(body)
    assert "\n- \\# head\n" in text
    assert "<summary>a_&lt;b&gt;: items" in text


def test_lm_eval_logs_are_judged_and_roles_hold(tmp_path: Path) -> None:
    right = FACTS.astype(float)
    old = write_lm_eval(tmp_path / "old", right)
    new = write_lm_eval(tmp_path / "new", flipped(FACTS, 40).astype(float))
    done = judge_logs("lm-eval", old, new, gate=Gate(), roles={}, metrics={})
    assert done.verdict.decision == "HOLD"
    assert len(done.flips["facts"]) == 5
    watched = judge_logs("lm-eval", old, new, gate=Gate(), roles={"facts": "watch"}, metrics={})
    assert watched.verdict.decision == "INCONCLUSIVE"
    with pytest.raises(ProbeError, match="--role fact: no such probe. Did you mean 'facts'"):
        judge_logs("lm-eval", old, new, gate=Gate(), roles={"fact": "watch"}, metrics={})


def test_samples_of_an_item_count_as_one_item(tmp_path: Path) -> None:
    # 100 items of 4 epochs: 20 lose all four answers, 40 one of four, so they change by -1 and by -0.25.
    old = write_inspect(tmp_path / "old.eval", inspect_log(["C"] * 400, epochs=4))
    values = ["I"] * 4 * 20 + ["I", "C", "C", "C"] * 40 + ["C"] * 4 * 40
    new = write_inspect(tmp_path / "new.eval", inspect_log(values, epochs=4))
    done = judge_logs("inspect", old, new, gate=Gate(), roles={}, metrics={})
    one = next(row for row in done.verdict.probes if row.probe == "facts")
    assert (one.n, one.clusters, one.samples) == (100, 100, 4)
    assert one.difference == pytest.approx(-0.30)
    # Within the 40 the changes are (-1, 0, 0, 0): variance 0.25, mean over all items 0.1, over four samples 0.025.
    # Between items: 0.2 x 1 + 0.4 x 0.0625 - 0.3^2 = 0.135, times 100/99.
    between = 0.135 * 100 / 99
    assert one.noise_share == pytest.approx(0.025 / between)
    # The t bound from a hundred means, t(0.95, 99) = 1.6604.
    assert one.ci90[0] == pytest.approx(-0.30 - 1.6604 * np.sqrt(between / 100), abs=1e-4)
    assert "100 items sampled 4 times" in one.reason


def test_tables_of_scores_are_judged(tmp_path: Path) -> None:
    before, after = sides(40)
    for side, tables in (("old", before), ("new", after)):
        for name, one in tables.items():
            (tmp_path / side).mkdir(exist_ok=True)
            one.write_parquet(tmp_path / side / f"{name}.parquet")
    assert judge_tables(tmp_path / "old", tmp_path / "new", gate=GATE, roles={}).verdict.decision == "HOLD"
    assert judge_tables(tmp_path / "old", tmp_path / "old", gate=GATE, roles={}).verdict.decision == "PROMOTE"
    (tmp_path / "new" / "sums.parquet").unlink()
    with pytest.raises(ProbeError, match="these probes are on one side only: sums"):
        judge_tables(tmp_path / "old", tmp_path / "new", gate=GATE, roles={})


def test_models_that_read_text_differently_are_refused_by_what_differs(tmp_path: Path) -> None:
    old, new = (write_tiny_model(tmp_path / name) for name in ("old", "new"))
    template = (new / "chat_template.jinja").read_text()
    (new / "chat_template.jinja").write_text(template.replace("a helpful", "an honest"))
    suite = load_suite()
    with pytest.raises(ProbeError, match=r"template: '\.\.\..*a helpful.*' on the old side, '\.\.\..*an honest"):
        judge_models(str(new), str(old), suite, tmp_path / "w", display=Display(quiet=True))


def test_a_tokenizer_saved_again_reads_alike(tmp_path: Path) -> None:
    from evertune.model.codec import load_codec

    folder = write_tiny_model(tmp_path / "old")
    first = load_codec(folder).digest
    file = folder / "tokenizer.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps({**dict(reversed(body.items())), "truncation": None}, indent=4))
    assert load_codec(folder).digest == first
    body["added_tokens"][0]["content"] = "<|other|>"
    file.write_text(json.dumps(body))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|other|>"}))
    assert load_codec(folder).digest != first


def test_the_general_suite_is_whole_and_decides() -> None:
    suite = load_suite()
    sizes = {one.name: len(one.items) for one in suite.probes}  # type: ignore[union-attr]
    assert all(count >= suite.gate.min_items for count in sizes.values())
    for one in suite.probes:
        if one.kind == "choice":
            places = np.bincount([item.answer for item in one.items], minlength=4)  # type: ignore[union-attr]
            assert places.max() - places.min() <= 1
        prompts = [item.prompt for item in one.items]  # type: ignore[union-attr]
        assert len(set(prompts)) == len(prompts)


def test_a_suite_is_read_from_items_from_yaml_and_from_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "probe-facts.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    (tmp_path / "prose.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    suite = load_suite([tmp_path], overrides=["gate.alpha=0.01"])
    assert {one.name: one.kind for one in suite.probes} == {
        "facts": "choice",
        "prose": "bits_per_byte",
        "sums": "generate",
    }
    assert suite.gate.alpha == 0.01
    yaml = tmp_path / "suite.yaml"
    yaml.write_text("probes:\n  facts: {path: probe-facts.jsonl, kind: choise}\n")
    with pytest.raises(RecipeError, match=r"suite.yaml:2, probes.facts.kind: .*Did you mean 'choice'"):
        load_suite([yaml])
    yaml.write_text("rescu: [discard]\n")
    with pytest.raises(RecipeError, match="unknown key 'rescu'") as told:
        load_suite([yaml])
    assert "'rescue'" not in str(told.value), "a recipe has that key, a suite has not"
    recipe = load_suite([Path(__file__).parent.parent / "recipes" / "debug.yaml"])
    assert [one.name for one in recipe.probes] == ["routes", "knowledge", "prose"]
    assert recipe.gate.min_items == 8
    (tmp_path / "odd.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ProbeError, match="the first item has question; expected"):
        load_suite([tmp_path / "odd.jsonl"])


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


def test_the_command_judges_logs_and_writes_every_file(tmp_path: Path) -> None:
    old = write_lm_eval(tmp_path / "old", FACTS.astype(float))
    new = write_lm_eval(tmp_path / "new", flipped(FACTS, 40).astype(float))
    files = {name: tmp_path / "out" / name for name in ("junit", "markdown", "evidence")}
    flags = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = run("--from-lm-eval", old, new, *flags)
    assert done.exit_code == 2
    assert ElementTree.parse(files["junit"]).getroot().attrib["failures"] == "3"
    assert files["markdown"].read_text().startswith("## HOLD")
    assert run("--replay", files["evidence"]).exit_code == 2
    printed = run("--from-lm-eval", old, new, "--json")
    assert json.loads(printed.output) == json.loads(files["evidence"].read_text())
    assert run("--from-lm-eval", old, old, "--set", "gate.margin.pooled=0.05").exit_code == 0
    assert run("--from-lm-eval", old, old, "--set", "gate.min_items=400").exit_code == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "found nothing to compare, expected one of"),
        (("a",), "found nothing to compare"),
        (("--from-lm-eval", "a", "b", "--against", "c"), "found --against and --from-lm-eval"),
        (("--from-lm-eval", "a", "b", "--probes", "c"), "--probes does not go with"),
        (("--from-lm-eval", "a", "b", "--role", "x=goal"), "found 'goal', expected one of guard, target, watch"),
        (("--from-lm-eval", "a", "b", "--metric", "x"), "--metric x: expected NAME=VALUE"),
        (("--from-lm-eval", "a", "b", "--set", "gate.alfa=1"), "unknown key 'alfa'. Did you mean 'alpha'"),
        (("a", "--against", "b", "--probes", "c.yaml"), "--probes c.yaml: no such file"),
    ],
)
def test_a_wrong_command_line_is_one_error(arguments: Any, message: str) -> None:
    with pytest.raises((RecipeError, ProbeError), match=message):
        CliRunner().invoke(app, ["gate", *arguments], catch_exceptions=False, standalone_mode=False)


@pytest.mark.path
def test_two_real_folders_are_judged_and_the_evidence_replays_without_them(tmp_path: Path) -> None:
    import shutil

    old, twin = (write_tiny_model(tmp_path / name) for name in ("old", "twin"))
    other = write_tiny_model(tmp_path / "other", seed=5)
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    rows = [
        {"prompt": "".join(rng.choice(letters, 6)), "choices": ["yes", "no way", "it may be"], "answer": i % 3}
        for i in range(240)
    ]
    items = tmp_path / "letters.jsonl"
    items.write_text("".join(json.dumps(one) + "\n" for one in rows))
    common = ("--probes", items, "--workspace", tmp_path / "w", "--set", "numerics.dtype=float32")
    wide = ("--set", "gate.margin.pooled=0.02")
    assert run(twin, "--against", old, *common, *wide, "--evidence", tmp_path / "e.json").exit_code == 0
    assert run(other, "--against", old, *common).exit_code in (2, 4)
    shutil.rmtree(old)
    shutil.rmtree(tmp_path / "w")
    assert run("--replay", tmp_path / "e.json").exit_code == 0
