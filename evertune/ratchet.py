"""The best promoted scores, against which small losses cannot add up over rounds.

The same items judge round after round, and what is promoted was picked by them: its luck on these items stays in its
scores, so that a chain of promotions looks better than it is. Each comparison with the best is therefore made at a
share of alpha: that of the history there has been since that best was set, told by how many candidates were judged for
each promotion. The first of them is taken to be promoted with probability 3/4, the g-th with 1/4 / (g (g - 1)); these
sum to 1, so the shares of all histories with equally many promotions do too. Whatever the rounds bring, the chance that
the k-th promotion is of a model that has lost the whole cumulative margin stays at alpha.
`benchmarks.gate --only creep` measures it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from evertune.gate import Decision, shown_gain
from evertune.probe.scores import ItemScores

FIRST = 0.75


@dataclass(frozen=True)
class Since:
    """What was judged since a best was set.

    Attributes:
        share: product of the shares of the promotions since.
        candidate: the number, counted from 1, of the next candidate since the last of them.
    """

    share: float = 1.0
    candidate: int = 1

    @property
    def left(self) -> float:
        """The share of alpha for the next candidate's comparison."""
        g = self.candidate
        return self.share * (FIRST if g == 1 else (1 - FIRST) / (g * (g - 1)))

    def judged(self, decision: Decision) -> "Since":
        """After one more verdict."""
        if decision == "PROMOTE":
            return Since(self.left, 1)
        return Since(self.share, self.candidate + 1)


@dataclass(frozen=True)
class Ratchet:
    """By probe, the best promoted scores and what was judged since they were set."""

    best: Mapping[str, ItemScores]
    since: Mapping[str, Since]

    @classmethod
    def start(cls, scores: Mapping[str, ItemScores]) -> "Ratchet":
        """From the base, which nothing has been compared with yet."""
        return cls(best=dict(scores), since=dict.fromkeys(scores, Since()))

    def begin(self, scores: Mapping[str, ItemScores]) -> "Ratchet":
        """With the probes that have no best yet: held-out ones, before they are asked for the first time."""
        new = {name: one for name, one in scores.items() if name not in self.best}
        return Ratchet(best={**self.best, **new}, since={**self.since, **dict.fromkeys(new, Since())})

    @property
    def shares(self) -> dict[str, float]:
        """By probe, the share of alpha for the next comparison with the best."""
        return {name: one.left for name, one in self.since.items()}

    def judged(self, decision: Decision) -> "Ratchet":
        """After a verdict: less of alpha is left."""
        return Ratchet(best=self.best, since={name: one.judged(decision) for name, one in self.since.items()})

    def climb(self, promoted: Mapping[str, ItemScores], *, alpha: float) -> "Ratchet":
        """After a promotion: a probe whose gain over the best is shown has a new best.

        A gain that may be luck does not raise it: the luckiest of many would be a reference that no model keeps to.
        Other items or another template cannot be compared, so the ratchet starts anew there.
        """
        best, since = dict(self.best), dict(self.since)
        for name, scores in promoted.items():
            old = best.get(name)
            if old is None or not _same_items(old, scores) or shown_gain(scores, old, alpha) > 0:
                best[name], since[name] = scores, Since()
        return Ratchet(best=best, since=since)


def _same_items(old: ItemScores, new: ItemScores) -> bool:
    return (old.items_digest, old.template_digest, old.ids) == (new.items_digest, new.template_digest, new.ids)
