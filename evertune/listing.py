"""What `log`, `show`, `export` and `doctor` print: plain values first, then the lines made of them."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evertune.lineage import Opened, checkpoint_events, current_events, find_checkpoint, open_workspace
from evertune.methods import standing_of, used_in, weakest
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.show import describe_for_humans

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers")
EXTRAS = {"eval": "lm_eval", "track": "trackio", "federated": "flwr", "gpu": "liger_kernel"}


def log_lines(body: dict[str, Any]) -> Iterator[str]:
    """The ledger for a person: one line an event, then the champion."""
    for event in body["events"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])) if event["time"] else ""
        yield f"{event['seq']:>4}  {when:<19}  {event['kind']:<10}  {_summary(event['kind'], event['body'])}"
    champion = body["champion"]
    yield ""
    yield f"champion: {champion['label'] if champion else 'base (nothing promoted)'}"


def show_body(place: Path, label: str | None) -> dict[str, Any]:
    """What a checkpoint is, for `evertune show --json`.

    Shape: what `describe_for_humans` says of the folder (`path`, `digest`, `form`, `stack`, `deploy`, ...), and for a
    labelled checkpoint of a workspace also `label`, `round`, `methods`,
    `standing`, `settings`, `data`, `probes`: {name: {value, ci90, n}} and, of a trained one, `final` and perhaps
    `warnings`; of a merged one `merged_from`: of each model the dtype its numbers are stored in, the adapters whose
    factors were read, and whether a merge had rounded it before.
    """
    if not (place / "ledger.sqlite").is_file():
        return describe_for_humans(describe(place))
    opened = open_workspace(place)
    event, checkpoint = find_checkpoint(opened, label)
    shown = ("label", "round", "stage", "methods", "standing", "settings", "data", "replay", "anchor")
    facts = {name: event.body[name] for name in shown}
    facts |= {name: event.body[name] for name in ("final", "warnings") if event.body.get(name)}
    numbers = (event.body.get("merge") or {}).get("numbers") or {}
    facts |= {"merged_from": [{"model": name, **one} for name, one in numbers.items()]} if numbers else {}
    return {**describe_for_humans(checkpoint), **facts, "probes": _probe_values(opened, event.body["digest"])}


def show_lines(body: dict[str, Any]) -> Iterator[str]:
    """The same for a person."""
    for name, value in body.items():
        if name == "probes":
            yield "probes:"
            for probe, one in value.items():
                low, high = one["ci90"]
                yield f"  {probe:<20} {one['value']:.3f}  90% {low:.3f} to {high:.3f}  n {one['n']}"
        elif isinstance(value, list):
            yield f"{name}:"
            yield from (f"  {_flat(item)}" for item in value)
        else:
            yield f"{name}: {_flat(value)}"


def export_checkpoint(place: Path, label: str | None, out: Path, *, form: str) -> None:
    """Write a labelled checkpoint of a workspace as a model folder or as one adapter, with its model card.

    Raises:
        CheckpointError: the folder is not empty, or the checkpoint has no adapter to export.
    """
    from evertune.model.export import export_adapter, export_weights

    opened = open_workspace(place)
    event, checkpoint = find_checkpoint(opened, label)
    checkpoints = [one.body for one in checkpoint_events(opened.ledger)]
    used = used_in(checkpoints, event.body["digest"])
    card = {
        "base_model": _base_model(opened, checkpoint, form),
        "label": event.body["label"],
        "data": [one["source"] for one in event.body["data"]],
        "probes": _probe_values(opened, event.body["digest"]),
        "methods": used,
        "standing": weakest([standing_of(used), event.body["standing"]]),
    }
    export = export_adapter if form == "adapter" else export_weights
    export(checkpoint, out, card=card)


def _base_model(opened: Opened, checkpoint: Checkpoint, form: str) -> str | None:
    """The base as the recipe names it; for an adapter over a checkpoint of this run, that checkpoint's label."""
    labels = {one.body["digest"]: one.body["label"] for one in checkpoint_events(opened.ledger)}
    label = labels.get(checkpoint.base.digest)
    if form == "adapter" and label != "base":
        return str(label) if label else None
    runs = [one.body["recipe"]["base"] for one in current_events(opened.ledger) if one.kind == "run"]
    return str(runs[-1]) if runs else None


def doctor_lines() -> Iterator[str]:
    """What this machine offers, without loading a heavy library."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"cpus {os.cpu_count()}, free disk here {shutil.disk_usage(Path()).free / 1e9:.0f} GB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield f"memory {memory / 1e9:.0f} GB"
    for name in PACKAGES:
        yield f"{name} {importlib.metadata.version(name)}"
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        yield f"extra '{extra}': {'installed' if found else f'not installed (pip install evertune[{extra}])'}"
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    yield f"OMP_WAIT_POLICY {policy or 'not set: evertune sets PASSIVE in its own processes'}"


def _probe_values(opened: Opened, digest: str) -> dict[str, Any]:
    """As the last run asked them; of a checkpoint that it does not stand on, as it was asked then."""
    for events in (current_events(opened.ledger), opened.ledger.events()):
        found = {
            event.body["probe"]: {name: event.body[name] for name in ("value", "ci90", "n", "role")}
            for event in events
            if event.kind == "probe" and event.body["checkpoint"] == digest
        }
        if found:
            return found
    return {}


def _summary(kind: str, body: dict[str, Any]) -> str:
    match kind:
        case "run":
            return f"{body['name']}, recipe {body['recipe_digest'][:12]}"
        case "position":
            return f"recipe {body['recipe_digest'][:12]} stands on {len(body['stands_on'])} events up to here"
        case "checkpoint":
            weak = [one for one in body["methods"] if standing_of([one]) == body["standing"]]
            made = "" if body["standing"] == "production" else f"  {body['standing']}: {', '.join(weak)}"
            return f"{body['label']}  {body['digest'][:12]}  {body['steps']} steps{made}"
        case "probe":
            return f"{body['label']}  {body['probe']} {body['value']:.3f}"
        case "verdict" | "rescue":
            return f"{body['decision']}  {body['label']}  {body['reasons'][0] if body['reasons'] else ''}"
        case "erosion":
            return f"{body['label']}  compared with {', '.join(one['since'] for one in body['against'])}"
        case "consolidation":
            return f"{body['label']}  best of {', '.join(one['way'] for one in body['ways'])}"
        case "look":
            return f"{body['label']}  look {body['number']} at {', '.join(body['probes'])}"
        case "audit":
            kl = ", ".join(f"{one['nats']:.4f} nats on {name} text" for name, one in body["kl"].items())
            return f"{body['label']}  beside {body['reference']}: {kl}"
        case "baseline":
            return f"{body['source']}: " + ", ".join(f"{k} {v['value']:.3f}" for k, v in body["scores"].items())
        case "blame":
            worst = f"{body['sources'][0]['source']} in {body['stage']}" if body["stage"] else "no stage"
            return f"{body['label']}  {body['probe']}: {worst}"
        case "promotion":
            return f"{body['label']} by {body['by']}"
        case "removal":
            return f"{len(body['texts'])} texts, in {len(body['checkpoints'])} checkpoints: {body['reason']}"
        case "rollback":
            return f"to {body['label']}, from {body['from']}"
        case "settled":
            return f"round {body['round']}: {body['decision']}, champion {body['champion']}"
        case _:
            return str(body.get("error", ""))


def _flat(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(_flat(item) for item in value)
    return str(value)
