"""Published statements tried again on the 135M model, one by one: the figure, its interval, and whether it holds here.

    python -m benchmarks.claims --data DATA --folder WORK                    all, in the order of CLAIMS
    python -m benchmarks.claims --data DATA --folder WORK replay factors     these
    python -m benchmarks.claims --data DATA --folder WORK --list             what each asks, and what is written of it
    python -m benchmarks.claims --folder WORK --page docs/evidence.md        the page, of the claims that have run

Task A is snips7 (7 commands), task B dbpedia14 (14 kinds of things); ARC-Easy and C4 text stand for general ability.
Everything is trained and probed by `evertune run` on recipes that are left in the folder; each claim's result is
written as soon as it is there, and what has run is not run again. A verdict is read off a 90 % interval over the
probes' items (bootstrap, paired): one seed, so a difference between seeds is not in it, but for the soup of three.

    holds       the interval lies on the side that the statement says
    does not    it lies on the other side
    undecided   it covers the statement's threshold, or there was nothing to lose in the first place
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
RECIPE = """\
evertune: 1
name: {name}
base: {base}
workspace: {name}
seed: {seed}
academic: allow
data:
  commands: {{path: {data}/snips7/train.jsonl, limit: {rows}}}
  topics: {{path: {data}/dbpedia14/train.jsonl, limit: {rows}}}
  general: {{path: {data}/replay_dolly/train.jsonl, limit: {rows}}}
probes:
  commands: {{path: {data}/snips7/test.jsonl, kind: choice, limit: {items}, role: watch}}
  topics: {{path: {data}/dbpedia14/test.jsonl, kind: choice, limit: {items}, role: watch}}
  arc: {{path: {data}/arc_easy/test.jsonl, kind: choice, limit: {items}}}
  c4: {{path: {data}/text_c4/test.jsonl, kind: bits_per_byte, limit: {texts}}}
defaults: {{tune: {{lora: {{rank: 8}}}}, replay: {{share: 0.0}}, anchor: {{kl: 0.0}}}}
# Nothing is promoted, so that every round starts from the base.
gate: {{min_items: 100000}}
rescue: [discard]
numerics: {{threads: 1, dtype: {dtype}}}
rounds:
{rounds}"""


@dataclass(frozen=True)
class Finding:
    """What a claim came to.

    Attributes:
        figure: the number that the statement is about, and its 90 % interval.
        verdict: `holds`, `does not` or `undecided`.
        reading: the figure in words.
        numbers: everything it was made from.
    """

    figure: float
    low: float
    high: float
    verdict: str
    reading: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where recipes are run, and how large."""

    data: Path
    folder: Path
    base: str
    dtype: str
    rows: int
    items: int
    texts: int
    max_tokens: int

    def sft(self, source: str, lr: float = 1e-3, **more: str) -> str:
        """A stage as a line of YAML."""
        rest = "".join(f", {name}: {value}" for name, value in more.items())
        pace = f"epochs: 1, batch_rows: 8, micro_batch_rows: 8, max_tokens: {self.max_tokens}, too_long: drop"
        return f"sft: {{data: [{source}], lr: {lr}, {pace}{rest}}}"

    def run(self, name: str, rounds: Mapping[str, Sequence[str]], *, seed: int = 1) -> "Runs":
        """Run a recipe of these rounds, each from the base, or what is missing of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for title, stages in rounds.items():
            lines += [f"  - name: {title}", "    start: base", "    stages:", *(f"      - {one}" for one in stages)]
        place = self.folder / f"{name}.yaml"
        values = {**vars(self), "name": name, "seed": seed, "rounds": "\n".join(lines) + "\n"}
        place.write_text(RECIPE.format(**{**values, "data": self.data.absolute()}))
        done = subprocess.run([sys.executable, "-m", "evertune", "run", str(place), "--quiet"], check=False)
        if done.returncode not in (0, 2, 4):
            raise SystemExit(f"{place}: evertune ended with {done.returncode}")
        return Runs(self.folder / name)


@dataclass(frozen=True)
class Runs:
    """A finished workspace."""

    place: Path

    def _events(self, kind: str) -> list[dict[str, Any]]:
        from evertune.ledger import Ledger

        return [one.body for one in Ledger.open(self.place / "ledger.sqlite", create=False).events(kind)]

    def scores(self, label: str, probe: str) -> Floats:
        """Item scores, higher is better."""
        from evertune.probe.scores import ItemScores
        from evertune.workspace import Workspace

        digest = [one["digest"] for one in self._events("checkpoint") if one["label"] == label][-1]
        workspace = Workspace.open(self.place, create=False)
        (key,) = [
            one.key
            for one in workspace.manifests()
            if one.kind == "probe"
            and (one.record["probe"]["checkpoint"], one.record["probe"]["probe"]) == (digest, probe)
        ]
        found = ItemScores.read_parquet(workspace.path(key) / "scores.parquet")
        return np.asarray(found.score, dtype=np.float64) * (1.0 if found.direction == "higher" else -1.0)

    def object(self, label: str) -> Path:
        body = [one for one in self._events("checkpoint") if one["label"] == label][-1]
        return self.place / "objects" / str(body["object"])


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], items: int) -> tuple[float, float, float]:
    """A statistic of item indexes and its 90 % percentile interval; resamples where it is not finite count as worst."""
    draw = np.random.default_rng(0)
    values = np.array([statistic(draw.integers(0, items, items)) for _ in range(RESAMPLES)])
    values = np.where(np.isfinite(values), values, -np.inf)
    low, high = np.quantile(values, [0.05, 0.95], method="nearest")
    return statistic(np.arange(items)), float(low), float(high)


def verdict_of(figure: float, low: float, high: float, threshold: float) -> str:
    """The statement says: above the threshold. Where there is no figure, nothing was lost that could be kept."""
    if not np.isfinite(figure):
        return "undecided"
    return "holds" if low > threshold else "does not" if high < threshold else "undecided"


def replay(bench: Bench) -> Finding:
    """Replay of 20 % of task A recovers at least half of what task B makes it lose."""
    first = bench.sft("commands")
    again = bench.sft("topics", replay="{share: 0.2, from: [commands]}")
    runs = bench.run("replay", {"plain": [first, bench.sft("topics")], "replayed": [first, again]})
    learnt, plain = (runs.scores(label, "commands") for label in ("plain/1-sft", "plain/2-sft"))
    kept = runs.scores("replayed/2-sft", "commands")

    def recovered(chosen: NDArray[np.int64]) -> float:
        lost = float((learnt - plain)[chosen].mean())
        return float((kept - plain)[chosen].mean()) / lost if lost > 0 else np.nan

    figure, low, high = bootstrap(recovered, len(learnt))
    numbers = {"learnt": learnt.mean(), "after B": plain.mean(), "after B with replay": kept.mean()}
    gains = {name: float(runs.scores(f"{name}/2-sft", "topics").mean()) for name in ("plain", "replayed")}
    reading = f"lost {100 * (learnt - plain).mean():.1f} points without, {100 * (learnt - kept).mean():.1f} with replay"
    return Finding(figure, low, high, verdict_of(figure, low, high, 0.5), reading, {**numbers, "B": gains})


def general(bench: Bench) -> Finding:
    """One per cent of general text halves the drift on general text."""
    mixed = bench.sft("topics", lr=2e-3, replay="{share: 0.01, from: [general]}")
    runs = bench.run("general", {"plain": [bench.sft("topics", lr=2e-3)], "mixed": [mixed]})
    start, plain, held = (runs.scores(label, "c4") for label in ("base", "plain/1-sft", "mixed/1-sft"))

    def saved(chosen: NDArray[np.int64]) -> float:
        drift = float((start - plain)[chosen].mean())
        return 1.0 - float((start - held)[chosen].mean()) / drift if drift > 0 else np.nan

    figure, low, high = bootstrap(saved, len(start))
    reading = f"bits per byte rose by {(start - plain).mean():.4f} without, {(start - held).mean():.4f} with 1 %"
    numbers = {"base": -start.mean(), "plain": -plain.mean(), "mixed": -held.mean()}
    return Finding(figure, low, high, verdict_of(figure, low, high, 0.5), reading, numbers)


def ranks(bench: Bench) -> Finding:
    """Full fine-tuning gains and loses more than LoRA of rank 64, and that more than rank 8."""
    rounds = {"full": [bench.sft("topics", lr=1e-4, tune="full")]}
    rounds |= {f"rank-{r}": [bench.sft("topics", tune=f"{{lora: {{rank: {r}}}}}")] for r in (64, 8)}
    runs = bench.run("ranks", rounds)
    gains = {name: runs.scores(f"{name}/1-sft", "topics") for name in rounds}
    texts = {name: runs.scores(f"{name}/1-sft", "c4") for name in rounds}
    numbers = {name: {"gain": float(gains[name].mean()), "c4": -float(texts[name].mean())} for name in rounds}

    def least_step(chosen: NDArray[np.int64]) -> float:
        order = ("full", "rank-64", "rank-8")
        means = [float(gains[name][chosen].mean()) for name in order]
        return min(means[0] - means[1], means[1] - means[2])

    figure, low, high = bootstrap(least_step, len(gains["full"]))
    in_order = texts["full"].mean() < texts["rank-64"].mean() < texts["rank-8"].mean()
    reading = f"the smaller of the two steps in gain is {100 * figure:+.1f} points; losses on text "
    reading += "are in that order" if in_order else "are not in that order"
    verdict = verdict_of(figure, low, high, 0.0)
    return Finding(figure, low, high, verdict if in_order or verdict != "holds" else "undecided", reading, numbers)


def interpolation(bench: Bench) -> Finding:
    """Between two tasks lies a model with 90 % of the gain and half of the loss."""
    stages = [bench.sft("commands"), bench.sft("topics")]
    shares = (0.25, 0.5, 0.75)
    rounds = {}
    for share in shares:
        name = f"at-{int(100 * share)}"
        new, old = (f"{{path: {name}/{label}, weight: {weight}}}" for label, weight in _ends(share))
        rounds[name] = [*stages, f"merge: {{method: linear, models: {{new: {new}, old: {old}}}}}"]
    runs = bench.run("interpolation", rounds)
    labels = ["at-25/2-sft", *(f"{name}/3-merge" for name in rounds)]
    learnt, begun = runs.scores("at-25/1-sft", "commands"), runs.scores("at-25/1-sft", "topics")
    old = {label: runs.scores(label, "commands") for label in labels}
    new = {label: runs.scores(label, "topics") for label in labels}

    def best(chosen: NDArray[np.int64]) -> float:
        """The largest share of the loss that is avoided, among those that keep 90 % of the gain."""
        gain = float((new[labels[0]] - begun)[chosen].mean())
        lost = float((learnt - old[labels[0]])[chosen].mean())
        kept = [one for one in labels[1:] if gain > 0 and float((new[one] - begun)[chosen].mean()) >= 0.9 * gain]
        if lost <= 0:
            return np.nan
        return max((1.0 - float((learnt - old[one])[chosen].mean()) / lost for one in kept), default=0.0)

    figure, low, high = bootstrap(best, min(len(learnt), len(begun)))
    numbers = {one: {"A": float(old[one].mean()), "B": float(new[one].mean())} for one in labels}
    reading = f"among those with 90 % of the gain, at most {100 * figure:.0f} % of the loss is avoided"
    return Finding(
        figure, low, high, verdict_of(figure, low, high, 0.5), reading, {"A learnt": learnt.mean(), **numbers}
    )


def _ends(share: float) -> list[tuple[str, float]]:
    return [("2-sft", share), ("1-sft", 1.0 - share)]


def _three(bench: Bench) -> list[Runs]:
    return [bench.run(f"seed-{seed}", {"topics": [bench.sft("topics")]}, seed=seed) for seed in (1, 2, 3)]


def soup(bench: Bench) -> Finding:
    """A soup of three seeds is better than its members are on the mean."""
    members = _three(bench)
    models = ", ".join(f"{'abc'[i]}: {{path: {one.object('topics/1-sft')}}}" for i, one in enumerate(members))
    runs = bench.run("soup", {"soup": [f"merge: {{method: linear, models: {{{models}}}}}"]})
    own = np.mean([one.scores("topics/1-sft", "topics") for one in members], axis=0)
    mixed = runs.scores("soup/1-merge", "topics")
    figure, low, high = bootstrap(lambda chosen: float((mixed - own)[chosen].mean()), len(own))
    reading = f"the soup has {100 * mixed.mean():.1f}, its members {100 * own.mean():.1f} on the mean"
    return Finding(
        figure, low, high, verdict_of(figure, low, high, 0.0), reading, {"soup": mixed.mean(), "members": own.mean()}
    )


def factors(bench: Bench) -> Finding:
    """The mean of B times the mean of A is not the mean of B A: off by ten per cent and more."""
    from evertune.federated.aggregation import aggregation_error, mean_of_factors
    from evertune.model.adapter import read_factors

    updates = [read_factors(one.object("topics/1-sft")) for one in _three(bench)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    halves = [0.5, 0.5]
    errors = [
        aggregation_error(mean_of_factors(two, halves).factors, two, halves)
        for two in ([updates[i], updates[j]] for i, j in pairs)
    ]
    thirds = [1 / 3] * 3
    figure = aggregation_error(mean_of_factors(updates, thirds).factors, updates, thirds)
    low, high = min([figure, *errors]), max([figure, *errors])
    reading = f"off by {100 * figure:.0f} % of the mean's norm for three clients"
    numbers = {"three": figure, "pairs": errors, "interval": "the range over three and all pairs"}
    return Finding(figure, low, high, verdict_of(figure, low, high, 0.1), reading, numbers)


CLAIMS: Mapping[str, Callable[[Bench], Finding]] = {
    "factors": factors,
    "replay": replay,
    "soup": soup,
    "interpolation": interpolation,
    "general": general,
    "ranks": ranks,
}
NOT_WRITTEN = {
    "pace": "drop grows with learning rate and epochs at matched gain",
    "kl": "KL on new-task prompts predicts the general drop better than weight distance",
    "barrier": "the linear path between siblings has no barrier, between strangers it has",
    "self-sft": "refreshed self-SFT drops less than SFT on a teacher's answers",
}


def measure(bench: Bench, names: Sequence[str]) -> None:
    """Run the claims that have no result yet; each is written down when it is there."""
    place = bench.folder / "claims.json"
    found = json.loads(place.read_text()) if place.is_file() else {}
    for name in names:
        if name in found:
            print(f"{name}: {found[name]['verdict']} (has run)")
            continue
        one = CLAIMS[name](bench)
        machine = {"date": str(datetime.date.today()), "machine": platform.machine(), "cores": os.cpu_count()}
        size = {"base": bench.base, "rows": bench.rows, "items": bench.items}
        found[name] = {**vars(one), "says": CLAIMS[name].__doc__, **machine, **size}
        place.write_text(json.dumps(found, indent=2, default=float) + "\n")
        print(f"{name}: {one.verdict}: {one.reading}")


def page_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from results alone; a bar is the interval, a mark the figure."""
    lines = [
        "# Evidence",
        "",
        "Published statements, tried again with `python -m benchmarks.claims` (its head says how a verdict is read).",
        "Each is one small model, one seed unless it says otherwise, and few items: what does not hold here may hold",
        "elsewhere.",
        "",
        "| statement | figure | 90 % | verdict | reading |",
        "|---|---|---|---|---|",
    ]
    for one in found.values():
        is_there = np.isfinite([one["figure"], one["low"], one["high"]]).all()
        figure = f"{one['figure']:.2f} | {one['low']:.2f} to {one['high']:.2f}" if is_there else "none | none"
        lines.append(f"| {one['says']} | {figure} | **{one['verdict']}** | {one['reading']} |")
    lines += ["", "```text"]
    for name, one in found.items():
        lines.append(f"{name:<14} |{_bar(one['low'], one['high'], one['figure'])}|")
    lines += [f"{'':<14}  {'-1':<20}{'0':^20}{'1':>20}", "```", ""]
    rest = [f"{name} ({CLAIMS[name].__doc__})" for name in CLAIMS if name not in found]
    if rest:
        lines += ["Written and not run yet: " + "; ".join(rest), ""]
    lines += ["Not written yet: " + "; ".join(f"{name} ({says})" for name, says in NOT_WRITTEN.items()) + ".", ""]
    runs = sorted({f"{one['date']}, {one['base']}, {one['rows']} rows, {one['items']} items" for one in found.values()})
    lines += ["Run: " + "; ".join(runs) + "."] if runs else []
    return "\n".join(lines) + "\n"


def _bar(low: float, high: float, figure: float, width: int = 61) -> str:
    def place(value: float) -> int:
        return round((min(max(value, -1.0), 1.0) + 1.0) / 2.0 * (width - 1))

    cells = [" "] * width
    if not np.isfinite([low, high, figure]).all():
        return "".join(cells)
    cells[width // 2] = ":"
    for i in range(place(low), place(high) + 1):
        cells[i] = "-"
    cells[place(figure)] = "o"
    return "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=f"of {', '.join(CLAIMS)}; all when none is named")
    parser.add_argument("--data", type=Path, help="folder of the data sets, as in docs/data.md")
    parser.add_argument("--folder", type=Path, required=True, help="where recipes, runs and results go")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=160, help="training rows of each task")
    parser.add_argument("--items", type=int, default=100, help="items of each choice probe")
    parser.add_argument("--texts", type=int, default=40, help="texts of C4")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--page", type=Path, help="write the page of what has run, and run nothing")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args()
    unknown = sorted(set(given.claims) - set(CLAIMS))
    if unknown:
        parser.error(f"no claim {unknown[0]!r}; there are: {', '.join(CLAIMS)}")
    place = given.folder / "claims.json"
    found = json.loads(place.read_text()) if place.is_file() else {}
    if given.list:
        for name, one in CLAIMS.items():
            print(f"{name:<14} {found[name]['verdict'] if name in found else 'not run':<10} {one.__doc__}")
        return
    if given.page:
        given.page.write_text(page_of(found))
        return
    if given.data is None:
        parser.error("--data is needed to run claims")
    bench = Bench(
        given.data, given.folder, given.base, given.dtype, given.rows, given.items, given.texts, given.max_tokens
    )
    measure(bench, given.claims or list(CLAIMS))


if __name__ == "__main__":
    main()
