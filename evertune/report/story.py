"""What the report tells, worked out from ledger events alone. Nothing is invented: what no event holds is None."""

from collections.abc import Sequence
from dataclasses import dataclass

from evertune.ledger import Event
from evertune.report.attempts import Ladder, climbed
from evertune.report.consolidations import Consolidated, consolidations
from evertune.report.curves import RescueCurve, rescue_curves
from evertune.report.erosion import Erosion, tell_erosion
from evertune.report.monitor import Dimension, watch_rounds
from evertune.report.rounds import Body, RoundStory, bodies, champion_line, judged_labels, open_failures, tell_rounds
from evertune.report.scores import Matrix, build_matrix
from evertune.report.skills import Skill, Summary, list_skills, summarise
from evertune.report.stages import (
    Cost,
    Origin,
    Stage,
    Used,
    methods_used,
    origins,
    round_costs,
    trained_stages,
)
from evertune.report.text import in_unit, unit_word


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    `sentence` is the first thing read; `line` the labels from the base to the champion; `methods` what went into the
    checkpoints; `stopped_by` the failures that nothing made good; `finished` the time of the last event (Unix seconds),
    None when no event holds one.
    """

    name: str
    sentence: str
    rounds: tuple[RoundStory, ...]
    line: tuple[str, ...]
    matrix: Matrix
    summaries: tuple[Summary, ...]
    skills: tuple[Skill, ...]
    probes: tuple[Body, ...]
    consolidations: tuple[Consolidated, ...]
    curves: tuple[RescueCurve, ...]
    erosion: tuple[Erosion, ...]
    ladders: tuple[Ladder, ...]
    stages: tuple[Stage, ...]
    costs: tuple[Cost, ...]
    lineage: tuple[Origin, ...]
    methods: tuple[Used, ...]
    monitor: tuple[Dimension, ...]
    blames: tuple[Body, ...]
    audits: tuple[Body, ...]
    failures: tuple[Body, ...]
    stopped_by: tuple[Body, ...]
    by_hand: tuple[Body, ...]
    run: Body | None
    head: str | None
    events: int
    finished: float | None

    @property
    def latest(self) -> RoundStory | None:
        """The last round that has a verdict."""
        judged = [one for one in self.rounds if one.verdict is not None]
        return judged[-1] if judged else None

    @property
    def state(self) -> str:
        """State of the last round that began, which the first sentence is about; "" before any."""
        began = [one for one in self.rounds if one.state != "PLANNED"]
        return began[-1].state if began else ""


def build_report(events: Sequence[Event]) -> Report:
    """Gather a run's story; a partial ledger gives a partial story that says so.

    Args:
        events: of one workspace, in order; of several with one label only the newest (`lineage.current_events`).
    """
    rounds = tell_rounds(events)
    line = champion_line(events)
    matrix = build_matrix(events, rounds)
    verdicts = judged_labels(rounds)
    stages = trained_stages(events, rounds)
    runs = bodies(events, "run")
    skills, costs = list_skills(matrix, line, verdicts), round_costs(events, stages, line)
    times = [one.volatile["time"] for one in events if one.volatile.get("time") is not None]
    return Report(
        name=runs[-1]["name"] if runs else "",
        sentence=_sentence(events, rounds, line),
        rounds=rounds,
        line=line,
        matrix=matrix,
        summaries=summarise(matrix, line, verdicts),
        skills=skills,
        probes=tuple(bodies(events, "probe")),
        consolidations=consolidations(events),
        curves=rescue_curves(events, rounds, matrix),
        erosion=tell_erosion(events),
        ladders=climbed(events, rounds),
        stages=stages,
        costs=costs,
        lineage=origins(events, rounds),
        methods=methods_used(events),
        monitor=watch_rounds(events, line=line, matrix=matrix, skills=skills, costs=costs),
        blames=tuple(bodies(events, "blame")),
        audits=tuple({**one, "cka_line": list(enumerate(one["cka"]))} for one in bodies(events, "audit")),
        failures=tuple(bodies(events, "failure")),
        stopped_by=open_failures(events),
        by_hand=_by_hand(events),
        run=runs[-1] if runs else None,
        head=events[-1].hash if events else None,
        events=len(events),
        finished=max(times) if times else None,
    )


def _by_hand(events: Sequence[Event]) -> tuple[Body, ...]:
    """What people decided, in order: promotions and rollbacks by hand."""
    return tuple(one.body for one in events if one.kind in ("promotion", "rollback") and _is_by_hand(one))


def _is_by_hand(one: Event) -> bool:
    """The other rollbacks are of a run whose edited recipe ends at another champion."""
    return bool(one.body["by"] == "user" if one.kind == "promotion" else one.body.get("by") != "recipe")


def _sentence(events: Sequence[Event], rounds: Sequence[RoundStory], line: Sequence[str]) -> str:
    """The state of the last round that began, then what a person decided after it."""
    began = [one for one in rounds if one.state != "PLANNED"]
    if not began:
        return _before_any_round(events)
    last = began[-1]
    told = _judged(last) if last.verdict is not None else _unjudged(events, last, line[-1])
    return " ".join([told, *_afterwards(events)])


def _before_any_round(events: Sequence[Event]) -> str:
    if not events:
        return "The ledger is empty: nothing has been run."
    scored = len({one["probe"] for one in bodies(events, "probe")})
    if not scored:
        return "Nothing has been measured yet: no probe was scored and no round began."
    return f"Only the base model has been measured, on {_counted(scored, 'probe')}. No round has begun."


def _unjudged(events: Sequence[Event], last: RoundStory, champion: str) -> str:
    trained = sum(one["round"] == last.name and one["steps"] > 0 for one in bodies(events, "checkpoint"))
    stopped = [one for one in open_failures(events) if one["round"] == last.name]
    if stopped:
        told = f"Round {last.name} stopped without a verdict: stage {stopped[-1]['stage']} failed."
    else:
        told = f"Round {last.name} has no verdict yet: {_counted(trained, 'stage')} trained."
    return f"{told} The champion is {champion}."


def _judged(last: RoundStory) -> str:
    verdict = last.deciding
    if verdict is None:
        raise AssertionError(f"round {last.name} has no verdict")
    return " ".join(one for one in (_outcome(last), _losses(last, verdict), _kept(verdict)) if one)


def _outcome(last: RoundStory) -> str:
    if last.state == "PROMOTE":
        if last.rescued is None:
            return f"Round {last.name} PROMOTED."
        if last.rescued["alpha"] is None:
            return f"Round {last.name} PROMOTED after a rescue: {last.rescued['why']}."
        return f"Round {last.name} PROMOTED after a rescue, which keeps {last.rescued['alpha']:g} of the update."
    if last.state == "PASSED":
        return f"Round {last.name} passed the gate, but its promotion is not recorded yet."
    word = "HELD" if last.state == "HOLD" else "INCONCLUSIVE"
    if not last.settled:
        return f"Round {last.name} {word}, its rescue not finished."
    tried = f" after {_counted(len(last.rescues), 'rescue')} tried" if last.rescues else ""
    return f"Round {last.name} {word}{tried}."


def _losses(last: RoundStory, verdict: Body) -> str:
    """What was lost, most first, against the champion where that shows it; a hold for another reason says that one."""
    if last.state != "HOLD":
        return ""
    lost: dict[str, Body] = {}
    for one in verdict["probes"]:
        if (
            one["outcome"] == "harm"
            and one["role"] == "guard"
            and (one["reference"] == "champion" or one["probe"] not in lost)
        ):
            lost[one["probe"]] = one
    if not lost:
        return f"Reason: {verdict['reasons'][0]}" if verdict["reasons"] else ""
    worst_first = sorted(lost.values(), key=lambda one: (one["difference"], one["probe"]))
    return "Lost " + ", ".join(f"{one['probe']} {gain_text(one)}" for one in worst_first) + "."


def _kept(verdict: Body) -> str:
    """Guards kept against every reference, and the targets' gains."""
    guards: dict[str, bool] = {}
    for one in verdict["probes"]:
        if one["role"] == "guard" and one["kind"] != "pooled":
            guards[one["probe"]] = guards.get(one["probe"], True) and one["outcome"] == "pass"
    targets = [f"{one['probe']} {gain_text(one)}" for one in verdict["probes"] if one["role"] == "target"]
    parts = [f"Kept {sum(guards.values())} of {_counted(len(guards), 'guarded skill')}"] if guards else []
    return "; ".join([*parts, *targets]) + "." if parts or targets else ""


def _afterwards(events: Sequence[Event]) -> list[str]:
    judged = [one.seq for one in events if one.kind in ("verdict", "rescue")]
    told = []
    for one in events:
        if judged and one.seq < judged[-1]:
            continue
        if one.kind == "rollback" and not _is_by_hand(one):
            told.append(f"The recipe as it stands ends at {one.body['label']}, no longer at {one.body['from']}.")
        elif one.kind == "rollback":
            told.append(f"Then rolled back by hand from {one.body['from']} to {one.body['label']}.")
        elif one.kind == "promotion" and _is_by_hand(one):
            told.append(f"Then {one.body['label']} was promoted by hand.")
    return told


def gain_text(one: Body) -> str:
    """A difference with its unit; better is positive."""
    return f"{in_unit(one['difference'], one['unit'])} {unit_word(one['unit'])}".strip()


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
