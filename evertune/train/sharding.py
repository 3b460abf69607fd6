"""A model in shards over the processes of a stage, by torch's FSDP2: weights, gradients and optimizer state.

Each decoder layer is a group: gathered before it computes, let go after it, in the forward and in the backward pass.
What is outside the layers (embeddings, last norm, head) is the root's group, which stays gathered until the backward
pass is over. Trained parameters are float32 and their own masters; layers compute in the stage's dtype.

Gathering takes all processes, in one order, and their rows differ: one may have a replayed row whose reference is
asked, or a micro-batch more. So before each pass the processes say which one they are at, and those that are ahead go
through the earliest with a single token and a weight of 0:

    process 0    reference    policy    backward
    process 1    (follows)    policy    backward
"""

# H hidden

import contextlib
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from evertune.errors import TrainingError
from evertune.train.head import Head, ModuleHead

READ = "read_for_training"


class Pass(IntEnum):
    """What a process is about to do; the least comes first."""

    WITHOUT_GRADIENT = 0
    FORWARD = 1
    BACKWARD = 2
    NONE = 3


class ShardedDecoder:
    """The decoder of a sharded model, called like it: all processes go through each pass together.

    Args:
        model: as `fully_shard` has left it.
        head: of the model, whose weights are gathered with the root's.
        is_packed: whether it reads rows packed.
    """

    def __init__(self, model: Any, decoder: nn.Module, head: ModuleHead, *, is_packed: bool) -> None:
        self.head, self.is_packed = head, is_packed
        self._model = model
        self._is_whole = False
        self._owed: list[Tensor] = []

        def read(**inputs: Any) -> Tensor:
            hidden: Tensor = decoder(**inputs).last_hidden_state
            return hidden

        # The root's hooks belong to the whole model's forward, and training never calls that.
        setattr(model, READ, read)
        register_fsdp_forward_method(model, READ)
        # Announcements go past the GPU, so that it is not waited for.
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        # The first pass settles which group is the root, and samples are made by the decoder alone.
        with torch.no_grad():
            self._read_token()
        model.reshard()

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        if not self._is_whole:
            self._take_turn(Pass.FORWARD if torch.is_grad_enabled() else Pass.WITHOUT_GRADIENT)
        return SimpleNamespace(last_hidden_state=getattr(self._model, READ)(**inputs))

    def backward(self, loss: Tensor) -> None:
        """The backward pass of this process's own loss, and of what it owes to passes that it has followed."""
        self._take_turn(Pass.BACKWARD)
        self._settle(loss)

    def finish(self) -> None:
        """Follow the others until all are through with their micro-batches."""
        self._take_turn(Pass.NONE)
        self._model.reshard()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, each process holds all weights in the compute dtype and may run the model as it likes, without
        gradient. All processes enter and leave it."""
        modules = sharded_modules(self._model)
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self._is_whole = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._is_whole = False
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self._model, recurse=False)

    def _take_turn(self, mine: Pass) -> None:
        """Follow every pass that another process has before this one."""
        while (turn := self._earliest(mine)) < mine:
            self._follow(turn)

    def _earliest(self, mine: Pass) -> Pass:
        told = torch.tensor(int(mine))
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
        return Pass(int(told))

    def _follow(self, turn: Pass) -> None:
        if turn is Pass.BACKWARD:
            self._settle()
            return
        with torch.set_grad_enabled(turn is Pass.FORWARD):
            hidden = self._read_token()
            if turn is Pass.FORWARD:
                # The head's gradient is part of the root's, and all processes must have one.
                parts = [hidden, self.head.weight_VH, self.head.bias_V]
                trained = [one for one in parts if one is not None and one.requires_grad]
                self._owed.append(torch.stack([0.0 * one.float().sum() for one in trained]).sum())

    def _read_token(self) -> Tensor:
        ids_11 = torch.zeros((1, 1), dtype=torch.int64, device=self.head.weight_VH.device)
        hidden: Tensor = getattr(self._model, READ)(input_ids=ids_11, use_cache=False)
        return hidden

    def _settle(self, *losses: Tensor) -> None:
        owed, self._owed = self._owed, []
        torch.stack([*losses, *owed]).sum().backward()  # type: ignore[no-untyped-call]


def shard(
    model: Any,
    decoder: nn.Module,
    head: Head,
    *,
    is_packed: bool,
    trained: Mapping[str, nn.Parameter],
    starts: Mapping[str, Tensor],
) -> ShardedDecoder:
    """Shard a model in place over all processes, and move it to their devices layer by layer.

    Its parameters are other objects afterwards: look up those that are trained again.

    Args:
        decoder, head, is_packed: of the model, as they were found while it was whole.
        trained: become float32 masters; the rest keeps its dtype.
        starts: what these begin from, by name, where the model has it rounded.

    Raises:
        TrainingError: there is one process only; the architecture names no layers; a parameter was not sharded.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise TrainingError(
            "launch.fsdp: found one process, and there is nothing to shard over.",
            remedy="Start several, such as `launch: {command: torchrun --nproc-per-node 2, fsdp: true}`.",
        )
    dtype = next(iter(trained.values())).dtype
    for name, parameter in trained.items():
        parameter.data = starts[name].detach() if name in starts else parameter.data.float()
    device = "cuda" if dist.get_backend() != "gloo" and torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    layers = _layers(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert_sharded(model, mesh)
    for module in sharded_modules(model):
        # Losses are divided by the counts of the whole step already: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # Named, because what torch finds out by itself depends on the passes before, which differ between processes.
    for layer, before in zip(layers, [model, *layers[:-1]], strict=True):
        layer.set_modules_to_backward_prefetch([before])
    model.set_modules_to_backward_prefetch([layers[-1]])
    sharded_head = ModuleHead(model.get_output_embeddings(), has_liger=head.has_liger)
    return ShardedDecoder(model, decoder, sharded_head, is_packed=is_packed)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The groups of a sharded model, the root first."""
    return [one for one in model.modules() if isinstance(one, FSDPModule)]


def assert_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise TrainingError unless every parameter lies in shards over the mesh: what was asked for is what runs."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            found = "a whole tensor in each process"
        elif parameter.device_mesh != mesh or parameter.placements != (Shard(0),):
            found = f"{parameter.placements} over {parameter.device_mesh}"
        else:
            continue
        raise TrainingError(
            f"launch.fsdp: {name} is {found}, expected shards over {mesh.size()} processes.",
            remedy="Train this model without 'fsdp', or with an external stage.",
        )


def shard_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters that this process holds between steps."""
    local = (one.to_local() if isinstance(one, DTensor) else one for one in model.parameters())
    return sum(one.numel() * one.element_size() for one in local)


def _layers(model: Any) -> list[Any]:
    """The modules that transformers says must not be split, in the order of the forward pass."""
    names = set(model._no_split_modules or ())
    found = [one for one in model.modules() if type(one).__name__ in names]
    if not found:
        raise TrainingError(
            f"launch.fsdp: transformers names no layers of {type(model).__name__} that could be shards' groups.",
            remedy="Train this model without 'fsdp', or with an external stage.",
        )
    return found
