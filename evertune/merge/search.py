"""Weights of a merge, found by trying them: on dev items only, so that the held-out score is honest.

    score(weights) -> value by probe, higher is better, on the dev items

A search sees nothing else. What it returns is then scored once on items that it never saw.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evertune.errors import MergeError

Weights = Mapping[str, float]
Values = Mapping[str, float]
Score = Callable[[Weights], Values]
# Weights are rounded to four digits: below it, none is left.
SMALLEST = 5e-5


@dataclass(frozen=True)
class Trial:
    """One set of weights and what it scored on the dev items."""

    weights: dict[str, float]
    values: dict[str, float]

    @property
    def objective(self) -> float:
        """The mean over probes."""
        return sum(self.values.values()) / len(self.values)

    def body(self) -> dict[str, Any]:
        return {"weights": self.weights, "values": self.values, "objective": self.objective}


@dataclass
class Search:
    """Trials so far; weights that were tried are not tried again."""

    score: Score
    trials: list[Trial] = field(default_factory=list)
    _known: dict[tuple[tuple[str, float], ...], Trial] = field(default_factory=dict)

    def attempt(self, weights: Weights) -> Trial:
        """Score these weights, rounded to four digits."""
        rounded = {name: round(float(one), 4) for name, one in weights.items()}
        key = tuple(sorted(rounded.items()))
        if key not in self._known:
            self._known[key] = Trial(rounded, dict(self.score(rounded)))
            self.trials.append(self._known[key])
        return self._known[key]

    @property
    def best(self) -> Trial:
        """The best trial; of equal ones the earliest."""
        return max(self.trials, key=lambda one: one.objective)


def grid(search: Search, names: Sequence[str], steps: int) -> Trial:
    """Every way of dividing 1 among the models in `steps` equal parts."""
    for parts in itertools.product(range(steps + 1), repeat=len(names)):
        if sum(parts) == steps:
            search.attempt({name: part / steps for name, part in zip(names, parts, strict=True)})
    return search.best


def coordinate(search: Search, names: Sequence[str], *, start: Weights, step: float, rounds: int) -> Trial:
    """One weight after the other, up and down, as long as it helps; the step halves when none does.

    The search of Command A's technical report (arXiv:2504.00698), which found more in it than in other formulas.
    """
    best = search.attempt(start)
    for _ in range(rounds):
        before = best
        for name in names:
            for change in (step, -step):
                tried = {**best.weights, name: max(0.0, best.weights[name] + change)}
                if any(tried.values()):
                    best = max(best, search.attempt(tried), key=lambda one: one.objective)
        if best is before:
            step /= 2
    return best


def cma(search: Search, names: Sequence[str], *, start: Weights, step: float, evaluations: int, seed: int) -> Trial:
    """CMA-ES (Hansen and Ostermeier 2001) through the `cma` package, within [0, 2] for each weight.

    The start is tried first. Whole generations are tried until `evaluations` candidates were asked for.

    Raises:
        MergeError: the package is not installed, or there is but one weight, which it does not search for.
    """
    if len(names) < 2:
        raise MergeError("CMA-ES needs two models or more.", remedy="Use --how coordinate.")
    library = _cma_library()
    best = search.attempt(start)
    options = {"bounds": [0.0, 2.0], "maxfevals": evaluations, "seed": seed + 1, "verbose": -9}
    strategy = library.CMAEvolutionStrategy([start[name] for name in names], step, options)
    while not strategy.stop():
        asked = strategy.ask()
        trials = [search.attempt(dict(zip(names, one, strict=True))) if max(one) > SMALLEST else None for one in asked]
        # Where no model counts there is nothing to score: as bad as the worst seen.
        worst = min(one.objective for one in search.trials)
        strategy.tell(asked, [-(worst if one is None else one.objective) for one in trials])
        best = search.best
    return best


def _cma_library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses a plotting library that is not asked for
            import cma
    except ImportError:
        raise MergeError("search by CMA-ES needs the package 'cma'.", remedy="pip install evertune[search]") from None
    return cma


def greedy_soup(search: Search, names: Sequence[str]) -> Trial:
    """Models in order of their own score; each stays in the equal mean if the mean does not get worse.

    Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    alone = {name: search.attempt(_equal([name], names)) for name in names}
    order = sorted(names, key=lambda one: -alone[one].objective)
    members, best = [order[0]], alone[order[0]]
    for name in order[1:]:
        tried = search.attempt(_equal([*members, name], names))
        if tried.objective >= best.objective:
            members, best = [*members, name], tried
    return best


@dataclass(frozen=True)
class LeftOut:
    """What leaving one model out of the best merge changes on each probe; positive where the others do better."""

    name: str
    change: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.change.values()) / len(self.change)


def leave_one_out(search: Search, best: Trial) -> list[LeftOut]:
    """Each weighted model left out in turn, the weights of the others scaled up; who collides most comes first."""
    found = []
    for name, weight in best.weights.items():
        total = sum(best.weights.values())
        if weight == 0.0 or total == weight:
            continue
        scale = total / (total - weight)
        trial = search.attempt({one: 0.0 if one == name else each * scale for one, each in best.weights.items()})
        found.append(LeftOut(name, {probe: trial.values[probe] - value for probe, value in best.values.items()}))
    return sorted(found, key=lambda one: -one.mean)


def _equal(members: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    return {name: 1.0 / len(members) if name in members else 0.0 for name in names}
