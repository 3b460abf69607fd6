"""The loss behind a probe's scores: its gradient says what would make right answers likelier than wrong ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evertune.errors import ProbeError
from evertune.hashing import digest_json
from evertune.model.codec import Codec
from evertune.model.forward import Tokens
from evertune.probe.score import answer_tokens, text_tokens
from evertune.probe.scores import ItemScores
from evertune.probe.suite import Probe, ProbeItem


@dataclass(frozen=True)
class LossItem:
    """One item as texts whose likelihoods make its loss.

    The loss is -log softmax(scales * log-likelihoods)[right] where there are several texts, else the text's own
    negative log-likelihood times its scale: nats in both cases.

    Attributes:
        texts: of a choice each choice as the answer, else the one text or answer that should be likely.
        scales: by what each text's log-likelihood is multiplied.
        right: index of the right one.
    """

    id: str
    texts: tuple[Tokens, ...]
    scales: tuple[float, ...]
    right: int


def loss_items(codec: Codec, probe: Probe, *, before: ItemScores, after: ItemScores, most: int) -> tuple[LossItem, ...]:
    """The items that tell most about a fall, at most `most`: those that fell, then others that had been right.

    Of a loss, items in an order drawn by their ids. A generated answer has no loss of its own: the text that should
    stay likely is the answer that the model gave before and that was right.

    Raises:
        ProbeError: no item was answered rightly before, so that nothing can be said about what was lost.
    """
    by_id = {item.id: item for item in probe.items}
    then, now = _by_item(before), _by_item(after)
    rises = 1.0 if before.direction == "higher" else -1.0
    fell = {name: rises * (then[name] - now[name]) for name in by_id}
    drawn = sorted(by_id, key=digest_json)
    if probe.kind == "bits_per_byte":
        chosen = drawn[:most]
    else:
        usable = drawn if probe.kind == "choice" else [name for name in drawn if then[name] > 0]
        chosen = sorted(usable, key=lambda name: (-max(fell[name], 0.0), -then[name]))[:most]
    if not chosen:
        raise ProbeError(
            f"probe '{probe.name}': found no item that was answered rightly before, expected one or more.",
            remedy="What was never known cannot have been lost: blame another probe, or an earlier checkpoint.",
        )
    answers = _best_answers(before)
    return tuple(_loss_item(codec, probe, by_id[name], answers.get(name, "")) for name in chosen)


def _loss_item(codec: Codec, probe: Probe, item: ProbeItem, answer: str) -> LossItem:
    if probe.kind == "choice":
        texts = tuple(
            answer_tokens(codec, probe, item, [*item.messages, {"role": "assistant", "content": one}])
            for one in item.choices
        )
        sizes = [len(one.encode()) for one in item.choices]
        # What is compared is nats per byte; times the mean size, a difference is worth about as much as it is in nats.
        mean = sum(sizes) / len(sizes)
        scales = tuple(mean / size if probe.normalise == "bytes" else 1.0 for size in sizes)
        return LossItem(item.id, texts, scales, item.answer)
    if item.text is not None:
        text = text_tokens(codec, probe, item, item.text)
    elif probe.kind == "bits_per_byte":
        text = answer_tokens(codec, probe, item, item.messages)
    else:
        text = answer_tokens(codec, probe, item, [*item.messages, {"role": "assistant", "content": answer}])
    return LossItem(item.id, (text,), (1.0 / sum(text.counted),), 0)


def _by_item(scores: ItemScores) -> Mapping[str, float]:
    """Mean score of each item over its samples."""
    K = scores.samples
    means = scores.score.reshape(-1, K).mean(axis=1)
    return dict(zip(_item_ids(scores), means.tolist(), strict=True))


def _best_answers(scores: ItemScores) -> Mapping[str, str]:
    """Of each item the answer that scored highest."""
    K = scores.samples
    best = scores.score.reshape(-1, K).argmax(axis=1).tolist()
    return {name: scores.prediction[i * K + best[i]] for i, name in enumerate(_item_ids(scores))}


def _item_ids(scores: ItemScores) -> Sequence[str]:
    K = scores.samples
    return scores.ids if K == 1 else [name.rsplit("#", 1)[0] for name in scores.ids[::K]]
