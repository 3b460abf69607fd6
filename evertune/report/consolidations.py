"""The ways that were tried to consolidate a round, side by side: what each scored, cost and came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evertune.ledger import Event
from evertune.report.rounds import Body


@dataclass(frozen=True)
class Consolidated:
    """One round's ways in the order they were named; each with `seconds` and `teacher_forwards` where they are known.

    `chosen` is the name of the way that was kept.
    """

    round: str
    champion: str
    chosen: str
    ways: tuple[Body, ...]


def consolidations(events: Sequence[Event]) -> tuple[Consolidated, ...]:
    """Every round that was consolidated in several ways."""
    return tuple(_tell(one) for one in events if one.kind == "consolidation")


def _tell(event: Event) -> Consolidated:
    body: dict[str, Any] = event.body
    costs = event.volatile.get("costs", {})
    ways = tuple(
        {"seconds": None, "teacher_forwards": None, **one, **costs.get(one["way"], {})} for one in body["ways"]
    )
    return Consolidated(body["round"], body["champion_label"], body["chosen"], ways)
