"""What lies between a model's matrix products, put through torch.compile: norms, rotations, gates.

Each of these is a dozen passes over memory that becomes one. The products are left alone, which the processor's library
does better, and so is attention, which depends on how a batch divides into rows: whole layers would be compiled anew
for each division. Sums are in the order that the compiler chose, so the last bits are others than without it.
"""

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from evertune.errors import TrainingError
from evertune.model.mode import evaluating

ROTATE = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_COMPILED = "_evertune_compiled"


def compile_between_products(model: nn.Module) -> dict[str, int]:
    """Compile in place what is found, at the first pass through it, for any number of tokens.

    A model's rotation is a function of transformers' module for its architecture, and is compiled for this process.

    Returns:
        How many norms, gates and rotations there are.

    Raises:
        TrainingError: there is nothing that could be compiled.
    """
    found = {"norms": 0, "gates": 0, "rotations": 0}
    norms: dict[type, Callable[..., Any]] = {}
    gates: dict[str, Callable[..., Any]] = {}
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm") and kind is not nn.RMSNorm:
            norms[kind] = norms.get(kind) or torch.compile(kind.forward, dynamic=True)
            module.forward = MethodType(norms[kind], module)  # type: ignore[method-assign]
            found["norms"] += 1
        elif _is_gated(module):
            activation: Any = module.act_fn
            name = repr(activation)
            gates[name] = gates.get(name) or torch.compile(_gate(activation), dynamic=True)
            module.forward = MethodType(_with_gate(gates[name]), module)
            found["gates"] += 1
        place = sys.modules[kind.__module__]
        if hasattr(place, ROTATE) and kind.__module__.startswith("transformers."):
            _compile_rotation(place)
            found["rotations"] = 1
    if not any(found.values()):
        raise TrainingError(
            f"numerics.compile: {type(model).__name__} has no norms, gates or rotations that are compiled.",
            remedy="Leave 'compile' out.",
        )
    return found


def _gate(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda opened, values: activation(opened) * values


def _with_gate(gate: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
        return found

    return forward


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether down(act(gate(x)) * up(x)) is what the module computes: by its parts, and by a trial."""
    if not all(hasattr(module, name) for name in _GATED) or getattr(module.gate_proj, "in_features", 0) == 0:
        return False
    weight = module.gate_proj.weight
    x = torch.linspace(-1, 1, 2 * module.gate_proj.in_features).to(weight).view(1, 2, -1)
    with evaluating(module):  # an adapter's dropout would tell two passes apart
        expected = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
        return torch.equal(module(x), expected)


def _compile_rotation(place: Any) -> None:
    rotate = getattr(place, ROTATE)
    if not hasattr(rotate, _COMPILED):
        compiled = torch.compile(rotate, dynamic=True)
        setattr(compiled, _COMPILED, True)
        setattr(place, ROTATE, compiled)
