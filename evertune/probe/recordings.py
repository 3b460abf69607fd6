"""A model's own answers as rows for replay: rehearsal without stored data (Huang et al. 2024, arXiv:2403.01244).

Standing: research. It keeps what the model can say to the prompts that are asked and nothing else, mistakes included,
so answers are filtered: by the row's own answer where there is one, by a verifier, and by likelihood.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evertune.data.rows import Row, messages_of
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.forward import Forward, Tokens, score_rows
from evertune.model.open import open_model
from evertune.probe.generate import generate_answers
from evertune.verifiers import check


@dataclass(frozen=True)
class Recordings:
    """Rows with the model's answers, and the prompts that gave none, by reason."""

    rows: list[dict[str, Any]]
    dropped: dict[str, int]


def record_answers(
    model: str,
    prompts: Sequence[Row],
    *,
    max_new_tokens: int,
    verifier: Mapping[str, Any] | None = None,
    keep_likely: float = 1.0,
) -> Recordings:
    """Greedy answers to the prompts of rows: all their turns before the last answer.

    Args:
        model: a bundled name or a folder.
        verifier: as a probe's; answers that do not pass against the row's `answer` are dropped.
        keep_likely: share of the answers that is kept, those with the highest mean log-probability of a token.
    """
    opened = open_model(describe(resolve_base(model, folder=Path())), dtype="bfloat16", device="auto", fold=True)
    forward, codec = Forward(opened), opened.codec
    dropped: Counter[str] = Counter()
    asked: list[tuple[Row, list[dict[str, str]], list[int]]] = []
    for row in prompts:
        turns = messages_of(row.value)
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        ids = codec.encode_prompt(turns)
        if forward.max_tokens is not None and len(ids) + max_new_tokens > forward.max_tokens:
            dropped["longer than the model's context"] += 1
        else:
            asked.append((row, turns, ids))
    answers = generate_answers(
        forward, [ids for _, _, ids in asked], max_new_tokens=max_new_tokens, stop_ids=codec.stop_ids
    )
    kept: list[tuple[dict[str, Any], Tokens]] = []
    for (row, turns, ids), answer in zip(asked, answers, strict=True):
        text = codec.decode(answer.ids)
        reason = _problem(row, text, answer.stopped and answer.is_finite, verifier)
        if reason:
            dropped[reason] += 1
            continue
        value = {"id": f"recorded-{row.id}", "messages": [*turns, {"role": "assistant", "content": text}]}
        whole = (*ids, *answer.ids)
        kept.append(({**value, "recorded_from": model}, Tokens(whole, tuple(i >= len(ids) for i in range(len(whole))))))
    if keep_likely < 1.0 and kept:
        scores = np.array([float(np.mean(one)) for one in score_rows(forward, [tokens for _, tokens in kept])])
        order = np.argsort(-scores, kind="stable")[: max(1, round(keep_likely * len(kept)))]
        dropped["less likely than the others"] += len(kept) - len(order)
        kept = [kept[i] for i in sorted(order.tolist())]
    return Recordings([value for value, _ in kept], dict(dropped))


def _problem(row: Row, text: str, is_whole: bool, verifier: Mapping[str, Any] | None) -> str:
    if not is_whole:
        return "not ended within the limit"
    if not text.strip():
        return "empty"
    if verifier is None:
        return ""
    return "" if check(verifier, output=text, answer=row.value.get("answer")).score == 1.0 else "not verified"
