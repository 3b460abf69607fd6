"""The one loop: from a recipe to verdicts, promotions and a ledger. Read it top to bottom; it is the product.

    base -> [ round: stages -> probes -> (best of several ways) -> verdict -> promote | rescue | set aside ] * -> report

A run is a fold over the recipe's rounds: what a round does depends only on the recipe, the data and the champion
before it. Everything made is stored under a key of its inputs, so the same command again does only what is missing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from evertune import rescue as ladder
from evertune.consolidation import Best, choose_way
from evertune.display import Display
from evertune.erosion import erosion_body
from evertune.errors import IntegrityError
from evertune.gate import GateSettings, ProbeFacts, Verdict, judge
from evertune.hashing import digest_json
from evertune.ledger import Event, Ledger, record_event, write_current
from evertune.ledger import champion as champion_of
from evertune.lineage import next_position
from evertune.methods import named, standing_of, used_in
from evertune.model.checkpoint import Checkpoint, describe
from evertune.plan import GATE_VERSION, Plan, make_plan
from evertune.probe.job import PROBE_VERSION
from evertune.probe.scores import ItemScores
from evertune.process import Workers
from evertune.ratchet import Ratchet
from evertune.recipe.load import LoadedRecipe
from evertune.recipe.schema import Interpolate, Round, Rung
from evertune.report.text import next_command
from evertune.scoring import score_checkpoint
from evertune.stages import KINDS, Past, Place
from evertune.workspace import Workspace

# What of a stage's cost differs from one performance to the next, where it is known.
SPENT = ("seconds", "teacher_forwards")


@dataclass(frozen=True)
class Model:
    """A checkpoint under the name the report shows, with its item scores by probe and the steps that trained it."""

    checkpoint: Checkpoint
    label: str
    scores: Mapping[str, ItemScores] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Position:
    """Where the fold over the rounds stands.

    Attributes:
        champion: the last promoted model; the base before any promotion.
        ratchet: the best promoted scores per probe: the reference that stops slow decay.
        history: keys of the objects that hold the training rows of promoted rounds.
        settled: key of the last verdict, `base` before the first.
        verdicts: how many there have been, rescues among them.
        looks: how often the held-out probes have been asked.
        made: every model of the run so far, in the order they were made; the base first.
        promoted: the model that each promoted round has promoted.
        without: digests of texts that a person asked to remove, in the rounds from here on.
    """

    champion: Model
    ratchet: Ratchet
    history: tuple[str, ...] = ()
    settled: str = "base"
    verdicts: int = 0
    looks: int = 0
    made: tuple[Model, ...] = ()
    promoted: Mapping[str, Model] = field(default_factory=dict)
    without: tuple[str, ...] = ()


class Completed(NamedTuple):
    """A round with the last stage that was kept, what its stages have made, start first, and of how many ways to
    consolidate it that stage was picked."""

    round: Round
    made: Sequence[Model]
    tried: int


class Decided(NamedTuple):
    """A candidate after its verdict: with the scores that decided, the round as it was performed (amended by a rescue,
    perhaps), and the position that the verdict leaves behind."""

    verdict: Verdict
    key: str
    candidate: Model
    performed: Round
    position: Position


@dataclass(frozen=True)
class Outcome:
    """What a run ends with: the last round's decision and the counts of what was done now."""

    decisions: Mapping[str, str]
    stages_run: int
    probes_run: int

    @property
    def last(self) -> str:
        return list(self.decisions.values())[-1]


@dataclass
class Session:
    """The open workspace and what every step needs; lives as long as the run holds the lock.

    `reached` holds kind and key of every event that this run has recorded or found recorded, in order.
    """

    plan: Plan
    workspace: Workspace
    ledger: Ledger
    workers: Workers
    display: Display
    decisions: dict[str, str] = field(default_factory=dict)
    reached: dict[tuple[str, str], None] = field(default_factory=dict)
    stages_run: int = 0
    probes_run: int = 0


def run_recipe(loaded: LoadedRecipe, *, display: Display | None = None, start_method: str = "forkserver") -> Outcome:
    """Run a recipe, or what is missing of it.

    Args:
        loaded: a recipe that `check_recipe` has passed.
        display: where progress goes; nowhere when not given.
        start_method: how children start; see `process.Workers`.

    Raises:
        EvertuneError: bad input, a lock held by another run, a diverged stage; the workspace stays resumable.
    """
    plan = make_plan(loaded)
    workspace = Workspace.open(plan.workspace, create=True)
    with workspace.lock(purpose=f"run {loaded.path.name}"):
        session = Session(
            plan=plan,
            workspace=workspace,
            ledger=Ledger.open(workspace.root / "ledger.sqlite", create=True),
            workers=Workers(
                start_method=start_method, launch=plan.recipe.launch.command if plan.recipe.launch else None
            ),
            display=display or Display(quiet=True),
        )
        _recover(session)
        position = begin(session)
        for one in plan.recipe.rounds:
            position = run_round(session, one, position)
        _agree_on_champion(session, position)
        _mark(session, is_over=True)
        write_current(workspace, session.ledger)
    return Outcome(session.decisions, session.stages_run, session.probes_run)


def begin(session: Session) -> Position:
    """Record the run and the base model, and probe the base: row 0 of the matrix."""
    plan = session.plan
    _record(session, "run", digest_json(plan.run_body), plan.run_body, volatile=plan.machine)
    _mark(session)
    base = Model(plan.base, "base")
    place = {"path": str(plan.base.path)}
    _record(session, "checkpoint", digest_json({"base": plan.base.digest}), plan.base_body(), place)
    base = probe(session, base)
    return _after_settling(session, Position(champion=base, ratchet=Ratchet.start(base.scores), made=(base,)))


def run_round(session: Session, one: Round, position: Position) -> Position:
    """One update: stages, each probed; a verdict; promotion, rescue or setting aside."""
    session.display.round_begins(one.name, position.champion.label)
    before = perform_stages(session, one, [_start(session, one, position)], position)
    one, made, tried = consolidate(session, one, before, position)
    decided = decide(session, one, made[-1], position, tried=tried)
    by = "gate"
    if decided.verdict.decision != "PROMOTE":
        decided, by = rescue(session, one, made, decided, tried=tried), "rescue"
    verdict, key, candidate, performed, position = decided
    new = {model.label: model for model in (*before[1:], *made[1:])}
    position = replace(position, made=(*position.made, *new.values()))
    session.decisions[one.name] = verdict.decision
    if verdict.decision == "PROMOTE":
        position = promote(session, performed, candidate, position, by=by)
    settled = {"round": one.name, "decision": session.decisions[one.name], "champion": position.champion.label}
    _record(session, "settled", key, settled)
    _mark(session)
    return _after_settling(session, replace(position, settled=key))


def record_erosion(session: Session, one: Round, made: Sequence[Model]) -> None:
    """What the newest stage of a round of several did to each capability: since the checkpoint before it, and since
    the newest sft stage before it, or the round's start; where it distils its own run back, since each of the round's.

    Args:
        made: the round's start, then what its stages have made, all scored but for a start that nobody asked.
    """
    if len(one.stages) == 1:
        return
    before, last = made[:-1], made[-1]
    taught = [i + 1 for i, stage in enumerate(one.stages[: len(before) - 1]) if stage.sft is not None]
    others: Sequence[Model] = (before[-1], before[taught[-1] if taught else 0])
    newest = one.stages[len(before) - 1].distill
    if newest is not None and newest.route == "best":
        others = before
    compared = {model.label: model.scores for model in others if model.scores}
    body = {"round": one.name, "label": last.label, "against": erosion_body(last.scores, compared)}
    _record(session, "erosion", digest_json(body), body)
    session.display.erosion(body)


def perform_stages(
    session: Session, one: Round, made: Sequence[Model], position: Position, *, attempt: str = ""
) -> list[Model]:
    """Perform the stages of a round that have not been, and probe what each makes.

    Args:
        made: the round's start, then what its first stages have made.
    """
    found = list(made)
    for index in range(len(made) - 1, len(one.stages)):
        found.append(probe(session, perform_stage(session, one, index, found, position, attempt=attempt)))
        record_erosion(session, one, found)
    return found


def consolidate(session: Session, one: Round, made: Sequence[Model], position: Position) -> Completed:
    """Complete a round in each way that `best_of` names, and keep the best; the round itself where it names none."""
    if not one.ways:
        return Completed(one, made, 1)
    ways = one.written_out()
    session.display.line(f"  best of  {', '.join(ways)}")
    done = {}
    for name, whole in ways.items():
        begun = made if len(whole.stages) > len(one.stages) else [_start(session, whole, position)]
        done[name] = perform_stages(session, whole, begun, position, attempt=name)
    best = choose_way(
        {name: models[-1].scores for name, models in done.items()},
        position.champion.scores,
        position.ratchet.best,
        _open_facts(session, one),
        _settings(session, position),
        shares=position.ratchet.shares,
    )
    _record_ways(session, one, position, best, {name: models[-1] for name, models in done.items()})
    session.display.ways(best)
    return Completed(ways[best.name], done[best.name], len(ways))


def _record_ways(session: Session, one: Round, position: Position, best: Best, models: Mapping[str, Model]) -> None:
    """Write down what each way made, scored and cost."""
    newest = {event.body["label"]: event for event in session.ledger.events("checkpoint")}
    made = {name: newest[model.label] for name, model in models.items()}
    costs = {name: {each: event.body[each] for each in ("digest", "steps", "tokens")} for name, event in made.items()}
    body = {
        "round": one.name,
        "label": models[best.name].label,
        "chosen": best.name,
        "champion_label": position.champion.label,
        "ways": [{**best.body(name), "label": model.label, **costs[name]} for name, model in models.items()],
    }
    spent = {name: {each: event.volatile.get(each, 0) for each in SPENT} for name, event in made.items()}
    _record(session, "consolidation", digest_json({**body, "after": position.settled}), body, {"costs": spent})


def perform_stage(
    session: Session, one: Round, index: int, made: Sequence[Model], position: Position, *, attempt: str = ""
) -> Model:
    """Perform one stage of a round, or find it done; returns the checkpoint it made.

    Args:
        made: the round's start, then what the stages before this one have made.
        attempt: the rescue that the round was amended for.
    """
    workspace = session.workspace
    place = Place(
        plan=session.plan,
        round=one,
        index=index,
        made=[model.checkpoint for model in made],
        champion=position.champion.checkpoint,
        histories=[workspace.path(key) for key in position.history],
        attempt=attempt,
        past=_past(position, made[1:]),
        without=position.without,
    )
    kind, label = KINDS[place.kind], place.label
    order: Any = kind.order(place)
    order = replace(order, key=session.plan.keyed(order.key))
    if workspace.manifest(order.key) is None:
        job = {"kind": place.kind, "workspace": str(workspace.root), "label": label, "spec": order.to_json()}
        with session.display.stage(label, order.key, workspace) as watch:
            _guarded(session, one, label, {**job, "is_launched": kind.is_launched}, watch)
        session.stages_run += 1
    manifest = workspace.manifest(order.key)
    if manifest is None:
        raise AssertionError(f"stage {label} reported success without an object")
    checkpoint = describe(workspace.path(order.key), cache=workspace.cache / "digests.json")
    body = {
        **manifest.record["checkpoint"],
        "digest": checkpoint.digest,
        "object": order.key,
        "label": label,
        "round": one.name,
        "stage_index": index,
        "settings": order.settings(),
    }
    session.display.warnings(label, body.get("warnings", ()))
    session.display.teachers(label, manifest.record["volatile"].get("teacher_forwards"))
    event = digest_json({"label": label, "object": order.key})
    _record(session, "checkpoint", event, body, manifest.record["volatile"])
    session.display.academic(label, named(body["methods"], "academic"))
    return Model(checkpoint, label, steps=int(body["steps"]))


def _past(position: Position, made: Sequence[Model]) -> Past:
    """What a stage may look back on: the rounds before, and the stages of this one."""
    models = (*position.made, *position.promoted.values(), *made)
    return Past(
        checkpoints={one.label: one.checkpoint for one in models},
        promoted={name: one.label for name, one in position.promoted.items()},
        values={
            one.label: {
                name: scores.value if scores.direction == "higher" else -scores.value
                for name, scores in one.scores.items()
            }
            for one in models
        },
    )


def probe(session: Session, model: Model, *, held_out: bool = False) -> Model:
    """Score a model on every probe it has not been scored on, and record its row of the matrix.

    Args:
        held_out: ask the held-out probes, and no others.
    """
    plan = session.plan.asked(held_out=held_out)
    if not plan.probes:
        return model
    scored = score_checkpoint(
        plan, session.workspace, session.workers, model.checkpoint, label=model.label, display=session.display
    )
    session.probes_run += scored.made_now
    for one in plan.probes:
        manifest = scored.objects[one.name]
        body = {**manifest.record["probe"], "label": model.label, "role": one.role, "safety": one.safety}
        body |= {"held_out": True} if held_out else {}
        key = digest_json({"label": model.label, "object": manifest.key, "role": one.role})
        _record(session, "probe", key, body, manifest.record.get("volatile"))
    return replace(model, scores={**model.scores, **scored.scores})


def decide(
    session: Session, one: Round, candidate: Model, position: Position, *, tried: int = 1, rescue_facts: Any = None
) -> Decided:
    """Judge a candidate against the champion and the best, and record the verdict.

    Held-out probes are asked only when everything else says PROMOTE, and the verdict is then that of all probes.
    """
    plan, facts, settings = session.plan, session.plan.facts(one), _settings(session, position)
    open_facts = _open_facts(session, one)

    def judged(asked: Mapping[str, ProbeFacts]) -> Verdict:
        champion, ratchet = position.champion.scores, position.ratchet
        return judge(candidate.scores, champion, ratchet.best, asked, settings, tried=tried, shares=ratchet.shares)

    verdict, consulted = judged(open_facts), False
    if verdict.decision == "PROMOTE" and len(open_facts) < len(facts):
        candidate, position = look_at_held_out(session, one, candidate, position)
        verdict, consulted = judged(facts), True
    key = digest_json(
        {
            "version": GATE_VERSION,
            "round": one.name,
            "label": candidate.label,
            "after": position.settled,
            "candidate": candidate.checkpoint.digest,
            "champion": position.champion.checkpoint.digest,
            "probes": {each.name: [each.digest, asdict(facts[each.name]), each.held_out] for each in plan.probes},
            "settings": plan.gate_body,
            "tried": tried,
            "alpha": settings.alpha,
            "shares": position.ratchet.shares,
            "rescue": rescue_facts,
        }
    )
    kind = "verdict" if rescue_facts is None else "rescue"
    body = {
        **verdict.to_json(),
        "round": one.name,
        "label": candidate.label,
        "candidate": candidate.checkpoint.digest,
        "champion": position.champion.checkpoint.digest,
        "champion_label": position.champion.label,
        "settings": plan.gate_body,
        "tried": tried,
        "gate_alpha": settings.alpha,
        "looks": position.looks,
        "held_out": consulted if len(open_facts) < len(facts) else None,
        **_provenance(session, candidate, verdict),
        "flips": plan.flips(candidate.scores, position.champion.scores),
        **(rescue_facts or {}),
    }
    _record(session, kind, key, body)
    then = next_command(_seen_from_here(plan.workspace), plan.recipe.name, candidate.label, verdict.decision)
    session.display.verdict(candidate.label, verdict, body, next_command=then)
    after = replace(position, ratchet=position.ratchet.judged(verdict.decision), verdicts=position.verdicts + 1)
    return Decided(verdict, key, candidate, one, after)


def _open_facts(session: Session, one: Round) -> dict[str, ProbeFacts]:
    """What the gate must know of the probes that are not held out."""
    facts = session.plan.facts(one)
    return {each.name: facts[each.name] for each in session.plan.asked(held_out=False).probes}


def _settings(session: Session, position: Position) -> GateSettings:
    """The gate's settings for the next verdict."""
    settings = session.plan.gate_settings
    return settings.at_verdict(position.verdicts + 1) if session.plan.recipe.gate.spend_alpha else settings


def look_at_held_out(session: Session, one: Round, candidate: Model, position: Position) -> tuple[Model, Position]:
    """Ask candidate and champion the held-out probes, and record the look: each wears them out a little."""
    number = position.looks + 1
    session.display.looks_at_held_out(number)
    champion = probe(session, position.champion, held_out=True)
    candidate = probe(session, candidate, held_out=True)
    body = {
        "round": one.name,
        "label": candidate.label,
        "candidate": candidate.checkpoint.digest,
        "champion": champion.checkpoint.digest,
        "probes": {each.name: each.digest for each in session.plan.asked(held_out=True).probes},
        "number": number,
    }
    _record(session, "look", digest_json({**body, "after": position.settled}), body)
    ratchet = position.ratchet.begin(champion.scores)
    return candidate, replace(position, champion=champion, ratchet=ratchet, looks=number)


def _provenance(session: Session, candidate: Model, verdict: Verdict) -> dict[str, Any]:
    """What the candidate was made with, back to the base, and the reasons with a word about academic methods."""
    checkpoints = [event.body for event in session.ledger.events("checkpoint")]
    used = used_in(checkpoints, candidate.checkpoint.digest)
    academic = named(used, "academic")
    told = [f"Made with academic methods, not production-validated: {', '.join(academic)}."] if academic else []
    return {"methods": list(used), "standing": standing_of(used), "reasons": [*verdict.reasons, *told]}


def rescue(session: Session, one: Round, made: Sequence[Model], decided: Decided, *, tried: int = 1) -> Decided:
    """Climb the ladder until a rung passes the gate; the candidate's own verdict when none does.

    Args:
        made: the round's start, then what each of its stages has made.
        tried: ways to consolidate the round of which its last stage was picked: each could have climbed this ladder.
    """
    recipe = session.plan.recipe
    written: Sequence[Rung] = one.rescue if one.rescue is not None else recipe.rescue
    rungs = ladder.in_order(written, recipe.rescue_budget.order, [model.steps for model in made[1:]])
    tries, own_steps = tried * ladder.count_tries(rungs), sum(model.steps for model in made[1:])
    attempts = steps = 0
    for rung in rungs:
        position = decided.position
        if rung.discard is not None:
            _discard(session, one, made[-1], position)
            break
        trains = rung.interpolate is None
        if attempts == recipe.rescue_budget.attempts or (trains and steps >= recipe.rescue_budget.training * own_steps):
            session.display.line(f"  rescue   {rung.kind} is not tried: the rescue budget is spent")
            continue
        if rung.interpolate is not None:
            attempt = _interpolate(session, one, rung.interpolate, made, position, tries)
        else:
            retrained = _retrain(session, one, rung, made, decided, tries)
            if retrained is None:
                continue
            attempt, more = retrained
            steps += more
        attempts += 1
        if attempt.verdict.decision == "PROMOTE":
            return attempt
        decided = decided._replace(position=attempt.position)
    return decided


def promote(session: Session, one: Round, candidate: Model, position: Position, *, by: str) -> Position:
    """Make the candidate the champion, raise the ratchet, and keep the round's rows for later replay.

    Args:
        one: the round as it was performed: what a rescue left out has taught the model nothing, and is not replayed.
    """
    body = {
        "round": one.name,
        "label": candidate.label,
        "checkpoint": candidate.checkpoint.digest,
        "by": by,
        "reason": f"round {one.name} passed the gate" if by == "gate" else f"a rescue of round {one.name} passed",
    }
    _record(session, "promotion", digest_json({**body, "after": position.settled}), body)
    history = session.plan.keep_history(one, session.workspace, without=position.without)
    ratchet = position.ratchet.climb(candidate.scores, alpha=session.plan.gate_settings.alpha)
    session.display.promoted(one.name, candidate.label)
    return replace(
        position,
        champion=candidate,
        ratchet=ratchet,
        history=(*position.history, history),
        promoted={**position.promoted, one.name: candidate},
    )


def _retrain(
    session: Session, one: Round, rung: Rung, made: Sequence[Model], decided: Decided, tries: int
) -> tuple[Decided, int] | None:
    """Perform the round as a rung amends it, and judge the result; also the steps that it trained.

    None where the rung would change nothing, or leads to a model that has been judged already.
    """
    position, display = decided.position, session.display
    # A round that starts from elsewhere than the champion has not needed its start's scores until now.
    start = probe(session, made[0]) if rung.drop_stage is not None else made[0]
    scores = [model.scores for model in (start, *made[1:])]
    proposal = ladder.propose(rung, session.plan.recipe, one, scores, decided.verdict)
    if proposal is None:
        display.line(f"  rescue   {rung.kind} is not tried: it would change nothing here")
        return None
    display.line(f"  rescue   {proposal.rung}: {proposal.why}")
    amended = one.model_copy(update={"stages": list(proposal.stages)})
    again = perform_stages(session, amended, made[:1], position, attempt=proposal.rung)
    known = {each.checkpoint.digest for each in made}
    steps = sum(model.steps for model in again[1:] if model.checkpoint.digest not in known)
    if again[-1].checkpoint.digest == made[-1].checkpoint.digest:
        display.line(f"  rescue   {rung.kind} led to the same model")
        return None
    facts: dict[str, Any] = {"rung": proposal.rung, "alpha": None, "why": proposal.why, "scan": []}
    return decide(session, amended, again[-1], position, tried=tries, rescue_facts=facts), steps


def _interpolate(
    session: Session, one: Round, settings: Interpolate, made: Sequence[Model], position: Position, tries: int
) -> Decided:
    """Scan between a reference and the candidate in memory, write the best point, and judge it like any candidate."""
    candidate = made[-1]
    reference = {"start": made[0], "before": made[-2], "champion": position.champion}[settings.toward]
    scan = _scan(session, one, ladder.shares_of(settings.alphas, settings.blocks), candidate, reference)
    chosen = ladder.choose(
        scan.scores,
        position.champion.scores,
        position.ratchet.best,
        _open_facts(session, one),
        _settings(session, position),
        tried=tries,
        shares=position.ratchet.shares,
    )
    winner = probe(session, _write_interpolation(session, one, scan, chosen.share, candidate, reference))
    blocks = list(chosen.share) if isinstance(chosen.share, tuple) else None
    facts = {
        "rung": "interpolate",
        "alpha": chosen.alpha,
        "blocks": blocks,
        "toward": settings.toward,
        "scan": chosen.scan_body(),
    }
    return decide(session, one, winner, position, tried=tries, rescue_facts=facts)


class _Scan(NamedTuple):
    """A scan's object, what a job needs to load its probes, and item scores by share and probe."""

    key: str
    probes: list[dict[str, Any]]
    scores: dict[ladder.Share, dict[str, ItemScores]]


def _scan(session: Session, one: Round, shares: Sequence[ladder.Share], candidate: Model, reference: Model) -> _Scan:
    """The shares' scores, found or made."""
    plan, workspace = session.plan.asked(held_out=False), session.workspace
    line = _line(session, candidate, reference)
    asked = [[each.name, each.digest] for each in plan.probes]
    facts = {"kind": "scan", "version": 5, "scores": PROBE_VERSION, "shares": list(shares), "probes": asked}
    key = digest_json({**facts, **line.identity})
    probes = [plan.probe_job(each) for each in plan.probes]
    if workspace.manifest(key) is None:
        job = {"kind": "scan", "label": one.name, "key": key, "shares": list(shares), "probes": probes, **line.job}
        with session.display.rescuing(one.name, shares, reference.label) as watch:
            session.workers.run(job, watch=watch)
    folder = workspace.path(key)
    scores = {
        share: {each.name: ItemScores.read_parquet(folder / f"{number}-{each.name}.parquet") for each in plan.probes}
        for number, share in enumerate(shares)
    }
    return _Scan(key, probes, scores)


def _write_interpolation(
    session: Session, one: Round, scan: _Scan, share: ladder.Share, candidate: Model, reference: Model
) -> Model:
    """A scanned point as a checkpoint of its own, recorded."""
    workspace = session.workspace
    line = _line(session, candidate, reference)
    plain = list(share) if isinstance(share, tuple) else share
    key = digest_json({"kind": "interpolate", "version": 3, "share": plain, **line.identity})
    number = list(scan.scores).index(share)
    if workspace.manifest(key) is None:
        job = {"kind": "interpolate", "label": one.name, "key": key, "scan": scan.key, "number": number, **line.job}
        session.workers.run({**job, "probes": scan.probes})
    checkpoint = describe(workspace.path(key), cache=workspace.cache / "digests.json")
    points = "-".join(f"{each:g}" for each in plain) if isinstance(plain, list) else f"{plain:g}"
    label = f"{one.name}/rescue-{points}"
    body = session.plan.interpolation_body(
        checkpoint, key, label, one.name, plain, reference.checkpoint, candidate.checkpoint
    )
    scanned = workspace.manifest(scan.key)
    assert scanned is not None, "read above"
    # Those of the point itself are with its probes, where its scores are the scanned ones.
    spent = sum(sum(each.values()) for i, each in enumerate(scanned.record["volatile"]["seconds"]) if i != number)
    _record(session, "checkpoint", digest_json({"label": label, "object": key}), body, {"scan_seconds": spent})
    return Model(checkpoint, label)


class _Line(NamedTuple):
    """The line from a reference to a candidate: what identifies it, and what a job needs to walk it."""

    identity: dict[str, Any]
    job: dict[str, Any]


def _line(session: Session, candidate: Model, reference: Model) -> _Line:
    numerics = session.plan.numerics
    ends = {"candidate": candidate.checkpoint, "reference": reference.checkpoint}
    return _Line(
        identity={**{name: one.digest for name, one in ends.items()}, "numerics": numerics},
        job={
            **{name: one.to_json() for name, one in ends.items()},
            "numerics": numerics,
            "workspace": str(session.workspace.root),
        },
    )


def _discard(session: Session, one: Round, candidate: Model, position: Position) -> None:
    """Set the candidate aside. The champion was never written to; its digest is read again to show it."""
    champion = position.champion.checkpoint
    if describe(champion.path).digest != champion.digest:
        raise AssertionError(f"the champion at {champion.path} changed while round {one.name} ran")
    session.display.discarded(one.name, candidate.label, position.champion.label)


def _start(session: Session, one: Round, position: Position) -> Model:
    if one.start == "champion":
        return position.champion
    if one.start == "base":
        return Model(session.plan.base, "base")
    checkpoint = describe(session.plan.loaded.resolve(one.start), cache=session.workspace.cache / "digests.json")
    return Model(checkpoint, one.start)


def _after_settling(session: Session, position: Position) -> Position:
    """Apply what a person decided here: `promote`, `rollback` and `data remove` name the verdict they follow."""
    here = [event for event in session.ledger.events() if event.body.get("after") == position.settled]
    texts = {text for event in here if event.kind == "removal" for text in event.body["texts"]}
    if texts:
        position = replace(position, without=tuple(sorted({*position.without, *texts})))
    decided = [event for event in here if event.kind != "removal"]
    if not decided:
        return position
    event = decided[-1]
    checkpoint = describe(Path(event.volatile["path"]), cache=session.workspace.cache / "digests.json")
    if checkpoint.digest != event.body["checkpoint"]:
        raise IntegrityError(f"'{event.body['label']}', promoted by hand, is no longer what it was: {checkpoint.path}.")
    label = event.body["label"]
    # It may be of an earlier form of the recipe, which these rounds do not make again.
    for one in session.ledger.events("checkpoint"):
        if (one.body["label"], one.body["digest"]) == (label, checkpoint.digest):
            session.reached[one.kind, one.key] = None
    return replace(position, champion=probe(session, Model(checkpoint, label)))


def _agree_on_champion(session: Session, position: Position) -> None:
    """A recipe that was changed and changed back ends at an older champion than the last one recorded: say so."""
    recorded = champion_of(session.ledger)
    now = position.champion
    if recorded is None or recorded.body["checkpoint"] == now.checkpoint.digest:
        return
    body = {
        "label": now.label,
        "checkpoint": now.checkpoint.digest,
        "from": recorded.body["label"],
        "by": "recipe",
        "reason": "the recipe as it stands ends here",
    }
    _record(session, "rollback", digest_json({**body, "head": session.ledger.head()}), body)


def _recover(session: Session) -> None:
    from evertune.ledger import adopt_orphans

    recovery = session.workspace.recover()
    adopted = adopt_orphans(session.workspace, session.ledger)
    session.display.recovered(recovery, adopted)


def _guarded(session: Session, one: Round, label: str, job: dict[str, Any], watch: Any) -> None:
    """Run a training job; a failure is written to the ledger before it travels on."""
    try:
        session.workers.run(job, watch=watch)
    except Exception as error:
        facts = {"time": time.time()}
        body = {"round": one.name, "stage": label, "error": str(error)}
        session.ledger.append("failure", digest_json({**body, **facts}), body, volatile=facts)
        raise


def _seen_from_here(folder: Path) -> str:
    """A folder as one would type it: relative where it lies below the working directory."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _mark(session: Session, *, is_over: bool = False) -> None:
    """Write down which events this run stands on, where the ledger would tell otherwise: the recipe was changed."""
    digest = session.plan.loaded.digest
    found = next_position(session.ledger.events(), digest, session.reached, is_over=is_over)
    if found is not None:
        key, body = found
        record_event(session.workspace, session.ledger, "position", key, body, {"time": time.time()})


def _record(
    session: Session, kind: str, key: str, body: dict[str, Any], volatile: Mapping[str, Any] | None = None
) -> Event:
    stamp = {"time": time.time(), **(volatile or {})}
    session.reached[kind, key] = None
    return record_event(session.workspace, session.ledger, kind, key, body, stamp)
