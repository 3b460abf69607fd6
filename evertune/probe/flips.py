"""The items whose score changed most between two checkpoints: what a person wants to see first."""

from collections.abc import Mapping
from typing import Any

from evertune.probe.scores import ItemScores

SHOWN = 5


def flips_of(after: ItemScores, before: ItemScores, prompts: Mapping[str, str]) -> list[dict[str, Any]]:
    """At most five items that fell, the worst first, then at most five that rose.

    Args:
        prompts: what a person sees of each item, by id; empty where nobody knows.
    """
    change = (after.score - before.score) * (1 if after.direction == "higher" else -1)
    order = sorted(range(len(after.ids)), key=lambda i: (change[i], after.ids[i]))
    worst = [i for i in order if change[i] < 0][:SHOWN]
    best = [i for i in reversed(order) if change[i] > 0][:SHOWN]
    return [
        {
            "id": after.ids[i],
            "prompt": prompts.get(after.ids[i], ""),
            "expected": after.expected[i],
            "before": before.prediction[i],
            "after": after.prediction[i],
            "before_score": float(before.score[i]),
            "after_score": float(after.score[i]),
        }
        for i in (*worst, *best)
    ]
