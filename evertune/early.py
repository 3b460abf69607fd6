"""The gate in batches: items in one random order that is fixed with the probes, a look after each, stop when decided.

Only probes with scores in [0, 1] are asked in batches; a loss is measured whole, at once. Early looks use bounds that
hold at every number of items and have a fifth of alpha together; the look at all items has the rest, so both errors
stay at alpha (`gate.judge`).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from evertune.gate import GateSettings, Look, ProbeFacts, Verdict, judge
from evertune.hashing import digest_json
from evertune.probe.scores import ItemScores, concatenate
from evertune.probe.suite import AnyProbe, Probe

BATCH_ITEMS = 50


class Sides(NamedTuple):
    """Scores of baseline and candidate on the same items."""

    before: ItemScores
    after: ItemScores


@dataclass(frozen=True)
class Stopped:
    """How far the looks went: the verdict, the scores so far, the last look, and items asked of those there are."""

    verdict: Verdict
    before: Mapping[str, ItemScores]
    after: Mapping[str, ItemScores]
    look: Look
    items_asked: int
    items_in_all: int


def judge_in_batches(
    probes: Sequence[AnyProbe],
    facts: Mapping[str, ProbeFacts],
    settings: GateSettings,
    score: Callable[[AnyProbe], Sides],
) -> Stopped:
    """Score both sides batch by batch until the gate decides.

    Args:
        score: scores of both sides on a probe, or on a part of its items.
    """
    whole = {one.name: score(one) for one in probes if not _is_batched(one)}
    batched = {one.name: one for one in probes if isinstance(one, Probe) and _is_batched(one)}
    seen: dict[str, list[Sides]] = {name: [] for name in batched}
    batches = plan_batches(list(batched.values()))
    in_all = sum(len(one.items) for one in batched.values())
    asked = 0
    for number, batch in enumerate(batches, start=1):
        for name, places in batch.items():
            probe = batched[name]
            seen[name].append(score(replace(probe, items=tuple(probe.items[i] for i in places))))
            asked += len(places)
        is_last = number == len(batches)
        if not is_last and not all(seen.values()):
            continue  # a probe has not been asked anything yet
        sides = whole | {
            name: Sides(concatenate([one.before for one in parts]), concatenate([one.after for one in parts]))
            for name, parts in seen.items()
        }
        look: Look = "last" if is_last else "early"
        before, after = ({name: one[side] for name, one in sides.items()} for side in (0, 1))
        verdict = judge(after, before, before, facts, settings, look=look)
        if is_last or verdict.decision != "INCONCLUSIVE":
            return Stopped(verdict, before, after, look, asked, in_all)
    before, after = ({name: one[side] for name, one in whole.items()} for side in (0, 1))
    return Stopped(judge(after, before, before, facts, settings), before, after, "whole", 0, 0)


def plan_batches(probes: Sequence[Probe], *, batch_items: int = BATCH_ITEMS) -> list[dict[str, list[int]]]:
    """Places of items by probe, in batches of at least `batch_items`; clusters stay whole.

    The order is random over all probes together, so that each batch is a sample of every comparison, and depends on
    the items alone: the same probes are always asked in the same order.
    """
    clusters: dict[tuple[str, str], list[int]] = {}
    for probe in probes:
        for i, item in enumerate(probe.items):
            clusters.setdefault((probe.name, item.cluster), []).append(i)
    order = sorted(clusters)
    random.Random(digest_json([[one.name, one.digest] for one in probes])).shuffle(order)
    batches: list[dict[str, list[int]]] = []
    count = batch_items
    for name, cluster in order:
        if count >= batch_items:
            batches.append({})
            count = 0
        batches[-1].setdefault(name, []).extend(clusters[name, cluster])
        count += len(clusters[name, cluster])
    return batches


def _is_batched(probe: AnyProbe) -> bool:
    return isinstance(probe, Probe) and probe.kind != "bits_per_byte"
