"""The best promoted scores, against which small losses cannot add up over rounds.

The same items judge round after round, and what is promoted was picked by them: its luck on these items stays in its
scores, so that a chain of promotions looks better than it is. Each comparison with the best is therefore made at a
share of alpha that falls with every verdict since that best was set. The share is that of the history there has been:
a promotion is taken to have probability 3/4, a hold 1/4. Were every history to lead to a model that has lost the whole
cumulative margin, the chance that one of them is promoted in the next round would still be at most alpha. docs/gate.md
has the measured rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evertune.gate import Decision, shown_gain
from evertune.probe.scores import ItemScores

PROMOTED, HELD = 0.75, 0.25


@dataclass(frozen=True)
class Ratchet:
    """By probe, the best promoted scores and the share of alpha that is left for a comparison with them."""

    best: Mapping[str, ItemScores]
    shares: Mapping[str, float]

    @classmethod
    def start(cls, scores: Mapping[str, ItemScores]) -> "Ratchet":
        """From the base, which nothing has been compared with yet."""
        return cls(best=dict(scores), shares=dict.fromkeys(scores, 1.0))

    def spend(self, decision: Decision) -> "Ratchet":
        """After a verdict: less of alpha is left."""
        factor = PROMOTED if decision == "PROMOTE" else HELD
        return Ratchet(best=self.best, shares={name: share * factor for name, share in self.shares.items()})

    def climb(self, promoted: Mapping[str, ItemScores], *, alpha: float) -> "Ratchet":
        """After a promotion: a probe whose gain over the best is shown has a new best.

        A gain that may be luck does not raise it: the luckiest of many would be a reference that no model keeps to.
        Other items or another template cannot be compared, so the ratchet starts anew there.
        """
        best, shares = dict(self.best), dict(self.shares)
        for name, scores in promoted.items():
            old = best.get(name)
            if old is None or not _same_items(old, scores) or shown_gain(scores, old, alpha) > 0:
                best[name], shares[name] = scores, 1.0
        return Ratchet(best=best, shares=shares)


def _same_items(old: ItemScores, new: ItemScores) -> bool:
    return (old.items_digest, old.template_digest, old.ids) == (new.items_digest, new.template_digest, new.ids)
