"""Published statements tried again on the 135M model, one by one: the figure, its interval, and whether it holds here.

    python -m benchmarks.claims --data DATA --folder WORK                    all, in the order of CLAIMS
    python -m benchmarks.claims --data DATA --folder WORK replay factors     these
    python -m benchmarks.claims --data DATA --folder WORK --smoke            all, on a random model: minutes, no meaning
    python -m benchmarks.claims --folder WORK --list                         what each asks, and what has run
    python -m benchmarks.claims --folder WORK --page docs/evidence.md        page and drawings of what has run

Task A is snips7 (7 commands), task B dbpedia14 (7 kinds of things), texts cut to 20 words; C4 text stands for general
ability. Everything is trained and probed by `evertune run` on recipes that are left in the folder. Claims
share their runs: the sweep over learning rate, epochs and rank serves seven of them. A result is written as soon as it
is there; stopped and called again, the script goes on where it was. It needs 5 GB in the folder and about an hour of
one core (`OMP_NUM_THREADS=1`).

A verdict is read off a 90 % interval: over the probes' items (bootstrap, paired), so that a difference between seeds is
not in it; over runs where the statement is about runs.

    holds       the interval lies on the side that the statement says
    does not    it lies on the other side
    undecided   it covers the statement's threshold, or there was nothing to lose in the first place
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims_bench import Bench, Floats, Indexes, Workspace, bootstrap, renamed_units, spearman, verdict_of

LEARNING_RATES, EPOCHS, FULL_RATES = (5e-4, 1.5e-3, 4e-3), (1, 2, 4), (3e-5, 1e-4, 3e-4)


def run_name(kind: str, lr: float, epochs: int) -> str:
    """`full`, 1e-4, 2 -> `full-1_0e-04-x2`: a round's name has no dots."""
    return f"{kind}-{lr:.1e}-x{epochs}".replace(".", "_")


RANK_8 = {(lr, epochs): run_name("rank-8", lr, epochs) for lr in LEARNING_RATES for epochs in EPOCHS}
FULL = {(lr, 1): run_name("full", lr, 1) for lr in FULL_RATES}
RANK_64 = run_name("rank-64", 1.5e-3, 1)
PLAIN, HOTTEST, FULL_PLAIN = RANK_8[1.5e-3, 1], RANK_8[4e-3, 4], FULL[1e-4, 1]
NEAR = 0.05
"""Two runs have the same gain where their accuracies differ by no more."""
BARRIER = 0.02
"""An error above the line between the ends by which there is a barrier (Frankle et al. 2019, arXiv:1912.05671)."""
SHARES = (0.25, 0.5, 0.75)
GENERAL = ("topics", "c4")
ASKED = 48
"""Questions on which the KL between two models is measured."""


@dataclass(frozen=True)
class Finding:
    """What a claim came to.

    Attributes:
        figure: the number that the statement is about, and its 90 % interval.
        threshold: above it the statement holds.
        verdict: `holds`, `does not` or `undecided`.
        reading: the figure in words.
        numbers: everything it was made from.
        plots: `{"title", "x", "y", "lines", "series": {name: [[x, y], ...]}}` each.
    """

    figure: float
    low: float
    high: float
    threshold: float
    verdict: str
    reading: str
    numbers: Mapping[str, Any]
    plots: Sequence[Mapping[str, Any]] = field(default=())


def _judged(
    interval: tuple[float, float, float], threshold: float, reading: str, numbers: Mapping[str, Any], **more: Any
) -> Finding:
    return Finding(*interval, threshold, verdict_of(*interval, threshold), reading, numbers, **more)


# Runs that claims share.


def sweep(bench: Bench) -> Workspace:
    """Task B from the base at all rates, lengths and ranks."""
    rounds = {name: [bench.sft("topics", lr=lr, epochs=epochs)] for (lr, epochs), name in RANK_8.items()}
    rounds |= {name: [bench.sft("topics", lr=lr, tune="full")] for (lr, _), name in FULL.items()}
    rounds[RANK_64] = [bench.sft("topics", tune="{lora: {rank: 64}}")]
    return bench.run("sweep", rounds, GENERAL)


SWEEP = (*RANK_8.values(), *FULL.values(), RANK_64)


def seeds(bench: Bench) -> list[Workspace]:
    """The plain run of the sweep with three seeds."""
    one = {PLAIN: [bench.sft("topics")]}
    return [sweep(bench), *(bench.run(f"plain-{seed}", one, GENERAL, seed=seed) for seed in (2, 3))]


def full_sibling(bench: Bench) -> Workspace:
    """The plain full fine-tuning of the sweep with another seed."""
    rounds = {FULL_PLAIN: [bench.sft("topics", lr=1e-4, tune="full")]}
    return bench.run("full-2", rounds, GENERAL, seed=2)


def sequence(bench: Bench) -> Workspace:
    """Task A, then task B: alone, with a fifth of replay, and averaged with what was there before."""
    first, second = bench.sft("commands"), bench.sft("topics", lr=4e-3, epochs=2)
    again = bench.sft("topics", lr=4e-3, epochs=2, replay="{share: 0.2, from: [commands]}")
    rounds = {"one-by-one": [first, second], "replayed": [first, again]}
    for share in SHARES:
        models = ", ".join(
            f"{name}: {{path: one-by-one/{stage}, weight: {weight}}}"
            for name, stage, weight in (("new", "2-sft", share), ("old", "1-sft", 1 - share))
        )
        rounds[f"at-{int(100 * share)}"] = [f"merge: {{method: linear, models: {{{models}}}}}"]
    return bench.run("sequence", rounds, ("commands", "topics"))


# The claims.


def factors(bench: Bench) -> Finding:
    """The mean of B times the mean of A is not the mean of B A: off by ten per cent and more."""
    from evertune.federated.aggregation import aggregation_error, mean_of_factors
    from evertune.model.adapter import read_factors

    updates = [read_factors(one.folder(f"{PLAIN}/1-sft")) for one in seeds(bench)]

    def off(some: Sequence[Any]) -> float:
        shares = [1 / len(some)] * len(some)
        return aggregation_error(mean_of_factors(some, shares).factors, some, shares)

    figure, pairs = off(updates), [off(two) for two in itertools.combinations(updates, 2)]
    reading = f"off by {100 * figure:.0f} % of the mean's norm for three clients"
    numbers = {"three": figure, "pairs": pairs, "interval": "the range over three and all pairs"}
    return _judged((figure, min(figure, *pairs), max(figure, *pairs)), 0.1, reading, numbers)


def soup(bench: Bench) -> Finding:
    """A soup of three seeds is better than its members are on the mean."""
    members = seeds(bench)
    models = ", ".join(f"{'abc'[i]}: {{path: {one.folder(f'{PLAIN}/1-sft')}}}" for i, one in enumerate(members))
    runs = bench.run("soup", {"soup": [f"merge: {{method: linear, models: {{{models}}}}}"]}, GENERAL)
    own = np.mean([one.scores(f"{PLAIN}/1-sft", "topics") for one in members], axis=0)
    mixed = runs.scores("soup/1-merge", "topics")
    interval = bootstrap(lambda chosen: float((mixed - own)[chosen].mean()), len(own))
    reading = f"the soup has {100 * mixed.mean():.1f}, its members {100 * own.mean():.1f} on the mean"
    return _judged(interval, 0.0, reading, {"soup": mixed.mean(), "members": own.mean()})


def replay(bench: Bench) -> Finding:
    """Replay of 20 % of task A recovers at least half of what task B makes it lose."""
    runs = sequence(bench)
    learnt, plain = (runs.scores(f"one-by-one/{stage}", "commands") for stage in ("1-sft", "2-sft"))
    kept = runs.scores("replayed/2-sft", "commands")

    def recovered(chosen: Indexes) -> float:
        lost = float((learnt - plain)[chosen].mean())
        return float((kept - plain)[chosen].mean()) / lost if lost > 0 else np.nan

    gains = {name: runs.scores(f"{name}/2-sft", "topics").mean() for name in ("one-by-one", "replayed")}
    reading = (
        f"lost {100 * (learnt - plain).mean():.1f} points without, {100 * (learnt - kept).mean():.1f} with replay; "
    )
    reading += f"B at {100 * gains['one-by-one']:.1f} and {100 * gains['replayed']:.1f}"
    numbers = {"learnt": learnt.mean(), "after B": plain.mean(), "after B with replay": kept.mean(), "B": gains}
    return _judged(bootstrap(recovered, len(learnt)), 0.5, reading, numbers)


def interpolation(bench: Bench) -> Finding:
    """Between two tasks lies a model with 90 % of the gain and half of the loss."""
    runs = sequence(bench)
    ends = ("one-by-one/1-sft", "one-by-one/2-sft")
    between = [f"at-{int(100 * share)}/1-merge" for share in SHARES]
    old = {label: runs.scores(label, "commands") for label in (*ends, *between)}
    new = {label: runs.scores(label, "topics") for label in (*ends, *between)}

    def best(chosen: Indexes) -> float:
        """The largest share of the loss that is avoided, among those that keep 90 % of the gain."""
        gain = float((new[ends[1]] - new[ends[0]])[chosen].mean())
        lost = float((old[ends[0]] - old[ends[1]])[chosen].mean())
        kept = [one for one in between if gain > 0 and float((new[one] - new[ends[0]])[chosen].mean()) >= 0.9 * gain]
        if lost <= 0:
            return np.nan
        return max((1.0 - float((old[ends[0]] - old[one])[chosen].mean()) / lost for one in kept), default=0.0)

    interval = bootstrap(best, min(map(len, (*old.values(), *new.values()))))
    line = [[float(old[one].mean()), float(new[one].mean())] for one in (ends[0], *between, ends[1])]
    reading = f"among those with 90 % of the gain, at most {100 * interval[0]:.0f} % of the loss is avoided"
    drawing = {
        "title": "From A's model to B's",
        "x": "accuracy on A",
        "y": "accuracy on B",
        "lines": True,
        "series": {"linear path": line},
    }
    numbers = {one: {"A": old[one].mean(), "B": new[one].mean()} for one in (*ends, *between)}
    return _judged(interval, 0.5, reading, numbers, plots=[drawing])


def general(bench: Bench) -> Finding:
    """One per cent of general text halves the drift on general text."""
    runs = sweep(bench)
    mixed = bench.sft("topics", lr=4e-3, epochs=4, replay="{share: 0.01, from: [general]}")
    bench.run("general", {"mixed": [mixed]}, GENERAL)
    start, plain, held = (runs.scores(label, "c4") for label in ("base", f"{HOTTEST}/1-sft", "mixed/1-sft"))

    def saved(chosen: Indexes) -> float:
        drift = float((start - plain)[chosen].mean())
        return 1.0 - float((start - held)[chosen].mean()) / drift if drift > 0 else np.nan

    reading = f"bits per byte rose by {(start - plain).mean():.4f} without, {(start - held).mean():.4f} with 1 %"
    numbers = {"base": -start.mean(), "plain": -plain.mean(), "mixed": -held.mean()}
    return _judged(bootstrap(saved, len(start)), 0.5, reading, numbers)


def ranks(bench: Bench) -> Finding:
    """Full fine-tuning gains and loses more than LoRA of rank 64, and that more than rank 8."""
    runs, names = sweep(bench), (FULL_PLAIN, RANK_64, PLAIN)
    gains, texts = ([runs.scores(f"{name}/1-sft", probe) for name in names] for probe in ("topics", "c4"))

    def least_step(values: Sequence[Floats], sign: float) -> Callable[[Indexes], float]:
        def step(chosen: Indexes) -> float:
            means = [sign * float(one[chosen].mean()) for one in values]
            return min(means[0] - means[1], means[1] - means[2])

        return step

    gained = bootstrap(least_step(gains, 1.0), len(gains[0]))
    lost = bootstrap(least_step(texts, -1.0), len(texts[0]))
    verdicts = {verdict_of(*gained, 0.0), verdict_of(*lost, 0.0)}
    verdict = "does not" if "does not" in verdicts else verdicts.pop() if len(verdicts) == 1 else "undecided"
    reading = f"the smaller of the two steps in gain is {100 * gained[0]:+.1f} points, "
    reading += f"in bits per byte lost {lost[0]:+.4f} ({lost[1]:+.4f} to {lost[2]:+.4f})"
    numbers: dict[str, Any] = {
        name: {"gain": gain.mean(), "c4": -text.mean()} for name, gain, text in zip(names, gains, texts, strict=True)
    }
    return Finding(*gained, 0.0, verdict, reading, {**numbers, "lost": lost})


@dataclass(frozen=True)
class Point:
    """A run of the sweep: what it gained, in accuracy, and lost, in bits per byte of each text."""

    name: str
    lr: float
    epochs: int
    gain: float
    lost: Floats


def pace(bench: Bench) -> Finding:
    """Drop grows with learning rate and with epochs at matched gain."""
    runs = sweep(bench)
    start, begun = runs.scores("base", "c4"), runs.scores("base", "topics").mean()
    families = [
        [
            Point(name, lr, epochs, runs.scores(f"{name}/1-sft", "topics").mean() - begun, start - texts)
            for (lr, epochs), name in family.items()
            for texts in [runs.scores(f"{name}/1-sft", "c4")]
        ]
        for family in (RANK_8, FULL)
    ]
    pairs = {by: [pair for one in families for pair in matched_pairs(one, by)] for by in ("lr", "epochs")}
    steps = {by: np.mean([hot.lost - mild.lost for mild, hot in some], axis=0) for by, some in pairs.items() if some}
    if len(steps) < len(pairs):
        interval = (np.nan, np.nan, np.nan)
    else:
        interval = bootstrap(lambda chosen: min(float(one[chosen].mean()) for one in steps.values()), len(start))
    told = [f"{by}: {len(some)} pairs, {_mean_of(steps.get(by)):+.4f} bits per byte" for by, some in pairs.items()]
    series = {
        f"rank 8, lr {lr:g}": [[one.gain, float(one.lost.mean())] for one in families[0] if one.lr == lr]
        for lr in LEARNING_RATES
    }
    series["full"] = [[one.gain, float(one.lost.mean())] for one in families[1]]
    axes = {"x": "gain on the task, accuracy", "y": "bits per byte lost on C4"}
    drawing = {"title": "What a gain costs, by rate; dots are lengths", **axes, "lines": True, "series": series}
    numbers = {
        "runs": {one.name: {"gain": one.gain, "lost": one.lost.mean()} for family in families for one in family},
        "pairs": {by: [[mild.name, hot.name] for mild, hot in some] for by, some in pairs.items()},
    }
    return _judged(interval, 0.0, "; ".join(told), numbers, plots=[drawing])


def _mean_of(values: Floats | None) -> float:
    return float("nan") if values is None else float(values.mean())


def matched_pairs(points: Sequence[Point], by: str) -> list[tuple[Point, Point]]:
    """Pairs of runs of about the same gain that differ in `lr` alone, or in `epochs` alone; the smaller first."""
    other = "epochs" if by == "lr" else "lr"
    return [
        (mild, hot)
        for mild, hot in itertools.permutations(points, 2)
        if getattr(mild, by) < getattr(hot, by)
        and getattr(mild, other) == getattr(hot, other)
        and abs(mild.gain - hot.gain) <= NEAR
    ]


def kl(bench: Bench) -> Finding:
    """KL on new-task prompts predicts the general drop better than weight distance."""
    places = [(sweep(bench), name) for name in SWEEP]
    places += [(one, PLAIN) for one in seeds(bench)[1:]] + [(full_sibling(bench), FULL_PLAIN)]
    start = places[0][0].scores("base", "c4").mean()
    lost = np.array([start - runs.scores(f"{name}/1-sft", "c4").mean() for runs, name in places])
    nats = np.array(_divergences(bench, [runs.folder(f"{name}/1-sft") for runs, name in places]))
    moved = np.array([runs.event(f"{name}/1-sft")["drift"]["to_base"] for runs, name in places])

    def better(chosen: Indexes) -> float:
        return spearman(nats[chosen], lost[chosen]) - spearman(moved[chosen], lost[chosen])

    interval = bootstrap(better, len(lost))
    rho = {"KL": spearman(nats, lost), "distance": spearman(moved, lost)}
    reading = f"over {len(lost)} runs the rank correlation with the drop is {rho['KL']:.2f} of KL, "
    reading += f"{rho['distance']:.2f} of distance"
    numbers = {
        "spearman": rho,
        "runs": [
            {"run": f"{name}, {runs.place.name}", "nats": float(a), "distance": float(b), "lost": float(c)}
            for (runs, name), a, b, c in zip(places, nats, moved, lost, strict=True)
        ],
    }
    kinds = {"LoRA": [not name.startswith("full") for _, name in places]}
    kinds["full"] = [not one for one in kinds["LoRA"]]
    plots = [
        {
            "title": title,
            "x": x,
            "y": "bits per byte lost on C4",
            "lines": False,
            "series": {
                kind: [[float(a), float(b)] for a, b, is_in in zip(values, lost, chosen, strict=True) if is_in]
                for kind, chosen in kinds.items()
            },
        }
        for title, x, values in (
            ("KL", "KL(base, tuned) on the task's answers, nats a token", nats),
            ("Weight distance", "relative L2 distance to the base", moved),
        )
    ]
    return _judged(interval, 0.0, reading, numbers, plots=plots)


def _divergences(bench: Bench, folders: Sequence[Path]) -> list[float]:
    """Mean exact KL(base || tuned) where the task's questions are answered, along the right answer; nats a token."""
    import torch

    from evertune.model.checkpoint import describe
    from evertune.model.open import open_model
    from evertune.plan import make_plan
    from evertune.probe.compare import divergence, texts_of
    from evertune.probe.suite import Probe
    from evertune.recipe.load import load_recipe

    torch.set_num_threads(1)
    plan = make_plan(load_recipe(bench.folder / "sweep.yaml"))
    (probe,) = [one for one in plan.probes if isinstance(one, Probe) and one.name == "topics"]
    base = open_model(plan.base, dtype=bench.dtype, device="auto")
    texts = texts_of(base.codec, probe, most=ASKED)
    tuned = (open_model(describe(one), dtype=bench.dtype, device="auto") for one in folders)
    return [divergence(base, one, texts)["nats"] for one in tuned]


def barrier(bench: Bench) -> Finding:
    """The linear path between siblings has no barrier, between strangers it has."""
    first, second = sweep(bench).folder(f"{FULL_PLAIN}/1-sft"), full_sibling(bench).folder(f"{FULL_PLAIN}/1-sft")
    stranger = bench.folder / "stranger"
    if not (stranger / "config.json").is_file():
        shutil.rmtree(stranger, ignore_errors=True)
        renamed_units(second, stranger.with_suffix(".making"), seed=1)
        stranger.with_suffix(".making").rename(stranger)
    ends = {"siblings": second, "strangers": stranger}
    rounds = {}
    for name, other in ends.items():
        for share in (*SHARES, 1.0) if name == "strangers" else SHARES:
            models = f"a: {{path: {first.absolute()}, weight: {1 - share}}}, "
            models += f"b: {{path: {other.absolute()}, weight: {share}}}"
            more = "different_starts: allow, dtype: bfloat16, output: model"
            rounds[f"{name}-{int(100 * share)}"] = [f"merge: {{method: linear, models: {{{models}}}, {more}}}"]
    runs = bench.run("barrier", rounds, ("topics", "c4"))
    start, sibling = (one.scores(f"{FULL_PLAIN}/1-sft", "topics") for one in (sweep(bench), full_sibling(bench)))
    other = runs.scores("strangers-100/1-merge", "topics")
    paths = {
        name: [start, *(runs.scores(f"{name}-{int(100 * share)}/1-merge", "topics") for share in SHARES), end]
        for name, end in (("siblings", sibling), ("strangers", other))
    }

    def height(path: Sequence[Floats], chosen: Indexes) -> float:
        return barrier_of([1.0 - float(one[chosen].mean()) for one in path], (0.0, *SHARES, 1.0))

    def margin(chosen: Indexes) -> float:
        return min(BARRIER - height(paths["siblings"], chosen), height(paths["strangers"], chosen) - BARRIER)

    everything = np.arange(len(start))
    heights = {name: height(path, everything) for name, path in paths.items()}
    reading = f"error above the line between the ends: {100 * heights['siblings']:.1f} points between siblings, "
    reading += f"{100 * heights['strangers']:.1f} between strangers; the figure is the distance from {BARRIER:.0%}"
    series = {
        name: [[share, float(one.mean())] for share, one in zip((0.0, *SHARES, 1.0), path, strict=True)]
        for name, path in paths.items()
    }
    axes = {"x": "share of the second model", "y": "accuracy on the task"}
    drawing = {"title": "On the line between two models", **axes, "lines": True, "series": series}
    numbers = {"heights": heights, "paths": series, "stranger": "the sibling with its units renamed: the same function"}
    return _judged(bootstrap(margin, len(start)), 0.0, reading, numbers, plots=[drawing])


def barrier_of(errors: Sequence[float], shares: Sequence[float]) -> float:
    """How far the highest error on a path lies above the straight line between its ends' errors; at least 0."""
    return max(one - ((1 - share) * errors[0] + share * errors[-1]) for one, share in zip(errors, shares, strict=True))


def self_sft(bench: Bench) -> Finding:
    """Refreshed self-SFT drops less than SFT on answers of another."""
    answers = "{samples: 6, keep: verified, max_new_tokens: 12, temperature: 1.0}"
    pace_ = "lr: 1.5e-3, epochs: 1, batch_rows: 8, micro_batch_rows: 8"
    own = f"distill: {{data: [asked], teachers: start, answers: {answers}, weight: 0.0, {pace_}}}"
    runs = bench.run("self", {"taught": [bench.sft("asked")] * 3, "own": [own] * 3}, ("named", "c4"))
    labels = {
        name: [f"{name}/{i + 1}-{kind}" for i in range(3)] for name, kind in (("taught", "sft"), ("own", "distill"))
    }
    start, begun = runs.scores("base", "c4"), runs.scores("base", "named").mean()
    taught, self_ = (runs.scores(labels[name][-1], "c4") for name in ("taught", "own"))
    gains = {name: runs.scores(each[-1], "named").mean() - begun for name, each in labels.items()}
    interval = bootstrap(lambda chosen: float((self_ - taught)[chosen].mean()), len(start))
    verdict = verdict_of(*interval, 0.0)
    if verdict == "holds" and gains["own"] < gains["taught"] / 2:
        verdict = "undecided"
    reading = f"bits per byte rose by {(start - taught).mean():+.4f} on the data's answers "
    reading += (
        f"(gain {100 * gains['taught']:+.1f} points), by {(start - self_).mean():+.4f} on its own, asked again before "
    )
    reading += f"each of three passes (gain {100 * gains['own']:+.1f})"
    series = {
        name: [
            [float(runs.scores(one, "named").mean() - begun), float((start - runs.scores(one, "c4")).mean())]
            for one in each
        ]
        for name, each in {"the data's answers": labels["taught"], "own answers": labels["own"]}.items()
    }
    axes = {"x": "gain on the task, accuracy", "y": "bits per byte lost on C4"}
    drawing = {"title": "After each of three passes", **axes, "lines": True, "series": series}
    answered = [runs.event(one)["final"]["answered"] for one in labels["own"]]
    numbers = {"gains": gains, "answered": answered, "passes": series}
    return Finding(*interval, 0.0, verdict, reading, numbers, [drawing])


CLAIMS: Mapping[str, Callable[[Bench], Finding]] = {
    "factors": factors,
    "soup": soup,
    "ranks": ranks,
    "pace": pace,
    "kl": kl,
    "general": general,
    "replay": replay,
    "interpolation": interpolation,
    "barrier": barrier,
    "self-sft": self_sft,
}
NEEDS_ABILITY = ("self-sft",)
"""Claims that a random model cannot be asked: it answers nothing rightly."""


def measure(bench: Bench, names: Sequence[str]) -> None:
    """Run the claims that have no result yet; each is written down when it is there."""
    bench.write()
    for name in names:
        found = read_results(bench.folder)
        if name in found:
            print(f"{name}: {found[name]['verdict']} (has run)", flush=True)
            continue
        began = time.monotonic()
        one = CLAIMS[name](bench)
        minutes = (time.monotonic() - began) / 60
        machine = {"date": str(datetime.date.today()), "machine": platform.machine(), "cores": os.cpu_count()}
        size = {key: getattr(bench, key) for key in ("base", "rows", "asked", "items", "texts")}
        found[name] = {**vars(one), "says": CLAIMS[name].__doc__, "minutes": minutes, **machine, **size}
        made = bench.folder / "claims.json.making"
        made.write_text(json.dumps(found, indent=2, default=float) + "\n")
        made.replace(bench.folder / "claims.json")
        print(f"{name}: {one.verdict}: {one.reading}  ({minutes:.1f} minutes)", flush=True)


def read_results(folder: Path) -> dict[str, Any]:
    """What has run."""
    place = folder / "claims.json"
    return dict(json.loads(place.read_text())) if place.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all when none is named")
    parser.add_argument("--data", type=Path, help="folder of the data sets, as in docs/data.md")
    parser.add_argument("--folder", type=Path, required=True, help="where recipes, runs and results go")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=160, help="training rows of each task")
    parser.add_argument("--asked", type=int, default=64, help="questions that the model answers itself")
    parser.add_argument("--items", type=int, default=120, help="items of each choice probe")
    parser.add_argument("--texts", type=int, default=40, help="texts of C4")
    parser.add_argument("--characters", type=int, default=800, help="at which texts are cut")
    parser.add_argument("--smoke", action="store_true", help="a random model and few rows; the verdicts mean nothing")
    parser.add_argument("--page", type=Path, help="write the page of what has run, and run nothing")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args()
    unknown = sorted(set(given.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"no claim {unknown[0]!r}; there are: {', '.join(CLAIMS)}")
    if given.list:
        found = read_results(given.folder)
        for name, one in CLAIMS.items():
            print(f"{name:<14} {found[name]['verdict'] if name in found else 'not run':<10} {one.__doc__}")
        return
    if given.page:
        from benchmarks.claims_page import write_page

        write_page(read_results(given.folder), {name: str(one.__doc__) for name, one in CLAIMS.items()}, given.page)
        return
    if given.data is None:
        parser.error("--data is needed to run claims")
    names = given.claims or list(CLAIMS)
    if given.smoke:
        bench = Bench(given.data, given.folder, "tiny-random", "float32", 16, 8, 20, 8, 300)
        names = [one for one in names if one not in NEEDS_ABILITY]
        print(f"smoke: a random model; left out: {', '.join(NEEDS_ABILITY)}", flush=True)
    else:
        sizes = (given.rows, given.asked, given.items, given.texts, given.characters)
        bench = Bench(given.data, given.folder, given.base, given.dtype, *sizes)
    measure(bench, names)


if __name__ == "__main__":
    main()
