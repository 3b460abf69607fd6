"""Scores of an open model on a probe, item by item.

`choice` and `bits_per_byte` ask how likely the model finds an answer. The answer's tokens are those that would carry
loss if the conversation were trained on, without the stop token: conversation and answer are rendered through the chat
template and tokenised once, as one text. Nothing is ever cut to fit.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evertune.agents import Episode
from evertune.errors import CheckpointError, ProbeError
from evertune.hashing import digest_json
from evertune.model.codec import Codec
from evertune.model.forward import BATCH_TOKENS, Forward, Tokens, score_branches, score_rows
from evertune.model.open import OpenModel
from evertune.model.precision import in_float32
from evertune.probe.generate import generate_answers
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe, ProbeItem
from evertune.verifiers import check

# Where a model computes in bfloat16, a choice's log-likelihood is off by 0.2 nats on average and by 0.9 at most on the
# bundled model: an item whose two best choices are closer than this is scored again in float32.
CLOSE_NATS = 1.0


def score_probe(opened: OpenModel, probe: Probe, *, batch_tokens: int | None = None) -> ItemScores:
    """Score every item of a probe. Batches depend on the items alone: the same weights give the same bits.

    Args:
        batch_tokens: padded tokens of one forward pass, or of a batch of answers. Scores in float32 do not depend on
            it beyond rounding.

    Raises:
        ProbeError: an item is longer than the model's context or cannot be asked through its chat template, a score
            is not finite, or a verifier failed. Nothing is skipped and nothing becomes a wrong answer.
    """
    forward = Forward(opened)
    try:
        columns = _COLUMNS[probe.kind](forward, opened.codec, probe, batch_tokens)
    except CheckpointError as error:
        raise ProbeError(f"probe '{probe.name}': {error.message}", remedy=error.remedy) from error
    return ItemScores(
        probe=probe.name,
        kind=probe.kind,
        direction="lower" if probe.kind == "bits_per_byte" else "higher",
        ids=tuple(name for item in probe.items for name in _names(item.id, probe.samples)),
        cluster=tuple(item.cluster for item in probe.items for _ in range(probe.samples)),
        samples=probe.samples,
        items_digest=probe.digest,
        template_digest=opened.codec.digest,
        **columns,
    )


def _choice(forward: Forward, codec: Codec, probe: Probe, batch_tokens: int | None) -> dict[str, Any]:
    """The choice with the highest log-likelihood, summed or per UTF-8 byte; the first of equals. Close items are scored
    in float32."""
    groups = []
    for item in probe.items:
        choices = [[*item.messages, {"role": "assistant", "content": text}] for text in item.choices]
        groups.append([answer_tokens(codec, probe, item, one) for one in choices])
        for row in groups[-1]:
            _check_length(forward, probe, item, len(row.ids))
    sizes = [[len(text.encode()) if probe.normalise == "bytes" else 1 for text in item.choices] for item in probe.items]
    found = _likelihoods(forward, groups, batch_tokens)
    close = [i for i, nats in enumerate(found) if _lead(nats, sizes[i]) < CLOSE_NATS]
    if close and forward.model.dtype != torch.float32:
        with in_float32(forward.model):
            again = _likelihoods(forward, [groups[i] for i in close], batch_tokens)
        for i, nats in zip(close, again, strict=True):
            found[i] = nats
    best, gaps = [], []
    for item, nats, size in zip(probe.items, found, sizes, strict=True):
        values = [one / each for one, each in zip(nats, size, strict=True)]
        if not all(map(math.isfinite, values)):
            raise _not_finite(probe, item)
        first, second = _ranked(values)[:2]
        best.append(first)
        gaps.append(values[first] - values[second])
    return {
        "score": [float(chosen == item.answer) for chosen, item in zip(best, probe.items, strict=True)],
        "prediction": tuple(item.choices[chosen] for chosen, item in zip(best, probe.items, strict=True)),
        "expected": tuple(item.choices[item.answer] for item in probe.items),
        "gap": gaps,
    }


def _likelihoods(forward: Forward, groups: Sequence[Sequence[Tokens]], batch_tokens: int | None) -> list[list[float]]:
    """Of each item the log-likelihood of each choice, in nats."""
    return [
        [math.fsum(one) for one in group]
        for group in score_branches(forward, groups, batch_tokens=batch_tokens or BATCH_TOKENS)
    ]


def _lead(nats: Sequence[float], sizes: Sequence[int]) -> float:
    """By how many nats the best choice could be wrong and still be the best."""
    values = [one / size for one, size in zip(nats, sizes, strict=True)]
    first, second = _ranked(values)[:2]
    return (values[first] - values[second]) * min(sizes[first], sizes[second])


def _ranked(values: Sequence[float]) -> list[int]:
    """Indices from the highest value down; the first of equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _bits_per_byte(forward: Forward, codec: Codec, probe: Probe, batch_tokens: int | None) -> dict[str, Any]:
    """Bits of the counted tokens by UTF-8 bytes of the item's text, or of its assistant turns.

    A text's first token counts only where the tokenizer puts one before it (BOS): nothing else predicts it. The bytes
    are those of the whole text all the same.
    """
    rows, sizes = [], []
    for item in probe.items:
        if item.text is not None:
            rows.append(text_tokens(codec, probe, item, item.text))
            sizes.append(len(item.text.encode()))
        else:
            rows.append(answer_tokens(codec, probe, item, item.messages))
            sizes.append(sum(len(one["content"].encode()) for one in item.messages if one["role"] == "assistant"))
        _check_length(forward, probe, item, len(rows[-1].ids))
    found = score_rows(forward, rows, batch_tokens=batch_tokens or BATCH_TOKENS)
    bits = [-math.fsum(logps) / math.log(2) for logps in found]
    return {"score": np.array(bits) / np.array(sizes), "weight": sizes}


def _generate(forward: Forward, codec: Codec, probe: Probe, batch_tokens: int | None) -> dict[str, Any]:
    """Answers, greedy or drawn, checked by the probe's verifier; an item's samples follow each other."""
    items = [item for item in probe.items for _ in range(probe.samples)]
    names = [name for item in probe.items for name in _names(item.id, probe.samples)]
    prompts = [codec.encode_prompt(item.messages) for item in items]
    for item, prompt in zip(items, prompts, strict=True):
        _check_length(forward, probe, item, len(prompt) + probe.max_new_tokens)
    answers = generate_answers(
        forward,
        prompts,
        max_new_tokens=probe.max_new_tokens,
        stop_ids=codec.stop_ids,
        temperature=probe.temperature,
        # From the item alone, so that every checkpoint is asked with the same noise.
        seeds=[int(digest_json(name)[:15], 16) for name in names],
        batch_tokens=batch_tokens,
    )
    for item, answer in zip(items, answers, strict=True):
        if not answer.is_finite:
            raise _not_finite(probe, item)
    texts = [codec.decode(answer.ids) for answer in answers]
    outcomes = [check(probe.verifier, output=text, answer=item.answer) for text, item in zip(texts, items, strict=True)]
    failed = [(item, one.error) for item, one in zip(items, outcomes, strict=True) if one.error is not None]
    if failed:
        raise ProbeError(
            f"probe '{probe.name}': the verifier failed on {len(failed)} of {len(outcomes)} items; the first is "
            f"{failed[0][0].id!r}: {failed[0][1]}.",
            remedy="A failed verifier is not a wrong answer, so the probe has no score: correct the item or verifier.",
        )
    return {
        "score": [one.score for one in outcomes],
        "prediction": tuple(texts),
        "expected": tuple(_as_text(item.answer) for item in items),
        "valid": [one.valid for one in outcomes],
        "stopped": [answer.stopped for answer in answers],
    }


def _episode(forward: Forward, codec: Codec, probe: Probe, batch_tokens: int | None) -> dict[str, Any]:
    """Episodes, all of them a step at a time: an item has succeeded where its goal is reached and the last answer
    passes the verifier. Valid: every step of the agent was in form. An agent that is still acting after `max_steps`, or
    whose conversation would no longer fit the model's context, has not answered, and failed.
    """
    episodes = [
        Episode(item.task["environment"], list(item.messages), item.task["state"] or {}) for item in probe.items
    ]
    for _ in range(probe.max_steps):
        acting = [i for i, one in enumerate(episodes) if one.final is None]
        prompts = {i: codec.encode_prompt(episodes[i].messages) for i in acting}
        fits = [i for i in acting if _has_room(forward, len(prompts[i]) + probe.max_new_tokens)]
        for i in acting:
            if i not in fits and not episodes[i].formed:
                _check_length(forward, probe, probe.items[i], len(prompts[i]) + probe.max_new_tokens)
        if not fits:
            break
        answers = generate_answers(
            forward,
            [prompts[i] for i in fits],
            max_new_tokens=probe.max_new_tokens,
            stop_ids=codec.stop_ids,
            batch_tokens=batch_tokens,
        )
        for i, answer in zip(fits, answers, strict=True):
            if not answer.is_finite:
                raise _not_finite(probe, probe.items[i])
            episodes[i].hear(codec.decode(answer.ids))
    scores = []
    for item, one in zip(probe.items, episodes, strict=True):
        outcome = check(probe.verifier, output=one.final or "", answer=item.answer)
        if outcome.error is not None:
            raise ProbeError(f"probe '{probe.name}': the verifier failed on {item.id!r}: {outcome.error}.")
        succeeded = one.final is not None and one.reached(item.task["goal"])
        scores.append(outcome.score if succeeded else 0.0)
    return {
        "score": scores,
        "prediction": tuple(one.transcript() for one in episodes),
        "expected": tuple(_as_text(item.answer) for item in probe.items),
        "valid": [all(one.formed) for one in episodes],
        "stopped": [one.final is not None for one in episodes],
    }


_COLUMNS = {"choice": _choice, "bits_per_byte": _bits_per_byte, "generate": _generate, "episode": _episode}


def answer_tokens(codec: Codec, probe: Probe, item: ProbeItem, messages: Sequence[Mapping[str, str]]) -> Tokens:
    """A conversation through its last answer; counted is what the assistant says, without stop tokens."""
    chat = codec.encode_chat(messages)
    counted = [
        counts and i > 0 and one not in codec.stop_ids
        for i, (one, counts) in enumerate(zip(chat.ids, chat.counted, strict=True))
    ]
    if True not in counted:
        raise ProbeError(
            f"probe '{probe.name}': item {item.id!r}: the answer {messages[-1]['content']!r} has no token of its own "
            "after the chat template.",
            remedy="Write an answer that does not begin with the white space in which the template's prompt ends.",
        )
    end = len(counted) - counted[::-1].index(True)
    return Tokens(tuple(chat.ids[:end]), tuple(counted[:end]))


def text_tokens(codec: Codec, probe: Probe, item: ProbeItem, text: str) -> Tokens:
    """A text with the tokens that the tokenizer puts around it; counted is the text itself."""
    own, ids = codec.encode(text), codec.encode(text, special=True)
    begin = next((i for i in range(len(ids) - len(own) + 1) if ids[i : i + len(own)] == own), None)
    if begin is None:
        raise ProbeError(f"probe '{probe.name}': item {item.id!r}: the tokenizer changes the text it puts BOS before.")
    if begin + len(own) < 2:
        raise ProbeError(
            f"probe '{probe.name}': item {item.id!r} is a single token, and nothing predicts it.",
            remedy="Use longer texts.",
        )
    end = begin + len(own)
    return Tokens(tuple(ids[:end]), tuple(i > 0 and i >= begin for i in range(end)))


def _has_room(forward: Forward, tokens: int) -> bool:
    return forward.max_tokens is None or tokens <= forward.max_tokens


def _check_length(forward: Forward, probe: Probe, item: ProbeItem, tokens: int) -> None:
    if forward.max_tokens is not None and tokens > forward.max_tokens:
        room = f" ({probe.max_new_tokens} of them for the answer)" if probe.kind in ("generate", "episode") else ""
        raise ProbeError(
            f"probe '{probe.name}': item {item.id!r} needs {tokens} tokens{room}, and the model's context has "
            f"{forward.max_tokens}.",
            remedy="Shorten or remove the item; items are never cut.",
        )


def _not_finite(probe: Probe, item: ProbeItem) -> ProbeError:
    return ProbeError(
        f"probe '{probe.name}': the model's logits for item {item.id!r} are NaN or Inf, expected finite numbers.",
        remedy="A model with NaN or Inf in its outputs cannot be judged: go back to an earlier checkpoint.",
    )


def _names(item_id: str, samples: int) -> list[str]:
    """Of an item's samples; an item that is asked once keeps its own."""
    return [item_id] if samples == 1 else [f"{item_id}#{k + 1}" for k in range(samples)]


def _as_text(answer: Any) -> str:
    if answer is None:
        return ""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, sort_keys=True)
