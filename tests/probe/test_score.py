import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evertune.errors import ProbeError
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward, Tokens
from evertune.model.open import OpenModel, open_model
from evertune.probe import score as score_module
from evertune.probe.score import score_probe
from evertune.probe.suite import Probe, load_probe
from evertune.verifiers import Outcome
from tests.probe.models import naive_greedy, naive_log_probabilities, opened_tiny
from tests.tiny import TEMPLATES, write_tiny_model

VOCABULARY = 261
QUESTIONS = [
    {"prompt": "Sky?", "choices": ["blue", "red as a brick", "g"], "answer": 0},
    {"prompt": "Which of these is a fruit, my friend?", "choices": ["pear", "ä"], "answer": "ä", "cluster": "fruit"},
    {"prompt": "x", "choices": ["one", "two", "three", "four"], "answer": 3, "cluster": "fruit"},
]
PROMPTS = [{"prompt": text, "answer": "yes"} for text in ("Sky?", "A rather long question, this one", "x")]


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> OpenModel:
    return opened_tiny(tiny_model)


def make(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Probe:
    (folder / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    probe = load_probe("p", settings={"path": "items.jsonl", **settings}, root=folder)
    assert isinstance(probe, Probe)
    return probe


def zero_head(opened: OpenModel) -> OpenModel:
    with torch.no_grad():
        opened.model.get_output_embeddings().weight.zero_()
    return opened


def naive_choice_sums(opened: OpenModel, probe: Probe) -> list[list[float]]:
    """By hand for ChatML and a byte-level tokenizer: prompt tokens, then the choice's bytes."""
    sums = []
    for item in probe.items:
        prompt = opened.codec.encode_prompt(item.messages)
        rows = [(prompt, opened.codec.encode(text)) for text in item.choices]
        tokens = [Tokens((*a, *b), (False,) * len(a) + (True,) * len(b)) for a, b in rows]
        sums.append([sum(naive_log_probabilities(opened.model, one)) for one in tokens])
    return sums


@pytest.mark.parametrize("normalise", ["sum", "bytes"])
def test_the_likeliest_choice_is_taken(opened: OpenModel, tmp_path: Path, normalise: str) -> None:
    probe = make(tmp_path, QUESTIONS, kind="choice", normalise=normalise)
    scores = score_probe(opened, probe)
    assert scores.gap is not None
    for i, (item, sums) in enumerate(zip(probe.items, naive_choice_sums(opened, probe), strict=True)):
        sizes = [len(text.encode()) if normalise == "bytes" else 1 for text in item.choices]
        values = [one / size for one, size in zip(sums, sizes, strict=True)]
        best = int(np.argmax(values))
        assert scores.prediction[i] == item.choices[best]
        assert scores.expected[i] == item.choices[item.answer]
        assert scores.score[i] == float(best == item.answer)
        assert scores.gap[i] == pytest.approx(sorted(values)[-1] - sorted(values)[-2], abs=1e-5)
    assert (scores.kind, scores.direction, scores.valid, scores.stopped, scores.weight) == (
        "choice",
        "higher",
        None,
        None,
        None,
    )
    assert scores.cluster == ("items:1", "fruit", "fruit")
    assert (scores.items_digest, scores.template_digest) == (probe.digest, opened.codec.digest)


def test_normalising_by_bytes_compares_bytes_not_characters(tiny_model: Path, tmp_path: Path) -> None:
    # Every token costs log V, a token is a byte: sums prefer the short choice, per byte all are equal.
    uniform = zero_head(opened_tiny(tiny_model))
    rows = [{"prompt": "Q", "choices": ["aaaa", "ä"], "answer": 1}]
    by_sum = score_probe(uniform, make(tmp_path, rows, kind="choice", normalise="sum"))
    assert by_sum.prediction == ("ä",)
    assert by_sum.gap == pytest.approx([2 * math.log(VOCABULARY)], rel=1e-6)
    by_bytes = score_probe(uniform, make(tmp_path, rows, kind="choice"))
    assert by_bytes.prediction == ("aaaa",)  # the first of equals
    assert by_bytes.gap == pytest.approx([0.0], abs=1e-6)


def test_an_item_has_the_same_score_alone_and_among_others(opened: OpenModel, tmp_path: Path) -> None:
    together = score_probe(opened, make(tmp_path, QUESTIONS, kind="choice"))
    assert together.gap is not None
    for i, row in enumerate(QUESTIONS):
        alone = score_probe(opened, make(tmp_path, [row], kind="choice"), batch_tokens=1)
        assert alone.gap == pytest.approx([together.gap[i]], abs=1e-5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_scored_as_training_would_count_them(tmp_path: Path, template: str) -> None:
    # llama2 writes a blank before the answer; it belongs to what the model says, as in training.
    model = opened_tiny(write_tiny_model(tmp_path / "model", template=template))
    codec = model.codec
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Hey"}]}]
    scores = score_probe(model, make(tmp_path, rows, kind="bits_per_byte"))
    said = " Hey " if template == "llama2" else "Hey"
    prompt = codec.encode_prompt(rows[0]["messages"][:1])
    answer = codec.encode(said)
    row = Tokens((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))
    assert scores.weight == pytest.approx([3])
    assert scores.value == pytest.approx(-sum(naive_log_probabilities(model.model, row)) / math.log(2) / 3, rel=1e-6)


def test_bits_per_byte_of_a_uniform_model_is_log2_of_the_vocabulary_per_token(tiny_model: Path, tmp_path: Path) -> None:
    # No BOS: 5 bytes are 5 tokens, 4 of them predicted; the umlaut's text has 4 bytes, 3 predicted.
    uniform = zero_head(opened_tiny(tiny_model))
    scores = score_probe(uniform, make(tmp_path, [{"text": "abcde"}, {"text": "ääab"[:3]}], kind="bits_per_byte"))
    bits = math.log2(VOCABULARY)
    assert scores.score == pytest.approx([4 * bits / 5, 4 * bits / 5], rel=1e-6)
    assert scores.value == pytest.approx(8 * bits / 10, rel=1e-6)
    assert scores.direction == "lower"
    conversation = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "abc"}]
    # All 3 tokens of the answer are predicted; its stop token does not count.
    gold = score_probe(uniform, make(tmp_path, [{"messages": conversation}], kind="bits_per_byte"))
    assert gold.value == pytest.approx(bits, rel=1e-6)


def test_with_a_bos_token_the_first_token_of_a_text_counts(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    uniform = zero_head(opened_tiny(tiny_model))
    uniform.codec.tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 259), ("</s>", 260)]
    )
    scores = score_probe(uniform, make(tmp_path, [{"text": "abcde"}], kind="bits_per_byte"))
    assert scores.value == pytest.approx(math.log2(VOCABULARY), rel=1e-6)


def test_bits_per_byte_equals_the_naive_sum(opened: OpenModel, tmp_path: Path) -> None:
    texts = ["A short one.", "A rather longer text, with ümläuts and more to say.", "x y"]
    scores = score_probe(opened, make(tmp_path, [{"text": one} for one in texts], kind="bits_per_byte"))
    for text, value in zip(texts, scores.score, strict=True):
        ids = opened.codec.encode(text)
        nats = -sum(naive_log_probabilities(opened.model, Tokens(tuple(ids), (False,) + (True,) * (len(ids) - 1))))
        assert value == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_answers_are_generated_and_checked(tmp_path: Path) -> None:
    opened = opened_tiny(write_tiny_model(tmp_path / "model", tied=False, seed=3))
    prompts = [opened.codec.encode_prompt([{"role": "user", "content": one["prompt"]}]) for one in PROMPTS]
    said = [naive_greedy(opened.model, one, 6, set(opened.codec.stop_ids)) for one in prompts]
    texts = [opened.codec.decode(ids) for ids, _ in said]
    rows = [{**PROMPTS[0], "answer": texts[0]}, *PROMPTS[1:]]
    scores = score_probe(opened, make(tmp_path, rows, kind="generate", verifier={"exact": {}}, max_new_tokens=6))
    assert scores.prediction == tuple(texts)
    assert scores.expected == (texts[0], "yes", "yes")
    assert list(scores.score) == [1.0, 0.0, 0.0]
    assert scores.stopped is not None
    assert list(scores.stopped) == [ended for _, ended in said]
    assert scores.valid is not None
    assert scores.valid[0]


def test_a_failed_verifier_is_an_error_never_a_wrong_answer(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([Outcome(1.0, True), Outcome(0.0, False, error="timed out"), Outcome(1.0, True)])
    monkeypatch.setattr(score_module, "check", lambda *_, **__: next(outcomes))
    probe = make(tmp_path, PROMPTS, kind="generate", verifier={"exact": {}}, max_new_tokens=2)
    with pytest.raises(ProbeError, match=r"failed on 1 of 3 items; the first is 'items:2': timed out"):
        score_probe(opened, probe)


KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choice": (QUESTIONS, {"kind": "choice"}),
    "generate": (PROMPTS, {"kind": "generate", "verifier": {"exact": {}}, "max_new_tokens": 4}),
    "bits_per_byte": ([{"text": "some text"}], {"kind": "bits_per_byte"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_model_stops_the_probe_and_names_an_item(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    broken = opened_tiny(tiny_model)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7, 0] = float("nan")
    rows, settings = KINDS[kind]
    with pytest.raises(ProbeError, match=r"probe 'p'.*item 'items:1'"):
        score_probe(broken, make(tmp_path, rows, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_longer_than_the_context_is_an_error(opened: OpenModel, tmp_path: Path, kind: str) -> None:
    rows, settings = KINDS[kind]
    long = {name: "x" * 600 if name in ("prompt", "text") else value for name, value in rows[0].items()}
    with pytest.raises(ProbeError, match=r"item 'items:2' needs \d{3} tokens.*has 512.*never cut"):
        score_probe(opened, make(tmp_path, [rows[0], long], **settings))


def test_the_longest_item_that_fits_is_scored(opened: OpenModel, tmp_path: Path) -> None:
    assert Forward(opened).max_tokens == 512
    assert len(score_probe(opened, make(tmp_path, [{"text": "x" * 512}], kind="bits_per_byte")).ids) == 1
    with pytest.raises(ProbeError, match="needs 513 tokens"):
        score_probe(opened, make(tmp_path, [{"text": "x" * 513}], kind="bits_per_byte"))


def test_room_for_the_answer_is_part_of_the_length(opened: OpenModel, tmp_path: Path) -> None:
    probe = make(tmp_path, PROMPTS, kind="generate", verifier={"exact": {}}, max_new_tokens=500)
    with pytest.raises(ProbeError, match=r"500 of them for the answer"):
        score_probe(opened, probe)


def test_a_single_token_has_nothing_to_predict_it(opened: OpenModel, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="single token"):
        score_probe(opened, make(tmp_path, [{"text": "x"}], kind="bits_per_byte"))


def test_an_answer_the_template_swallows_is_an_error(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    (model / "chat_template.jinja").write_text(
        template + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    with pytest.raises(ProbeError, match=r"item 'items:1': the answer 'blue' has no token of its own"):
        score_probe(opened_tiny(model), make(tmp_path, QUESTIONS, kind="choice"))


def test_a_base_model_without_a_template_reads_texts_only(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    plain = opened_tiny(model)
    assert score_probe(plain, make(tmp_path, [{"text": "some text"}], kind="bits_per_byte")).value > 0
    with pytest.raises(ProbeError, match=r"probe 'p': .*no chat template"):
        score_probe(plain, make(tmp_path, QUESTIONS, kind="choice"))


def test_close_items_of_a_bfloat16_model_are_scored_in_float32(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every item called close, choices and margins are those of a float32 model with the same weights."""
    opened, wide = (open_model(describe(tiny_model), dtype="bfloat16") for _ in range(2))
    for parameter in wide.model.parameters():
        parameter.data = parameter.data.float()
    probe = make(tmp_path, QUESTIONS, kind="choice")
    gaps = {}
    for nats in (0.0, 1e9):
        monkeypatch.setattr(score_module, "CLOSE_NATS", nats)
        gaps[nats] = score_probe(opened, probe).gap
    expected = score_probe(wide, probe).gap
    assert gaps[1e9] == pytest.approx(expected, abs=1e-6)
    assert gaps[0.0] != pytest.approx(expected, abs=1e-6)
