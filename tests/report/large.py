"""A long and wide run: as many rounds and probes as asked for, every seventh round held after a rescue."""

import math
from typing import Any

from evertune.hashing import digest_json
from evertune.ledger import Event
from tests.report import story


def large_story(rounds: int, probes: int) -> list[Event]:
    """Events of a run in which round k teaches probe k (as long as there are probes)."""
    names = [f"capability-{j:02d}" for j in range(probes)]
    labels = [f"2026-{k + 1:02d}/1-sft" for k in range(rounds)]
    body = story.run_body()
    body["round_names"] = [label.split("/")[0] for label in labels]
    found: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [("run", "run", body, {})]
    found += _scored("base", story.checkpoint("base", None, stage="base"), names, -1)
    champion = "base"
    for k, label in enumerate(labels):
        name = label.split("/")[0]
        made = story.checkpoint(label, name, start=champion, replay=0.2, stage_seed=k)
        made["data"][0] |= {"source": f"batch-{k:02d}", "sha256": digest_json(k)}
        found += _scored(label, made, names, k, seconds=100.0)
        is_held = k % 7 == 6
        found.append(("verdict", label, _verdict(name, label, champion, names, k, is_held=is_held), {}))
        if is_held:
            rescued = f"{name}/rescue-0.4"
            middle = story.checkpoint(rescued, name, start=champion, stage="interpolate")
            found += _scored(rescued, middle, names, k)
            values = dict.fromkeys(names, 0.5)
            scan = [{"alpha": alpha, "values": values, "passes": False} for alpha in (0.7, 0.4)]
            tried = _verdict(name, rescued, champion, names, k, is_held=True)
            found.append(
                ("rescue", rescued, {**tried, "tried": 2, "rung": "interpolate", "alpha": 0.4, "scan": scan}, {})
            )
            found.append(("settled", label, {"round": name, "decision": "HOLD", "champion": champion}, {}))
        else:
            found += story.promoted(name, label)
            champion = label
    return story.chain(found)


def _value(j: int, k: int) -> float:
    """Probe j after round k: near 0.2 until round j teaches it, near 0.9 after, slowly worse."""
    return 0.2 if k < j else max(0.3, 0.9 - 0.004 * (k - j)) + 0.01 * math.sin(3 * k + j)


def _scored(
    label: str, body: dict[str, Any], names: list[str], k: int, *, seconds: float | None = None
) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    volatile = {} if seconds is None else {"seconds": seconds, "tokens_per_second": 100.0}
    rows = []
    for j, name in enumerate(names):
        value = _value(j, k)
        facts = {"label": label, "checkpoint": digest_json(label), "probe": name, "value": value}
        base = {**story.probe("base", "knowledge"), **facts, "ci90": [max(0.0, value - 0.03), value + 0.03]}
        rows.append(("probe", f"{label}/{name}", base, {}))
    return [("checkpoint", label, body, volatile), *rows]


def _verdict(name: str, label: str, champion: str, names: list[str], k: int, *, is_held: bool) -> dict[str, Any]:
    body = story.verdict("1", "1/1-sft", "base", "HOLD" if is_held else "PROMOTE", target="cards")
    rows = []
    for j, probe in enumerate(names):
        difference = _value(j, k) - _value(j, k - 1) - (0.2 if is_held and j == 0 else 0.0)
        one = story.evidence("knowledge", "1/1-sft", "base", target="cards")
        role = "target" if j == k else "guard" if j < k or j > len(names) // 2 else "watch"
        outcome = "watch" if role == "watch" else "harm" if difference < -0.06 else "pass"
        ci90 = [difference - 0.03, difference + 0.03]
        rows.append({**one, "probe": probe, "role": role, "difference": difference, "outcome": outcome, "ci90": ci90})
    harmed = [f"{one['probe']} fell." for one in rows if one["outcome"] == "harm"]
    names_of = {"round": name, "label": label, "champion_label": champion}
    return {**body, **names_of, "probes": rows, "reasons": harmed or ["All kept."], "flips": {}}
