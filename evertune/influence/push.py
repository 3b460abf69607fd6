"""Which training rows pushed a probe down: by how each row's loss changes along the gradient of the probe's loss.

A step of gradient descent on a row changes the probe's loss by -rate * <g_row, g_probe> to first order (TracIn, Pruthi
et al. 2020, arXiv:2002.08484). The push of a row is -<g_row, g_probe / |g_probe|>: above 0, training on the row raises
the probe's loss. It is taken without any row's gradient: the derivative of the row's loss along g_probe, by central
differences in float32, so that it costs two forward passes of a row and rows go through the model in batches.

It is averaged over checkpoints that were kept on the way, or where none were, over points on the line from the stage's
start to its end, which is where training went, roughly. What it leaves out: the optimizer's own scaling, the order of
the rows, and everything beyond first order.
"""

# P points, N rows, H hidden

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evertune.data.encode import EncodedPair, EncodedRow, encode_pairs, encode_rows
from evertune.data.quality import asked_and_said
from evertune.data.replay import reservoir
from evertune.data.rows import Row, read_rows
from evertune.influence.order import SourceOrder
from evertune.measure.clusters import cluster_vectors, count_clusters
from evertune.measure.products import squared_norm
from evertune.merge.interpolate import scan
from evertune.model.checkpoint import Checkpoint
from evertune.model.forward import Forward, Tokens, score_rows
from evertune.model.open import OpenModel, open_model
from evertune.model.packing import read_tree
from evertune.model.tree import grow
from evertune.probe.loss import LossItem, loss_items
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe

POINTS = (0.0, 0.5, 1.0)
# Length of the step along the gradient, of the length of the weights: what a few steps of training move them.
STEP = 2e-5
BATCH_TOKENS = 2048
SHOWN_ROWS, SHOWN_WORDS, SHOWN_CHARACTERS = 5, 5, 240
Z95 = 1.6448536269514722
_LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Sampled:
    """A sampled row: its text, and the token rows whose log-likelihoods, by their factors, are its loss."""

    row: Row
    source: str
    texts: tuple[Tokens, ...]
    factors: tuple[float, ...]


def find_pushes(
    candidate: Checkpoint,
    start: Checkpoint,
    probe: Probe,
    before: ItemScores,
    after: ItemScores,
    sources: Sequence[SourceOrder],
    *,
    most_rows: int,
    most_items: int,
    max_tokens: int,
    seed: int,
    device: str,
    kept: Sequence[tuple[float, Checkpoint]] = (),
) -> dict[str, Any]:
    """How far each source, and each cluster of the worst one's rows, pushed a probe down in one stage.

    Args:
        kept: checkpoints from inside the stage with the shares of its steps that were done.

    Returns:
        `points`: [share of the update, or of the steps where checkpoints were kept; the probe's loss in nats there];
        `items`: how many items the loss is over; `sources`: see `_source_facts`, with `along`, the push at each point;
        the worst first; `clusters` and `rows` of the worst.
    """
    points: list[list[float]] = []
    sampled: list[Sampled] = []
    asked: tuple[LossItem, ...] = ()
    along_PN: list[NDArray[np.float64]] = []
    hidden_NH: NDArray[np.float64] = np.zeros((0, 0))

    def visit(share: Any, opened: OpenModel) -> None:
        nonlocal sampled, asked, hidden_NH
        if not sampled:
            asked = loss_items(opened.codec, probe, before=before, after=after, most=most_items)
            sampled = [one for each in sources for one in _sample(each, opened, most_rows, max_tokens, seed)]
            hidden_NH = mean_hidden(opened, sampled)
        loss, push_N = pushes(opened, asked, sampled)
        points.append([float(share), loss])
        along_PN.append(push_N)

    if kept:
        for share, checkpoint in ((0.0, start), *kept, (1.0, candidate)):
            visit(share, open_model(checkpoint, dtype="float32", device=device))
    else:
        scan(candidate, start, POINTS, dtype="float32", device=device, visit=visit)
    total_N = np.mean(along_PN, axis=0)
    facts = []
    for order in sources:
        own = [i for i, one in enumerate(sampled) if one.source == order.source]
        along = [float(push_N[own].mean()) * order.shown for push_N in along_PN]
        facts.append({**_source_facts(order, total_N[own]), "along": along})
    upward = sum(max(one["push"], 0.0) for one in facts)
    for one in facts:
        one["share"] = max(one["push"], 0.0) / upward if upward else 0.0
    facts.sort(key=lambda one: (-one["push"], one["source"]))
    worst = [i for i, one in enumerate(sampled) if one.source == facts[0]["source"]]
    return {
        "points": points,
        "items": len(asked),
        "sources": facts,
        "clusters": _clusters([sampled[i] for i in worst], total_N[worst], hidden_NH[worst], sampled),
        "rows": _worst_rows([sampled[i] for i in worst], total_N[worst]),
    }


def pushes(opened: OpenModel, asked: Sequence[LossItem], rows: Sequence[Sampled]) -> tuple[float, NDArray[np.float64]]:
    """The probe's mean loss in nats, and (N,) the push of each row: nats of the row a unit step along the probe's
    gradient costs, turned so that above 0 training on the row raises the probe's loss.

    The weights of the decoder layers are what moves; embeddings, norms and head stay. They end as they were, but for
    the rounding of float32.
    """
    weights = _layer_weights(opened.model)
    loss, gradients = probe_gradient(opened, asked, weights)
    norm = _norm(gradients.values())
    if norm == 0.0:
        if loss > 1e-6:
            raise AssertionError(f"a loss of {loss} nats has no gradient by the layers' weights")
        return loss, np.zeros(len(rows))
    length = STEP * _norm(weights.values())
    texts = [one for row in rows for one in row.texts]
    with _moved(weights, gradients, length / norm):
        ahead = _sums(opened, texts)
    with _moved(weights, gradients, -length / norm):
        behind = _sums(opened, texts)
    slope = (ahead - behind) / (2 * length)
    found, place = np.zeros(len(rows)), 0
    for n, row in enumerate(rows):
        found[n] = -sum(factor * slope[place + k] for k, factor in enumerate(row.factors))
        place += len(row.texts)
    return loss, found


def probe_gradient(
    opened: OpenModel, asked: Sequence[LossItem], weights: Mapping[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of the items in nats, and its gradient by the weights."""
    forward = Forward(opened)
    tensors = list(weights.values())
    for one in tensors:
        one.requires_grad_(True)
    total = 0.0
    gradients = {name: torch.zeros_like(one) for name, one in weights.items()}
    try:
        for batch in _batches(asked):
            with torch.enable_grad():
                loss = _items_loss(forward, batch) / len(asked)
                found = torch.autograd.grad(loss, tensors, allow_unused=True)
            total += float(loss.detach())
            for name, one in zip(weights, found, strict=True):
                if one is not None:
                    gradients[name] += one
    finally:
        for one in tensors:
            one.requires_grad_(False)
    return total, gradients


def mean_hidden(opened: OpenModel, rows: Sequence[Sampled]) -> NDArray[np.float64]:
    """(N, H): the last hidden states of each row's first text, in the mean over its tokens."""
    forward = Forward(opened)
    found = []
    for row in rows:
        ids_BT, _ = forward.pad([row.texts[0].ids])
        with torch.no_grad():
            hidden = forward.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        found.append(hidden[0].float().mean(dim=0).cpu().numpy())
    return np.array(found, dtype=np.float64)


def _items_loss(forward: Forward, items: Sequence[LossItem]) -> Tensor:
    """Sum of the items' losses."""
    texts = [one for item in items for one in item.texts]
    likelihoods = _tree_likelihoods(forward, texts) if forward.can_pack else _padded_likelihoods(forward, texts)
    losses, place = [], 0
    for item in items:
        scaled = torch.stack([likelihoods[place + k] * scale for k, scale in enumerate(item.scales)])
        place += len(item.texts)
        losses.append(-(scaled.log_softmax(dim=0)[item.right] if len(scaled) > 1 else scaled[0]))
    return torch.stack(losses).sum()


def _tree_likelihoods(forward: Forward, texts: Sequence[Tokens]) -> list[Tensor]:
    """Log-likelihood of each text's counted tokens, with gradient; what the texts share is read once."""
    found: dict[int, Tensor] = {}
    for tree in grow([one.ids[:-1] for one in texts], budget=BATCH_TOKENS):
        outputs = read_tree(forward.decoder, tree, device=forward.device)
        for i, places in tree.places.items():
            counted = [t for t in range(1, len(texts[i].ids)) if texts[i].counted[t]]
            hidden_NH = outputs.last_hidden_state[0, [places[t - 1] for t in counted]]
            logp_NV = forward.logits(outputs, hidden_NH).log_softmax(dim=-1)
            words_N = torch.tensor([texts[i].ids[t] for t in counted], device=forward.device)
            found[i] = logp_NV.gather(1, words_N.unsqueeze(1)).sum()
    return [found[i] for i in range(len(texts))]


def _padded_likelihoods(forward: Forward, texts: Sequence[Tokens]) -> list[Tensor]:
    ids_BT, _ = forward.pad([one.ids for one in texts])
    counted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, one in enumerate(texts):
        counted_BT[b, : len(one.ids)] = torch.tensor(one.counted)
    # Rows are padded on the right and the model is causal: what stands behind a row's end changes nothing in it.
    outputs = forward.decoder(input_ids=ids_BT, use_cache=False)
    asked_BT = torch.zeros_like(counted_BT)
    asked_BT[:, :-1] = counted_BT[:, 1:]
    logp_NV = forward.logits(outputs, outputs.last_hidden_state[asked_BT]).log_softmax(dim=-1)
    taken_N = logp_NV.gather(1, ids_BT[:, 1:][asked_BT[:, :-1]].unsqueeze(1)).squeeze(1)
    return [part.sum() for part in taken_N.split(counted_BT.sum(dim=1).tolist())]


def _batches(items: Sequence[LossItem]) -> list[list[LossItem]]:
    """Items in batches of at most so many padded tokens, an item whole."""
    batches: list[list[LossItem]] = []
    longest = rows = 0
    for item in sorted(items, key=lambda one: max(len(text.ids) for text in one.texts)):
        longest, rows = max(len(text.ids) for text in item.texts), rows + len(item.texts)
        if not batches or longest * rows > BATCH_TOKENS:
            batches.append([])
            rows = len(item.texts)
        batches[-1].append(item)
    return batches


def _layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of the decoder layers, without those of adapters: what an adapter changes is one of these."""
    return {
        name: one
        for name, one in model.named_parameters()
        if one.ndim == 2 and _LAYER.search(f".{name}") and ".lora_" not in name
    }


def _norm(tensors: Any) -> float:
    return float(torch.stack([squared_norm(one) for one in tensors]).sum().sqrt())


@contextmanager
def _moved(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor], factor: float) -> Any:
    with torch.no_grad():
        for name, one in weights.items():
            one.add_(direction[name], alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, one in weights.items():
                one.sub_(direction[name], alpha=factor)


def _sums(opened: OpenModel, texts: Sequence[Tokens]) -> NDArray[np.float64]:
    """Negative log-likelihood in nats of each text."""
    return np.array([-sum(one) for one in score_rows(Forward(opened), texts, batch_tokens=BATCH_TOKENS)])


def _sample(order: SourceOrder, opened: OpenModel, most: int, max_tokens: int, seed: int) -> list[Sampled]:
    rows = read_rows(Path(order.path), format=order.format, source=order.source, limit=order.limit)
    drawn = {row.id: row for row in reservoir(rows, most, seed)}
    if order.beta is None:
        encoded = encode_rows(list(drawn.values()), opened.codec, max_tokens=max_tokens, too_long="drop").rows
        return [Sampled(drawn[one.id], order.source, (_tokens(one),), (1.0,)) for one in encoded]
    pairs: Sequence[EncodedPair] = encode_pairs(
        list(drawn.values()), opened.codec, max_tokens=max_tokens, too_long="drop"
    ).rows
    half = order.beta / 2
    return [
        Sampled(drawn[one.id], order.source, (_tokens(one.chosen), _tokens(one.rejected)), (half, -half))
        for one in pairs
    ]


def _tokens(row: EncodedRow) -> Tokens:
    counted = (False, *row.counted[1:].tolist())
    return Tokens(tuple(row.ids.tolist()), counted)


def _source_facts(order: SourceOrder, push_n: NDArray[np.float64]) -> dict[str, Any]:
    """A source's push: the mean of its sampled rows times the rows shown, with a 90 % interval of that mean; and the
    share of rows that push up."""
    n = len(push_n)
    mean = float(push_n.mean())
    half = Z95 * float(push_n.std(ddof=1)) / n**0.5 if n > 1 else abs(mean)
    return {
        "source": order.source,
        "is_replay": order.is_replay,
        "shown": order.shown,
        "sampled": n,
        "push": mean * order.shown,
        "ci90": [(mean - half) * order.shown, (mean + half) * order.shown],
        "rows_up": float((push_n > 0).mean()),
    }


def _clusters(
    rows: Sequence[Sampled], push_n: NDArray[np.float64], hidden_nH: NDArray[np.float64], all_rows: Sequence[Sampled]
) -> list[dict[str, Any]]:
    """Clusters of the rows by their hidden states, the one that pushes most first, with the words that mark it."""
    group_n = cluster_vectors(hidden_nH, count_clusters(len(rows)))
    found = []
    for k in sorted(set(group_n.tolist())):
        mine = np.flatnonzero(group_n == k).tolist()
        others = [one for one in all_rows if id(one) not in {id(rows[i]) for i in mine}]
        typical = mine[int(np.argmax(push_n[mine]))]
        found.append(
            {
                "rows": len(mine),
                "push": float(push_n[mine].mean()),
                "rows_up": float((push_n[mine] > 0).mean()),
                "words": marking_words([_text(rows[i]) for i in mine], [_text(one) for one in others]),
                "example": _text(rows[typical])[:SHOWN_CHARACTERS],
            }
        )
    return sorted(found, key=lambda one: -float(one["push"]))


def marking_words(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words that are in far more of these texts than of the others."""
    inside, outside = (
        Counter(w for text in each for w in set(_WORD.findall(text.lower()))) for each in (texts, others)
    )
    lift = {word: n / len(texts) - outside[word] / max(len(others), 1) for word, n in inside.items()}
    return [word for word in sorted(lift, key=lambda one: (-lift[one], one))[:SHOWN_WORDS] if lift[word] > 0]


def _worst_rows(rows: Sequence[Sampled], push_n: NDArray[np.float64]) -> list[dict[str, Any]]:
    worst = sorted(range(len(rows)), key=lambda i: (-push_n[i], rows[i].row.id))[:SHOWN_ROWS]
    return [
        {
            "id": rows[i].row.id,
            "place": rows[i].row.place,
            "push": float(push_n[i]),
            "text": _text(rows[i])[:SHOWN_CHARACTERS],
        }
        for i in worst
        if push_n[i] > 0
    ]


def _text(one: Sampled) -> str:
    asked, said = asked_and_said(one.row)
    return f"{asked} → {said}" if asked else said
