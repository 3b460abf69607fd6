"""Two open models side by side on the same texts: divergence of outputs, similarity of hidden states, distance of
weights, and how sure each is of its choices."""

# N positions, V vocabulary, H hidden, L layers

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evertune.measure.outputs import calibration_error, kl_sum, linear_cka, spectral_norm
from evertune.measure.products import squared_norm
from evertune.model.codec import Codec
from evertune.model.forward import Forward, Tokens, score_branches
from evertune.model.open import OpenModel
from evertune.probe.score import answer_tokens, text_tokens
from evertune.probe.suite import Probe

# Hidden states are compared at so many positions at most: enough for widths of a few thousand.
POSITIONS = 2048
_INSIDE = re.compile(r"\.(?:layers|layer|h|blocks)\.\d+\.(.*)\.weight$")


def texts_of(codec: Codec, probe: Probe, *, most: int) -> list[Tokens]:
    """A probe's items with what should be said: texts, or questions with their right answers. Items without a text for
    an answer are left out."""
    found = []
    for item in probe.items[:most]:
        if item.text is not None:
            found.append(text_tokens(codec, probe, item, item.text))
            continue
        turns: list[Mapping[str, str]] = list(item.messages)
        if turns[-1]["role"] != "assistant":
            answer = item.choices[item.answer] if item.choices else item.answer
            if not isinstance(answer, str):
                continue
            turns.append({"role": "assistant", "content": answer})
        found.append(answer_tokens(codec, probe, item, turns))
    return found


@torch.no_grad()
def divergence(before: OpenModel, after: OpenModel, texts: Sequence[Tokens]) -> dict[str, float]:
    """Mean exact KL(before || after) over the counted positions, in nats per token, and how many there are."""
    forwards = [Forward(one) for one in (before, after)]
    total, tokens = 0.0, 0
    for text in texts:
        ids_BT, _ = forwards[0].pad([text.ids])
        asked_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        asked_BT[0, :-1] = torch.tensor(text.counted[1:])
        outputs = [one.decoder(input_ids=ids_BT, use_cache=False) for one in forwards]
        hidden = [one.last_hidden_state[asked_BT] for one in outputs]
        for start in range(0, len(hidden[0]), forwards[0].chunk_positions):
            part = slice(start, start + forwards[0].chunk_positions)
            logp, logq = (
                forward.logits(output, one[part]).log_softmax(dim=-1)
                for forward, output, one in zip(forwards, outputs, hidden, strict=True)
            )
            total += kl_sum(logp, logq)
        tokens += int(asked_BT.sum())
    return {"nats": total / tokens, "tokens": tokens}


@torch.no_grad()
def similarity(before: OpenModel, after: OpenModel, texts: Sequence[Tokens]) -> list[float]:
    """Linear CKA of the hidden states of both models, after the embedding and after each layer."""
    kept: list[list[list[Tensor]]] = [[], []]
    positions = 0
    for text in texts:
        if positions >= POSITIONS:
            break
        for k, one in enumerate((before, after)):
            ids_BT, _ = Forward(one).pad([text.ids])
            states = one.model.get_decoder()(input_ids=ids_BT, use_cache=False, output_hidden_states=True).hidden_states
            kept[k].append([state[0].float() for state in states])
        positions += len(text.ids)
    layers = len(kept[0][0])
    joined = [[torch.cat([each[i] for each in side])[:POSITIONS] for i in range(layers)] for side in kept]
    return [linear_cka(X, Y) for X, Y in zip(*joined, strict=True)]


@torch.no_grad()
def weight_distance(before: OpenModel, after: OpenModel) -> dict[str, dict[str, float]]:
    """By kind of matrix within a layer (`self_attn.q_proj`): relative L2 over all layers, and the largest ratio of
    spectral norms of change and weight. Both models are plain, of one architecture."""
    new = dict(after.model.named_parameters())
    moved: dict[str, float] = {}
    size: dict[str, float] = {}
    spectral: dict[str, float] = {}
    for name, old in before.model.named_parameters():
        found = _INSIDE.search(f".{name}")
        if found is None or old.ndim != 2:
            continue
        kind, change = found.group(1), new[name].float() - old.float()
        moved[kind] = moved.get(kind, 0.0) + float(squared_norm(change))
        size[kind] = size.get(kind, 0.0) + float(squared_norm(old))
        whole = spectral_norm(old)
        spectral[kind] = max(spectral.get(kind, 0.0), spectral_norm(change) / whole if whole else 0.0)
    return {
        kind: {"relative_l2": math.sqrt(moved[kind] / size[kind]) if size[kind] else 0.0, "spectral": spectral[kind]}
        for kind in moved
    }


def sureness(opened: OpenModel, probe: Probe, *, most: int) -> float:
    """Expected calibration error of a `choice` probe: how far the share of right answers is from how sure the model is
    of them, by the softmax of what it compares (per byte: times the mean size of the choices)."""
    forward = Forward(opened)
    items = probe.items[:most]
    groups = [
        [
            answer_tokens(opened.codec, probe, item, [*item.messages, {"role": "assistant", "content": one}])
            for one in item.choices
        ]
        for item in items
    ]
    confidences, right = [], []
    for item, logps in zip(items, score_branches(forward, groups), strict=True):
        sizes = [len(one.encode()) for one in item.choices]
        mean = sum(sizes) / len(sizes)
        scales = [mean / size if probe.normalise == "bytes" else 1.0 for size in sizes]
        values = torch.tensor([sum(one) * scale for one, scale in zip(logps, scales, strict=True)])
        shares = values.softmax(dim=0)
        confidences.append(float(shares.max()))
        right.append(int(shares.argmax()) == item.answer)
    return calibration_error(confidences, right)


def compare_models(
    before: OpenModel, after: OpenModel, groups: Mapping[str, Sequence[Probe]], *, most_texts: int
) -> dict[str, Any]:
    """Everything above.

    Args:
        groups: probes whose texts are read, by what they are called: `general`, `taught`.

    Returns:
        `{"kl": {group: {"nats", "tokens"}}, "cka": [of the embedding, of each layer], "weights": {kind: {...}},
        "calibration": {probe: [before, after]}}`.
    """
    texts = {
        name: [one for probe in probes for one in texts_of(before.codec, probe, most=most_texts)]
        for name, probes in groups.items()
    }
    kl = {name: divergence(before, after, each) for name, each in texts.items() if each}
    first = next((each for each in texts.values() if each), [])
    choices = [probe for probes in groups.values() for probe in probes if probe.kind == "choice"]
    return {
        "kl": kl,
        "cka": similarity(before, after, first) if first else [],
        "weights": weight_distance(before, after),
        "calibration": {
            probe.name: [sureness(one, probe, most=4 * most_texts) for one in (before, after)] for probe in choices
        },
    }
