"""The loop's parts: penalties on weights, gradients that agree or not, masks from seeds, sinks."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.errors import RecipeError, TrainingError
from evertune.train import loop, stage
from evertune.train.batch import collate
from evertune.train.loop import cosines, dropout_seed, make_accelerator
from evertune.train.penalty import PositionValues
from evertune.train.sft import run_sft
from evertune.train.sink import Sink, require_trackers, start_trackers
from tests.train.stage import make_spec, open_workspace
from tests.train.test_reference import ROWS


def test_rows_are_padded_on_the_right_and_positions_point_at_what_they_predict():
    batch = collate(ROWS, pad_id=256, device=torch.device("cpu"))
    assert batch.ids_BT.shape == (3, 17)
    assert (batch.ids_BT[2, 4:] == 256).all()
    counted = [int(token) for row in ROWS for token in row.ids[1:][row.counted[1:]]]
    assert batch.targets_N.tolist() == counted
    counts = [int(row.counted[1:].sum()) for row in ROWS]
    assert batch.positions_of([False, True, False]).tolist() == [
        *[False] * counts[0],
        *[True] * counts[1],
        *[False] * counts[2],
    ]


def test_padding_changes_no_hidden_state(tiny_model):
    """Why no attention mask is made."""
    from transformers import AutoModelForCausalLM

    decoder = AutoModelForCausalLM.from_pretrained(tiny_model).get_decoder()
    batch = collate(ROWS, pad_id=256, device=torch.device("cpu"))
    together = decoder(input_ids=batch.ids_BT).last_hidden_state
    for b, row in enumerate(ROWS):
        alone = decoder(input_ids=torch.from_numpy(row.ids).long().unsqueeze(0)).last_hidden_state[0]
        assert torch.allclose(together[b, : len(row.ids)], alone, atol=1e-6)


def test_the_cosine_of_gradients_runs_over_all_tensors_of_a_part():
    # (1, 0; 2) and (0, 3; 2): dot 4, norms sqrt(5) and sqrt(13). The third has no like in the other gradient.
    one = {"h.1.a": torch.tensor([1.0, 0.0]), "h.12.b": torch.tensor([2.0])}
    other = {"h.1.a": torch.tensor([0.0, 3.0]), "h.12.b": torch.tensor([2.0])}
    parts = {"": "", "first": "h.1.", "last": "h.12.", "none": "h.3."}
    expected = {"": 4 / (5 * 13) ** 0.5, "first": 0.0, "last": 1.0, "none": 0.0}
    assert cosines(one, other, parts) == pytest.approx(expected)
    longer = {**other, "h.2.c": torch.tensor([6.0])}
    assert cosines(one, longer, {"": ""})[""] == pytest.approx(4 / (5 * 49) ** 0.5)
    assert cosines(longer, one, {"": ""})[""] == pytest.approx(4 / (5 * 49) ** 0.5)
    assert cosines(one, {name: -2 * value for name, value in one.items()}, {"": ""})[""] == pytest.approx(-1.0)
    assert cosines(one, {name: 0 * value for name, value in one.items()}, {"": ""})[""] == 0.0
    assert cosines({}, {}, {"": ""}) == {"": 0.0}


def test_masks_follow_the_seed_and_leave_the_global_generator_alone():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    drawn = []
    for parts in ((1, 2), (1, 2), (2, 1), (12,)):
        with dropout_seed(device, *parts):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3]
    assert torch.equal(torch.get_rng_state(), before)


class _HoldWeights:
    """L2 toward the start's weights (L2-SP, arXiv:1802.01483), as a penalty from outside would come in."""

    name = "l2_sp"

    def __init__(self, weight: float, start: Mapping[str, Tensor]) -> None:
        self.weight, self._start = weight, start

    def applies_to(self, row: Any) -> bool:
        return False

    def at_positions(self, rows: Sequence[Any]) -> PositionValues:
        raise AssertionError("it applies to no row")

    def on_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        return sum((((one - self._start[name]) ** 2).sum() for name, one in weights.items()), torch.zeros(()))


def test_a_penalty_on_weights_holds_them_back(tmp_path, tiny_model, monkeypatch):
    workspace = open_workspace(tmp_path / "w")
    make = stage.make_trainer
    drifts = []
    for i, weight in enumerate((0.0, 1.0, 100.0)):

        def with_penalty(*args: Any, _weight: float = weight) -> Any:
            trainer = make(*args)
            start = {name: one.detach().clone() for name, one in trainer.masters.weights.items()}
            trainer.penalties = [_HoldWeights(_weight, start)]
            return trainer

        monkeypatch.setattr(stage, "make_trainer", with_penalty)
        spec = make_spec(tmp_path, tiny_model, label=f"r/{i}", tune={"full": {}}, lr=1e-3)
        drifts.append(run_sft(spec, workspace)["checkpoint"]["drift"]["to_start"])
        metrics = (workspace.path(spec.key) / "metrics.jsonl").read_text().splitlines()
        assert json.loads(metrics[-1])["l2_sp"] > 0
    assert drifts[0] > 1.05 * drifts[1] > 1.05 * 1.05 * drifts[2]


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path, tiny_model):
    missing = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    with pytest.raises(RecipeError, match=rf"track: '{missing[0]}'.*evertune\[track\]"):
        run_sft(make_spec(tmp_path, tiny_model, track=missing), open_workspace(tmp_path / "w"))


def test_trackers_get_the_settings_and_every_step(tmp_path):
    from accelerate.tracking import GeneralTracker

    class Recorder(GeneralTracker):  # type: ignore[misc]
        name, requires_logging_directory, main_process_only = "recorder", False, True

        def __init__(self) -> None:
            super().__init__()
            self.settings: dict[str, Any] = {}
            self.records: list[tuple[int | None, dict[str, Any]]] = []

        @property
        def tracker(self) -> "Recorder":
            return self

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.settings = values

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.records.append((step, values))

    recorder: Any = Recorder()
    accelerator = make_accelerator(device="cpu", track=[recorder], logging_dir=tmp_path)
    start_trackers(accelerator, "r/1-sft", {"lr": 0.1, "tune": {"full": {}}, "clip": None}, folder=tmp_path)
    sink = Sink(tmp_path / "metrics.jsonl", history=[{"step": 1, "loss": 2.0}], accelerator=accelerator)
    sink.log({"step": 2, "loss": 1.5})
    assert recorder.settings == {"lr": 0.1}
    assert recorder.records == [(2, {"loss": 1.5})]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_files_lie_in_the_stages_folder(tmp_path, tiny_model):
    pytest.importorskip("tensorboard")
    require_trackers(["tensorboard"])
    workspace = open_workspace(tmp_path / "w")
    spec = make_spec(tmp_path, tiny_model, track=["tensorboard"])
    run_sft(spec, workspace)
    assert list((workspace.work / spec.key / "trackers").rglob("events.*"))


def test_cuda_without_a_device_is_an_error_and_not_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no CUDA device"):
        make_accelerator(device="cuda", track=[], logging_dir=tmp_path)


def test_more_processes_than_gpus_are_an_error_before_they_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="found 2 processes on a machine with 1 GPU, expected one for each"):
        make_accelerator(device="auto", track=[], logging_dir=tmp_path)


def test_a_process_has_its_own_gpu_before_it_multiplies_on_one(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(loop, "Accelerator", lambda **settings: done.append("device"))
    monkeypatch.setattr(loop, "prefer_same_bits", lambda: done.append("product"))
    make_accelerator(device="cuda", track=[], logging_dir=tmp_path)
    assert done == ["device", "product"]


@pytest.mark.parametrize(
    "name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG"]
)
def test_a_launcher_that_asks_for_shards_is_refused_and_not_given_copies(
    name: str, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(TrainingError, match=f"launch: {name} asks for"):
        make_accelerator(device="cpu", track=[], logging_dir=tmp_path)
