"""Scores out of other tools' logs: what is read, and every way in which two sides are not comparable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.errors import ProbeError
from evertune.probe.inspect_logs import read_inspect_logs
from evertune.probe.lm_eval_logs import read_lm_eval_logs
from evertune.probe.logs import pair_logs
from tests.logs import inspect_log, write_inspect, write_lm_eval

RIGHT = [1.0, 0.0, 1.0, 1.0] * 3


def lm_eval_pair(old: Path, new: Path, **metrics: str) -> Any:
    return pair_logs(*(read_lm_eval_logs(one, metrics=metrics) for one in (old, new)), kind="lm-eval")


def inspect_pair(old: Path, new: Path, **metrics: str) -> Any:
    return pair_logs(*(read_inspect_logs(one, metrics=metrics) for one in (old, new)), kind="inspect")


def test_lm_eval_samples_are_read_item_by_item(tmp_path: Path) -> None:
    old = write_lm_eval(tmp_path / "old", RIGHT)
    new = write_lm_eval(tmp_path / "new", [0.0, *RIGHT[1:]])
    pair = lm_eval_pair(old, new)
    assert pair.before["facts"].score.tolist() == RIGHT
    assert (pair.after["facts"].score - pair.before["facts"].score).tolist() == [-1.0] + [0.0] * 11
    # In the order of the numbers: 10 stands after 9, on both sides.
    assert pair.after["facts"].ids == tuple(map(str, range(12)))
    assert pair.prompts["facts"]["3"] == "Question 3?"


def test_another_metric_can_be_named_and_an_unknown_one_cannot(tmp_path: Path) -> None:
    old = write_lm_eval(tmp_path / "old", RIGHT)
    assert lm_eval_pair(old, old, facts="acc_norm").before["facts"].score.tolist() == [1.0] * 12
    with pytest.raises(ProbeError, match=r"no metric 'acc_nrm'\. Did you mean 'acc_norm,none'\?"):
        lm_eval_pair(old, old, facts="acc_nrm")


def test_the_newest_evaluation_of_a_folder_counts(tmp_path: Path) -> None:
    folder = write_lm_eval(tmp_path, [0.0] * 12, date="2026-01-01T00-00-00.000000")
    write_lm_eval(folder, RIGHT, date="2026-02-01T00-00-00.000000")
    assert read_lm_eval_logs(folder, metrics={})["facts"].items[0].score == 1.0


def test_a_loss_needs_its_direction_told(tmp_path: Path) -> None:
    bare = write_lm_eval(tmp_path / "a", RIGHT, results=False, metrics=["score"], score=0.5)
    with pytest.raises(ProbeError, match="nothing says whether a higher 'score' is better"):
        read_lm_eval_logs(bare, metrics={})
    loss = write_lm_eval(tmp_path / "b", RIGHT, results=False, metrics=["bits_per_byte"], bits_per_byte=0.5)
    assert read_lm_eval_logs(loss, metrics={})["facts"].direction == "lower"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "Q: {i}"}, r"facts: prompt of 12 of 12 items, first of item '0': 'Question 0\?' on the old side"),
        ({"target": 9}, "facts: target of 12 of 12 items"),
        ({"doc_hash": "x"}, "facts: document of 12 of 12 items"),
        ({"chat_template": "{{ new }}"}, r"facts: chat_template: None on the old side, '{{ new }}' on the new"),
        ({"right": RIGHT[:10]}, "facts: 2 items only on the old side: '10', '11'"),
        ({"task": "other"}, "tasks only on the old side: facts"),
    ],
)
def test_lm_eval_sides_that_differ_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    old = write_lm_eval(tmp_path / "old", RIGHT)
    new = write_lm_eval(tmp_path / "new", **{"right": RIGHT, **changed})
    with pytest.raises(ProbeError, match=message):
        lm_eval_pair(old, new)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"jsonl:1: not JSON"),
        ('{"a": 1}', r"jsonl:1: no 'doc_id'"),
        ('{"doc_id": 0, "metrics": ["acc"], "acc": "x"}', "found 'x' in 'acc'"),
        ('{"doc_id": 0, "metrics": ["acc"], "acc": NaN}', "found nan in 'acc'"),
        ("", "no sample in it"),
    ],
)
def test_broken_lm_eval_logs_are_one_error_with_a_place(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "samples_facts_2026-01-02T03-04-05.6.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ProbeError, match=message):
        read_lm_eval_logs(file, metrics={})


def test_what_lm_eval_really_writes_is_read(tmp_path: Path) -> None:
    """A tiny model evaluated by lm-eval itself, with its own tracker writing the files."""
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.probe.test_lm_eval import ROWS, TASK
    from tests.tiny import write_tiny_model

    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "facts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    (tmp_path / "task" / "task.yaml").write_text(TASK.replace("facts.jsonl", str(tmp_path / "task" / "facts.jsonl")))
    sides = []
    for seed in (0, 1):
        folder = write_tiny_model(tmp_path / f"model{seed}", seed=seed)
        model = HFLM(
            pretrained=AutoModelForCausalLM.from_pretrained(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            batch_size=4,
        )
        tracker = EvaluationTracker(output_path=str(tmp_path / f"out{seed}"))
        manager = TaskManager(include_path=str(tmp_path / "task"), include_defaults=False)
        results = simple_evaluate(
            model=model, tasks=["probe_facts"], task_manager=manager, log_samples=True, evaluation_tracker=tracker,
            apply_chat_template=True, bootstrap_iters=0,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        tracker.save_results_samples(task_name="probe_facts", samples=samples["probe_facts"])
        sides.append((tmp_path / f"out{seed}", results["results"]["probe_facts"]["acc,none"]))
    pair = lm_eval_pair(sides[0][0], sides[1][0])
    for scores, (_, told) in zip((pair.before, pair.after), sides, strict=True):
        assert scores["probe_facts"].value == pytest.approx(told)
    assert "<|im_start|>user\nThe sky is" in pair.prompts["probe_facts"]["0"]
    assert pair.before["probe_facts"].cluster == ("0", "kinds", "sums")


@pytest.mark.parametrize("name", ["log.json", "log.eval"])
def test_inspect_logs_are_read_with_letters_words_and_numbers(tmp_path: Path, name: str) -> None:
    file = write_inspect(tmp_path / name, inspect_log(["C", "I", "P", "N", 0.25, True, "yes"]))
    task = read_inspect_logs(file, metrics={})["facts"]
    assert [one.score for one in task.items] == [1.0, 0.0, 0.5, 0.0, 0.25, 1.0, 1.0]


def test_epochs_are_samples_of_an_item(tmp_path: Path) -> None:
    file = write_inspect(tmp_path / "log.eval", inspect_log(["C", "I", "C", "C"], epochs=2))
    scores = inspect_pair(file, file).before["facts"]
    assert (scores.ids, scores.cluster, scores.samples) == (("0#1", "0#2", "1#1", "1#2"), ("0", "0", "1", "1"), 2)
    assert np.array_equal(scores.score, [1, 0, 1, 1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 1.0}, r"facts: sampling: {} on the old side, {'temperature': 1.0} on the new"),
        ({"system": "Reply."}, "facts: turns before the answer of 4 of 4 items"),
        ({"epochs": 2}, "facts: samples of each item: 1 on the old side, 2 on the new"),
    ],
)
def test_inspect_sides_that_differ_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    old = write_inspect(tmp_path / "old.eval", inspect_log(["C"] * 4))
    new = write_inspect(tmp_path / "new.eval", inspect_log(["C"] * 4, **changed))
    with pytest.raises(ProbeError, match=message):
        inspect_pair(old, new)


def test_unfinished_failed_and_foreign_inspect_logs_are_refused(tmp_path: Path) -> None:
    cancelled = write_inspect(tmp_path / "a" / "log.eval", inspect_log(["C"], status="cancelled"))
    with pytest.raises(ProbeError, match="has the status 'cancelled', expected 'success'"):
        read_inspect_logs(cancelled, metrics={})
    log = inspect_log(["C", "C"])
    log["samples"][1]["error"] = {"message": "boom"}
    with pytest.raises(ProbeError, match="sample '1' ended in an error"):
        read_inspect_logs(write_inspect(tmp_path / "b" / "log.json", log), metrics={})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.json").write_text("{}")
    with pytest.raises(ProbeError, match="no log of Inspect in it"):
        read_inspect_logs(tmp_path / "c", metrics={})
