"""A ledger made in the test: a base, round 1 promoted, 2-plain held after a rescue, 2-protected promoted."""

from collections.abc import Iterable, Mapping
from typing import Any

from evertune.hashing import digest_json
from evertune.ledger import GENESIS, Event

NEW_YEAR = 1_767_225_600.0  # 2026-01-01 00:00 UTC

# Scores by checkpoint, in the order of PROBES.
PROBES = ("copying", "knowledge", "prose", "cards", "routing", "arc")
SCORES = {
    "base": (0.90, 0.60, 1.190, 0.00, 0.05, 0.31),
    "1/1-sft": (0.91, 0.61, 1.195, 0.96, 0.05, 0.31),
    "2-plain/1-sft": (0.42, 0.52, 1.262, 0.11, 0.77, 0.29),
    "2-plain/rescue-0.4": (0.84, 0.60, 1.204, 0.71, 0.40, 0.30),
    "2-protected/1-sft": (0.92, 0.60, 1.197, 0.95, 0.76, 0.31),
}
KINDS = {"knowledge": "choice", "prose": "bits_per_byte", "arc": "lm_eval"}
ROLES = {"routing": "watch", "arc": "watch"}
MARGINS = {"prose": 0.05}
ITEMS = {"copying": 60, "knowledge": 200, "prose": 40, "cards": 100, "routing": 100, "arc": 400}


def story() -> list[Event]:
    """All events of the finished run."""
    return chain(facts())


def chain(facts: Iterable[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]) -> list[Event]:
    """(kind, key, body, volatile) as events, numbered and chained like the ledger does."""
    events: list[Event] = []
    prev = GENESIS
    for seq, (kind, key, body, volatile) in enumerate(facts, start=1):
        fields: dict[str, Any] = {
            "seq": seq,
            "kind": kind,
            "key": key,
            "body": dict(body),
            "volatile": {"time": NEW_YEAR + 60.0 * seq, **volatile},
            "prev": prev,
        }
        prev = digest_json(fields)
        events.append(Event(**fields, hash=prev))
    return events


def facts() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(kind, key, body, volatile) of every event, in order."""
    found = [("run", "run", run_body(), {"cpus": 2}), *scored("base", checkpoint("base", None, stage="base"))]
    found += scored("1/1-sft", checkpoint("1/1-sft", "1", start="base", replay=0.3), seconds=268.8)
    found.append(("verdict", "v1", verdict("1", "1/1-sft", "base", "PROMOTE", target="cards"), {}))
    found += promoted("1", "1/1-sft")
    found += scored("2-plain/1-sft", checkpoint("2-plain/1-sft", "2-plain", start="1/1-sft"), seconds=126.5)
    found.append(("verdict", "v2", verdict("2-plain", "2-plain/1-sft", "1/1-sft", "HOLD", target="routing"), {}))
    rescued = checkpoint("2-plain/rescue-0.4", "2-plain", start="1/1-sft", stage="interpolate")
    found += scored("2-plain/rescue-0.4", rescued)
    found.append(("rescue", "r2", rescue("2-plain", "2-plain/rescue-0.4", "1/1-sft", "HOLD"), {}))
    found.append(("settled", "v2", {"round": "2-plain", "decision": "HOLD", "champion": "1/1-sft"}, {}))
    protected = checkpoint("2-protected/1-sft", "2-protected", start="1/1-sft", replay=0.2, stage_seed=1)
    found += scored("2-protected/1-sft", protected, seconds=243.0)
    last = verdict("2-protected", "2-protected/1-sft", "1/1-sft", "PROMOTE", target="routing")
    return [*found, ("verdict", "v3", last, {}), *promoted("2-protected", "2-protected/1-sft")]


def run_body() -> dict[str, Any]:
    return {
        "name": "northwind",
        "recipe_digest": digest_json("recipe"),
        "recipe": {
            "evertune": 1,
            "name": "northwind",
            "workspace": "runs/northwind",
            "base": "smollm2-135m",
            "seed": 13,
            "rounds": ["1", "2"],
        },
        "versions": {"evertune": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "machine": {"machine": "x86_64", "system": "Linux", "cpus": 2},
        "round_names": ["1", "2-plain", "2-protected"],
        "seed": 13,
    }


def checkpoint(
    label: str,
    round_name: str | None,
    *,
    start: str | None = None,
    stage: str = "sft",
    replay: float | None = None,
    stage_seed: int = 0,
) -> dict[str, Any]:
    """Body of a checkpoint event; a trained one has losses, drift, data and, with a share, replay and an anchor."""
    trained = stage == "sft"
    source = "cards" if round_name == "1" else "routing"
    layers = {f"model.layers.{i}": 0.002 + 0.0003 * ((i * 7 + stage_seed) % 9) for i in range(30)}
    body: dict[str, Any] = {
        "digest": digest_json(label),
        "object": digest_json([label]),
        "label": label,
        "round": round_name,
        "stage_index": 0 if trained else None,
        "stage": stage,
        "standing": "production",
        "methods": ["wise_ft"] if stage == "interpolate" else [],
        "form": "model",
        "stands_on": None,
        "start": digest_json(start) if start else None,
        "settings": {"lr": 1e-4, "epochs": 1.0, "seed": 13} if trained else {},
        "data": [],
        "replay": None,
        "anchor": None,
        "steps": 0,
        "new_rows": 0,
        "replay_rows": 0,
        "tokens": 0,
        "counted_tokens": 0,
        "losses": [],
        "final": {},
        "bytes": 272_592_002,
        "drift": None,
        "interference": None,
    }
    if trained:
        body |= {
            "data": [
                {
                    "source": source,
                    "sha256": digest_json(source),
                    "rows": 200,
                    "dropped_long": 3,
                    "removed": {"leaks": {"arithmetic": 2}, "bad": 1},
                    "tokens": 12000,
                }
            ],
            "steps": 35,
            "new_rows": 200,
            "tokens": 12000,
            "counted_tokens": 3400,
            "losses": [[step, 3.2 * 0.86**step + 0.03 * (step % 4)] for step in range(1, 36)],
            "final": {"loss": 0.043},
            "drift": {"to_start": 0.0029, "to_base": 0.0031, "layers": {"model.embed_tokens": 0.0033, **layers}},
        }
    if replay:
        body |= {
            "replay": {
                "share_asked": replay,
                "share_done": replay - 0.004,
                "rows": 80,
                "pool_rows": 140,
                "removed_duplicates": 6,
                "sources": {"general": 50, "history/1/cards": 30},
                "sha256": {"general": "1" * 64, "history/1/cards": "2" * 64},
            },
            "anchor": {"kl": 0.1, "to": "start", "on": "replay", "direction": "forward", "cache": "off"},
            "methods": ["replay", "dedup", "anchored_sft_kl"],
            "replay_rows": 80,
            "tokens": 16000,
            "final": {"loss": 0.051, "kl": 0.47},
            "interference": {"start": 0.095, "end": -0.139},
        }
    return body


def scored(
    label: str, body: dict[str, Any], *, seconds: float | None = None
) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """A checkpoint and its row of the matrix."""
    volatile = {} if seconds is None else {"seconds": seconds, "tokens_per_second": body["tokens"] / seconds}
    probes = [("probe", f"{label}/{name}", probe(label, name), {}) for name in PROBES]
    return [("checkpoint", label, body, volatile), *probes]


def probe(label: str, name: str) -> dict[str, Any]:
    value = SCORES[label][PROBES.index(name)]
    speaks = name not in KINDS
    return {
        "checkpoint": digest_json(label),
        "label": label,
        "probe": name,
        "kind": KINDS.get(name, "generate"),
        "role": ROLES.get(name, "guard"),
        "safety": False,
        "items_digest": digest_json(name),
        "template_digest": digest_json("template"),
        "n": ITEMS[name],
        "clusters": ITEMS[name],
        "value": value,
        "direction": "lower" if name == "prose" else "higher",
        "ci90": [max(0.0, value - 0.04), value + 0.04],
        "chance": 0.25 if name == "knowledge" else None,
        "format_validity": 0.99 if speaks else None,
        "stop_rate": 0.04 if speaks and label == "base" else 0.98 if speaks else None,
    }


def verdict(round_name: str, label: str, champion: str, decision: str, *, target: str) -> dict[str, Any]:
    probes = [evidence(name, label, champion, target=target) for name in PROBES]
    probes += [evidence(name, label, champion, target=target, form=True) for name in ("copying", "cards")]
    harmed = [one["reason"] for one in probes if one["outcome"] == "harm"]
    guards = [one for one in probes if one["role"] == "guard"]
    pooled = {**guards[0], "probe": "all guards", "kind": "pooled", "outcome": "pass" if not harmed else "undecided"}
    return {
        "round": round_name,
        "label": label,
        "candidate": digest_json(label),
        "champion": digest_json(champion),
        "champion_label": champion,
        "decision": decision,
        "reasons": harmed or [f"{len(guards)} of {len(guards)} guards kept within their margins."],
        "settings": {"alpha": 0.05},
        "pooled": pooled,
        "probes": probes,
        "flips": {"cards": [flip(i) for i in range(5)], "prose": []},
        "tried": 1,
    }


def rescue(round_name: str, label: str, champion: str, decision: str) -> dict[str, Any]:
    start, end = SCORES["1/1-sft"], SCORES["2-plain/1-sft"]
    scan = [
        {
            "alpha": alpha,
            "values": {name: a + alpha * (b - a) for name, a, b in zip(PROBES, start, end, strict=True)},
            "passes": False,
        }
        for alpha in (0.7, 0.4, 0.2)
    ]
    body = verdict(round_name, label, champion, decision, target="routing")
    return {**body, "tried": 3, "rung": "interpolate", "alpha": 0.4, "scan": scan}


def evidence(name: str, label: str, champion: str, *, target: str, form: bool = False) -> dict[str, Any]:
    """One comparison; a guard that fell by more than its margin is harmed."""
    before, after = (SCORES[one][PROBES.index(name)] for one in (champion, label))
    difference = (before - after) / before if name == "prose" else after - before
    role = "form" if form else "target" if name == target else "watch" if name in ("routing", "arc") else "guard"
    if form:
        before, after, difference = 0.99, 0.99, 0.0
    margin = MARGINS.get(name, 0.06)
    outcome = "watch" if role == "watch" else "harm" if difference < -margin else "pass"
    return {
        "probe": f"{name} (format)" if form else name,
        "role": role,
        "safety": False,
        "kind": KINDS.get(name, "generate"),
        "reference": "champion",
        "n": ITEMS[name],
        "clusters": ITEMS[name],
        "before": before,
        "after": after,
        "difference": difference,
        "unit": "percent" if name == "prose" and not form else "points",
        "ci90": [difference - 0.03, difference + 0.03],
        "lower_bound": difference - 0.03,
        "level": 0.05,
        "bootstrap_bound": None,
        "samples": 1,
        "noise_share": 0.0,
        "flip_share": min(1.0, abs(difference) + 0.02),
        "smallest_visible_drop": 0.041,
        "margin": margin if role in ("guard", "form") else None,
        "p_harm": 0.0001 if outcome == "harm" else 0.8,
        "p_holm": None if role == "watch" else 0.0006 if outcome == "harm" else 1.0,
        "outcome": outcome,
        "items_needed": None,
        "reason": f"{name} {100 * difference:+.1f} points (90% interval, {ITEMS[name]} items).",
    }


def flip(i: int) -> dict[str, Any]:
    return {
        "id": f"cards:{i}",
        "prompt": f"Contact card. Elena Becker from Turin writes: please change the address behind my kettle K-{i}52.",
        "expected": f"Becker, Elena / K-{i}52 / Turin",
        "before": f"Becker, Elena / K-{i}52 / Turin",
        "after": "Accounts desk" if i else "I am sorry to hear about your kettle. " * 14,
        "before_score": 1.0,
        "after_score": 0.0,
    }


def promoted(round_name: str, label: str, by: str = "gate") -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    body = {"round": round_name, "label": label, "checkpoint": digest_json(label), "by": by}
    body["reason"] = f"round {round_name} passed the gate"
    settled = {"round": round_name, "decision": "PROMOTE", "champion": label}
    return [("promotion", f"p-{label}", body, {}), ("settled", f"s-{label}", settled, {})]
