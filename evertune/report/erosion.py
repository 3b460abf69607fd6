"""Stage by capability: what each stage of a round of several did, as the ledger tells it."""

from collections.abc import Sequence
from dataclasses import dataclass

from evertune.ledger import Event
from evertune.report.rounds import Body, bodies


@dataclass(frozen=True)
class Row:
    """A stage compared with an earlier checkpoint; a cell for each of the round's probes, None where not scored."""

    label: str
    since: str
    cells: tuple[Body | None, ...]


@dataclass(frozen=True)
class Erosion:
    """One round: its probes, and a row for each comparison of each stage."""

    round: str
    probes: tuple[str, ...]
    rows: tuple[Row, ...]


def tell_erosion(events: Sequence[Event]) -> tuple[Erosion, ...]:
    """Of every round whose stages were compared, in order; of a stage done anew the newest comparison."""
    found: dict[str, dict[str, Sequence[Body]]] = {}
    for body in bodies(events, "erosion"):
        found.setdefault(body["round"], {})[body["label"]] = body["against"]
    return tuple(_of_round(name, stages) for name, stages in found.items())


def _of_round(name: str, stages: dict[str, Sequence[Body]]) -> Erosion:
    tables = [
        (label, str(each["since"]), {one["probe"]: one for one in each["changes"]})
        for label, against in stages.items()
        for each in against
    ]
    probes = tuple(dict.fromkeys(probe for _, _, cells in tables for probe in cells))
    rows = tuple(Row(label, since, tuple(cells.get(probe) for probe in probes)) for label, since, cells in tables)
    return Erosion(name, probes, rows)
