"""Distillation as a stage: who teaches which rows."""

from pathlib import Path
from typing import Any

from evertune import verifiers
from evertune.data.encode import question_of
from evertune.data.rows import read_rows
from evertune.errors import CheckpointError, RecipeError
from evertune.hashing import digest_json
from evertune.model.checkpoint import Checkpoint
from evertune.recipe.presets import ResolvedDistill
from evertune.recipe.schema import OF_ROUND, OF_STAGE, RUN, Teacher
from evertune.stages.place import Place
from evertune.stages.training import ask_guards, training_fields, training_key, verifiers_of
from evertune.train.distill_spec import AnswersSpec, DemonstrationSpec, DistillSpec, OnPolicySpec, TeacherSpec
from evertune.workspace import Workspace

# Raised by hand when the meaning of the stage changes: old results are then made anew.
VERSION = 1


def order(place: Place) -> DistillSpec:
    """The complete order for a distill stage.

    Raises:
        RecipeError: a round that is to teach was not promoted, or a teacher has no score to be chosen by.
        CheckpointError: there is no checkpoint at a teacher's path.
    """
    settings = place.resolved
    assert isinstance(settings, ResolvedDistill), place.label
    members = [found for one in settings.teachers for found in _teachers(place, one)]
    routes = {source: _route(place, settings, members, source) for source in place.settings.new_sources}
    used = sorted({number for route in routes.values() for number in route})
    common = training_fields(place, settings)
    compressed = _compressed(place, settings)
    fields = {
        **common,
        "start": common["start"] if compressed is None else compressed.base,
        "compressed": compressed,
        "route": settings.route,
        "teachers": [members[number][1] for number in used],
        "routes": {source: [used.index(number) for number in route] for source, route in routes.items()},
        "loss": settings.loss,
        "beta": settings.beta,
        "temperature": settings.temperature,
        "weight": settings.weight,
        "words": None if settings.words == "all" else settings.words,
        "on_policy": OnPolicySpec(**settings.on_policy.model_dump()) if settings.on_policy else None,
        "answers": _answers(place, settings),
        "demonstration": DemonstrationSpec(**settings.demonstration.model_dump()) if settings.demonstration else None,
    }
    unkeyed = DistillSpec(key="0" * 64, label=place.label, **fields)
    return DistillSpec(key=_key(unkeyed), label=place.label, **fields)


def perform(order: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    """Train the student.

    Raises:
        ProbeError: no output could equal a row's answer.
    """
    from evertune.train.distill import run_distill

    spec = DistillSpec.from_json(order)
    given = spec.answers.verifiers if spec.answers else {}
    verify = {name: verifiers.placed(one, spec.folder) for name, one in given.items()}
    for ref in spec.new:
        for row in read_rows(Path(ref.path), format=ref.format, source=ref.source, limit=ref.limit) if verify else ():
            verifiers.validate(verify[ref.source], question_of(row)[1], place=row.place)

    def check(source: str, output: str, answer: Any) -> bool:
        found = verifiers.check(verify[source], output=output, answer=answer)
        return found.error is None and found.score == 1.0

    return run_distill(spec, workspace, check, ask=ask_guards(spec))


def _key(spec: DistillSpec) -> str:
    """As of any trained stage, with teachers by what they compute: neither their names nor their places count."""
    facts = {
        source: [[one.checkpoint.digest, one.weight if len(spec.of(source)) > 1 else 1.0] for one in spec.of(source)]
        for source in spec.routes
    }
    untaught = DistillSpec(**{**vars(spec), "teachers": [], "routes": {}, "route": "sources"})
    return digest_json({"training": training_key(VERSION, untaught), "taught": facts})


def _answers(place: Place, settings: ResolvedDistill) -> AnswersSpec | None:
    if settings.answers is None:
        return None
    verify = verifiers_of(place) if settings.answers.keep == "verified" else {}
    return AnswersSpec(**settings.answers.model_dump(), verifiers=verify)


def _compressed(place: Place, settings: ResolvedDistill) -> Checkpoint | None:
    """The stack that the new adapter is to begin at, where one is to be compressed."""
    if not settings.compress:
        return None
    if settings.tune.lora is None:
        raise RecipeError(
            f"{place.label}: 'compress' makes an adapter, and 'tune' trains every weight here.",
            remedy="Set 'tune: {lora: {rank: 16}}' in the stage.",
        )
    if place.start.form != "adapter":
        raise RecipeError(
            f"{place.label}: there is no adapter to compress: the stage starts from whole weights, {place.start.path}.",
            remedy="Leave 'compress' out.",
        )
    return place.start


def _teachers(place: Place, teacher: Teacher) -> list[tuple[Teacher, TeacherSpec]]:
    """The checkpoints a teacher of the recipe stands for: one, or all that the run has made."""
    written = teacher.checkpoint
    if written == RUN:
        found = dict(place.past.checkpoints)
    else:
        found = {written: _checkpoint(place, written)}
    return [(teacher, TeacherSpec(name, one, teacher.weight)) for name, one in found.items()]


def _checkpoint(place: Place, written: str) -> Checkpoint:
    past = place.past
    if written.startswith(OF_ROUND):
        name = written.removeprefix(OF_ROUND)
        if name not in past.promoted:
            raise RecipeError(
                f"{place.label}: the teacher '{written}' has promoted nothing.",
                remedy=f"To learn from it all the same, name the stage that made it, such as "
                f"'{OF_STAGE}{_last_label(place, name)}'.",
            )
        return past.checkpoints[past.promoted[name]]
    if written.startswith(OF_STAGE):
        name = written.removeprefix(OF_STAGE)
        own = [k for k, stage in enumerate(place.round.stages[: place.index]) if stage.kind == name]
        return place.made[own[-1] + 1] if own else past.checkpoints[name]
    try:
        return place.reference(written)
    except CheckpointError as error:
        raise CheckpointError(f"{place.label}: teacher '{written}': {error.message}", remedy=error.remedy) from error


def _last_label(place: Place, round_name: str) -> str:
    return [label for label in place.past.checkpoints if label.startswith(f"{round_name}/")][-1]


def _route(
    place: Place, settings: ResolvedDistill, members: list[tuple[Teacher, TeacherSpec]], source: str
) -> list[int]:
    """Numbers of the members that teach a source's rows."""
    able = [number for number, (teacher, _) in enumerate(members) if source in (teacher.sources or [])]
    if settings.route == "sources":
        return able
    probe = settings.skills[source]
    scored = [(_value(place, members[number][1], probe), number) for number in able]
    # Of equals the last: it has seen the most since.
    return [max(scored)[1]]


def _value(place: Place, teacher: TeacherSpec, probe: str) -> float:
    """A teacher's value on a probe, higher is better, as the run has measured it."""
    values = [
        place.past.values[label][probe]
        for label, one in place.past.checkpoints.items()
        if one.digest == teacher.checkpoint.digest and probe in place.past.values[label]
    ]
    if not values:
        raise RecipeError(
            f"{place.label}: this run has no score of the teacher '{teacher.name}' on probe '{probe}', by which it is "
            "to be chosen.",
            remedy="Give each teacher its 'sources' and leave 'route: best' out, or name checkpoints of this run.",
        )
    return values[-1]
