"""What the report tells, worked out from ledger events alone. Nothing is invented: what no event holds is None."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evertune.ledger import Event
from evertune.measure.matrix import Interval, backward_transfer_interval, retention_per_task

Z90 = 1.6448536269514722
VERBS = {"PROMOTE": "was PROMOTED", "HOLD": "was HELD", "INCONCLUSIVE": "is INCONCLUSIVE"}


@dataclass(frozen=True)
class Column:
    """A probe of the matrix."""

    name: str
    role: str
    kind: str
    direction: str
    chance: float | None


@dataclass(frozen=True)
class Cell:
    """A score with what it means: change since the champion of its round, and a word for it."""

    value: float
    low: float
    high: float
    n: int
    change: float | None
    word: str


@dataclass(frozen=True)
class MatrixRow:
    """One checkpoint: `state` is champion, promoted, held or step."""

    label: str
    digest: str
    state: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class RoundStory:
    """One round: its verdict, what was tried after it, and how it ended."""

    name: str
    decision: str
    verdict: Mapping[str, Any]
    rescues: tuple[Mapping[str, Any], ...]
    promoted: str | None
    by: str | None


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    name: str
    sentence: str
    decision: str | None
    academic: tuple[str, ...]
    rounds: tuple[RoundStory, ...]
    columns: tuple[Column, ...]
    rows: tuple[MatrixRow, ...]
    transfer: Interval | None
    retention: tuple[tuple[str, float], ...]
    gains: tuple[Mapping[str, Any], ...]
    stages: tuple[Mapping[str, Any], ...]
    probe_facts: tuple[Mapping[str, Any], ...]
    cost: Mapping[str, Any] | None
    champion: str
    failures: tuple[Mapping[str, Any], ...]
    run: Mapping[str, Any] | None
    head: str
    finished: float | None


def build_report(events: Sequence[Event]) -> Report:
    """Gather a run's story; a partial ledger gives a partial story that says so."""
    bodies = _by_kind(events)
    rounds = _rounds(bodies)
    champion = _champion(bodies)
    columns, rows = _matrix(bodies, rounds, champion)
    transfer, kept = _summaries(rounds, columns, rows)
    stages = tuple(
        {**one.body, "volatile": one.volatile} for one in events if one.kind == "checkpoint" and one.body["steps"]
    )
    latest = rounds[-1] if rounds else None
    run = bodies["run"][-1] if bodies["run"] else None
    times = [one.volatile["time"] for one in events if one.volatile.get("time")]
    return Report(
        name=str(run["name"]) if run else "run",
        sentence=_sentence(bodies, latest),
        decision=latest.decision if latest else None,
        academic=tuple(sorted({one["label"] for one in bodies["checkpoint"] if one["standing"] == "academic"})),
        rounds=rounds,
        columns=columns,
        rows=rows,
        transfer=transfer,
        retention=kept,
        gains=_gains(latest),
        stages=stages,
        probe_facts=tuple(bodies["probe"]),
        cost=_cost(stages),
        champion=champion,
        failures=tuple(bodies["failure"]),
        run=run,
        head=events[-1].hash if events else "",
        finished=max(times) if times else None,
    )


def _by_kind(events: Sequence[Event]) -> dict[str, list[dict[str, Any]]]:
    kinds = ("run", "checkpoint", "probe", "verdict", "rescue", "promotion", "rollback", "failure", "settled")
    return {kind: [one.body for one in events if one.kind == kind] for kind in kinds}


def _rounds(bodies: Mapping[str, list[dict[str, Any]]]) -> tuple[RoundStory, ...]:
    found = []
    for verdict in bodies["verdict"]:
        name = verdict["round"]
        promotions = [one for one in bodies["promotion"] if one["round"] == name]
        rescues = tuple(one for one in bodies["rescue"] if one["round"] == name)
        promoted = promotions[-1] if promotions else None
        found.append(
            RoundStory(
                name=name,
                decision="PROMOTE" if promoted else verdict["decision"],
                verdict=verdict,
                rescues=rescues,
                promoted=promoted["label"] if promoted else None,
                by=promoted["by"] if promoted else None,
            )
        )
    return tuple(found)


def _champion(bodies: Mapping[str, list[dict[str, Any]]]) -> str:
    decided = bodies["promotion"] + bodies["rollback"]
    # Lists are by kind; a rollback after the last promotion is the later of the two.
    if (
        bodies["rollback"]
        and bodies["promotion"]
        and bodies["rollback"][-1]["from"] == bodies["promotion"][-1]["label"]
    ):
        return str(bodies["rollback"][-1]["label"])
    return (
        str(bodies["promotion"][-1]["label"])
        if bodies["promotion"]
        else str(decided[-1]["label"])
        if decided
        else "base"
    )


def _sentence(bodies: Mapping[str, list[dict[str, Any]]], latest: RoundStory | None) -> str:
    if latest is None:
        if not bodies["probe"]:
            return "Nothing has been measured yet."
        done = len([one for one in bodies["checkpoint"] if one["steps"]])
        return f"No round has a verdict yet; {done} stage{'s' * (done != 1)} trained so far."
    evidence = latest.verdict["probes"]
    guards = [one for one in evidence if one["role"] == "guard" and one["reference"] == "champion"]
    kept = sum(one["outcome"] == "pass" for one in guards)
    rescued = " after a rescue" if latest.by == "rescue" else ""
    parts = [f"Round {latest.name} {VERBS[latest.decision]}{rescued}."]
    if guards:
        parts.append(f"Kept {kept} of {len(guards)} guarded skills.")
    parts += [f"{one['probe']} {_points(one)}." for one in evidence if one["role"] == "target"]
    return " ".join(parts)


def _points(one: Mapping[str, Any]) -> str:
    unit = "%" if one["kind"] == "bits_per_byte" else " points"
    return f"{one['difference'] * 100:+.1f}{unit}"


def _matrix(
    bodies: Mapping[str, list[dict[str, Any]]], rounds: Sequence[RoundStory], champion: str
) -> tuple[tuple[Column, ...], tuple[MatrixRow, ...]]:
    order = {"guard": 0, "target": 1, "watch": 2}
    known: dict[str, Column] = {}
    for one in bodies["probe"]:
        known[one["probe"]] = Column(one["probe"], one["role"], one["kind"], one["direction"], one["chance"])
    columns = tuple(sorted(known.values(), key=lambda one: order.get(one.role, 3)))
    scores = {(one["label"], one["probe"]): one for one in bodies["probe"]}
    labels = [one["label"] for one in bodies["checkpoint"] if any(label == one["label"] for label, _ in scores)]
    promoted = {one.promoted for one in rounds if one.promoted}
    judged = {one.verdict["label"]: one.verdict for one in rounds}
    judged |= {one["label"]: one for story in rounds for one in story.rescues}
    digests = {one["label"]: one["digest"] for one in bodies["checkpoint"]}
    rows = []
    for label in dict.fromkeys(labels):
        state = (
            "champion"
            if label == champion
            else "promoted"
            if label in promoted
            else "held"
            if label in judged
            else "step"
        )
        before = judged[label]["champion_label"] if label in judged else None
        cells = tuple(
            _cell(scores.get((label, one.name)), scores.get((before, one.name)), judged.get(label)) for one in columns
        )
        rows.append(MatrixRow(label, digests[label], state, cells))
    return columns, tuple(rows)


def _cell(
    score: Mapping[str, Any] | None, before: Mapping[str, Any] | None, verdict: Mapping[str, Any] | None
) -> Cell | None:
    if score is None:
        return None
    change = None if before is None else score["value"] - before["value"]
    outcomes = [one["outcome"] for one in (verdict or {}).get("probes", []) if one["probe"] == score["probe"]]
    word = ""
    if "harm" in outcomes:
        word = "lost"
    elif change is not None and outcomes:
        better = change if score["direction"] == "higher" else -change
        word = "up" if better > 0 else "down" if better < 0 else "same"
    low, high = score["ci90"]
    return Cell(score["value"], low, high, score["n"], change, word)


def _summaries(
    rounds: Sequence[RoundStory], columns: Sequence[Column], rows: Sequence[MatrixRow]
) -> tuple[Interval | None, tuple[tuple[str, float], ...]]:
    """Backward transfer and retention over the promoted rounds, each with the first probe it taught as its task."""
    tasks: list[tuple[str, str]] = []
    for one in rounds:
        targets = [each["probe"] for each in one.verdict["probes"] if each["role"] == "target"]
        if one.promoted and targets and targets[0] not in [name for name, _ in tasks]:
            tasks.append((targets[0], one.promoted))
    names = [column.name for column in columns]
    by_label = {row.label: row for row in rows}
    if len(tasks) < 2 or any(label not in by_label for _, label in tasks):
        return None, ()
    K = len(tasks)
    R, errors = np.full((K, K), np.nan), np.zeros((K, K))
    for i, (_, label) in enumerate(tasks):
        for j, (name, _) in enumerate(tasks):
            cell = by_label[label].cells[names.index(name)]
            if cell is not None:
                R[i, j], errors[i, j] = cell.value, (cell.high - cell.low) / (2 * Z90)
    if not np.all(np.isfinite(R[np.tril_indices(K)])):
        return None, ()
    kept = retention_per_task(R)
    return backward_transfer_interval(R, errors), tuple((tasks[j][0], float(kept[j])) for j in range(K - 1))


def _gains(latest: RoundStory | None) -> tuple[Mapping[str, Any], ...]:
    return tuple(one for one in latest.verdict["probes"] if one["role"] == "target") if latest else ()


def _cost(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Tokens and seconds spent, beside a retrain on all rows so far: C_retrain ~ D_total T, C_increment ~ D_new T_inc +
    alpha D_old (rows shown again, replay included)."""
    if not stages:
        return None
    last = stages[-1]
    all_new = sum(one["new_rows"] for one in stages)
    return {
        "seconds": sum(one["volatile"].get("seconds", 0.0) for one in stages),
        "tokens": sum(one["tokens"] for one in stages),
        "last_label": last["label"],
        "last_rows": last["new_rows"] + last["replay_rows"],
        "last_new": last["new_rows"],
        "retrain_rows": all_new,
        "new_share": last["new_rows"] / all_new if all_new else 0.0,
    }
