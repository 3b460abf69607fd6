"""Small model and adapter folders for the tests, made once and copied, so that a test may break its own copy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evertune.model.adapter import add_adapter, new_parameters, save_new
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.open import open_model


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; a value of `...` removes the key."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_adapter_folder(start: Checkpoint, folder: Path, *, seed: int, rank: int = 3, **options: Any) -> Checkpoint:
    """An adapter over `start` whose factors are random, so that it changes every output."""
    opened = open_model(start, dtype="float32", device="cpu")
    settings: dict[str, Any] = {"alpha": 2.0 * rank, "dropout": 0.0, "targets": "all-linear", **options}
    add_adapter(opened, rank=rank, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    for parameter in new_parameters(opened).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_new(opened, folder, start)
    return describe(folder)
