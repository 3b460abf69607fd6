"""The verifier `classifier`, with a small classifier whose weights were set by hand so that its class can be told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from evertune.errors import ProbeError
from evertune.probe.suite import load_probe
from evertune.recipe.schema import Verifier
from evertune.verifiers import check, located, placed, validate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "no", "yes", "maybe"]
LABELS = {"refuse": "REFUSAL", "comply": "ANSWER"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says REFUSAL where the first word is "no", else ANSWER: one coordinate of that word's embedding is read out."""
    folder = tmp_path_factory.mktemp("classifier") / "words"
    names: dict[str, Any] = {"id2label": {0: "ANSWER", 1: "REFUSAL"}, "label2id": {"ANSWER": 0, "REFUSAL": 1}}
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=4,
            num_hidden_layers=0,
            num_attention_heads=1,
            intermediate_size=4,
            **names,
        )
    )
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
        embeddings = model.bert.embeddings
        embeddings.LayerNorm.weight.fill_(1.0)
        embeddings.word_embeddings.weight[WORDS.index("no"), 0] = 1.0
        model.bert.pooler.dense.weight[0, 0] = 1.0
        model.classifier.weight[1, 0] = 1.0
        model.classifier.bias[0] = 0.5
    model.save_pretrained(folder)
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def _verifier(folder: Path, **changes: Any) -> dict[str, Any]:
    given = Verifier.model_validate({"classifier": {"path": folder.name, **changes}})
    return located(given.model_dump(exclude_none=True), folder.parent)


def test_an_output_is_put_into_a_class_and_compared_with_the_answers(classifier: Path) -> None:
    verifier = placed(_verifier(classifier, labels=LABELS), classifier.parent)
    found = {
        (output, answer): check(verifier, output=output, answer=answer).score
        for output in ("no yes", "yes no")
        for answer in ("refuse", "comply")
    }
    assert found == {
        ("no yes", "refuse"): 1.0,
        ("no yes", "comply"): 0.0,
        ("yes no", "refuse"): 0.0,
        ("yes no", "comply"): 1.0,
    }


def test_only_the_first_tokens_are_read(classifier: Path) -> None:
    verifier = placed(_verifier(classifier, max_tokens=1), classifier.parent)
    assert check(verifier, output="no " * 2000, answer="REFUSAL").score == 1.0


def test_an_answer_that_is_no_class_is_refused_beforehand(classifier: Path) -> None:
    verifier = _verifier(classifier)
    validate(verifier, "REFUSAL", place="items.jsonl:1")
    with pytest.raises(ProbeError, match=r"items.jsonl:2: found 'refuse' as 'answer', .* words: ANSWER, REFUSAL"):
        validate(verifier, "refuse", place="items.jsonl:2")
    with pytest.raises(ProbeError, match=r"found 'NO' \('refuse' in 'labels'\)"):
        validate(_verifier(classifier, labels={"refuse": "NO"}), "refuse", place="items.jsonl:1")


def test_a_folder_that_holds_no_classifier_is_refused_beforehand(tmp_path: Path, classifier: Path) -> None:
    with pytest.raises(ProbeError, match="no folder of a classifier"):
        _verifier(tmp_path / "nothing")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ProbeError, match="0 classes in 'id2label' and 0 safetensors"):
        _verifier(tmp_path / "plain")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((classifier / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ProbeError, match="2 classes in 'id2label' and 0 safetensors"):
        _verifier(tmp_path / "pickled")


def test_a_probes_identity_has_the_classifier_in_it_and_not_where_it_lies(tmp_path: Path, classifier: Path) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "a", "prompt": "Do it.", "answer": "refuse"}) + "\n")
    verifier = {"classifier": {"path": "words", "labels": LABELS, "max_tokens": 512}}
    settings = {"path": "items.jsonl", "kind": "generate", "verifier": verifier}

    def digest(name: str, *, flip: int = 0) -> str:
        home = tmp_path / name
        shutil.copytree(classifier, home / "words")
        shutil.copy(tmp_path / "items.jsonl", home)
        weights = bytearray((home / "words" / "model.safetensors").read_bytes())
        weights[-1] ^= flip
        (home / "words" / "model.safetensors").write_bytes(weights)
        return load_probe("safe", settings=settings, root=home).digest

    assert digest("here") == digest("there")
    assert digest("changed", flip=1) != digest("unchanged")
