"""lm-eval as the outside check of our own scoring, and as a probe itself."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from evertune.data.leak import find_leaks
from evertune.data.rows import Row
from evertune.errors import ProbeError
from evertune.model.forward import Forward, Tokens, score_branches
from evertune.model.open import OpenModel
from evertune.probe.job import score_one
from evertune.probe.lm_eval import _Model
from evertune.probe.score import score_probe
from evertune.probe.scores import ItemScores
from evertune.probe.suite import load_probe
from tests.probe.models import opened_tiny
from tests.tiny import write_tiny_model

ROWS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": ["blue", "red"], "answer": 0},
    {"question": "An apple is", "choices": ["a fruit", "a tool", "a metal"], "answer": 0, "cluster": "kinds"},
    {"question": "Ten and ten make", "choices": ["twenty", "ten"], "answer": 0, "cluster": "sums"},
]
TASK = """
task: probe_facts
dataset_path: json
dataset_kwargs: {data_files: {test: facts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
GENERATE = """
task: probe_say
dataset_path: json
dataset_kwargs: {data_files: facts.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: lower, filter: [{function: lowercase}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return opened_tiny(write_tiny_model(tmp_path_factory.mktemp("lm") / "model", tied=False))


def run(opened: OpenModel, folder: Path, task: str = TASK, rows: Any = ROWS, **settings: Any) -> ItemScores:
    (folder / "task.yaml").write_text(task)
    (folder / "facts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    probe = load_probe("facts", settings={"lm_eval": "task.yaml", **settings}, root=folder)
    return score_one(opened, probe)


def _requests(opened: OpenModel, row: dict[str, Any]) -> list[Instance]:
    prompt = opened.codec.render([{"role": "user", "content": row["question"]}], add_generation_prompt=True)
    return [Instance("loglikelihood", {}, (prompt, one), 0) for one in row["choices"]]


def test_our_log_likelihoods_equal_lm_evals_on_the_same_tokens(opened: OpenModel) -> None:
    codec, harness = opened.codec, _Model(opened, "p")
    pairs = [
        (
            codec.encode_prompt([{"role": "user", "content": row["question"]}]),
            [codec.encode(one) for one in row["choices"]],
        )
        for row in ROWS
    ]
    flat = [(("", ""), prompt, choice) for prompt, choices in pairs for choice in choices]
    theirs = iter(harness._loglikelihood_tokens(flat, disable_tqdm=True))
    groups = [
        [Tokens((*prompt, *one), (False,) * len(prompt) + (True,) * len(one)) for one in choices]
        for prompt, choices in pairs
    ]
    for group in score_branches(Forward(opened), groups):
        for ours in group:
            assert sum(ours) == pytest.approx(next(theirs)[0], abs=1e-4)


def test_our_tokens_are_lm_evals_where_the_prompt_ends_in_no_blank(tmp_path: Path) -> None:
    # lm-eval moves blanks at the prompt's end into the answer; a template without them gives the same sums.
    folder = write_tiny_model(tmp_path / "model", tied=False)
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    opened = opened_tiny(folder)
    rows = [{"prompt": one["question"], "choices": one["choices"], "answer": one["answer"]} for one in ROWS]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    probe = load_probe("p", settings={"path": "items.jsonl", "kind": "choice", "normalise": "sum"}, root=tmp_path)
    scores = score_probe(opened, probe)  # type: ignore[arg-type]
    requests = [one for row in ROWS for one in _requests(opened, row)]
    theirs = iter(_Model(opened, "p").loglikelihood(requests, disable_tqdm=True))
    for row, gap, taken in zip(rows, scores.gap, scores.prediction, strict=True):  # type: ignore[arg-type]
        sums = [next(theirs)[0] for _ in row["choices"]]
        assert taken == row["choices"][int(np.argmax(sums))]
        assert gap == pytest.approx(sorted(sums)[-1] - sorted(sums)[-2], abs=1e-4)


def test_a_task_file_gives_a_score_per_item(opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # data files are found from the task file, not from here
    folder = tmp_path / "tasks"
    folder.mkdir()
    before = random.getstate()
    scores = run(opened, folder)
    assert random.getstate() == before
    assert (scores.kind, scores.direction, scores.ids) == ("lm_eval", "higher", ("0", "1", "2"))
    assert scores.cluster == ("0", "kinds", "sums")
    assert set(scores.score) <= {0.0, 1.0}
    # By hand: the larger sum of log-likelihoods, asked through the chat template.
    harness = _Model(opened, "p")
    for row, score in zip(ROWS, scores.score, strict=True):
        sums = [one for one, _ in harness.loglikelihood(_requests(opened, row), disable_tqdm=True)]
        assert score == float(int(np.argmax(sums)) == row["answer"])


def test_the_same_task_twice_pairs_and_other_data_does_not(opened: OpenModel, tmp_path: Path) -> None:
    one, two = run(opened, tmp_path), run(opened, tmp_path)
    assert one.items_digest == two.items_digest
    np.testing.assert_array_equal(one.score, two.score)
    other = run(opened, tmp_path, rows=[*ROWS[:2], {**ROWS[2], "answer": 1}])
    assert other.items_digest != one.items_digest


def test_limit_and_metric_are_obeyed(opened: OpenModel, tmp_path: Path) -> None:
    assert run(opened, tmp_path, limit=2).ids == ("0", "1")
    run(opened, tmp_path, metric="acc_norm")
    with pytest.raises(ProbeError, match="has no metric 'f1' per item, it has: acc,none, acc_norm,none"):
        run(opened, tmp_path, metric="f1")


def test_a_generating_task_is_read_under_one_filter(opened: OpenModel, tmp_path: Path) -> None:
    scores = run(opened, tmp_path, task=GENERATE)
    assert len(scores.ids) == 3
    assert scores.expected == ("blue", "a fruit", "twenty")
    lower = run(opened, tmp_path, task=GENERATE, metric="exact_match,lower")
    assert len(lower.ids) == 3
    with pytest.raises(ProbeError, match="exact_match,first, exact_match,lower"):
        run(opened, tmp_path, task=GENERATE, metric="exact_match,upper")


@pytest.mark.parametrize("task", [TASK, GENERATE])
def test_what_lm_eval_would_cut_is_an_error(opened: OpenModel, tmp_path: Path, task: str) -> None:
    long = {**ROWS[0], "question": "x" * 600}
    with pytest.raises(ProbeError, match=r"needs \d{3} tokens, and the model's context has 512"):
        run(opened, tmp_path, task=task, rows=[ROWS[0], long])


def test_a_task_that_is_not_here_is_an_error_with_its_reason(opened: OpenModel, tmp_path: Path) -> None:
    missing = TASK.replace("dataset_path: json", "dataset_path: someone/somewhere").replace(
        "dataset_kwargs: {data_files: {test: facts.jsonl}}\n", ""
    )
    with pytest.raises(ProbeError, match=r"lm-eval task .* failed: .*"):
        run(opened, tmp_path, task=missing)


def test_a_task_leaves_nothing_behind(opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    run(opened, tmp_path)
    assert not (tmp_path / "home").exists()


def test_items_of_a_task_are_searched_for_in_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))
    words = [f"{first}{last}" for first in ("lan", "ri", "wat", "tern") for last in ("tor", "ber", "min", "sal", "do")]
    questions = [" ".join(random.Random(i).sample(words, 18)) + "?" for i in range(9)]
    rows = [{"question": one, "choices": ["left", "right"], "answer": i % 2} for i, one in enumerate(questions)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        TASK.replace('"{{question}}"', '"Please read with care, then answer.\\nQuestion: {{question}}\\nAnswer:"')
    )
    probe = load_probe("facts", settings={"lm_eval": "task.yaml", "limit": 8}, root=tmp_path)
    asked = f"Please read with care, then answer.\nQuestion: {questions[3]}\nAnswer:"
    assert [one.text for one in probe.texts() if one.item == "3"] == [asked, questions[3]]
    assert {one.item for one in probe.texts()} == {str(i) for i in range(8)}
    found = find_leaks(
        [
            Row("s", "bare", 1, Path("r"), {"text": questions[2].upper()}, "text"),
            Row("s", "whole", 2, Path("r"), {"text": asked}, "text"),
            Row("s", "inside", 3, Path("r"), {"text": f"We talked. {questions[5]} Nobody knew."}, "text"),
            Row("s", "past the limit", 4, Path("r"), {"text": questions[8]}, "text"),
            Row("s", "template", 5, Path("r"), {"text": "Please read with care, then answer. Question: Why?"}, "text"),
        ],
        probe.texts(),
    )
    # Prompt and question are one item: it is told once, as what it is most.
    assert [(one.row_id, one.item, one.how) for one in found if one.is_leak] == [
        ("bare", "2", "normalised"),
        ("whole", "3", "exact"),
        ("inside", "5", "near-duplicate"),
    ]
    # They are kept: lm-eval is not loaded a second time.
    monkeypatch.setitem(sys.modules, "evertune.probe.lm_eval", None)
    assert len(probe.texts()) == 16


def test_a_task_whose_items_cannot_be_read_stops_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))
    probe = load_probe("far", settings={"lm_eval": "arc_easy"}, root=tmp_path)
    with pytest.raises(ProbeError, match="items of the lm-eval task 'arc_easy' cannot be read"):
        probe.texts()
