"""The bundled 135M model: our log-likelihoods against lm-eval's, and probes that it is known to pass."""

import json
import math
from pathlib import Path

import pytest

from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward, score_branches
from evertune.model.open import open_model
from evertune.probe.score import answer_tokens, score_probe
from evertune.probe.suite import Probe, load_probe

QUESTIONS = {
    "What is the capital of France?": ["Paris", "Rome", "Oslo"],
    "What is the capital of Japan?": ["Tokyo", "Madrid", "Cairo"],
    "Which animal barks?": ["dog", "fish", "snail"],
    "What colour is a clear sky?": ["blue", "purple", "brown"],
    "What do bees make?": ["honey", "cement", "paper"],
    "How many legs does a spider have?": ["eight", "two", "three"],
}


@pytest.mark.slow
def test_the_bundled_model_is_scored_as_lm_eval_scores_it(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from evertune.probe.lm_eval import _Model

    rows = [{"prompt": prompt, "choices": choices, "answer": 0} for prompt, choices in QUESTIONS.items()]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    probe = load_probe("facts", settings={"path": "items.jsonl", "kind": "choice", "normalise": "sum"}, root=tmp_path)
    assert isinstance(probe, Probe)
    opened = open_model(describe(resolve_base("smollm2-135m")), dtype="float32", device="cpu")
    assert score_probe(opened, probe).value >= 4 / 6
    groups = [
        [
            answer_tokens(opened.codec, probe, item, [*item.messages, {"role": "assistant", "content": one}])
            for one in item.choices
        ]
        for item in probe.items
    ]
    pairs = [(("", ""), list(row.ids[: row.first]), list(row.ids[row.first :])) for group in groups for row in group]
    theirs = iter(_Model(opened, "facts")._loglikelihood_tokens(pairs, disable_tqdm=True))
    for group in score_branches(Forward(opened), groups):
        for ours in group:
            assert math.fsum(ours) == pytest.approx(next(theirs)[0], abs=2e-4)
