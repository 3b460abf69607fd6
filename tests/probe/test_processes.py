"""Parts of a suite in processes of their own: the same scores, errors under their names, and nobody left behind."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evertune.errors import ProbeError
from evertune.model.checkpoint import describe
from evertune.model.open import OpenModel, open_model
from evertune.probe import job as job_module
from evertune.probe import processes as module
from evertune.probe.job import score_each, score_open
from evertune.probe.processes import in_processes, is_divided
from evertune.probe.suite import AnyProbe
from tests.probe.test_score import QUESTIONS, make

TEXTS = [{"text": "One text."}, {"text": "Another, longer text."}, {"text": "Third."}]
ORDERS = [{"prompt": f"Say {word}", "answer": word} for word in ("yes", "no", "so", "why", "how")]


@pytest.fixture
def opened(tiny_model: Path) -> OpenModel:
    return open_model(describe(tiny_model), dtype="bfloat16", device="cpu")


@pytest.fixture
def probes(tmp_path: Path) -> list[AnyProbe]:
    verifier = {"contains": {}}
    made = {
        "knowledge": make(tmp_path, QUESTIONS, kind="choice"),
        "prose": make(tmp_path, TEXTS, kind="bits_per_byte"),
        "answers": make(tmp_path, ORDERS, kind="generate", verifier=verifier, max_new_tokens=9),
        "drawn": make(
            tmp_path, ORDERS, kind="generate", verifier=verifier, max_new_tokens=3, samples=2, temperature=1.0
        ),
    }
    return [replace(one, name=name) for name, one in made.items()]


def test_scores_are_those_of_one_process(
    opened: OpenModel, probes: list[AnyProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "PART_ITEMS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = score_open(opened, probes)
    finally:
        torch.set_num_threads(threads)
    pids = set()
    original = job_module._score_part

    def told(opened: OpenModel, part: AnyProbe) -> object:
        return replace(original(opened, part), prediction=(str(os.getpid()),) * len(part.items) * part.samples)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = score_open(opened, probes)
    assert list(together) == [one.name for one in probes]
    for name, scores in alone.items():
        assert together[name].ids == scores.ids
        np.testing.assert_array_equal(together[name].score, scores.score)
        assert together[name].prediction == scores.prediction
    monkeypatch.setattr(job_module, "_score_part", told)
    pids = {pid for one in score_open(opened, probes).values() for pid in one.prediction}
    assert len(pids) == 3 and str(os.getpid()) not in pids, "every process takes part, and this one does not"


def test_weights_are_laid_out_once_for_all(
    opened: OpenModel, probes: list[AnyProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evertune.model import packed_weights

    made = []
    monkeypatch.setattr(packed_weights, "_packed", lambda group: made.append(1) or [one.forward for one in group])
    monkeypatch.setattr(job_module, "PART_ITEMS", 2)
    monkeypatch.setattr(module, "is_divided", lambda _: False)
    with torch.no_grad():
        once = len(packed_weights._groups(opened.model))
    score_open(opened, probes)
    assert len(made) == once
    score_open(opened, probes)
    assert len(made) == 2 * once, "weights may have changed in between"


def test_an_error_of_a_child_is_raised_under_its_name(
    opened: OpenModel, probes: list[AnyProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    broken = replace(probes[2], verifier={"regex": {"pattern": "("}})
    with pytest.raises(ProbeError, match=r"probe 'answers': the verifier failed on 5 of 5 items") as caught:
        list(score_each(opened, [probes[0], broken]))
    assert caught.value.remedy.startswith("A failed verifier is not a wrong answer")
    assert "score_probe" in caught.value.__notes__[0], "where in the child it happened"


def _work(seconds: float) -> float:
    time.sleep(abs(seconds))
    if seconds < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return seconds


def test_results_come_as_they_are_done_and_a_death_is_an_error() -> None:
    assert list(in_processes(_work, [0.5, 0.0, 0.1], 2)) == [0.0, 0.1, 0.5]
    with pytest.raises(ProbeError, match="a process that scored items died with signal SIGKILL"):
        list(in_processes(_work, [30.0, -0.01, 30.0], 2))


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    def child(place: str) -> None:
        Path(place).write_text(str(os.getpid()))
        time.sleep(60)

    parent = os.fork()
    if not parent:
        try:
            list(in_processes(child, [str(tmp_path / "pid")], 1))
        finally:
            os._exit(0)
    try:
        place = tmp_path / "pid"
        _until(lambda: place.exists() and bool(place.read_text()))
        assert _is_alive(int(place.read_text()))
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    _until(lambda: not _is_alive(int(place.read_text())))


def _until(holds: "object") -> None:
    end = time.monotonic() + 20
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_probe_asked_alone_has_the_bits_it_has_among_others(
    opened: OpenModel, probes: list[AnyProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread scores it in either case: a run that is stopped asks only for what is missing.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    used: list[int] = []
    original = job_module._score_part

    def told(opened: OpenModel, part: AnyProbe) -> object:
        monkeypatch.undo()
        return replace(original(opened, part), prediction=(str(torch.get_num_threads()),) * len(part.items))

    monkeypatch.setattr(job_module, "_score_part", told)
    for asked in (probes[:1], probes[:2]):
        used += [int(one) for scores in score_open(opened, asked).values() for one in scores.prediction]
    assert set(used) == {1}


def test_when_a_suite_is_divided(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(one.nbytes for one in opened.model.parameters())
    # Room for five: the weights laid out and a copy, and the attention cache of one batch of answers, for each.
    monkeypatch.setattr(module, "_memory_bytes", lambda: 5 * (2 * weights + 2**30))
    for threads, expected in ((1, False), (2, True), (5, True), (6, False), (9, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert is_divided(opened) is expected, threads
    monkeypatch.setattr(module, "_memory_bytes", lambda: 1 << 40)
    for threads, expected in ((8, True), (9, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert is_divided(opened) is expected, threads
    monkeypatch.undo()
    assert module._memory_bytes() > 1 << 28
