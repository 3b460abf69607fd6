"""Models as judges of training rows, against what transformers itself computes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evertune.data.rows import Row
from evertune.errors import CheckpointError, DataError
from evertune.probe.rows import answer_bits, classifier_score
from tests.tiny import write_tiny_model


def chat(*texts: str) -> Row:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Row("s", "r", 1, Path("r"), {"messages": turns})


def test_bits_of_the_last_answer_equal_those_of_the_model_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = chat("Hi", "Hello", "Who are you?", "A small model é")
    before = tokenizer.apply_chat_template(row.value["messages"][:-1], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    ids = tokenizer(before + "A small model é", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logp = model(ids).logits.float().log_softmax(-1)[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum()
    expected = -logp.item() / math.log(2) / len("A small model é".encode())
    assert answer_bits(str(folder))([row])[0] == pytest.approx(expected, rel=1e-2)


def test_a_row_that_is_too_long_has_no_value(tmp_path: Path) -> None:
    found = answer_bits(str(write_tiny_model(tmp_path / "m")))([chat("a", "b"), chat("a", "b" * 600)])
    assert np.isfinite(found).tolist() == [True, False]


def write_classifier(folder: Path, classes: int) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    write_tiny_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = classes
    torch.manual_seed(0)
    (folder / "model.safetensors").unlink()
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_reward_and_a_probability_are_those_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    row = chat("Hi", "Hello")
    for classes in (1, 3):
        folder = write_classifier(tmp_path / f"c{classes}", classes)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(row.value["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits[0]
        expected = logits[0] if classes == 1 else logits.softmax(-1)[2]
        assert classifier_score(folder, 2 * (classes > 1))([row])[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_class_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 3 classes, expected more than 3"):
        classifier_score(write_classifier(tmp_path / "c", 3), 3)


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="score.weight"):
        classifier_score(write_tiny_model(tmp_path / "m"), 0)
    with pytest.raises(CheckpointError, match="found no folder"):
        classifier_score(tmp_path / "nothing", 0)
