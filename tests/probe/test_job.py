import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model
from evertune.probe import job as job_module
from evertune.probe.job import probe_key, run_probes, score_open
from evertune.probe.scores import ItemScores
from evertune.probe.suite import AnyProbe, load_probe
from evertune.workspace import Workspace

NUMERICS = {"dtype": "float32", "device": "cpu", "threads": None}
CHOICES = [
    {"prompt": "Sky?", "choices": ["blue", "red"], "answer": 0, "cluster": "a"},
    {"prompt": "Sea?", "choices": ["blue", "red"], "answer": 1, "cluster": "a"},
    {"prompt": "Sun?", "choices": ["blue", "red"], "answer": 0, "cluster": "b"},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "knowledge": {"kind": "choice"},
    "prose": {"kind": "bits_per_byte"},
    "answers": {"kind": "generate", "verifier": {"contains": {}}, "max_new_tokens": 3},
}


@pytest.fixture
def probes(tmp_path: Path) -> list[AnyProbe]:
    rows = {
        "knowledge": CHOICES,
        "prose": [{"text": "One text."}, {"text": "Another, longer text."}],
        "answers": [{"prompt": "Say yes", "answer": "yes"}, {"prompt": "Say no", "answer": "no"}],
    }
    for name, values in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in values))
    return [
        load_probe(name, settings={"path": f"{name}.jsonl", **settings}, root=tmp_path)
        for name, settings in SETTINGS.items()
    ]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "run", create=True)


@pytest.fixture
def checkpoint(tiny_model: Path) -> Checkpoint:
    return describe(tiny_model)


def test_each_probe_becomes_an_object_with_its_facts(
    probes: list[AnyProbe], workspace: Workspace, checkpoint: Checkpoint
) -> None:
    keys = run_probes(checkpoint, probes, workspace, numerics=NUMERICS)
    assert keys == [probe_key(checkpoint, one, NUMERICS) for one in probes]
    manifests = [workspace.manifest(key) for key in keys]
    bodies = [one.record["probe"] for one in manifests if one is not None]
    scores = [ItemScores.read_parquet(workspace.path(key) / "scores.parquet") for key in keys]
    for probe, body, score in zip(probes, bodies, scores, strict=True):
        assert body["checkpoint"] == checkpoint.digest
        assert (body["probe"], body["kind"], body["n"]) == (probe.name, probe.kind, len(score.ids))
        assert body["value"] == score.value
        assert body["items_digest"] == probe.digest
        low, high = body["ci90"]
        assert low <= body["value"] <= high
    assert [one["clusters"] for one in bodies] == [2, 2, 2]
    assert [one["direction"] for one in bodies] == ["higher", "lower", "higher"]
    assert [one["chance"] for one in bodies] == [0.5, None, None]
    assert [one["format_validity"] is None for one in bodies] == [True, True, False]
    assert [one["stop_rate"] is None for one in bodies] == [True, True, False]
    assert all(workspace.verify(key) == [] for key in keys)


def test_what_is_there_is_not_scored_again(
    probes: list[AnyProbe], workspace: Workspace, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_probes(checkpoint, probes[:1], workspace, numerics=NUMERICS)
    scored = []
    original = job_module._score_part
    monkeypatch.setattr(
        job_module, "_score_part", lambda opened, part: scored.append(part.name) or original(opened, part)
    )
    monkeypatch.setattr("evertune.probe.processes.is_divided", lambda _: False)
    keys = run_probes(checkpoint, probes, workspace, numerics=NUMERICS)
    assert scored == ["prose", "answers"]
    monkeypatch.setattr("evertune.model.open.open_model", lambda *_, **__: pytest.fail("opened a model for nothing"))
    assert run_probes(checkpoint, probes, workspace, numerics=NUMERICS) == keys


def test_the_key_names_weights_items_and_numerics(
    probes: list[AnyProbe], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from dataclasses import replace

    from tests.tiny import write_tiny_model

    other = describe(write_tiny_model(tmp_path / "other", seed=1))
    keys = {
        probe_key(checkpoint, probes[0], NUMERICS),
        probe_key(other, probes[0], NUMERICS),
        probe_key(checkpoint, probes[1], NUMERICS),
        probe_key(checkpoint, probes[0], {**NUMERICS, "dtype": "bfloat16"}),
        probe_key(checkpoint, replace(probes[0], digest="0" * 64), NUMERICS),
    }
    assert len(keys) == 5
    assert probe_key(checkpoint, probes[0], {**NUMERICS, "threads": 7}) in keys


def test_scores_do_not_depend_on_which_other_probes_run(probes: list[AnyProbe], checkpoint: Checkpoint) -> None:
    opened = open_model(checkpoint, dtype="bfloat16", device="cpu")
    together = score_open(opened, probes)
    for probe in reversed(probes):
        alone = score_open(opened, [probe])[probe.name]
        np.testing.assert_array_equal(alone.score, together[probe.name].score)
        assert alone.prediction == together[probe.name].prediction
