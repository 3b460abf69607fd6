"""How often gates err, by simulation with known truth; prints the tables of docs/gate.md. `python -m benchmarks.gate`

Items of a probe flip independently with probability psi, or move as one with their cluster; the true drop is what the
scenario says. Beside our gate stand four that others use; each blocks a model, or lets it pass:

    drop 2, drop 5    the mean of some probe fell by more than 2 (5) points
    probability       the mean probability of the answers' tokens fell by more than 0.10 on some probe
    t per probe       Welch's t-test on some probe has p < 0.05, two independent samples, no correction

A token probability needs a model of its own: it falls (rises) by 0.2 on an item that turns wrong (right), and moves by
noise of 0.02 on the others.
"""

import argparse
import datetime
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy
from scipy import stats as scipy_stats

from evertune.gate import GateSettings, ProbeFacts, judge
from evertune.measure import stats
from evertune.probe.scores import ItemScores
from evertune.ratchet import Ratchet
from evertune.recipe.schema import Gate

DEFAULT = GateSettings.from_json(Gate().model_dump())
GUARD = ProbeFacts(role="guard", safety=False, margin=None)
RIVALS = ("drop 2", "drop 5", "probability", "t per probe")
VERDICTS = ("PROMOTE", "HOLD", "INCONCLUSIVE")
Probes = dict[str, ItemScores]
Floats = np.ndarray
Draw = Callable[[np.random.Generator], Mapping[str, Floats]]


def scores(name: str, right: Floats, size: int = 1) -> ItemScores:
    """Item scores in clusters of `size` neighbours."""
    ids = tuple(map(str, range(len(right))))
    cluster = ids if size == 1 else tuple(f"g{i // size}" for i in range(len(right)))
    return ItemScores(
        probe=name,
        kind="choice",
        direction="higher",
        ids=ids,
        score=right,
        cluster=cluster,
        items_digest="i",
        template_digest="t",
    )


def flips(rng: np.random.Generator, n: int, psi: float, drop: float, size: int = 1, shared: float = 0.0) -> Floats:
    """d of n items: -1 with (psi + drop) / 2, +1 with (psi - drop) / 2; a share of clusters moves as one."""
    shares = [(psi + drop) / 2, (psi - drop) / 2, 1 - psi]
    alone = rng.choice([-1, 1, 0], size=n, p=shares)
    if size == 1:
        return alone
    together = np.repeat(rng.choice([-1, 1, 0], size=n // size, p=shares), size)
    return np.where(np.repeat(rng.uniform(size=n // size) < shared, size), together, alone)


def sides(drawn: Mapping[str, Floats], rng: np.random.Generator, size: int = 1) -> tuple[Probes, Probes]:
    """Candidate and champion whose items differ by d; items that did not move are right six times in ten."""
    kept = {name: rng.uniform(size=len(d)) < 0.6 for name, d in drawn.items()}
    after, before = (
        {name: scores(name, np.where(d == 0, kept[name], d == sign), size) for name, d in drawn.items()}
        for sign in (1, -1)
    )
    return after, before


def blocked_by(after: Probes, before: Probes, rng: np.random.Generator) -> list[str]:
    """Which of the other gates block this model."""
    found = set()
    for name in after:
        new, old = after[name].score, before[name].score
        d = new - old
        found |= {f"drop {points}" for points in (2, 5) if d.mean() < -points / 100}
        probability = np.where(d == 0, rng.normal(0, 0.02, size=len(d)), 0.2 * d)
        found |= {"probability"} if probability.mean() < -0.10 else set()
        if np.ptp(new) or np.ptp(old):
            test = scipy_stats.ttest_ind(new, old, equal_var=False, alternative="less")
            found |= {"t per probe"} if test.pvalue < 0.05 else set()
    return sorted(found)


@dataclass
class Rates:
    """Counts of our verdicts, and of blocks by the others, over seeded runs."""

    runs: int = 0
    ours: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    def cells(self) -> list[str]:
        """Per cent: promote, hold, inconclusive, then how often each other gate blocks."""
        shares = [self.ours[one] for one in VERDICTS] + [self.others[one] for one in RIVALS]
        return [f"{100 * one / self.runs:.1f}" for one in shares]


def rates(runs: int, settings: GateSettings, draw: Draw, size: int = 1) -> Rates:
    """Our verdicts and the others' on the same simulated models."""
    rng, found = np.random.default_rng(11), Rates()
    for _ in range(runs):
        after, before = sides(draw(rng), rng, size)
        found.runs += 1
        found.ours[judge(after, before, before, dict.fromkeys(after, GUARD), settings).decision] += 1
        found.others.update(blocked_by(after, before, rng))
    return found


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


HEADS = ("", *VERDICTS, *RIVALS)


def nothing_lost(runs: int) -> None:
    rows = []
    for probes in (3, 5, 10, 20):
        for psi in (0.02, 0.05, 0.10, 0.20, 0.30):

            def draw(rng: np.random.Generator, probes: int = probes, psi: float = psi) -> dict[str, Floats]:
                return {f"g{k}": flips(rng, 500, psi, 0.0) for k in range(probes)}

            rows.append([f"{probes} guards, {psi:.0%} flip", *rates(runs, DEFAULT, draw).cells()])
    table("Nothing lost, 500 items a guard: HOLD is an error, and so is a block by another gate", HEADS, rows)


def one_lost(runs: int) -> None:
    rows = []
    wide = replace(DEFAULT, pooled=0.03)
    for drop in (0.03, 0.05, 0.10, 0.20):
        for probes in (3, 5, 10, 20):

            def draw(rng: np.random.Generator, probes: int = probes, drop: float = drop) -> dict[str, Floats]:
                return {
                    f"g{k}": flips(rng, 500, max(0.05, 1.5 * drop) if k == 0 else 0.05, drop if k == 0 else 0.0)
                    for k in range(probes)
                }

            rows.append([f"{100 * drop:.0f} points on one of {probes}", *rates(runs, wide, draw).cells()])
    table("One guard truly lost its whole margin of 3 points, or more: PROMOTE, or no block, is an error", HEADS, rows)


def edges(runs: int) -> None:
    rows = []
    alone = replace(DEFAULT, pooled=0.05, probe=0.05, min_items=50)
    for n, psi in ((100, 0.10), (300, 0.10), (1000, 0.10), (1000, 0.20), (1000, 0.30)):
        draw = lambda rng, n=n, psi=psi: {"g": flips(rng, n, psi, 0.05)}  # noqa: E731
        rows.append([f"one guard, {n} items, {psi:.0%} flip, lost its margin of 5", *rates(runs, alone, draw).cells()])
    for k in (3, 5, 10):
        draw = lambda rng, k=k: {f"g{i}": flips(rng, 2000 // k, 0.05, 0.01) for i in range(k)}  # noqa: E731
        rows.append([f"each of {k} guards lost 1 point, 2,000 items in all", *rates(runs, DEFAULT, draw).cells()])
    for drop, what in ((0.0, "nothing lost"), (0.05, "lost its margin of 5")):
        for told, how in ((8, "named"), (1, "**not** named")):
            draw = lambda rng, drop=drop: {"g": flips(rng, 400, 0.15, drop, size=8, shared=0.67)}  # noqa: E731
            rows.append([f"50 clusters of 8, {what}, clusters {how}", *rates(runs, alone, draw, size=told).cells()])
    table("At the edge of a margin, and with items that are not independent", HEADS, rows)


@dataclass
class Walk:
    """Ten rounds under one rule: promoted rounds, and the true loss of the last champion in points."""

    promoted: int = 0
    lost: float = 0.0
    held: int = 0


def walk(rng: np.random.Generator, drop: float, rule: str, *, probes: int, n: int, settings: GateSettings) -> Walk:
    """Candidates that are truly worse than their champion by `drop` on every guard, 4 % of the items flipping.

    Every model is asked the same items, so what the gate picks by luck stays in what it picks from.
    """
    found, psi, share = Walk(), 0.04, 0.7
    champion = {f"g{k}": scores(f"g{k}", rng.uniform(size=n) < share) for k in range(probes)}
    ratchet, facts = Ratchet.start(champion), dict.fromkeys(champion, GUARD)
    for _ in range(10):
        after = {}
        for name, one in champion.items():
            falls = rng.uniform(size=n) < (psi + drop) / 2 / share
            rises = rng.uniform(size=n) < (psi - drop) / 2 / (1 - share)
            after[name] = scores(name, np.where(one.score == 1, ~falls, rises))
        if rule.startswith("drop"):
            worst = min(after[name].value - champion[name].value for name in after)
            passes = worst >= -int(rule.split()[1]) / 100
        else:
            best = champion if rule == "champion alone" else ratchet.best
            shares = ratchet.shares if rule == "ours" else None
            decision = judge(after, champion, best, facts, settings, shares=shares).decision
            passes, ratchet = decision == "PROMOTE", ratchet.judged(decision)
            found.held += decision == "HOLD"
        if passes:
            champion, share = after, share - drop
            ratchet = ratchet.climb(after, alpha=settings.alpha)
            found.promoted, found.lost = found.promoted + 1, found.lost + 100 * drop
    return found


def creep(runs: int) -> None:
    rows = []
    settings = replace(DEFAULT, pooled=0.02, probe=0.02, ratchet=0.02)
    whole = runs
    for probes, n, drops in ((1, 1000, (0.0, 0.0041, 0.0051, 0.0067, 0.0101)), (5, 1000, (0.0, 0.0051))):
        runs = whole if probes == 1 else max(1, whole // 4)
        for drop in drops:
            cells = []
            for rule in ("ours", "best at full alpha", "champion alone", "drop 2", "drop 5"):
                rng = np.random.default_rng(12)
                found = [walk(rng, drop, rule, probes=probes, n=n, settings=settings) for _ in range(runs)]
                beyond = np.mean([one.lost > 2 + 1e-9 for one in found])
                cells.append(f"{np.mean([one.promoted for one in found]):.1f}, {100 * beyond:.1f} %")
                if rule == "ours":
                    held = f"{100 * np.mean([one.held for one in found]) / 10:.1f} %"
            rows.append([f"{probes} × {n:,} items, {100 * drop:.2f} points a round, {runs} runs", *cells, held])
    heads = ("", "ours", "best, full alpha", "champion alone", "drop 2", "drop 5", "held, ours, per verdict")
    table(
        "Ten rounds of drift, margins of 2 points: rounds promoted, and runs that lose more than 2 points", heads, rows
    )


@dataclass
class Looked:
    """What a run of looks ends with: decision and items used, in all and by McNemar's test at each look."""

    decision: str
    items: int
    false_alarm: bool


def look(rng: np.random.Generator, n: int, psi: float, drop: float, settings: GateSettings, batch: int = 50) -> Looked:
    """Items in random order, looked at after each batch; the last look has all of them."""
    d = flips(rng, n, psi, drop)
    after, before = sides({"g": d}, rng)
    alarm = False
    for seen in range(batch, n + 1, batch):
        alarm |= stats.mcnemar(int(np.sum(d[:seen] < 0)), int(np.sum(d[:seen] > 0))) <= settings.alpha
    for seen in range(batch, n + 1, batch):
        now, then = ({"g": scores("g", side["g"].score[:seen])} for side in (after, before))
        decision = judge(now, then, then, {"g": GUARD}, settings, look="last" if seen == n else "early").decision
        if decision != "INCONCLUSIVE" or seen == n:
            return Looked(decision, seen, alarm)
    raise AssertionError("no items")


def peeking(runs: int, n: int = 2000) -> None:
    rows = []
    settings = replace(DEFAULT, pooled=0.02, probe=0.02)
    for psi, drop in ((0.10, 0.0), (0.10, 0.02), (0.10, 0.03), (0.10, 0.05), (0.15, 0.10), (0.30, 0.20), (0.05, -0.02)):
        rng = np.random.default_rng(14)
        found = [look(rng, n, psi, drop, settings) for _ in range(runs)]
        whole = rates(runs, settings, lambda rng, psi=psi, drop=drop: {"g": flips(rng, n, psi, drop)})
        used = np.mean([one.items for one in found])
        counts = Counter(one.decision for one in found)
        cells = [f"{100 * counts[one] / runs:.1f}" for one in VERDICTS]
        cells += [f"{used:,.0f}", f"{100 * (1 - used / n):.0f} %"]
        cells += [f"{100 * whole.ours[one] / runs:.1f}" for one in VERDICTS[:2]]
        cells += [f"{100 * np.mean([one.false_alarm for one in found]):.1f}"]
        rows.append([f"{100 * drop:+.0f} points lost, {psi:.0%} flip", *cells])
    heads = ("", *VERDICTS, "items used", "saved", "whole: PROMOTE", "whole: HOLD", "McNemar at each look alarms")
    table(f"Looking after every 50 of {n:,} items, margin 2 points", heads, rows)


def rescue(runs: int) -> None:
    """Five shares of an update, all of which lost the whole margin, with independent noise."""
    wide = replace(DEFAULT, pooled=0.2, probe=0.05)
    rng, found = np.random.default_rng(13), Counter[int]()
    for _ in range(runs):
        drawn = [sides({"g": flips(rng, 300, 0.10, 0.05)}, rng) for _ in range(5)]
        for tried in (1, 5):
            verdicts = [judge(after, base, base, {"g": GUARD}, wide, tried=tried) for after, base in drawn]
            found[tried] += any(one.decision == "PROMOTE" for one in verdicts)
    each, corrected = (f"{100 * found[one] / runs:.1f} %" for one in (1, 5))
    print(f"\nAny of five shares promoted, each truly at the margin: {each} at 0.05 each, {corrected} at 0.05 / 5")


def sizes() -> None:
    """Closed forms: least items, and items for 80 % power."""
    margins = (0.01, 0.02, 0.03, 0.05, 0.10, 0.15)
    heads = ("margin, points", *(f"{100 * m:.0f}" for m in margins))
    levels = ((0.05, "level 0.05"), (0.01, "level 0.01 (a scan of five)"))
    rows = [[title, *(f"{stats.minimum_items(m, level):,}" for m in margins)] for level, title in levels]
    table("Least items to rule out a drop when nothing flips", heads, rows)
    rows = []
    for psi in (0.02, 0.05, 0.10, 0.20):
        cells = (max(stats.minimum_items(m, 0.05), stats.items_needed(psi, m, 0.05) or 0) for m in margins)
        rows.append([f"{psi:.0%}", *(f"{one:,}" for one in cells)])
    table("Items for an 80 % chance to rule it out, when nothing is lost and a share flips", heads, rows)


PARTS = {
    "sizes": lambda runs: sizes(),
    "nothing": nothing_lost,
    "one": one_lost,
    "edges": edges,
    "creep": creep,
    "peeking": lambda runs: peeking(max(1, runs // 2)),
    "rescue": rescue,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    began = time.monotonic()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
          f"numpy {np.__version__}, scipy {scipy.__version__}, {given.runs} runs")  # fmt: skip
    for name in given.only:
        PARTS[name](given.runs)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
