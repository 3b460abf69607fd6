"""What a checkpoint is, for people: what it holds, what it stands on, what to deploy. Loads no torch."""

import math
import shlex
from typing import Any

from evertune.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, read_json, weight_files
from evertune.model.codec import load_codec
from evertune.model.header import TensorInfo, read_header


def describe_for_humans(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of a checkpoint as plain JSON values.

    Shape: `path`, `digest`, `form`; of the base `architecture`, `parameters`, `dtype`, `layers`, `hidden`,
    `vocabulary`, `tokenizer_tokens`, `chat_template` (`none`, `marks generated text` or `plain`), `stop` (texts),
    `trains_stop`; `stack`: base first, each {digest, form, path, and of an adapter rank, modules, parameters};
    `deploy`: the command or the folder to serve.

    Raises:
        CheckpointError: a file of the base cannot be read.
    """
    base = checkpoint.base
    config = read_json(base.path / "config.json")
    tensors = _tensors(base)
    codec = load_codec(base.path)
    return {
        "path": str(checkpoint.path),
        "digest": checkpoint.digest,
        "form": checkpoint.form,
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "dtype": ", ".join(sorted({tensor.dtype for tensor in tensors.values()})),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "tokenizer_tokens": codec.vocab_size,
        "chat_template": _template(codec),
        "stop": [codec.decode([one], special=True) for one in sorted(codec.stop_ids)],
        "trains_stop": codec.template is not None and codec.trains_stop(),
        "stack": [_layer_of_stack(one) for one in checkpoint.stack],
        "deploy": _deploy(checkpoint),
    }


def _tensors(base: Checkpoint) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file in weight_files(base.path):
        found.update(read_header(file))
    return found


def _template(codec: Any) -> str:
    if codec.template is None:
        return "none"
    return "marks generated text" if codec.marks_generation else "plain"


def _layer_of_stack(checkpoint: Checkpoint) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "form": checkpoint.form,
        "digest": checkpoint.digest,
        "path": str(checkpoint.path),
    }
    if checkpoint.form == "model":
        return facts
    config = read_json(checkpoint.path / ADAPTER_CONFIG)
    tensors = read_header(checkpoint.path / ADAPTER_WEIGHTS)
    downs = {name: tensor for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    ranks = sorted({tensor.shape[0] for tensor in downs.values()})
    return {
        **facts,
        "rank": ranks[0] if len(ranks) == 1 else ranks,
        "alpha": config.get("lora_alpha"),
        "modules": len(downs),
        "targets": sorted({name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in downs}),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
    }


def _deploy(checkpoint: Checkpoint) -> str:
    """What to serve: the folder itself, one adapter over the base, or first an export."""
    if checkpoint.form == "model":
        return f"serve the folder {shlex.quote(str(checkpoint.path))}"
    base = shlex.quote(str(checkpoint.base.path))
    if len(checkpoint.stack) == 2:
        return f"serve {base} with the adapter {shlex.quote(str(checkpoint.path))}, or export it as a model"
    return (
        f"export the {len(checkpoint.stack) - 1} adapters as one (`evertune export --form adapter`) and serve it over "
        f"{base}, or export a model"
    )
