"""A merge put into a model that is already loaded: what a search tries, without a checkpoint for each candidate."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from evertune.merge.engine import copy_equal
from evertune.merge.kernels import Array
from evertune.merge.methods import State
from evertune.merge.plan import MergePlan, TensorPlan, tensor_rule
from evertune.merge.reader import Reader, open_inputs
from evertune.merge.sources import Files
from evertune.model.header import DTYPE_BITS


def apply_into(plan: MergePlan, model: Any) -> None:
    """Overwrite a model's weights with the planned merge, tensor by tensor, read from the same files as ever.

    The numbers are those that `run_merge` writes, rounded to the model's dtype. Adapters must not be attached.

    Args:
        model: a transformers model of the result's architecture.

    Raises:
        MergeError: as `run_merge`, but for models with different starts.
    """
    import torch

    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    files = Files()
    reader = Reader(files)
    try:
        for tensor in plan.tensors:
            if tensor.settings is None:
                same = np.empty(tensor.elements * DTYPE_BITS[tensor.dtype] // 8, np.uint8)
                copy_equal(plan, tensor, tensor.begin, same, files)
                continue
            target = _place(places, tensor.name)
            with torch.no_grad():
                flat = target.view(-1)
                for begin, values in _merged(plan, tensor, reader, files):
                    flat[begin : begin + len(values)] = torch.from_numpy(values).to(flat.dtype)
    finally:
        files.close()


def _merged(plan: MergePlan, tensor: TensorPlan, reader: Reader, files: Files) -> Iterator[tuple[int, Array]]:
    """The merged elements of one tensor, chunk by chunk: (index of the first, values)."""
    inputs, rule, state = open_inputs(plan, tensor, files), tensor_rule(plan.config, tensor), State()
    for one in rule.passes:
        while True:
            total: Array = np.zeros(one.shape, one.dtype)
            for segment in range(1 if one.of_sample else tensor.segments):
                sums: Array = np.zeros(one.shape, one.dtype)
                for chunk in reader.sample(inputs) if one.of_sample else reader.chunks(inputs, *tensor.span(segment)):
                    one.gather(chunk, state, sums)
                total += sums
            if not one.finish(total, state):
                break
    for chunk in reader.chunks(inputs, 0, tensor.elements):
        out = reader.room.take("out", (chunk.count,), chunk.like.dtype)
        rule.apply(chunk, state, out, np.zeros(len(tensor.experts), np.int64))
        yield chunk.begin, out


def _place(places: dict[str, Any], name: str) -> Any:
    """The model's tensor of a stored name; some models are stored without the outermost part of the name."""
    if name in places:
        return places[name]
    found = [one for one in places if one.endswith(f".{name}")]
    if len(found) != 1:
        raise AssertionError(f"{name} is in the files and not in the model")
    return places[found[0]]
