"""What leaves the workspace: one adapter, or whole weights, with a model card. Never into a folder that holds files."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evertune.errors import CheckpointError
from evertune.hashing import canonical_json
from evertune.model.adapter import Factor, concatenate, read_factors, write_adapter
from evertune.model.card import model_card
from evertune.model.checkpoint import (
    INDEX,
    MODEL_FILES,
    NOTE,
    WEIGHTS,
    Checkpoint,
    describe,
    read_json,
    weight_files,
)
from evertune.model.open import check_finite, is_finite, quiet

MAX_SHARD_BYTES = "5GB"
# Beside what a model computes with: what the tokenizer of an older library reads.
_TOKENIZER_FILES = (*MODEL_FILES[2:], "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


def export_adapter(checkpoint: Checkpoint, out: Path, *, card: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write the whole stack as one PEFT adapter over the base: factors concatenated, exactly the same function.

    Raises:
        CheckpointError: the checkpoint has no adapter, or `out` is not empty.
    """
    if checkpoint.form != "adapter":
        raise CheckpointError(
            f"{checkpoint.path}: whole weights, so there is no adapter to export.", remedy="Export it as a model."
        )
    stack = [read_factors(one.path) for one in checkpoint.stack[1:]]

    def write(folder: Path) -> None:
        write_adapter(concatenate(stack), folder, checkpoint.base)
        text = model_card(checkpoint, relation="adapter", card=card or {})
        (folder / "README.md").write_text(text, encoding="utf-8")

    return _write_once(out, write)


def export_weights(checkpoint: Checkpoint, out: Path, *, card: Mapping[str, Any] | None = None) -> Checkpoint:
    """Write the stack folded into the base's weights: summed in float32, rounded once to the base's dtype.

    Every tensor of the base keeps its name, dtype and file. One file is in memory at a time.

    Raises:
        CheckpointError: `out` is not empty, or an adapter changes a tensor the base does not store.
    """
    stack = [read_factors(one.path) for one in checkpoint.stack[1:]]

    def write(folder: Path) -> None:
        shutil.copyfile(checkpoint.base.path / "config.json", folder / "config.json")
        copy_text_files(checkpoint.base.path, folder)
        _fold_files(checkpoint.base.path, folder, stack)
        (folder / NOTE).write_bytes(canonical_json({"made_of": [one.digest for one in checkpoint.stack]}))
        text = model_card(checkpoint, relation="finetune", card=card or {})
        (folder / "README.md").write_text(text, encoding="utf-8")

    return _write_once(out, write)


def save_dense(model: Any, folder: Path, like: Checkpoint) -> None:
    """Write a whole model's weights and configuration, with the tokenizer and template of `like`'s base.

    Weights are written in the dtype they have in memory.

    Raises:
        CheckpointError: a tensor holds NaN or Inf.
    """
    check_finite(model, place=str(folder))
    with quiet():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    copy_text_files(like.base.path, folder)


def copy_text_files(source: Path, folder: Path) -> None:
    """Copy a model's tokenizer, chat template and stop tokens over those of the folder."""
    for name in ("generation_config.json", *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _fold_files(source: Path, folder: Path, stack: list[dict[str, Factor]]) -> None:
    files = weight_files(source)
    updates: dict[str, list[Factor]] = {}
    stored = [key for file in files for key in _keys(file)]
    for factors in stack:
        for name, factor in factors.items():
            updates.setdefault(_stored_key(name, stored, source), []).append(factor)
    for file in files:
        with safe_open(file, framework="pt") as reader:
            tensors = {key: _folded(reader.get_tensor(key), updates.get(key, []), key) for key in reader.keys()}  # noqa: SIM118
            metadata = reader.metadata()
        save_file(tensors, folder / file.name, metadata=metadata or {"format": "pt"})
    if files != [source / WEIGHTS]:
        (folder / INDEX).write_text(json.dumps(read_json(source / INDEX), indent=2, sort_keys=True) + "\n")


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as reader:
        return list(reader.keys())


def _stored_key(module: str, stored: list[str], source: Path) -> str:
    """The stored name of a module's weight; some models are stored without the outermost part of the name."""
    wanted = f"{module}.weight"
    if wanted in stored:
        return wanted
    found = [key for key in stored if wanted.endswith(f".{key}")]
    if len(found) != 1:
        raise CheckpointError(
            f"{source}: an adapter changes {module}, but no tensor {wanted} is stored.",
            remedy="Export the stack as one adapter instead.",
        )
    return found[0]


def _folded(tensor: Tensor, factors: list[Factor], name: str) -> Tensor:
    if not factors:
        return tensor
    total = tensor.float()
    for factor in factors:
        delta = factor.delta()
        if delta.shape != total.shape:
            raise CheckpointError(
                f"the adapter's update of {name} is {tuple(delta.shape)}, the base's weight {tuple(total.shape)}.",
                remedy="Check that base and adapter belong together.",
            )
        total = total + delta
    folded = total.to(tensor.dtype)
    if not is_finite(folded):
        raise CheckpointError(f"{name} holds NaN or Inf after folding.", remedy="Train the adapter again.")
    return folded.contiguous()


def _write_once(out: Path, write: Callable[[Path], None]) -> Checkpoint:
    """Write beside `out`, check that the result can be described, then rename: a whole export or none."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not an empty folder.", remedy="Give a new folder; nothing is overwritten."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
        describe(temporary)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return describe(out)
