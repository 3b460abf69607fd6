"""A model's own answers as rows: what it says itself, filtered, and never a guess of what it did not finish."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from evertune.data.rows import Row
from evertune.probe import recordings
from evertune.probe.generate import Answer
from evertune.probe.recordings import record_answers
from tests.tiny import write_tiny_model


def asked(count: int) -> list[Row]:
    return [
        Row("s", f"r{i}", i, Path("r"), {"prompt": f"Say {i}", "answer": f"{i}"}, "verifiable") for i in range(count)
    ]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny_model(tmp_path / "m"))


def say(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str], stopped: Sequence[bool] | None = None) -> None:
    """Let the model say these texts: a random one says nothing that ends."""

    def answers(forward: object, prompts: Sequence[Sequence[int]], **_: object) -> list[Answer]:
        codec = recordings_codec[0]
        ends = stopped or [True] * len(texts)
        return [Answer(tuple(codec.encode(text)), end, True) for text, end in zip(texts, ends, strict=True)]

    recordings_codec: list = []
    whole = recordings.open_model

    def opened(*arguments: object, **named: object) -> object:
        found = whole(*arguments, **named)  # type: ignore[arg-type]
        recordings_codec.append(found.codec)
        return found

    monkeypatch.setattr(recordings, "open_model", opened)
    monkeypatch.setattr(recordings, "generate_answers", answers)


def test_an_answer_becomes_the_last_turn(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["zero", "one"])
    found = record_answers(model, asked(2), max_new_tokens=8)
    assert found.rows[1]["messages"] == [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "one"}]
    assert (found.rows[1]["id"], found.rows[1]["recorded_from"]) == ("recorded-r1", model)


def test_what_did_not_end_or_is_empty_or_wrong_is_dropped(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["0", "1", " ", "7"], [True, False, True, True])
    found = record_answers(model, asked(4), max_new_tokens=8, verifier={"exact": {}})
    assert [one["id"] for one in found.rows] == ["recorded-r0"]
    assert found.dropped == {"not ended within the limit": 1, "empty": 1, "not verified": 1}


def test_the_likeliest_are_kept(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, ["aaaa", "bbbb", "cccc", "dddd"])
    monkeypatch.setattr(recordings, "score_rows", lambda _, rows: [[-3.0], [-1.0], [-2.0], [-4.0]])
    found = record_answers(model, asked(4), max_new_tokens=8, keep_likely=0.5)
    assert [one["id"] for one in found.rows] == ["recorded-r1", "recorded-r2"]


def test_a_real_model_is_asked_and_its_unfinished_answers_are_told(model: str) -> None:
    found = record_answers(model, asked(3), max_new_tokens=4)
    assert len(found.rows) + sum(found.dropped.values()) == 3
    long = [Row("s", "r", 1, Path("r"), {"prompt": "x" * 600, "answer": ""}, "verifiable")]
    assert record_answers(model, long, max_new_tokens=4).dropped == {"longer than the model's context": 1}
