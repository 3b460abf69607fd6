"""Tensors on disk as each process holds them: torch's distributed checkpoint, in safetensors, no pickle.

    weights/shard-00001-model-00001-of-00001.safetensors     what the first process holds, with its places in the whole
    weights/shard-00002-model-00001-of-00001.safetensors     what the second one holds

They are read back into shards over any number of processes, or into whole tensors.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write this process's parts. All processes call it with one folder, which they share."""
    # A number has no place in a whole: it is written as a row of one.
    plain = {name: one.detach().reshape(1) if one.ndim == 0 else one.detach() for name, one in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(plain), storage_writer=writer)


def read_shards(folder: Path, *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a folder, each laid out as the one in `like` that has its name or the beginning of it.

    A tensor of another shape than its like is a number beside it, and comes back whole. All processes call it.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        layout = like_of(name, like)
        if facts.size == layout.shape:  # type: ignore[union-attr]
            found[name] = torch.empty_like(layout, dtype=facts.properties.dtype)  # type: ignore[union-attr]
        else:
            found[name] = torch.empty(facts.size, dtype=facts.properties.dtype)  # type: ignore[union-attr]
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)))
    return {name: one.detach() if one.shape == like_of(name, like).shape else one[0] for name, one in found.items()}


def as_shards(tensors: Mapping[str, Tensor], *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors laid out as in `read_shards`."""
    return {name: _as_shard(one, like_of(name, like)) for name, one in tensors.items()}


def like_of(name: str, like: Mapping[str, Tensor]) -> Tensor:
    """The tensor with this name, or the one whose moment it names: `<name>.exp_avg`."""
    return like[name] if name in like else like[name.rpartition(".")[0]]


def _as_shard(tensor: Tensor, layout: Tensor) -> Tensor:
    if not isinstance(layout, DTensor) or tensor.shape != layout.shape:
        return tensor
    # Each process has read the whole: nothing needs to be sent.
    return distribute_tensor(tensor.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)
