"""Monitoring over rounds, in five dimensions: what was kept, what was learnt, safety, cost, drift.

Each has a trigger with a default (the recipe's `monitor`) and an action that it recommends. Nothing acts by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from evertune.ledger import Event
from evertune.report.rounds import Body, bodies
from evertune.report.scores import Cell, Column, Matrix
from evertune.report.skills import Z95, Skill, ratio_interval
from evertune.report.stages import Cost

State = Literal["fine", "watch", "act", "unknown"]
DEFAULTS: Mapping[str, float] = {
    "forgetting": 0.02,
    "new_skill": 0.8,
    "safety": 0.01,
    "cost": 1.0,
    "drift": 0.05,
    "kl_nats": 0.1,
}
# Watts of a machine whose power nobody has measured: a server's share for a few cores, and for one large GPU.
CPU_WATTS, GPU_WATTS = 65.0, 400.0


@dataclass(frozen=True)
class Reading:
    """One number that is watched: what, its value as text, and whether it is beyond its trigger.

    `watch` says beyond the trigger, but within what chance may do; `act` beyond chance too.
    """

    what: str
    value: str
    state: State


@dataclass(frozen=True)
class Dimension:
    """One of the five: its readings, the trigger in words, what to do when it is pulled, and how to measure more."""

    name: str
    trigger: str
    action: str
    measure: str
    readings: tuple[Reading, ...]

    @property
    def state(self) -> State:
        """The worst of its readings."""
        order: tuple[State, ...] = ("act", "watch", "fine")
        states = {one.state for one in self.readings}
        return next((one for one in order if one in states), "unknown")


def watch_rounds(
    events: Sequence[Event],
    *,
    line: Sequence[str],
    matrix: Matrix,
    skills: Sequence[Skill],
    costs: Sequence[Cost],
) -> tuple[Dimension, ...]:
    """The five dimensions over the line of champions.

    Args:
        line: labels from the base to the champion.
        skills: every capability of the champion.
        costs: of the rounds that trained.
    """
    runs = bodies(events, "run")
    recipe = runs[-1]["recipe"] if runs else {}
    triggers = {**DEFAULTS, **(recipe.get("monitor") or {})}
    baselines, audits = bodies(events, "baseline"), bodies(events, "audit")
    return (
        _forgetting(line, matrix, skills, triggers["forgetting"]),
        _new_skill(line, matrix, skills, baselines[-1] if baselines else None, triggers["new_skill"]),
        _safety(line, matrix, triggers["safety"]),
        _cost(events, line, costs, triggers["cost"]),
        _drift(events, line, audits, triggers),
    )


def to_json(dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """As plain values."""
    return [
        {
            "name": one.name,
            "state": one.state,
            "trigger": one.trigger,
            "action": one.action,
            "measure": one.measure,
            "readings": [{"what": each.what, "value": each.value, "state": each.state} for each in one.readings],
        }
        for one in dimensions
    ]


def slope_per_round(trend: Sequence[float]) -> float | None:
    """Change of a score from one champion to the next, by least squares; None of fewer than two."""
    if len(trend) < 2:
        return None
    return float(np.polyfit(np.arange(len(trend)), np.asarray(trend, dtype=float), 1)[0])


def _forgetting(line: Sequence[str], matrix: Matrix, skills: Sequence[Skill], most: float) -> Dimension:
    readings = []
    for one in skills:
        if one.learnt_at == line[-1]:
            continue
        then, now = matrix.cell(one.learnt_at, one.probe), matrix.cell(line[-1], one.probe)
        if then is None or now is None or then.value <= 0:
            continue
        kept = ratio_interval(now, then)
        # Of a loss more is worse: 3 % more bits are a loss of 3 %.
        sign = -1.0 if one.lower_is_better else 1.0
        change = sign * (kept.value - 1)
        best = max(sign * (kept.low - 1), sign * (kept.high - 1))
        state: State = "fine" if change >= -most else "act" if best < 0 else "watch"
        slope = slope_per_round(one.trend)
        told = f"{100 * change:+.1f} % since {one.learnt_at} (90 % interval up to {100 * best:+.1f} %)"
        if slope is not None and len(one.trend) > 2:
            told += f", {100 * sign * slope / abs(then.value):+.1f} % a promotion"
        readings.append(Reading(one.probe, told, state))
    return Dimension(
        "Forgetting",
        f"a skill has lost more than {100 * most:g} % since it was learnt",
        "replay more of that skill's rows (rescue: more_replay, by_probe), teach it back (distil_back), or roll back",
        "`evertune blame PROBE RECIPE` says what pushed it down",
        tuple(readings),
    )


def _new_skill(
    line: Sequence[str], matrix: Matrix, skills: Sequence[Skill], baseline: Body | None, least: float
) -> Dimension:
    readings = []
    for one in skills:
        cell, column = matrix.cell(line[-1], one.probe), _column(matrix, one.probe)
        if baseline is None or not one.taught or cell is None or one.lower_is_better:
            continue
        other = baseline["scores"].get(one.probe)
        floor = max(column.chance or 0.0, _value(matrix.cell(line[0], one.probe)))
        if other is None or other["value"] <= floor:
            continue
        share = (cell.value - floor) / (other["value"] - floor)
        shown = cell.high < other["ci90"][0]
        state: State = "fine" if share >= least else "act" if shown else "watch"
        told = f"{cell.value:.3f} against {other['value']:.3f} retrained: {100 * share:.0f} % of what it gains"
        readings.append(Reading(one.probe, told, state))
    return Dimension(
        "New skills against a retrain",
        f"a taught skill has gained less than {100 * least:g} % of what a retrained model gains",
        "retrain from the base on all the data: `evertune advise update RECIPE` writes the round",
        "`evertune advise baseline RECIPE` makes the retrained model, or takes one",
        tuple(readings),
    )


def _safety(line: Sequence[str], matrix: Matrix, most: float) -> Dimension:
    readings = []
    for column in matrix.columns:
        now, then = matrix.cell(line[-1], column.name), matrix.cell(line[0], column.name)
        if not column.safety or now is None or then is None or len(line) < 2:
            continue
        change = (now.value - then.value) * (1 if column.direction == "higher" else -1)
        best = change + Z95 * float(np.hypot(_error(now), _error(then)))
        state: State = "fine" if change >= -most else "act" if best < 0 else "watch"
        told = f"{100 * change:+.1f} points since the base (90 % interval up to {100 * best:+.1f})"
        readings.append(Reading(column.name, told, state))
    return Dimension(
        "Safety",
        f"a safety probe has lost more than {100 * most:g} point{'' if most == 0.01 else 's'} since the base",
        "pause the rounds and look at the flipped answers",
        "give probes `safety: true`; `evertune safety FOLDER` writes sets of refusals, over-refusals and disguises",
        tuple(readings),
    )


def _cost(events: Sequence[Event], line: Sequence[str], costs: Sequence[Cost], most: float) -> Dimension:
    """Tokens of all updates after the champion's line last started from the base, held ones too, over a retrain's."""
    begun = _begun(events, line)
    names = [one.round for one in costs]
    since = costs[names.index(begun) + 1 :] if begun in names else costs
    readings = []
    if begun in names:
        spent, retrain = sum(one.increment for one in since), max(one.retrain for one in costs)
        told = f"{spent:,} tokens in {len(since)} rounds since {begun}, against {retrain:,.0f} for one retrain"
        state: State = "act" if spent > most * retrain else "fine"
        readings.append(Reading("updates", f"{told}: {spent / retrain:.2f} of it", state))
    seconds = [one.seconds for one in costs if one.seconds is not None]
    if costs and len(seconds) == len(costs):
        watts = GPU_WATTS if _on_gpu(events) else CPU_WATTS
        energy = sum(seconds) * watts / 3.6e6
        told = f"{sum(seconds):,.0f} s of training in all; about {energy:.2g} kWh, if the machine draws {watts:g} W"
        readings.append(Reading("time and energy", told, "fine"))
    return Dimension(
        "Cost",
        f"the updates since the model last started from the base cost more than {most:g} times a retrain on all data",
        "retrain once instead of the next update: `evertune advise update RECIPE` has both recipes",
        "every trained round records its tokens",
        tuple(readings),
    )


def _drift(
    events: Sequence[Event], line: Sequence[str], audits: Sequence[Body], triggers: Mapping[str, float]
) -> Dimension:
    readings = []
    drifts = {
        one["label"]: one["drift"]["to_base"]
        for one in bodies(events, "checkpoint")
        if one["drift"] and one["drift"]["to_base"] is not None
    }
    path = [drifts[label] for label in line if label in drifts]
    if line[-1] in drifts:
        value = drifts[line[-1]]
        told = f"{value:.4f} of the base's length"
        if len(path) > 1:
            told += f", from {path[0]:.4f} at the first promotion"
        readings.append(Reading("weights", told, "act" if value > triggers["drift"] else "fine"))
    mine = [one for one in audits if one["label"] == line[-1] and one["reference"] == line[0]]
    for name, kl in (mine[-1]["kl"] if mine else {}).items():
        told = f"{kl['nats']:.4f} nats a token from {mine[-1]['reference']}, over {kl['tokens']:,} tokens"
        # What a round teaches must change there; general text should not.
        beyond = name == "general" and kl["nats"] > triggers["kl_nats"]
        readings.append(Reading(f"output on {name} text", told, "act" if beyond else "fine"))
    return Dimension(
        "Drift",
        f"weights are more than {triggers['drift']:g} from the base, or the mean KL on general text is above "
        f"{triggers['kl_nats']:g} nats a token",
        "a stronger anchor or a lower rate in the next round, or a retrain",
        "`evertune audit RECIPE` measures outputs, layers, calibration and habits",
        tuple(readings),
    )


def _begun(events: Sequence[Event], line: Sequence[str]) -> str | None:
    """The last round on the champion's line that started from the base."""
    made = bodies(events, "checkpoint")
    base = next((one["digest"] for one in made if one["label"] == "base"), None)
    promoted = [next((one["round"] for one in made if one["label"] == label), None) for label in line[1:]]
    started = {one["round"] for one in made if one["start"] == base and one["round"] is not None}
    return next((name for name in reversed(promoted) if name in started), None)


def _column(matrix: Matrix, name: str) -> Column:
    return next(one for one in matrix.columns if one.name == name)


def _value(cell: Cell | None) -> float:
    return cell.value if cell is not None else 0.0


def _error(cell: Cell) -> float:
    return (cell.high - cell.low) / (2 * Z95)


def _on_gpu(events: Sequence[Event]) -> bool:
    settings = [one["settings"] for one in bodies(events, "checkpoint") if one["steps"]]
    return bool(settings) and settings[-1].get("device") == "cuda"
