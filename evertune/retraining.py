"""Update or retrain? What the data, the record of the rounds and the cost say, with a recipe for either; and the
retrained model that new skills are measured against.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from evertune.data.encode import encode_rows, tokens_of
from evertune.data.quality import asked_and_said
from evertune.data.replay import reservoir
from evertune.data.rows import Row, read_rows
from evertune.display import Display
from evertune.errors import RecipeError
from evertune.hashing import digest_json
from evertune.ledger import Event, record_event, write_current
from evertune.lineage import current_events, open_workspace
from evertune.measure.stats import mean_interval
from evertune.model.bundled import resolve_base
from evertune.model.checkpoint import describe
from evertune.model.codec import load_codec
from evertune.plan import Plan, make_plan
from evertune.process import Workers
from evertune.recipe.fields import REPLAYABLE
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.recipe.schema import Round, Training, kept_sources
from evertune.report import build_report
from evertune.report.monitor import Dimension
from evertune.report.rounds import champion_line
from evertune.report.story import Report
from evertune.run import run_recipe
from evertune.scoring import score_checkpoint

Says = Literal["retrain", "update", "either"]
# Shares of new data in all: above the first a retrain is favoured, below the second an update.
MUCH, LITTLE = 0.30, 0.10
# Word trigrams of new rows that old rows have too, over those that one half of the old rows shares with the other.
STRANGE, FAMILIAR = 0.25, 0.50
SAMPLE = 400
STATES_SAMPLE = 48
_SHARE, _WORDS = "share of new data", "likeness of new data"
_CARRIED_OVER = ("lr", "tune", "schedule", "batch_rows", "micro_batch_rows", "max_tokens", "too_long", "weight_decay")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Criterion:
    """One thing that speaks for a retrain, for an update, or for neither, with its number."""

    name: str
    value: str
    says: Says
    rule: str


@dataclass(frozen=True)
class UpdateAdvice:
    """The recommendation with what it rests on, what either costs in tokens, and a round for either."""

    round: str
    choice: Literal["retrain", "update"]
    reason: str
    criteria: list[Criterion]
    update_tokens: float
    retrain_tokens: float
    update_round: dict[str, Any]
    retrain_round: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "criteria": [asdict(one) for one in self.criteria]}


def advise_update(loaded: LoadedRecipe, *, is_zero_tolerance: bool = False, with_model: bool = False) -> UpdateAdvice:
    """Whether the next round should be an update of the champion or a retrain from the base.

    Args:
        loaded: a recipe; its next round is the first that is not settled, else the last.
        is_zero_tolerance: nothing may be lost (safety, compliance).
        with_model: compare rows by the base model's hidden states too: opens the model in this process.

    Raises:
        RecipeError: nothing has been promoted yet, so that the round is the first training in any case.
    """
    plan = make_plan(loaded)
    events = _events(plan)
    seen = _seen(events)
    if not seen:
        raise RecipeError(
            f"nothing has been promoted in {plan.workspace}: the next round is the first training in any case.",
            remedy="Run the recipe first.",
        )
    one = _next_round(loaded, events)
    old = {name: _rows(plan, name) for name in seen if name in plan.recipe.data}
    new = {name: _rows(plan, name) for name in kept_sources(one) if name not in old}
    counts = _Counts.of(plan, old, new)
    settings = next((stage.settings for stage in one.stages if isinstance(stage.settings, Training)), None)
    passes = float(settings.epochs) if settings is not None and settings.epochs else 1.0
    replayed = settings.replay or plan.recipe.defaults.replay if settings is not None else None
    share = replayed.share if replayed is not None else 0.2
    update_tokens = counts.new * passes / (1 - share)
    retrain_tokens = (counts.old + counts.new) * passes
    criteria = [
        _by_share(counts),
        _by_overlap(old, new),
        *([_by_states(plan, old, new)] if with_model else []),
        _by_tolerance(is_zero_tolerance),
        *_by_monitor(build_report(events)),
    ]
    choice, reason = _weighed(criteria)
    return UpdateAdvice(
        round=one.name,
        choice=choice,
        reason=reason,
        criteria=criteria,
        update_tokens=update_tokens,
        retrain_tokens=retrain_tokens,
        update_round=_plain(one),
        retrain_round=retrain_round(loaded, [*old, *new], name=f"{one.name}-retrained", epochs=passes),
    )


def _weighed(criteria: Sequence[Criterion]) -> tuple[Literal["retrain", "update"], str]:
    """The choice and its reason: one criterion against an update is enough."""
    against = [each.name for each in criteria if each.says == "retrain"]
    if against:
        return (
            "retrain",
            f"{', '.join(against)} {'speak' if len(against) > 1 else 'speaks'} for a retrain from the base",
        )
    if all(each.says == "update" for each in criteria if each.name in (_SHARE, _WORDS)):
        return "update", "little new data in a known domain, and nothing speaks against it"
    return "update", "nothing speaks for a retrain; watch the guards of the skills that are near the new data"


def retrain_round(loaded: LoadedRecipe, sources: Sequence[str], *, name: str, epochs: float) -> dict[str, Any]:
    """One round from the base on all these sources, judged against the champion on every skill that was taught.

    Raises:
        RecipeError: none of them can be trained on by a supervised stage.
    """
    usable = [one for one in sources if loaded.recipe.data[one].format in REPLAYABLE]
    if not usable:
        raise RecipeError(
            f"none of {', '.join(sources)} is of format {' or '.join(REPLAYABLE)}, which a supervised stage reads.",
            remedy="Write the retrain as a round of your own, with 'start: base'.",
        )
    taught = {probe for one in loaded.recipe.rounds for probe, role in one.roles.items() if role == "target"}
    # As the last supervised stage trains: its rate, adapters and lengths fit model and data.
    stages = [stage.sft for one in loaded.recipe.rounds for stage in one.stages if stage.sft is not None]
    own = stages[-1].model_dump(mode="json", by_alias=True, exclude_unset=True) if stages else {}
    kept = {key: value for key, value in own.items() if key in _CARRIED_OVER}
    settings = {"data": usable, **kept, "epochs": epochs, "replay": {"share": 0.0}, "anchor": {"kl": 0.0}}
    roles = dict.fromkeys(sorted(taught), "guard")
    return {"name": name, "start": "base", "roles": roles, "stages": [{"sft": settings}]}


def write_retrain(loaded: LoadedRecipe, advice: UpdateAdvice) -> Path:
    """The recipe with the retrain in place of its next round, beside the recipe.

    Raises:
        RecipeError: the file is there already.
    """
    out = loaded.path.with_name(f"{loaded.path.stem}-retrain.yaml")
    if out.exists():
        raise RecipeError(f"{out} is there already.", remedy="Move it away, or edit it.")
    body = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    names = [one.name for one in loaded.recipe.rounds]
    before = body["rounds"][: names.index(advice.round)]
    body["rounds"] = [*before, advice.retrain_round]
    out.write_text(yaml.safe_dump(body, sort_keys=False, allow_unicode=True), encoding="utf-8")
    load_recipe(out)
    return out


def measure_baseline(
    loaded: LoadedRecipe, *, model: str | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Score what a retrain makes of the promoted rounds' data, and record it for the monitor.

    Args:
        model: a model that is taken instead of one made here.

    Returns:
        `{"source": "retrained" or the model, "data": [source], "steps", "scores": {probe: {"value", "ci90"}}}`.

    Raises:
        RecipeError: nothing has been promoted yet.
    """
    plan, shown = make_plan(loaded), display or Display(quiet=True)
    events = _events(plan)
    sources = [name for name in _seen(events) if name in plan.recipe.data]
    if model is None and not sources:
        raise RecipeError(f"nothing has been promoted in {plan.workspace}: there is nothing to retrain on.")
    body: dict[str, Any] = {"source": model or "retrained", "data": [] if model else sources, "steps": 0}
    if model is None:
        round_ = retrain_round(loaded, sources, name="baseline", epochs=_passes(events))
        place = plan.workspace / "pilots" / "baseline"
        names = {"workspace": json.dumps(str(place)), "rescue": "[discard]", "rounds": json.dumps([round_])}
        pilot = load_recipe(loaded.path, overrides=[f"{name}={value}" for name, value in names.items()])
        shown.line(f"retraining from the base on {', '.join(sources)}")
        run_recipe(pilot, display=Display(quiet=True))
        told = current_events(open_workspace(place).ledger)
        last = [one.body for one in told if one.kind == "checkpoint" and one.body["round"] == "baseline"][-1]
        scores = [one.body for one in told if one.kind == "probe" and one.body["label"] == last["label"]]
        body["steps"] = last["steps"]
        body["scores"] = {one["probe"]: {"value": one["value"], "ci90": one["ci90"]} for one in scores}
    opened = open_workspace(plan.workspace)
    with opened.workspace.lock(purpose="advise baseline"):
        if model is not None:
            own = replace(plan, probes=tuple(one for one in plan.probes if not one.held_out))
            checkpoint = describe(resolve_base(model, folder=Path()))
            found = score_checkpoint(own, opened.workspace, Workers(), checkpoint, label=model, display=shown).scores
            body["scores"] = {
                name: {"value": one.value, "ci90": list(mean_interval(one.score, one.cluster, one.weight))}
                for name, one in found.items()
            }
        record_event(opened.workspace, opened.ledger, "baseline", digest_json(body), body, {"time": time.time()})
        write_current(opened.workspace, opened.ledger)
    return body


@dataclass(frozen=True)
class _Counts:
    """Rows and tokens of what the champion's rounds have seen, and of what is new."""

    old_rows: int
    new_rows: int
    old: int
    new: int

    @classmethod
    def of(cls, plan: Plan, old: Mapping[str, Sequence[Row]], new: Mapping[str, Sequence[Row]]) -> "_Counts":
        codec = load_codec(plan.base.base.path)

        def tokens(rows: Sequence[Row]) -> int:
            encoded = encode_rows(list(rows), codec, max_tokens=1 << 30, too_long="drop").rows if rows else ()
            return sum(map(tokens_of, encoded))

        texts = [[row for rows in each.values() for row in rows if row.format in REPLAYABLE] for each in (old, new)]
        rows = [sum(map(len, each.values())) for each in (old, new)]
        return cls(rows[0], rows[1], tokens(texts[0]), tokens(texts[1]))


def _by_share(counts: _Counts) -> Criterion:
    whole = counts.old_rows + counts.new_rows
    share = counts.new_rows / whole if whole else 0.0
    says: Says = "retrain" if share > MUCH else "update" if share < LITTLE else "either"
    value = f"{share:.0%}: {counts.new_rows:,} new rows beside {counts.old_rows:,} seen ones"
    return Criterion(_SHARE, value, says, f"above {MUCH:.0%}: retrain; below {LITTLE:.0%}: update")


def _by_overlap(old: Mapping[str, Sequence[Row]], new: Mapping[str, Sequence[Row]]) -> Criterion:
    rule = f"below {STRANGE:g}: a new domain, retrain; from {FAMILIAR:g}: a known one, update"
    if not any(new.values()):
        return Criterion(_WORDS, "no new rows", "update", rule)
    familiarity = likeness(
        [_text(row) for rows in old.values() for row in rows], [_text(row) for rows in new.values() for row in rows]
    )
    says: Says = "retrain" if familiarity < STRANGE else "update" if familiarity >= FAMILIAR else "either"
    return Criterion(_WORDS, f"{familiarity:.2f} of the likeness within the seen data (word trigrams)", says, rule)


def _by_states(plan: Plan, old: Mapping[str, Sequence[Row]], new: Mapping[str, Sequence[Row]]) -> Criterion:
    from evertune.probe.rows import row_states

    name, rule = "likeness under the base", f"below {STRANGE:g}: a new domain, retrain; from {FAMILIAR:g}: a known one"
    groups = [reservoir([row for rows in each.values() for row in rows], STATES_SAMPLE, 0) for each in (old, new)]
    if not groups[1] or len(groups[0]) < 4:
        return Criterion(name, "too few rows", "either", rule)
    states = row_states(str(plan.base.path))
    found = state_likeness(*(states(each) for each in groups))
    says: Says = "retrain" if found < STRANGE else "update" if found >= FAMILIAR else "either"
    return Criterion(name, f"{found:.2f} of the likeness within the seen data (hidden states)", says, rule)


def state_likeness(old_NH: NDArray[np.float64], new_MH: NDArray[np.float64]) -> float:
    """How near new rows lie to old ones, over how near one half of the old lies to the other: the mean cosine with the
    nearest of the half, about the mean of all. About 1 for more of the same, 0 for another domain."""
    old, new = (each[~np.isnan(each).any(axis=1)] for each in (old_NH, new_MH))
    middle = np.concatenate([old, new]).mean(axis=0)
    A, B, N = (_directions(each - middle) for each in (old[::2], old[1::2], new))
    within = float((B @ A.T).max(axis=1).mean())
    return float(np.clip((N @ A.T).max(axis=1).mean() / within, 0.0, 1.0)) if within > 0 else 0.0


def _directions(X: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    return np.asarray(X / lengths, dtype=np.float64)


def likeness(old: Sequence[str], new: Sequence[str], *, seed: int = 0) -> float:
    """Share of the new texts' word trigrams that the old ones have, over the share that one half of the old texts has
    of the other's: about 1 for more of the same, near 0 for another domain. Samples of at most 400 texts."""
    known, fresh = reservoir(old, SAMPLE, seed), reservoir(new, SAMPLE, seed)
    halves = known[::2], known[1::2]
    within = _shared(halves[1], halves[0])
    # As many old texts as in a half: more of them would hold more trigrams.
    return min(1.0, _shared(fresh, halves[0]) / within) if within else 0.0


def _shared(texts: Sequence[str], others: Sequence[str]) -> float:
    mine, theirs = (_trigrams(each) for each in (texts, others))
    return len(mine & theirs) / len(mine) if mine else 0.0


def _trigrams(texts: Sequence[str]) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = _WORD.findall(text.lower())
        found |= {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    return found


def _by_tolerance(is_zero: bool) -> Criterion:
    value, rule = "none" if is_zero else "the gate's margins", "none (--zero-tolerance): retrain"
    return Criterion("tolerance for loss", value, "retrain" if is_zero else "either", rule)


def _by_monitor(found: Report) -> list[Criterion]:
    """What the dimensions that are watched over rounds say."""
    asked = {
        "damage so far": ("Forgetting", "a skill beyond its trigger, beyond chance: retrain"),
        "gain against a retrain": ("New skills against a retrain", "below its trigger: retrain"),
        "cost so far": ("Cost", "updates above one retrain: retrain"),
    }
    watched = {each.name: each for each in found.monitor}
    return [_by_dimension(name, watched[dimension], rule) for name, (dimension, rule) in asked.items()]


def _by_dimension(name: str, one: Dimension, rule: str) -> Criterion:
    worst = next((each for each in one.readings if each.state == one.state), None)
    value = f"{worst.what}: {worst.value}" if worst else "not measured"
    says: Says = "retrain" if one.state == "act" else "update" if one.state == "fine" else "either"
    return Criterion(name, value, says, rule)


def _events(plan: Plan) -> list[Event]:
    return current_events(open_workspace(plan.workspace).ledger)


def _seen(events: Sequence[Event]) -> list[str]:
    """Sources of the rounds on the champion's line, in order, each once."""
    line = set(champion_line(events))
    made = [one.body for one in events if one.kind == "checkpoint"]
    rounds = {one["round"] for one in made if one["label"] in line}
    return list(dict.fromkeys(each["source"] for one in made if one["round"] in rounds for each in one["data"]))


def _passes(events: Sequence[Event]) -> float:
    """How often the champion's rounds have shown their rows, at least once."""
    line = set(champion_line(events))
    made = [one.body for one in events if one.kind == "checkpoint" and one.body["label"] in line and one.body["data"]]
    rows = sum(each["rows"] for one in made for each in one["data"])
    return max(1.0, sum(one["new_rows"] for one in made) / rows) if rows else 1.0


def _next_round(loaded: LoadedRecipe, events: Sequence[Event]) -> Round:
    settled = {one.body["round"] for one in events if one.kind == "settled"}
    rounds = loaded.recipe.rounds
    return next((one for one in rounds if one.name not in settled), rounds[-1])


def _rows(plan: Plan, name: str) -> list[Row]:
    ref = plan.rows_ref(name)
    return read_rows(Path(ref.path), format=ref.format, source=name, limit=ref.limit)


def _plain(one: Round) -> dict[str, Any]:
    found: dict[str, Any] = one.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return found


def _text(row: Row) -> str:
    return " ".join(asked_and_said(row))
