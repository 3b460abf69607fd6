"""What adapter_config.json of a plain LoRA says, without torch or PEFT: which variants are known, and each scale."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from evertune.errors import CheckpointError
from evertune.model.checkpoint import ADAPTER_CONFIG

# What PEFT puts before a module's name in the weights file.
PREFIX = "base_model.model."
# Fields that plain LoRA on linear layers reads, or that say where and how it was made. Any other field that is set
# means a variant that computes something else.
_PLAIN_FIELDS = {
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "peft_type",
    "task_type", "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Ways to begin that leave the base's weights as they are; others (PiSSA, OLoRA, LoftQ) change them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a variant that is not plain LoRA on linear layers."""
    neutral = {"bias": ("none", None), "init_lora_weights": _PLAIN_STARTS}
    for field, value in config.items():
        plain = value in neutral[field] if field in neutral else field in _PLAIN_FIELDS or not value
        if not plain:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: {field} is {value!r}; only plain LoRA on linear layers is known.",
                remedy="Merge the adapter into its base with the tool that made it.",
            )


def pair_names(file: Path, keys: Collection[str]) -> list[str]:
    """Names of the modules, as the file has them, whose factors a weights file holds, in order.

    Raises:
        CheckpointError: anything in it is not one of a pair of factors of a linear layer.
    """
    names = sorted(key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight"))
    odd = sorted({f"{name}.lora_{side}.weight" for name in names for side in "AB"} ^ set(keys))
    if not odd and names:
        return names
    first = odd[0] if odd else "no tensor"
    if ".base_layer." in first:
        told = "is a weight of the base, which PEFT stores beside the update where a head or an embedding has one."
        remedy = "Save the adapter again with save_pretrained(..., save_embedding_layers=False)."
    elif ".lora_embedding_" in first:
        told = "belongs to the adapter of an embedding; only linear layers are known."
        remedy = "Leave the embedding out of target_modules, or merge the adapter into its base with PEFT."
    else:
        told = "does not belong to a pair of lora_A and lora_B."
        remedy = "Copy the adapter again; adapters of convolutions are not known."
    raise CheckpointError(f"{file}: {first!r} {told}", remedy=remedy)


def scale_of(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """What B @ A of a module is multiplied with: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Args:
        rank: of the module's stored factors.

    Raises:
        CheckpointError: the configuration gives another rank, or no finite alpha.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    said = ranks.get(_pattern(ranks, module), config.get("r"))
    alpha = alphas.get(_pattern(alphas, module), config.get("lora_alpha"))
    if said != rank or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: rank {said!r} and alpha {alpha!r} for {module}, whose factors have rank "
            f"{rank}.",
            remedy="Copy the adapter again.",
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first key of a rank or alpha pattern that means this module: a regular expression for the end of its name."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
