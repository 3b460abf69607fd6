"""The one verified door to weights. Nothing else in the package loads a model.

What comes through is local, safetensors only, without code from the folder, has the digest that was asked for, every
tensor present, expected, of the right shape and finite, and a tokenizer that fits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from evertune.errors import CheckpointError, IntegrityError
from evertune.model.adapter import Factors, attach, detach, fold_stack, read_factors
from evertune.model.checkpoint import Checkpoint, describe
from evertune.model.codec import Codec, load_codec
from evertune.workspace import read_manifest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MANIFEST = "MANIFEST.json"
SHOWN = 3


@dataclass
class OpenModel:
    """A model in memory, frozen and in evaluation mode, with what belongs to it.

    model: a transformers causal language model; adapters sit inside its linear layers.
    codec: tokenizer, chat template and stop tokens of the base.
    checkpoint: what was opened.
    device, dtype: of weights and activations.
    """

    model: Any
    codec: Codec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype


def open_model(checkpoint: Checkpoint, *, dtype: str, device: str = "cpu", fold: bool = False) -> OpenModel:
    """Load and verify a checkpoint.

    Args:
        dtype: `bfloat16` or `float32`, of weights and activations.
        device: `cpu`, `cuda` or `auto`.
        fold: add the adapters to the weights, in float32, and cast once at the end: a plain model without adapters.
            Otherwise they are attached as `s0`, `s1`, ..., all active.

    Raises:
        IntegrityError: the files are no longer those that the checkpoint's digest names.
        CheckpointError: the model is not what it should be; names the file or tensor.
    """
    check_digest(checkpoint)
    base = checkpoint.base
    codec = load_codec(base.path)
    stack = [read_factors(adapter.path) for adapter in checkpoint.stack[1:]]
    wanted = DTYPES[dtype]
    model = _load(base.path, torch.float32 if fold and stack else wanted)
    _check_vocabulary(model, codec, base.path)
    if fold and stack:
        _fold(model, stack, wanted, place=str(checkpoint.path))
    else:
        for i, factors in enumerate(stack):
            attach(model, factors, f"s{i}", place=str(checkpoint.stack[i + 1].path))
    check_finite(model, place=str(checkpoint.path))
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if place.type == "cuda":
        # Where torch prefers it, cuDNN's attention makes a plan for each new length: here nearly all lengths are new,
        # and while an answer grows, each token's.
        torch.backends.cuda.enable_cudnn_sdp(False)
    model.to(place)
    model.requires_grad_(False)
    model.eval()
    return OpenModel(model=model, codec=codec, checkpoint=checkpoint, device=place, dtype=wanted)


def open_classifier(folder: Path) -> tuple[Any, Codec]:
    """A model that gives numbers for a text, such as a reward model, in float32 on the CPU, with its tokenizer.

    Raises:
        CheckpointError: the folder is not such a model, or not what it should be; names the file or tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: found no folder, expected a model.", remedy="Check the path.")
    codec = load_codec(folder)
    model = _load(folder, torch.float32, AutoModelForSequenceClassification)
    check_finite(model, place=str(folder))
    model.requires_grad_(False)
    model.eval()
    return model, codec


@contextmanager
def stacked(opened: OpenModel, checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, an open base computes what a stack of adapters over it computes, bit for bit as if opened by itself.

    So that many adapters of one base need its weights once.

    Args:
        opened: the base of the checkpoint's stack, without adapters, not folded.

    Raises:
        IntegrityError: the checkpoint's files have changed.
        CheckpointError: an adapter is not what it should be.
    """
    if checkpoint.base.digest != opened.checkpoint.digest:
        raise AssertionError(f"{checkpoint.path} stands on another base than {opened.checkpoint.path}")
    check_digest(checkpoint)
    names = [f"s{i}" for i in range(len(checkpoint.stack) - 1)]
    try:
        for name, one in zip(names, checkpoint.stack[1:], strict=True):
            attach(opened.model, read_factors(one.path), name, place=str(one.path))
        yield
    finally:
        for name in names:
            detach(opened.model, name)


def check_finite(model: nn.Module, *, place: str) -> None:
    """Raise CheckpointError naming the first tensor, in the model's order, that holds NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{place}: {bad} of {tensor.numel()} values of {name} are NaN or Inf.",
                remedy="Go back to a checkpoint from before; these weights cannot be repaired.",
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. Both come through its least and its greatest value, which are found
    in a twentieth of the time that a truth value for each element takes."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_digest(checkpoint: Checkpoint) -> None:
    """Raise IntegrityError when the files are no longer those that the checkpoint's digest names."""
    for one in checkpoint.stack:
        if (one.path / MANIFEST).is_file():
            _check_sizes(one.path)
    found = describe(checkpoint.path)
    if found.digest != checkpoint.digest:
        raise IntegrityError(
            f"{checkpoint.path}: found checkpoint {found.digest[:12]}, expected {checkpoint.digest[:12]}.",
            remedy="The files, or those of the model it stands on, have changed since they were recorded. Restore "
            "them; `evertune verify` names the file.",
        )


def _check_sizes(folder: Path) -> None:
    for entry in read_manifest(folder).files:
        file = folder / entry.path
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise IntegrityError(
                f"{file}: {found}, the manifest says {entry.size} bytes.", remedy="Run `evertune verify`."
            )


def _load(folder: Path, dtype: torch.dtype, kind: Any = AutoModelForCausalLM) -> Any:
    try:
        with quiet():
            loaded: Any = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported by name, and refused below
                output_loading_info=True,
            )
    except Exception as error:  # whatever a library raises for a malformed folder, the folder is at fault
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot load it: {type(error).__name__}: {reason[:300]}",
            remedy="Check config.json against the weights, or fetch the folder again.",
        ) from error
    model, facts = loaded
    _check_keys(facts, folder)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            raise CheckpointError(f"{folder}: {name} was loaded as {parameter.dtype}, expected {dtype}.")
    return model


def _check_keys(facts: dict[str, Any], folder: Path) -> None:
    for kind, meaning in (
        ("mismatched_keys", "have another shape than config.json says"),
        ("missing_keys", "are missing"),
        ("unexpected_keys", "do not belong to the model"),
    ):
        keys = sorted(_named(key) for key in facts.get(kind) or ())
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise CheckpointError(
                f"{folder}: tensors {meaning}: {', '.join(keys[:SHOWN])}{more}.",
                remedy="Weights and config.json must belong together: fetch or copy the folder again.",
            )
    if facts.get("error_msgs"):
        raise CheckpointError(f"{folder}: {facts['error_msgs'][0]}", remedy="Fetch or copy the folder again.")


def _named(key: Any) -> str:
    """A tensor's name; of a mismatch (name, found shape, expected shape) all three."""
    if isinstance(key, tuple):
        name, found, expected = key
        return f"{name} is {tuple(found)}, expected {tuple(expected)}"
    return str(key)


def _check_vocabulary(model: Any, codec: Codec, folder: Path) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if codec.vocab_size > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {codec.vocab_size} tokens, the model embeds {rows}.",
            remedy="Use the tokenizer that was saved with the model.",
        )


def _fold(model: Any, stack: Sequence[Factors], dtype: torch.dtype, *, place: str) -> None:
    fold_stack(model, stack, place=place)
    for parameter in model.parameters():  # not model.to(dtype): that would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers: what they would say is checked here and raised."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
