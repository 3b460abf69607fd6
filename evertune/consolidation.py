"""Which of several ways to consolidate a round is kept: a choice only; the loop performs the ways like any stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.probe.scores import ItemScores
from evertune.rescue import rank

Scores = Mapping[str, ItemScores]


@dataclass(frozen=True)
class Best:
    """The way to keep, and what each of them scored; each verdict is corrected for their number."""

    name: str
    verdicts: Mapping[str, Verdict]
    values: Mapping[str, Mapping[str, float]]

    def body(self, name: str) -> dict[str, Any]:
        """One way as the ledger keeps it."""
        verdict = self.verdicts[name]
        return {
            "way": name,
            "decision": verdict.decision,
            "gain": gain(verdict),
            "failing": len(verdict.failing),
            "values": dict(self.values[name]),
        }


def choose_way(
    scored: Mapping[str, Scores],
    champion: Scores,
    best: Scores,
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    *,
    shares: Mapping[str, float] | None = None,
) -> Best:
    """Of the ways that pass the gate the one with the largest gain; if none does, the one that comes nearest.

    Nearest: not held rather than held, then the fewest comparisons that fail, then the larger gain. Of equals the first
    that was named. Every bound is taken at alpha divided by the number of ways, as in a rescue.

    Args:
        scored: item scores by probe of what each way made.
        champion, best, probes, settings, shares: as in `gate.judge`.
    """
    verdicts = {
        name: judge(scores, champion, best, probes, settings, tried=len(scored), shares=shares)
        for name, scores in scored.items()
    }
    chosen = min(verdicts, key=lambda name: (rank(verdicts[name]), -gain(verdicts[name])))
    values = {name: {probe: one.value for probe, one in scores.items()} for name, scores in scored.items()}
    return Best(chosen, verdicts, values)


def gain(verdict: Verdict) -> float:
    """Mean difference of the targets against the champion; without a target, that of all guards together."""
    targets = [one.difference for one in verdict.probes if one.role == "target" and one.reference == "champion"]
    if targets:
        return sum(targets) / len(targets)
    return verdict.pooled.difference if verdict.pooled is not None else 0.0
