"""A search for merge weights on real models: candidates in memory, chosen on dev items, reported on held-out ones."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evertune.errors import MergeError
from evertune.hashing import digest_json
from evertune.merge.config import MergeConfig
from evertune.merge.engine import check_new
from evertune.merge.in_memory import apply_into
from evertune.merge.plan import plan_checkpoints
from evertune.merge.run import Result, merge_planned
from evertune.merge.search import LeftOut, Search, Trial, cma, coordinate, greedy_soup, grid, leave_one_out
from evertune.model.checkpoint import describe
from evertune.recipe.load import LoadedRecipe

How = Literal["grid", "coordinate", "cma", "greedy"]


@dataclass(frozen=True)
class Found:
    """A finished search.

    Attributes:
        best: the chosen weights with their dev values.
        held_out: values of the chosen weights, and of equal ones, on items no trial saw; higher is better.
        equal_held_out: of equal weights.
        left_out: who collides, most first.
    """

    best: Trial
    trials: list[Trial]
    held_out: dict[str, float]
    equal_held_out: dict[str, float]
    left_out: list[LeftOut]
    written: Result | None

    def body(self) -> dict[str, Any]:
        return {
            "weights": self.best.weights,
            "dev": self.best.values,
            "held_out": self.held_out,
            "equal_held_out": self.equal_held_out,
            "left_out": [{"name": one.name, "change": one.change, "mean": one.mean} for one in self.left_out],
            "trials": [one.body() for one in self.trials],
            "written": self.written.body() if self.written else None,
        }

    def lines(self) -> list[str]:
        said = ", ".join(f"{name} {one:g}" for name, one in self.best.weights.items())
        lines = [f"{len(self.trials)} candidates tried in memory; best on dev items: {said}"]
        lines.append(f"{'probe':<16} {'dev':>9} {'held out':>9} {'equal weights, held out':>24}")
        for probe, value in self.best.values.items():
            lines.append(f"{probe:<16} {value:9.4f} {self.held_out[probe]:9.4f} {self.equal_held_out[probe]:24.4f}")
        for one in self.left_out:
            each = ", ".join(f"{probe} {change:+.4f}" for probe, change in one.change.items())
            lines.append(f"without {one.name}: {each}")
        if self.left_out and self.left_out[0].mean > 0:
            lines.append(f"-> {self.left_out[0].name} collides: the others do better without it")
        return lines + (self.written.lines() if self.written else [])


def search_weights(
    config: MergeConfig,
    folder: Path,
    recipe: LoadedRecipe,
    *,
    how: How,
    steps: int = 4,
    rounds: int = 2,
    out: Path | None = None,
    cache: Path | None = None,
) -> Found:
    """Find weights for a merge on a recipe's probes.

    Bits per byte count negated, so that higher is better everywhere; the objective is the mean over probes.

    Raises:
        MergeError: a method without weights, models with different starts, or `out` holds files.
    """
    from evertune.model.open import open_model

    if "weight" not in config.table.per_model:
        raise MergeError(f"'{config.method}' has no weights to search for.", remedy="Use linear or task_arithmetic.")
    if out is not None:
        check_new(out)  # before the search, not after
    models = {name: describe(folder / one.path, cache=cache) for name, one in config.models.items()}
    base = describe(folder / config.base, cache=cache) if config.base is not None else None
    numerics = recipe.recipe.numerics
    opened = open_model(base or next(iter(models.values())), dtype=numerics.dtype, device=numerics.device, fold=True)
    dev, held = _halves(recipe)

    def values(probes: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, float]:
        from evertune.probe.job import score_one

        apply_into(plan_checkpoints(_weighted(config, weights), models, base), opened.model)
        found = {name: score_one(opened, probe) for name, probe in probes.items()}
        return {name: float(one.value) * (1 if one.direction == "higher" else -1) for name, one in found.items()}

    searching = Search(lambda weights: values(dev, weights))
    names = list(models)
    equal = dict.fromkeys(names, 1.0 / len(names))
    step = 1.0 / steps
    if how == "grid":
        best = grid(searching, names, steps)
    elif how == "greedy":
        best = greedy_soup(searching, names)
    elif how == "cma":
        best = cma(searching, names, start=equal, step=step, evaluations=10 * rounds, seed=config.seed)
    else:
        best = coordinate(searching, names, start=equal, step=step, rounds=rounds)
    left_out = leave_one_out(searching, best)
    held_out, equal_held_out = values(held, best.weights), values(held, equal)
    written = None
    if out is not None:
        written = merge_planned(plan_checkpoints(_weighted(config, best.weights), models, base), out)
    return Found(best, searching.trials, held_out, equal_held_out, left_out, written)


def _weighted(config: MergeConfig, weights: Mapping[str, float]) -> MergeConfig:
    models = {name: one.model_copy(update={"weight": weights[name]}) for name, one in config.models.items()}
    return config.model_copy(update={"models": models, "output": "model", "rank": None})


def _halves(recipe: LoadedRecipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each probe's items in two halves, by the digest of an item's id: (dev, held out)."""
    from evertune.probe.suite import load_probe

    dev, held = {}, {}
    for name, probe in recipe.recipe.probes.items():
        if probe.lm_eval is not None:
            continue
        whole: Any = load_probe(name, settings=probe.model_dump(exclude_none=True), root=recipe.folder)
        first = [one for one in whole.items if int(digest_json(one.id)[:8], 16) % 2 == 0]
        rest = [one for one in whole.items if int(digest_json(one.id)[:8], 16) % 2 == 1]
        if not first or not rest:
            raise MergeError(f"probe '{name}' has {len(whole.items)} items, too few to divide.", remedy="Add items.")
        dev[name] = dataclasses.replace(whole, items=tuple(first))
        held[name] = dataclasses.replace(whole, items=tuple(rest))
    if not dev:
        raise MergeError(f"{recipe.path}: no probe of its own; lm-eval tasks are not divided.", remedy="Add a probe.")
    return dev, held
