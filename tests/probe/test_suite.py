import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.probe import task_files
from evertune.probe.suite import LmEvalProbe, Probe, load_probe

CHOICE = {"prompt": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path.name


def load(folder: Path, *rows: Any, **settings: Any) -> Probe:
    name = write(folder / "items.jsonl", *rows)
    probe = load_probe("p", settings={"path": name, **settings}, root=folder)
    assert isinstance(probe, Probe)
    return probe


def test_choice_items_are_read_in_all_their_shapes(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    rows = [
        CHOICE,
        {"id": "named", "messages": turns, "choices": ["a", "b", "c"], "answer": "c", "cluster": "passage 1"},
    ]
    first, second = load(tmp_path, *rows, kind="choice").items
    assert (first.id, first.cluster, first.answer) == ("items:1", "items:1", 1)
    assert first.messages == ({"role": "user", "content": "2 + 2?"},)
    assert (second.id, second.cluster, second.answer, second.messages) == ("named", "passage 1", 2, tuple(turns))
    assert second.prompt == "Q"


def test_chance_is_the_mean_share_of_one_choice(tmp_path: Path) -> None:
    # Two choices and four: (1/2 + 1/4) / 2.
    four = {"prompt": "Q", "choices": ["a", "b", "c", "d"], "answer": 0}
    assert load(tmp_path, CHOICE, four, kind="choice").chance == 0.375
    assert load(tmp_path, {"text": "T T"}, kind="bits_per_byte").chance is None


def test_generating_items_may_be_choice_items(tmp_path: Path) -> None:
    probe = load(tmp_path, CHOICE, kind="generate", verifier={"exact": {}})
    assert (probe.items[0].answer, probe.items[0].choices) == ("4", ())
    assert probe.max_new_tokens == 64


def test_bits_per_byte_reads_texts_or_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (item,) = load(tmp_path, {"messages": messages}, kind="bits_per_byte").items
    assert (item.text, item.messages, item.prompt) == (None, tuple(messages), "Q")
    (item,) = load(tmp_path, {"text": "plain"}, kind="bits_per_byte").items
    assert (item.text, item.messages, item.prompt) == ("plain", (), "plain")


def test_a_system_turn_is_put_before_every_item(tmp_path: Path) -> None:
    probe = load(tmp_path, CHOICE, kind="choice", system="Be brief.")
    assert probe.items[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_compressed_files_globs_and_limits(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(CHOICE) + "\n")
    write(tmp_path / "b.jsonl", CHOICE, CHOICE)
    ids = [one.id for one in load_probe("p", settings={"path": "?.jsonl*", "kind": "choice"}, root=tmp_path).items]  # type: ignore[union-attr]
    assert ids == ["a:1", "b:1", "b:2"]
    probe = load_probe("p", settings={"path": "b.jsonl", "kind": "choice", "limit": 1}, root=tmp_path)
    assert isinstance(probe, Probe)
    assert len(probe.items) == 1


GENERATE = {"kind": "generate", "verifier": {"exact": {}}}
WRONG: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "answer out of range": ([{**CHOICE, "answer": 2}], {"kind": "choice"}, r"items\.jsonl:1: .*answer 2, expected an"),
    "answer is no choice": ([CHOICE, {**CHOICE, "answer": "5"}], {"kind": "choice"}, r"jsonl:2: found the answer '5'"),
    "one choice": ([{**CHOICE, "choices": ["3"], "answer": 0}], {"kind": "choice"}, r"jsonl:1: found 1 choices"),
    "duplicate choices": ([{**CHOICE, "choices": ["4", "4"]}], {"kind": "choice"}, r"jsonl:1: .*same text twice"),
    "duplicate ids": ([{**CHOICE, "id": "x"}] * 2, {"kind": "choice"}, r"jsonl:2: found the id 'x', also at .*:1"),
    "no rows": ([], {"kind": "choice"}, "found no rows"),
    "not JSON": (["{"], {"kind": "choice"}, r"jsonl:1: found malformed JSON"),
    "text for choice": ([{"text": "T"}], {"kind": "choice"}, r"jsonl:1: found the fields text"),
    "no answer": ([{"prompt": "Q"}], GENERATE, r"jsonl:1: found the fields prompt, expected 'answer'"),
    "answer for no verifier": ([{"prompt": "Q", "answer": 4}], GENERATE, r"jsonl:1: .*'answer'"),
    "bad pattern": (
        [{"prompt": "Q", "answer": "x"}],
        {"kind": "generate", "verifier": {"regex": "("}},
        r"jsonl:1: .*'\('",
    ),
    "cluster is a number": ([{**CHOICE, "cluster": 3}], {"kind": "choice"}, r"jsonl:1: found 3 in 'cluster'"),
    "two system turns": (
        [{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "answer": "A"}],
        {**GENERATE, "system": "T"},
        r"jsonl:1: found a system turn in the item, and the probe sets 'system' too",
    ),
    "mixed texts and messages": ([{"text": "T T"}, CHOICE], {"kind": "bits_per_byte"}, r"jsonl:2: found the fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, case: str) -> None:
    rows, settings, message = WRONG[case]
    with pytest.raises(ProbeError, match=message):
        load(tmp_path, *rows, **settings)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"probe 'p': .*absent\.jsonl"):
        load_probe("p", settings={"path": "absent.jsonl", "kind": "choice"}, root=tmp_path)


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prompt": lambda row: {**row, "prompt": "2 + 3?"},
    "choices": lambda row: {**row, "choices": ["3", "5"]},
    "answer": lambda row: {**row, "answer": 0},
    "id": lambda row: {**row, "id": "other"},
    "cluster": lambda row: {**row, "cluster": "other"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with_every_part_of_an_item(tmp_path: Path, change: str) -> None:
    before = load(tmp_path, CHOICE, kind="choice").digest
    assert load(tmp_path, CHANGES[change](CHOICE), kind="choice").digest != before


def test_the_digest_covers_what_shapes_a_score_and_nothing_else(tmp_path: Path) -> None:
    def digest(**settings: Any) -> str:
        return load(tmp_path, CHOICE, CHOICE, **settings).digest

    choice, generate = digest(kind="choice"), digest(**GENERATE)
    assert digest(kind="choice", normalise="sum") != choice
    assert digest(kind="choice", system="S") != choice
    assert digest(kind="choice", limit=1) != choice
    assert digest(**GENERATE, max_new_tokens=8) != generate
    assert digest(kind="generate", verifier={"contains": {}}) != generate
    # Its role is the gate's affair, and a choice generates nothing.
    assert digest(kind="choice", role="watch", margin=0.2, max_new_tokens=8) == choice


def test_reading_a_probe_imports_no_torch() -> None:
    code = "import sys, evertune.probe.suite, evertune.probe.job, evertune.probe.scores; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


TASK = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\ndoc_to_text: !function f.g\n"


def task_digest(folder: Path, **settings: Any) -> str:
    probe = load_probe("p", settings={"lm_eval": "task.yaml", **settings}, root=folder)
    assert isinstance(probe, LmEvalProbe)
    assert probe.task == str(folder / "task.yaml")
    return probe.digest


def test_a_task_file_is_known_by_the_bytes_of_all_it_names(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("num_fewshot: 0\n")
    (tmp_path / "task.yaml").write_text(TASK + "include: base.yaml\n")
    (tmp_path / "f.py").write_text("def g(doc): return ''\n")
    write(tmp_path / "items.jsonl", CHOICE)
    found = {task_digest(tmp_path)}
    found.add(task_digest(tmp_path, metric="acc"))
    found.add(task_digest(tmp_path, limit=3))
    for name in ("task.yaml", "base.yaml", "f.py", "items.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        found.add(task_digest(tmp_path))
    assert len(found) == 7
    (tmp_path / "unrelated.txt").write_text("x")
    assert task_digest(tmp_path) in found


def test_a_task_file_that_names_missing_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"task\.yaml cannot be read"):
        task_digest(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    with pytest.raises(ProbeError, match=r"names the data file .*items\.jsonl, and there is none"):
        task_digest(tmp_path)
    (tmp_path / "task.yaml").write_text("include: task.yaml\n")
    with pytest.raises(ProbeError, match="includes itself"):
        task_digest(tmp_path)


def test_lm_eval_missing_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ProbeError, match=r'pip install "evertune\[eval\]"'):
        load_probe("arc", settings={"lm_eval": "arc_easy"}, root=tmp_path)
