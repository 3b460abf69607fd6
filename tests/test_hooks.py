"""`ProbeCallback` in real trainers of TRL: what it scores, when it stops, and that it changes nothing."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evertune.errors import ProbeError
from evertune.hooks import ProbeCallback
from evertune.model.checkpoint import describe
from evertune.model.open import open_model
from evertune.probe.job import score_open
from tests.check.folders import chat, write_rows

SUITE = """\
probes:
  words: {path: words.jsonl, kind: bits_per_byte, margin: 0.1}
  facts: {path: facts.jsonl, kind: choice}
  talk: {path: talk.jsonl, kind: generate, verifier: exact, max_new_tokens: 4, role: watch}
gate: {min_items: 8, min_clusters: 8, margin: {pooled: 0.4, probe: 0.4, format: 0.4}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    write_rows(tmp_path / "words.jsonl", [{"text": f"a plain text, number {i}, of some words"} for i in range(24)])
    items = [{"prompt": f"which {i}", "choices": ["a", "b"], "answer": i % 2} for i in range(12)]
    write_rows(tmp_path / "facts.jsonl", items)
    write_rows(tmp_path / "talk.jsonl", [{"prompt": f"say {i}", "answer": "x"} for i in range(4)])
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path / "suite.yaml"


def _train(model: Path, folder: Path, *callbacks: Any, lr: float = 1e-3, steps: int = 4, peft: Any = None) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=True,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attention_dropout=0.1),
            args=config,
            train_dataset=Dataset.from_list([chat(f"card {i}", f"kind {i}") for i in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=list(callbacks),
            peft_config=peft,
        )
        trainer.train()
    return trainer


def _weights(trainer: Any) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def test_scores_are_those_of_the_saved_model_and_training_is_as_without_it(
    suite: Path, tiny_model: Path, tmp_path: Path
) -> None:
    probing = ProbeCallback(suite, every_steps=2, stop_on_harm=False)
    probed = _train(tiny_model, tmp_path / "one", probing)
    plain = _train(tiny_model, tmp_path / "other")
    for name, weight in _weights(plain).items():
        assert torch.equal(weight, _weights(probed)[name]), name
    assert sorted(probing.scores) == [0, 2, 4]
    begin = score_open(open_model(describe(tiny_model), dtype="float32"), probing.suite.probes)
    probed.save_model(str(tmp_path / "saved"))
    end = score_open(open_model(describe(tmp_path / "saved"), dtype="float32"), probing.suite.probes)
    for step, expected in ((0, begin), (4, end)):
        for name, scores in expected.items():
            assert list(probing.scores[step][name].score) == pytest.approx(list(scores.score), abs=1e-6), (step, name)
    assert begin["words"].value != end["words"].value


def test_it_leaves_a_line_a_probing_and_the_item_scores(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    trainer = _train(tiny_model, tmp_path, ProbeCallback(suite, every_steps=3, stop_on_harm=False))
    folder = tmp_path / "trainer" / "probes"
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [3, 4]
    assert lines[0]["scores"].keys() == {"words", "facts", "talk"}
    assert lines[0]["decision"] in ("PROMOTE", "HOLD", "INCONCLUSIVE")
    assert {file.name for file in folder.glob("*-words.parquet")} == {
        "0-words.parquet",
        "3-words.parquet",
        "4-words.parquet",
    }
    logged = [one["step"] for one in trainer.state.log_history if "probe/words" in one]
    assert logged == [0, 3, 4]


@pytest.mark.parametrize("stops", [True, False])
def test_harm_to_a_guard_ends_training_when_asked_to(
    stops: bool, suite: Path, tiny_model: Path, tmp_path: Path
) -> None:
    probing = ProbeCallback(suite, every_steps=2, stop_on_harm=stops)
    # A rate that destroys the model at once.
    trainer = _train(tiny_model, tmp_path, probing, lr=0.3, steps=6)
    assert probing.verdicts[2].decision == "HOLD"
    assert any("words" in reason for reason in probing.verdicts[2].reasons)
    assert trainer.state.global_step == (2 if stops else 6)


def test_an_adapter_of_peft_is_scored_with_the_adapter(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    probing = ProbeCallback(suite, every_steps=4, stop_on_harm=False)
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    _train(tiny_model, tmp_path, probing, lr=0.05, peft=peft)
    assert probing.scores[4]["words"].value != pytest.approx(probing.scores[0]["words"].value, abs=1e-4)


def test_a_resumed_run_is_judged_against_its_first_start(suite: Path, tiny_model: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import cast

    first = ProbeCallback(suite, every_steps=2, stop_on_harm=False)
    trainer = _train(tiny_model, tmp_path, first)
    resumed = ProbeCallback(suite, every_steps=2, stop_on_harm=False)
    state = cast(Any, SimpleNamespace(is_world_process_zero=True, global_step=4))
    facts = {"model": trainer.model, "processing_class": trainer.processing_class}
    resumed.on_train_begin(trainer.args, state, trainer.control, **facts)
    assert list(resumed.scores[0]["words"].score) == list(first.scores[0]["words"].score)
    elsewhere = ProbeCallback(suite, every_steps=2, folder=tmp_path / "elsewhere")
    with pytest.raises(ProbeError, match="goes on from step 4"):
        elsewhere.on_train_begin(trainer.args, state, trainer.control, **facts)


def test_it_asks_for_steps(suite: Path) -> None:
    with pytest.raises(ValueError, match="every_steps is 0"):
        ProbeCallback(suite, every_steps=0)
