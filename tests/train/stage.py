"""A small stage to train in tests: rows of made-up sums, a tiny model, a workspace."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evertune.hashing import digest_file, digest_json
from evertune.model.checkpoint import Checkpoint, describe
from evertune.train.spec import AnchorSpec, RowsRef, SftSpec
from evertune.workspace import Workspace


def write_rows(path: Path, count: int, *, word: str = "plus", seed: int = 0) -> RowsRef:
    """Chats of different lengths; returns where they are."""
    lines = []
    for i in range(count):
        ask = f"{'please ' * ((i + seed) % 3)}{i} {word} {seed}?"
        answer = f"It is {i + seed}{'!' * (i % 4)}"
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return RowsRef(source=path.stem, path=str(path), format="messages", limit=None, digest=digest_file(path))


def make_spec(folder: Path, model: Path, **changes: Any) -> SftSpec:
    """An 8-step LoRA stage with replay; `anchor` may be a dict of AnchorSpec fields without the reference."""
    start = describe(model)
    settings: dict[str, Any] = {
        "label": "round/1-sft",
        "start": start,
        "base": start,
        "new": [write_rows(folder / "new.jsonl", 24)],
        "weights": None,
        "mix": None,
        "replay": [write_rows(folder / "old.jsonl", 12, word="minus", seed=3)],
        "share": 0.25,
        "dedup": True,
        "tune": {"lora": {"rank": 4, "dropout": 0.1, "targets": "all-linear"}},
        "lr": 0.01,
        "epochs": None,
        "steps": 8,
        "schedule": "linear",
        "warmup": 0.1,
        "batch_rows": 4,
        "micro_batch_rows": 2,
        "max_tokens": 256,
        "too_long": "error",
        "weight_decay": 0.01,
        "clip": 1.0,
        "gradient_checkpointing": False,
        "ema_decay": None,
        "save_steps": 50,
        "anchor": None,
        "plugins": [],
        "seed": 7,
        "dtype": "float32",
        "device": os.environ.get("EVERTUNE_TEST_DEVICE", "cpu"),
        "threads": None,
        "track": [],
        **changes,
    }
    if isinstance(settings["anchor"], dict):
        settings["anchor"] = anchor(start, **settings["anchor"])
    spec = SftSpec(key="0" * 64, **settings)
    # A test that changes how the stage is cut up still wants an object of its own.
    return replace(spec, key=digest_json(spec.to_json()))


def write_rounded(model: Path, to: Path) -> Path:
    """The same model in one file, stored in bfloat16."""
    to.mkdir()
    for file in (one for one in model.iterdir() if one.is_file()):
        if file.suffix == ".safetensors":
            narrow = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
            save_file(narrow, to / file.name, {"format": "pt"})
        else:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def anchor(reference: Checkpoint, **changes: Any) -> AnchorSpec:
    fields = {"kl": 0.1, "on": "both", "direction": "forward", "cache": "off", **changes}
    return AnchorSpec(reference=reference, **fields)


def open_workspace(folder: Path) -> Workspace:
    return Workspace.open(folder, create=True)


def published_weights(workspace: Workspace, spec: SftSpec) -> dict[str, torch.Tensor]:
    """All tensors of the published checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(workspace.path(spec.key).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
