"""How much replay: pilots of one stage at several shares, the weaker half dropped at each rung, the curve at the end.

A pilot is the recipe's own round with one stage, the first rows of each source, another share, and the recipe's own
probes; it is judged like any candidate, against the checkpoint it starts from. Successive halving (Jamieson and
Talwalkar 2016, arXiv:1502.07943): all shares run on a quarter of the rows, the better half on half of them, the best
on all. Better is: retention within the pooled margin first, then the gain on the targets.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evertune.display import Display
from evertune.errors import RecipeError
from evertune.lineage import current_events, find_checkpoint, open_workspace
from evertune.recipe.load import LoadedRecipe, load_recipe
from evertune.recipe.presets import resolve_sft
from evertune.run import run_recipe
from evertune.workspace import Workspace

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3)
ROWS = 400
RUNGS = 3


@dataclass(frozen=True)
class Pilot:
    """What one share did.

    Attributes:
        share: replayed share of the stream.
        rung, rows: how far it got: 1 is the first; rows of each source that it trained on.
        retention, gain: mean change over all guards and over the targets, in score units, better is positive; None
            where the round has no guard in [0, 1], or no target.
        retention_ci90, gain_ci90: two-sided.
        is_kept: no guard fell by more than its margin, as far as was seen.
    """

    share: float
    rung: int
    rows: int
    steps: int
    retention: float | None
    retention_ci90: tuple[float, float] | None
    gain: float | None
    gain_ci90: tuple[float, float] | None
    is_kept: bool

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Larger is better."""
        gain, retention = self.gain or 0.0, self.retention or 0.0
        return (True, gain, retention) if self.is_kept else (False, retention, gain)


@dataclass(frozen=True)
class Advice:
    """The curve: each share at the furthest rung that it reached, and the pick among those that reached the last."""

    round: str
    stage: int
    pilots: list[Pilot]
    pick: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "pilots": [one.__dict__ for one in self.pilots]}


def advise_replay(
    loaded: LoadedRecipe,
    *,
    round_name: str | None = None,
    shares: Sequence[float] = SHARES,
    rows: int = ROWS,
    say: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Run the pilots, or those of them that have not run yet, beside the recipe's workspace.

    Args:
        round_name: the round to try; the first that has not been settled, else the last.
        shares: at least two, each in [0, 1).
        rows: of each source, at the last rung.

    Raises:
        RecipeError: no such round, nothing to replay in it, or shares that are no shares.
    """
    if len(set(shares)) < 2 or not all(0.0 <= one < 1.0 for one in shares):
        raise RecipeError(f"found the shares {', '.join(map(str, shares))}, expected two or more from 0 to below 1.")
    base = _Base.of(loaded, round_name)
    best: dict[float, Pilot] = {}
    running = sorted(set(shares))
    rungs = min(RUNGS, max(1, math.ceil(math.log2(len(running)))))
    for rung in range(1, rungs + 1):
        amount = max(1, rows // 2 ** (rungs - rung))
        listed = ", ".join(f"{one:g}" for one in running)
        say(f"rung {rung} of {rungs}: {amount} rows of each source at the shares {listed}")
        for share in running:
            best[share] = _run(base, share, rung, amount)
            say(f"  {_line(best[share])}")
        running = sorted(sorted(running, key=lambda one: best[one].rank, reverse=True)[: max(2, len(running) // 2)])
    last = [best[share] for share in running if best[share].rung == rungs]
    pick = max(last, key=lambda one: one.rank)
    advice = Advice(base.name, base.stage, [best[one] for one in sorted(best)], pick.share, _reason(pick, last))
    place = base.pilots / "advice.json"
    place.write_text(json.dumps(advice.to_json(), indent=2) + "\n", encoding="utf-8")
    return advice


@dataclass(frozen=True)
class _Base:
    """What all pilots have in common."""

    loaded: LoadedRecipe
    name: str
    index: int
    stage: int
    start: str
    history: list[dict[str, str]]
    pilots: Path

    @classmethod
    def of(cls, loaded: LoadedRecipe, round_name: str | None) -> "_Base":
        recipe = loaded.recipe
        workspace = loaded.resolve(recipe.workspace)
        settled: list[str] = []
        start, history = "base", []
        if (workspace / "ledger.sqlite").is_file():
            opened = open_workspace(workspace)
            settled = [one.body["round"] for one in opened.ledger.events("settled")]
            start = str(find_checkpoint(opened, None)[1].path)
            history = _history_sources(opened.workspace)
        names = [one.name for one in recipe.rounds]
        name = round_name or next((one for one in names if one not in settled), names[-1])
        if name not in names:
            raise RecipeError(f"no round '{name}' in {loaded.path}; it has: {', '.join(names)}.")
        index = names.index(name)
        stages = [i for i, stage in enumerate(recipe.rounds[index].stages) if stage.sft is not None]
        if not stages:
            raise RecipeError(f"round '{name}' has no sft stage to try shares on.")
        return cls(loaded, name, index, stages[0], start, history, workspace / "pilots")


def _history_sources(workspace: Workspace) -> list[dict[str, str]]:
    """The rows of promoted rounds as sources of a pilot."""
    found = []
    for manifest in workspace.manifests():
        if manifest.kind == "history":
            for name, format in manifest.record["formats"].items():
                path = workspace.path(manifest.key) / f"{name}.jsonl"
                found.append({"path": str(path), "format": format})
    return found


def _run(base: _Base, share: float, rung: int, rows: int) -> Pilot:
    """One pilot: its own recipe, in its own workspace, so that an interrupted series goes on where it stopped."""
    place = base.pilots / base.name / f"rung-{rung}-share-{share:g}"
    loaded = load_recipe(base.loaded.path, overrides=_overrides(base, share, rows, place))
    run_recipe(loaded, display=Display(quiet=True))
    events = current_events(open_workspace(place).ledger)
    verdict = [one.body for one in events if one.kind == "verdict"][-1]
    made = [one.body for one in events if one.kind == "checkpoint"][-1]
    pooled = verdict["pooled"]
    targets = [one for one in verdict["probes"] if one["role"] == "target" and one["reference"] == "champion"]
    guards = [one for one in verdict["probes"] if one["margin"] is not None and one["reference"] == "champion"]
    gain = sum(one["difference"] for one in targets) / len(targets) if targets else None
    return Pilot(
        share=share,
        rung=rung,
        rows=rows,
        steps=made["steps"],
        retention=pooled["difference"] if pooled else None,
        retention_ci90=tuple(pooled["ci90"]) if pooled else None,
        gain=gain,
        gain_ci90=_mean_interval(targets),
        is_kept=all(one["difference"] >= -one["margin"] for one in [*guards, *([pooled] if pooled else [])]),
    )


def _mean_interval(targets: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """The interval of a mean of independent probes: half widths add up in squares."""
    if not targets:
        return None
    middle = sum(one["difference"] for one in targets) / len(targets)
    low = math.sqrt(sum((one["difference"] - one["ci90"][0]) ** 2 for one in targets)) / len(targets)
    high = math.sqrt(sum((one["ci90"][1] - one["difference"]) ** 2 for one in targets)) / len(targets)
    return middle - low, middle + high


def _overrides(base: _Base, share: float, rows: int, place: Path) -> list[str]:
    recipe = base.loaded.recipe
    one = recipe.rounds[base.index]
    stage = one.stages[base.stage].sft
    assert stage is not None, "chosen as an sft stage"
    settings = resolve_sft(recipe, stage)
    named = [name for name in settings.replay.sources if name != "history"]
    overrides = [f"workspace={json.dumps(str(place))}", "rescue=[discard]"]
    if "history" in settings.replay.sources:
        for i, kept in enumerate(base.history):
            overrides.append(f"data.pilot-history-{i}={json.dumps(kept)}")
            named.append(f"pilot-history-{i}")
    if not named:
        raise RecipeError(
            f"round '{base.name}' has nothing to replay: 'history' is empty before a round is promoted.",
            remedy="Name a source in 'replay.from'.",
        )
    body: dict[str, Any] = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    sft = body["stages"][base.stage]["sft"]
    if sft.pop("steps", None) is not None or sft.get("epochs") is None:
        sft["epochs"] = settings.epochs or 1.0
    replay = settings.replay.model_dump(mode="json", by_alias=True)
    # A share that rose on the way would be another than the one that is tried.
    sft["replay"] = {**replay, "share": share, "from": named, "adapt": None}
    body |= {"start": base.start, "stages": [{"sft": sft}]}
    body.pop("rescue", None)
    overrides.append(f"rounds={json.dumps([body])}")
    for name, source in recipe.data.items():
        overrides.append(f"data.{name}.limit={min(rows, source.limit or rows)}")
    return overrides


def _reason(pick: Pilot, last: Sequence[Pilot]) -> str:
    if not pick.is_kept:
        return "no share kept every guard within its margin: this one lost least. Try larger shares or a lower rate."
    others = [one for one in last if one is not pick and one.is_kept]
    if pick.gain is not None and pick.gain_ci90 is not None and others:
        rival = max(others, key=lambda one: one.rank)
        if rival.gain is not None and pick.gain_ci90[0] <= rival.gain <= pick.gain_ci90[1]:
            return (
                f"it kept every guard and gained most, but {rival.share:g} lies within its interval: too close to call."
            )
    return "it kept every guard within its margin and gained most."


def _line(one: Pilot) -> str:
    def shown(value: float | None, interval: tuple[float, float] | None) -> str:
        if value is None or interval is None:
            return f"{'-':>24}"
        return f"{100 * value:>+7.1f} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})".ljust(24)

    kept = "" if one.is_kept else "  a guard fell by more than its margin"
    return (
        f"share {one.share:<5g} retention {shown(one.retention, one.retention_ci90)}  "
        f"gain {shown(one.gain, one.gain_ci90)}  {one.steps} steps{kept}"
    )


def advice_lines(advice: Advice) -> list[str]:
    """The curve for a terminal: retention and gain over shares, in points, with 90 % intervals."""
    lines = [f"round {advice.round}, stage {advice.stage + 1}: change against the start, in points, 90 % intervals"]
    lines += [f"  {_line(one)}" for one in advice.pilots]
    values = [one for pilot in advice.pilots for one in (*(pilot.retention_ci90 or ()), *(pilot.gain_ci90 or ()))]
    low, high = min([0.0, *values]), max([0.0, *values])
    if high > low:
        lines.append("")
        for name in ("retention", "gain"):
            for pilot in advice.pilots:
                value, interval = getattr(pilot, name), getattr(pilot, f"{name}_ci90")
                if value is not None and interval is not None:
                    lines.append(f"  {name:<9} {pilot.share:>5g} |{_bar(low, high, value, interval)}|")
    return [*lines, "", f"pick: share {advice.pick:g}: {advice.reason}"]


def _bar(low: float, high: float, value: float, interval: tuple[float, float], width: int = 60) -> str:
    """An interval with its middle and zero on a line."""

    def place(one: float) -> int:
        return round((one - low) / (high - low) * (width - 1))

    cells = [" "] * width
    cells[place(0.0)] = ":"
    for i in range(place(interval[0]), place(interval[1]) + 1):
        cells[i] = "-"
    cells[place(value)] = "o"
    return "".join(cells)
