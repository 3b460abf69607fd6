"""Which items a probe's loss is over, and what should be likely in each."""

import json
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.model.checkpoint import describe
from evertune.model.codec import Codec, load_codec
from evertune.probe.loss import loss_items
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe, load_probe


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(describe(tiny_model).path)


def probe(folder: Path, kind: str, rows: list[dict[str, Any]], **settings: Any) -> Probe:
    (folder / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = load_probe("p", settings={"path": "p.jsonl", "kind": kind, **settings}, root=folder)
    assert isinstance(found, Probe)
    return found


def scores(one: Probe, values: list[float], predictions: tuple[str, ...] = (), samples: int = 1) -> ItemScores:
    ids = [item.id if samples == 1 else f"{item.id}#{k + 1}" for item in one.items for k in range(samples)]
    return ItemScores(
        probe="p", kind=one.kind, direction="higher", ids=tuple(ids), score=values,
        cluster=tuple(ids), prediction=predictions, items_digest="d", template_digest="t", samples=samples,
    )  # fmt: skip


def test_items_that_fell_come_first(codec: Codec, tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": "?", "choices": ["yes", "no"], "answer": 0} for n in range(5)]
    one = probe(tmp_path, "choice", rows)
    found = loss_items(codec, one, before=scores(one, [0, 1, 1, 0, 1]), after=scores(one, [1, 1, 0, 0, 0]), most=3)
    assert {item.id for item in found[:2]} == {"i2", "i4"}
    assert found[2].id == "i1"
    assert all(item.right == 0 and len(item.texts) == 2 for item in found)
    # Per byte, times the mean of 3 and 2 bytes.
    assert found[0].scales == (2.5 / 3, 2.5 / 2)


def test_of_a_generated_answer_the_one_that_was_right_should_stay_likely(codec: Codec, tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": "?", "answer": "x"} for n in range(2)]
    one = probe(tmp_path, "generate", rows, verifier={"exact": {}}, samples=2, temperature=1.0)
    before = scores(one, [0, 1, 0, 0], ("wrong", "a right one", "no", "never"), samples=2)
    found = loss_items(codec, one, before=before, after=scores(one, [0] * 4, ("",) * 4, samples=2), most=5)
    assert [item.id for item in found] == ["i0"]
    (text,) = found[0].texts
    said = codec.decode([token for token, counts in zip(text.ids, text.counted, strict=True) if counts])
    assert said == "a right one"
    assert found[0].scales == (1 / sum(text.counted),)
    with pytest.raises(ProbeError, match="no item that was answered rightly before"):
        nothing = scores(one, [0] * 4, ("",) * 4, samples=2)
        loss_items(codec, one, before=nothing, after=nothing, most=5)
