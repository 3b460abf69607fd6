"""Model folders for the tests of merging: a few tensors of any names and types, without a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evertune.merge.config import MergeConfig
from evertune.merge.engine import Merged, run_merge
from evertune.merge.plan import plan_merge

SHAPES = {
    "model.embed_tokens.weight": (50, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 24),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.up_proj.weight": (40, 24),
    "model.layers.1.norm.weight": (24,),
    "model.norm.weight": (24,),
}


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: Any) -> Path:
    """A model folder of these tensors, in as many files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, **config}))
    return folder


def random_tensors(seed: int, *, dtype: torch.dtype = torch.bfloat16, std: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * std).to(dtype) for name, shape in SHAPES.items()}


def write_family(
    folder: Path, *, experts: int = 3, dtype: torch.dtype = torch.bfloat16, delta: float = 2e-3, **options: Any
) -> Path:
    """A base and experts e0, e1, ... that are the base plus small noise, rounded to `dtype`."""
    base = random_tensors(0, dtype=dtype)
    write_model(folder / "base", base, **options)
    for k in range(experts):
        noise = random_tensors(100 + k, dtype=torch.float32, std=delta)
        moved = {name: (base[name].float() + noise[name]).to(dtype) for name in base}
        write_model(folder / f"e{k}", moved, **options)
    return folder


def configure(method: str, models: Mapping[str, Any], **settings: Any) -> MergeConfig:
    """A configuration; a model is its settings, and its path its name when not given."""
    full = {name: {"path": name, **(one or {})} for name, one in models.items()}
    return MergeConfig.model_validate({"method": method, "models": full, **settings})


def merge(
    folder: Path, out: str, method: str, models: Mapping[str, Any], *, threads: int = 1, **settings: Any
) -> Merged:
    """Merge folders of `folder` into folder/out."""
    plan = plan_merge(configure(method, models, **settings), folder=folder)
    return run_merge(plan, folder / out, threads=threads)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def weights_bytes(folder: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors_of(folder).items()}


def wide(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """A tensor in float64."""
    return tensors_of(folder)[name].double().numpy()
