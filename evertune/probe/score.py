"""Likelihood probes: the choices of a question, and bits per byte of text or of gold answers.

Prompts go through the chat template. A choice is scored as the beginning of the assistant's answer, without the stop
token; prompt and choice are tokenised apart, so that every choice continues the same tokens. The prompt is read once
for all its choices.
"""

# B rows, C choices, T tokens, V vocabulary

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.errors import ProbeError
from evertune.model.open import OpenModel
from evertune.probe.generate import generate_answers, pad_left
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe, ProbeItem
from evertune.verifiers import check

# Tokens of one forward pass, padding included, and of one piece of logits.
BATCH_TOKENS = 2048
LOGIT_TOKENS = 512


@torch.inference_mode()
def score_probe(opened: OpenModel, probe: Probe) -> ItemScores:
    """Score every item of a probe. Batches depend on the items alone, so the same weights give the same scores.

    Raises:
        ProbeError: an item is longer than the model's context, a score is not finite, or a verifier failed.
    """
    if opened.codec.template is None and (probe.kind != "bits_per_byte" or probe.items[0].messages):
        raise ProbeError(
            f"probe '{probe.name}' needs a chat template, and {opened.checkpoint.base.path} has none.",
            remedy="Add chat_template.jinja to the model's folder, or use text items.",
        )
    if probe.kind == "choice":
        return _score_choices(opened, probe)
    if probe.kind == "generate":
        return _score_answers(opened, probe)
    return _score_bits(opened, probe)


def _score_choices(opened: OpenModel, probe: Probe) -> ItemScores:
    prompts = {item.id: opened.codec.encode_prompt(list(item.messages)) for item in probe.items}
    choices = {item.id: [opened.codec.encode(text) for text in item.choices] for item in probe.items}
    for item in probe.items:
        _check_length(opened, probe, item, len(prompts[item.id]) + max(map(len, choices[item.id])))
    logp: dict[str, list[float]] = {}
    for batch in _choice_batches(probe.items, prompts):
        rows = [prompts[item.id] for item in batch]
        found = choice_log_likelihoods(opened, rows, [choices[item.id] for item in batch])
        logp.update(zip((item.id for item in batch), found, strict=True))
    best, gaps = [], []
    for item in probe.items:
        divisors = [len(text.encode()) if probe.normalise == "bytes" else 1 for text in item.choices]
        values = [one / divisor for one, divisor in zip(logp[item.id], divisors, strict=True)]
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        best.append(order[0])
        gaps.append(values[order[0]] - values[order[1]])
    right = [float(chosen == item.answer) for chosen, item in zip(best, probe.items, strict=True)]
    return _item_scores(
        opened,
        probe,
        score=right,
        prediction=[item.choices[chosen] for chosen, item in zip(best, probe.items, strict=True)],
        expected=[item.choices[item.answer] for item in probe.items],
        gap=gaps,
    )


def choice_log_likelihoods(
    opened: OpenModel, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Summed log-likelihood, in nats, of each choice after its prompt; every prompt has the same number of choices."""
    device, count = opened.device, len(choices[0])
    ids_BT, mask_BT = pad_left(prompts, opened.codec.pad_id, device)
    position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    read = opened.model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, use_cache=True, logits_to_keep=1
    )
    first_BV = read.logits[:, -1].float().log_softmax(dim=-1)
    flat = [one for group in choices for one in group]
    longest = max(map(len, flat))
    choice_RT = torch.full((len(flat), longest), opened.codec.pad_id, dtype=torch.int64, device=device)
    for r, one in enumerate(flat):
        choice_RT[r, : len(one)] = torch.tensor(one)
    totals_R = first_BV.repeat_interleave(count, dim=0).gather(1, choice_RT[:, :1])[:, 0].double()
    if longest > 1:
        totals_R += _rest_of_choices(opened, read.past_key_values, mask_BT, choice_RT, [len(one) for one in flat])
    return [totals_R[i : i + count].tolist() for i in range(0, len(flat), count)]


def _rest_of_choices(opened: OpenModel, cache: Any, mask_BT: Tensor, choice_RT: Tensor, lengths: list[int]) -> Tensor:
    """(R,) summed log-likelihoods of all tokens of the choices but the first, after the cached prompts."""
    count = len(lengths) // len(mask_BT)
    cache.batch_repeat_interleave(count)
    before_RT = mask_BT.repeat_interleave(count, dim=0)
    inputs_RT, targets_RT = choice_RT[:, :-1], choice_RT[:, 1:]
    position_RT = before_RT.sum(dim=1, keepdim=True) + torch.arange(inputs_RT.shape[1], device=inputs_RT.device)
    output = opened.model(
        input_ids=inputs_RT,
        attention_mask=torch.cat([before_RT, torch.ones_like(inputs_RT)], dim=1),
        position_ids=position_RT,
        past_key_values=cache,
        use_cache=True,
    )
    logp_RT = output.logits.float().log_softmax(dim=-1).gather(2, targets_RT[..., None])[..., 0]
    places = torch.arange(1, choice_RT.shape[1], device=choice_RT.device)
    counted_RT = places < torch.tensor(lengths, device=choice_RT.device)[:, None]
    return (logp_RT.double() * counted_RT).sum(dim=1)


def _score_answers(opened: OpenModel, probe: Probe) -> ItemScores:
    prompts = [opened.codec.encode_prompt(list(item.messages)) for item in probe.items]
    for item, prompt in zip(probe.items, prompts, strict=True):
        _check_length(opened, probe, item, len(prompt) + probe.max_new_tokens)
    answers = generate_answers(opened, prompts, max_new_tokens=probe.max_new_tokens)
    outcomes = [
        check(probe.verifier, output=answer.text, answer=item.answer)
        for answer, item in zip(answers, probe.items, strict=True)
    ]
    failed = [(item, one.error) for item, one in zip(probe.items, outcomes, strict=True) if one.error]
    if failed:
        raise ProbeError(
            f"probe '{probe.name}': the verifier failed on {len(failed)} of {len(outcomes)} items; the first is "
            f"{failed[0][0].id!r}: {failed[0][1]}.",
            remedy="A failed verifier is not a wrong answer, so the probe has no score.",
        )
    return _item_scores(
        opened,
        probe,
        score=[one.score for one in outcomes],
        prediction=[answer.text for answer in answers],
        expected=["" if item.answer is None else str(item.answer) for item in probe.items],
        valid=[float(one.valid) for one in outcomes],
        stopped=[float(answer.stopped) for answer in answers],
    )


def _score_bits(opened: OpenModel, probe: Probe) -> ItemScores:
    """Bits per UTF-8 byte of each text (all tokens but the first, which nothing predicts when there is no BOS), or of
    each item's assistant turns without their stop tokens."""
    encoded = [_encode_gold(opened, item) for item in probe.items]
    for item, (ids, _, _) in zip(probe.items, encoded, strict=True):
        _check_length(opened, probe, item, len(ids))
    bits = [0.0] * len(encoded)
    for batch in _length_batches([len(ids) for ids, _, _ in encoded], LOGIT_TOKENS):
        rows = [encoded[i][0] for i in batch]
        longest = max(map(len, rows))
        ids_BT = torch.full((len(rows), longest), opened.codec.pad_id, dtype=torch.int64, device=opened.device)
        counted_BT = torch.zeros((len(rows), longest), dtype=torch.bool, device=opened.device)
        for b, i in enumerate(batch):
            ids_BT[b, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
            counted_BT[b, : len(encoded[i][1])] = torch.tensor(encoded[i][1])
        # Padding stands behind every row's end, where a causal model cannot see it.
        logits_BTV = opened.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        nats_BT = -logits_BTV.log_softmax(dim=-1).gather(2, ids_BT[:, 1:, None])[..., 0].double()
        for i, nats in zip(batch, (nats_BT * counted_BT[:, 1:]).sum(dim=1).tolist(), strict=True):
            bits[i] = nats / math.log(2)
    sizes = [float(size) for _, _, size in encoded]
    return _item_scores(
        opened,
        probe,
        score=[one / size for one, size in zip(bits, sizes, strict=True)],
        prediction=["" for _ in encoded],
        expected=["" for _ in encoded],
        weight=sizes,
    )


def _encode_gold(opened: OpenModel, item: ProbeItem) -> tuple[list[int], list[bool], int]:
    """Ids, which of them are scored, and the UTF-8 bytes that the scored ones spell."""
    codec = opened.codec
    if item.text is not None:
        ids = codec.encode(item.text, special=True)
        return ids, [False] + [True] * (len(ids) - 1), len(item.text.encode())
    chat = codec.encode_chat(list(item.messages))
    scored = [counts and one not in codec.stop_ids for one, counts in zip(chat.ids, chat.counted, strict=True)]
    size = sum(len(one["content"].encode()) for one in item.messages if one["role"] == "assistant")
    return chat.ids, scored, size


def _choice_batches(items: Sequence[ProbeItem], prompts: dict[str, list[int]]) -> Iterator[list[ProbeItem]]:
    """Items with the same number of choices, by length, within the token budget."""
    for count in sorted({len(item.choices) for item in items}):
        group = [item for item in items if len(item.choices) == count]
        for batch in _length_batches([len(prompts[item.id]) for item in group], max(1, BATCH_TOKENS // count)):
            yield [group[i] for i in batch]


def _length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by length, cut where the padded batch would pass the budget."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and lengths[i] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _check_length(opened: OpenModel, probe: Probe, item: ProbeItem, tokens: int) -> None:
    longest = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ProbeError(
            f"probe '{probe.name}': item {item.id!r} needs {tokens} tokens, and the model's context has {longest}.",
            remedy="Shorten or remove the item; items are never cut.",
        )


def _item_scores(
    opened: OpenModel,
    probe: Probe,
    *,
    score: Sequence[float],
    prediction: Sequence[str],
    expected: Sequence[str],
    weight: Sequence[float] | None = None,
    valid: Sequence[float] | None = None,
    stopped: Sequence[float] | None = None,
    gap: Sequence[float] | None = None,
) -> ItemScores:
    def column(values: Sequence[float] | None) -> Any:
        return None if values is None else np.array(values, dtype=np.float64)

    return ItemScores(
        probe=probe.name,
        kind=probe.kind,
        direction="lower" if probe.kind == "bits_per_byte" else "higher",
        ids=tuple(item.id for item in probe.items),
        score=column(score),
        cluster=tuple(item.cluster for item in probe.items),
        prediction=tuple(prediction),
        expected=tuple(expected),
        weight=column(weight if weight is not None else [1.0] * len(score)),
        valid=column(valid),
        stopped=column(stopped),
        gap=column(gap),
        items_digest=probe.digest,
        template_digest=opened.codec.digest,
    )
