"""What to try after a candidate was not promoted: proposals only; the loop performs them like any stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.probe.scores import ItemScores

Scores = Mapping[str, ItemScores]


@dataclass(frozen=True)
class Chosen:
    """The share of the update to keep, and what every tried share scored.

    `passes` says whether the share would be promoted, corrected for the number tried.
    """

    alpha: float
    values: Mapping[float, Mapping[str, float]]
    passes: Mapping[float, bool]

    def scan_body(self) -> list[dict[str, Any]]:
        """The scan as the ledger keeps it, largest share first."""
        return [
            {"alpha": alpha, "values": dict(values), "passes": self.passes[alpha]}
            for alpha, values in sorted(self.values.items(), reverse=True)
        ]


def choose(
    scan: Mapping[float, Scores],
    champion: Scores,
    best: Scores,
    probes: Mapping[str, ProbeFacts],
    settings: GateSettings,
    shares: Mapping[str, float] | None = None,
) -> Chosen:
    """The largest share of the update that passes the gate; if none does, the one that comes nearest.

    Nearest: not held rather than held, then the fewest comparisons that fail, then the larger share. It is written and
    judged all the same, so that the ledger shows by how much the rescue missed.

    Args:
        scan: item scores by probe for each share tried, in (0, 1).
    """
    verdicts = {
        alpha: judge(scores, champion, best, probes, settings, tried=len(scan), shares=shares)
        for alpha, scores in scan.items()
    }
    alpha = min(verdicts, key=lambda one: (_rank(verdicts[one]), -one))
    return Chosen(
        alpha=alpha,
        values={one: {name: scores.value for name, scores in scan[one].items()} for one in scan},
        passes={one: verdict.decision == "PROMOTE" for one, verdict in verdicts.items()},
    )


def _rank(verdict: Verdict) -> tuple[int, int]:
    order = {"PROMOTE": 0, "INCONCLUSIVE": 1, "HOLD": 2}
    return order[verdict.decision], len(verdict.failing)
