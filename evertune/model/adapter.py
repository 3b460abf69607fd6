"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): stack, switch, train, save. The only door to PEFT.

A stack is frozen adapters `s0`, `s1`, ... over the base, all active at once, and at most one trained adapter `new`.
Each adds scale * B @ A to the weights it stands on, so a stack is exactly one adapter with concatenated factors.
"""

# I inputs, O outputs, R rank

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evertune.errors import CheckpointError, RecipeError
from evertune.hashing import canonical_json, digest_json
from evertune.model.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    place_seen_from,
    read_json,
    write_note,
)
from evertune.model.lora_config import PREFIX, check_plain, pair_names, scale_of
from evertune.model.lora_linear import Update, add_updates, lora_linear

if TYPE_CHECKING:
    from evertune.model.open import OpenModel

NEW = "new"


@dataclass(frozen=True)
class Factor:
    """The update of one module: scale * B @ A is added to its (O, I) weight.

    a_RI, b_OR: the two factors, any floating dtype.
    transposed: the module stores its weight as (I, O), as GPT-2's layers do.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def delta(self) -> Tensor:
        """The update in float32, in the shape the module stores its weight."""
        delta_OI = self.b_OR.float() @ self.a_RI.float() * self.scale
        return delta_OI.T if self.transposed else delta_OI


Factors = Mapping[str, Factor]
"""Module name, as in `model.named_modules()` -> its update."""


def add_adapter(
    opened: "OpenModel", *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str], seed: int
) -> dict[str, nn.Parameter]:
    """Put a trainable adapter `new` on top of the stack and freeze everything else; returns its parameters by name.

    A is uniform in +-1/sqrt(I), as PEFT draws it, but from `seed` and the module's name, so that it depends neither on
    the global generator nor on the order of modules; B is zero, so outputs are at first the start's, bit for bit.

    Args:
        targets: `all-linear` (every linear layer but the head) or last parts of names, such as `q_proj`.

    Raises:
        RecipeError: a target names no linear layer, or the head.
        CheckpointError: an adapter `new` is already there.
    """
    if NEW in adapter_names(opened.model):
        raise CheckpointError("the model already carries a trained adapter.", remedy="Save it and open it again.")
    factors = {}
    for name in select_targets(opened.model, targets):
        module = _base_layer(opened.model.get_submodule(name))
        outputs, inputs = _sizes(module)
        factors[name] = Factor(
            a_RI=draw_a(rank, inputs, seed, name),
            b_OR=torch.zeros(outputs, rank),
            scale=alpha / rank,
            transposed=isinstance(module, Conv1D),
        )
    attach(opened.model, factors, NEW, dropout=dropout)
    trained = new_parameters(opened)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def new_parameters(opened: "OpenModel") -> dict[str, nn.Parameter]:
    """The trained adapter's parameters: `<module>.lora_A` and `<module>.lora_B`, in the order of module names."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in sorted(_layers(opened.model)):
        if NEW in layer.lora_A:
            found[f"{name}.lora_A"] = layer.lora_A[NEW].weight
            found[f"{name}.lora_B"] = layer.lora_B[NEW].weight
    return found


@contextmanager
def without_new(opened: "OpenModel") -> Iterator[None]:
    """Inside, the model computes what its start computes, bit for bit: only `new` is off."""
    layers = [layer for _, layer in _layers(opened.model)]
    before = [list(layer.active_adapters) for layer in layers]
    # Not PEFT's set_adapter: that also flips requires_grad, under a graph that may still be waiting for backward.
    for layer, names in zip(layers, before, strict=True):
        layer._active_adapter = [name for name in names if name != NEW]
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def scale_new(opened: "OpenModel", alpha: float) -> None:
    """Let `new` count `alpha` times: 0 is the start, 1 the trained model, between them the line between the two."""
    scale_adapters(opened, (NEW,), alpha)


def scale_adapters(opened: "OpenModel", names: Sequence[str], alpha: float | Callable[[str], float]) -> None:
    """Let the named adapters of the stack count `alpha` times what they were saved or trained with.

    Args:
        alpha: a number, or a function of the name of the layer.
    """
    for place, layer in _layers(opened.model):
        for name in names:
            if name in layer.lora_A:
                factor = alpha(place) if callable(alpha) else alpha
                layer.scaling[name] = layer.evertune_scale[name] * factor


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters a model carries, from the bottom up."""
    found: dict[str, None] = {}
    for _, layer in _layers(model):
        found.update(dict.fromkeys(layer.lora_A))
    return list(found)


def attach(model: nn.Module, factors: Factors, name: str, *, dropout: float = 0.0, place: str = "the adapter") -> None:
    """Put an adapter with these factors on top of the stack, active and frozen, in each module's dtype and device.

    Raises:
        CheckpointError: a factor's module is missing or of another shape.
    """
    _check_fit(model, factors, place)
    ranks = {module_name: factor.rank for module_name, factor in factors.items()}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        rank_pattern=ranks,
        target_modules=list(factors),
        lora_dropout=dropout,
        fan_in_fan_out=any(factor.transposed for factor in factors.values()),
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, adapter_name=name)
    for module_name, factor in factors.items():
        layer = model.get_submodule(module_name)
        _fill(layer, name, factor)
    for _, layer in _layers(model):
        layer._active_adapter = list(layer.lora_A)
        layer.forward = partial(_forward, layer)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(model.training)  # PEFT makes its layers in training mode, and their dropout with them


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter off the stack again: the model computes what it would without it, bit for bit."""
    for _, layer in _layers(model):
        if name in layer.lora_A:
            layer.delete_adapter(name)
            del layer.evertune_scale[name]
        layer._active_adapter = list(layer.lora_A)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def read_factors(folder: Path) -> dict[str, Factor]:
    """The factors of a PEFT LoRA folder.

    Raises:
        CheckpointError: a variant that is not plain LoRA, or tensors that do not pair up.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    check_plain(folder, config)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    names = pair_names(folder / ADAPTER_WEIGHTS, tensors)
    return {name.removeprefix(PREFIX): _factor(folder, config, name, tensors) for name in names}


def write_adapter(factors: Factors, folder: Path, stands_on: Checkpoint, *, dropout: float = 0.0) -> None:
    """Write a PEFT LoRA folder: adapter_model.safetensors, adapter_config.json, evertune.json.

    PEFT loads it over the base when it is the only adapter of its stack, else over `stands_on` folded into weights.
    """
    tensors = {}
    for name, factor in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factor.a_RI.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factor.b_OR.detach().cpu().contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = _saved_config(factors, place_seen_from(folder, stands_on.base.path), dropout)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_note(folder, stands_on)


def save_new(opened: "OpenModel", folder: Path, stands_on: Checkpoint) -> None:
    """Write the trained adapter `new` as a PEFT LoRA folder that stands on `stands_on`, in its own dtype."""
    factors = {}
    dropout = 0.0
    for name, layer in sorted(_layers(opened.model)):
        if NEW in layer.lora_A:
            factors[name] = _factor_of(layer, NEW)
            dropout = float(getattr(layer.lora_dropout[NEW], "p", 0.0))
    if not factors:
        raise AssertionError("save_new without add_adapter")
    write_adapter(factors, folder, stands_on, dropout=dropout)


def concatenate(stack: Sequence[Factors], scales: Sequence[float] | None = None) -> dict[str, Factor]:
    """One adapter that computes the sum of the stack: A stacked by rows, scale * B by columns; ranks add up.

    Args:
        stack: adapters from the bottom up.
        scales: a further factor for each adapter; 1 each when not given.

    Returns:
        Factors with scale 1, in the stack's dtype where that is exact, else in float32.
    """
    weights = [1.0] * len(stack) if scales is None else list(scales)
    found = {}
    for name in sorted({name for factors in stack for name in factors}):
        parts = [
            replace(factors[name], scale=factors[name].scale * weight)
            for factors, weight in zip(stack, weights, strict=True)
            if name in factors
        ]
        a_RI = torch.cat([part.a_RI.float() for part in parts], dim=0)
        b_OR = torch.cat([part.b_OR.float() * part.scale for part in parts], dim=1)
        dtypes = {part.a_RI.dtype for part in parts}
        narrow = dtypes.pop() if len(dtypes) == 1 else torch.float32
        if not torch.equal(b_OR.to(narrow).float(), b_OR):
            narrow = torch.float32
        found[name] = Factor(a_RI.to(narrow), b_OR.to(narrow), 1.0, parts[0].transposed)
    return found


def scaled(factors: Factors, alpha: float | Callable[[str], float]) -> dict[str, Factor]:
    """The same adapter counting `alpha` times, a number or a function of the layer's name; tensors are shared."""
    factor_of = alpha if callable(alpha) else lambda name: alpha
    return {name: replace(factor, scale=factor.scale * factor_of(name)) for name, factor in factors.items()}


def select_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the modules to adapt, sorted.

    Raises:
        RecipeError: a target names no linear layer, or the head.
    """
    head = _head(model)
    linear = [name for name, module in _linear_layers(model) if module is not head]
    if targets == "all-linear":
        return sorted(linear)
    if isinstance(targets, str):
        targets = [targets]
    chosen: set[str] = set()
    for target in targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise RecipeError(f"tune.lora.targets: no linear layer '{target}' besides the head; there are: {known}")
        chosen.update(found)
    return sorted(chosen)


def target_shapes(model: nn.Module, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each module that an adapter with these targets would change."""
    return {name: _sizes(_base_layer(model.get_submodule(name))) for name in select_targets(model, targets)}


def fold_stack(model: nn.Module, stack: Sequence[Factors], *, place: str = "the adapter") -> None:
    """Add the updates of a stack to the weights of a plain float32 model, in place, from the bottom up."""
    for factors in stack:
        _check_fit(model, factors, place)
        for name, factor in factors.items():
            weight: Any = model.get_submodule(name).weight
            if weight.dtype != torch.float32:
                raise AssertionError(f"{name} is {weight.dtype}; folding accumulates in float32")
            weight.data += factor.delta().to(weight.device)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What PEFT's layer computes, in fewer passes; PEFT's own forward where it does more than add updates."""
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    drops = layer.training and any(not isinstance(layer.lora_dropout[name], nn.Identity) for name in active)
    is_plain = type(base) is nn.Linear and x.dtype == base.weight.dtype and not (layer.merged or layer.disable_adapters)
    if not is_plain or drops or args or kwargs:
        found: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return found
    updates = [Update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in active]
    if not torch.is_grad_enabled():
        return add_updates(base(x.reshape(-1, x.shape[-1])), x, updates)
    return lora_linear(x, base.weight, base.bias, updates)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers by their name in the plain model, whether or not they carry adapters."""
    adapted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{above}.") for above in adapted[-1:]):
            continue
        if isinstance(module, LoraLayer):
            adapted.append(name)
            yield name, _base_layer(module)
        elif isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    weight = module.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(module, Conv1D) else (weight.shape[0], weight.shape[1])


def draw_a(rank: int, inputs: int, seed: int, name: str) -> Tensor:
    """The A that a new adapter of this seed begins with in a module: (rank, inputs), float32."""
    generator = torch.Generator().manual_seed(int(digest_json([seed, name])[:15], 16))
    bound = 1.0 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)


def _check_fit(model: nn.Module, factors: Factors, place: str) -> None:
    known = dict(_linear_layers(model))
    head = _head(model)
    for name, factor in factors.items():
        if name not in known:
            raise CheckpointError(
                f"{place}: changes {name}, which is no linear layer of the model it stands on.",
                remedy="Check that base and adapter belong together.",
            )
        module = known[name]
        if module is head:
            raise CheckpointError(
                f"{place}: changes {name}, the head, which is never adapted here.",
                remedy="Merge the adapter into its base with the tool that made it.",
            )
        found = (factor.b_OR.shape[0], factor.a_RI.shape[1])
        if found != _sizes(module) or factor.transposed != isinstance(module, Conv1D):
            raise CheckpointError(
                f"{place}: its update of {name} is {found}, the model's weight is {_sizes(module)} (outputs, inputs).",
                remedy="Check that base and adapter belong together.",
            )


def _fill(layer: Any, name: str, factor: Factor) -> None:
    """Give the layer's adapter `name` the factor's values, in the dtype and on the device of the weight it changes."""
    like = layer.get_base_layer().weight
    for linear, value in ((layer.lora_A[name], factor.a_RI), (layer.lora_B[name], factor.b_OR)):
        linear.weight = nn.Parameter(value.detach().to(dtype=like.dtype, device=like.device, copy=True))
    layer.scaling[name] = factor.scale
    if not hasattr(layer, "evertune_scale"):
        layer.evertune_scale = {}
    layer.evertune_scale[name] = factor.scale


def _factor_of(layer: Any, name: str) -> Factor:
    return Factor(
        a_RI=layer.lora_A[name].weight.detach(),
        b_OR=layer.lora_B[name].weight.detach(),
        scale=float(layer.scaling[name]),
        transposed=isinstance(layer.get_base_layer(), Conv1D),
    )


def _factor(folder: Path, config: dict[str, Any], key: str, tensors: Mapping[str, Tensor]) -> Factor:
    name = key.removeprefix(PREFIX)
    a_RI, b_OR = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    if a_RI.ndim != 2 or b_OR.ndim != 2 or a_RI.shape[0] != b_OR.shape[1]:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS}: {key} has factors {tuple(b_OR.shape)} and {tuple(a_RI.shape)}, which do not "
            "multiply.",
            remedy="Copy the adapter again.",
        )
    for side, tensor in (("A", a_RI), ("B", b_OR)):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {key}.lora_{side}.weight holds NaN or Inf.",
                remedy="Train or copy the adapter again.",
            )
    scale = scale_of(folder, config, name, a_RI.shape[0])
    return Factor(a_RI, b_OR, scale, bool(config.get("fan_in_fan_out")))


def _saved_config(factors: Factors, base: str, dropout: float) -> dict[str, Any]:
    first = next(iter(factors.values()))
    alphas = {name: _alpha(factor) for name, factor in factors.items()}
    config = LoraConfig(
        r=first.rank,
        lora_alpha=_alpha(first),  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=sorted(factors),
        rank_pattern={name: one.rank for name, one in sorted(factors.items()) if one.rank != first.rank},
        alpha_pattern={name: alpha for name, alpha in sorted(alphas.items()) if alpha != _alpha(first)},
        fan_in_fan_out=first.transposed,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    # Through JSON once, so that enums and sets become what a reader will see.
    config["target_modules"] = sorted(config["target_modules"])
    config["peft_type"], config["task_type"] = "LORA", "CAUSAL_LM"
    plain: dict[str, Any] = json.loads(canonical_json(config))
    return plain


def _alpha(factor: Factor) -> float:
    alpha = factor.scale * factor.rank
    return int(alpha) if alpha == int(alpha) else alpha
