"""What a stage did to every capability: paired comparisons with the checkpoints that it can have worn away."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evertune.gate import Scores, Unit, compare_scores
from evertune.measure import stats


@dataclass(frozen=True)
class Change:
    """One probe after a stage and before it, on the same items.

    Attributes:
        before, after: mean scores.
        difference: better is positive; in score units, or relative to the loss before.
        unit: as the gate counts it.
        ci90: two-sided interval of the difference.
        p_harm: one-sided p-value of a fall, adjusted (Holm) over the probes of the comparison.
    """

    probe: str
    before: float
    after: float
    difference: float
    unit: Unit
    ci90: tuple[float, float]
    p_harm: float


def changes(after: Scores, before: Scores) -> list[Change]:
    """Every probe that both were asked, compared item by item as the gate does."""
    names = [name for name in after if name in before]
    found = {name: compare_scores(after[name], before[name], level=0.05) for name in names}
    adjusted = stats.holm([one.p_harm for one, _ in found.values()])
    return [
        Change(
            probe=name,
            before=before[name].value,
            after=after[name].value,
            difference=one.difference,
            unit=unit,
            ci90=one.ci90,
            p_harm=p,
        )
        for (name, (one, unit)), p in zip(found.items(), adjusted, strict=True)
    ]


def erosion_body(after: Scores, against: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """For each label of what a stage is compared with, its changes as plain values."""
    return [
        {"since": label, "changes": [asdict(one) for one in changes(after, each)]} for label, each in against.items()
    ]
