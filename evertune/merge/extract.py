"""An adapter out of a tuned model and its base: a randomised SVD of each difference, and how much of it that holds."""

# I inputs, O outputs, R rank

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evertune.errors import MergeError
from evertune.merge.config import MergeConfig
from evertune.merge.kernels import Array
from evertune.merge.plan import MergePlan, TensorPlan, plan_checkpoints
from evertune.merge.reader import Reader, open_inputs
from evertune.merge.sources import Files
from evertune.model.checkpoint import Checkpoint, describe

OVERSAMPLING, POWER_STEPS = 10, 2
_IN_LAYER = re.compile(r"\.\d+\..*\.weight$")
# Differences below this share of the whole are left out without asking: rounding noise.
NEGLIGIBLE = 1e-6
TRANSPOSED_TYPES = ("gpt2", "openai-gpt", "imagegpt")


@dataclass(frozen=True)
class Extracted:
    """What an adapter holds of a difference.

    Attributes:
        energy: share of the squared difference of the adapted matrices that the adapter holds.
        rest: share of the squared difference that lies in tensors no adapter can hold.
        rest_names: those tensors, the largest first.
        by_tensor: energy held, by name.
    """

    checkpoint: Checkpoint
    rank: int
    energy: float
    rest: float
    rest_names: tuple[str, ...]
    by_tensor: dict[str, float]

    def body(self) -> dict[str, Any]:
        return {
            "path": str(self.checkpoint.path),
            "digest": self.checkpoint.digest,
            "rank": self.rank,
            "energy": self.energy,
            "rest": self.rest,
            "rest_names": list(self.rest_names),
            "by_tensor": self.by_tensor,
        }

    def lines(self) -> list[str]:
        worst = min(self.by_tensor, key=lambda one: self.by_tensor[one])
        lines = [
            f"rank {self.rank} holds {self.energy:.2%} of the squared difference of {len(self.by_tensor)} matrices "
            f"(least: {self.by_tensor[worst]:.2%} of {worst})"
        ]
        if self.rest_names:
            lines.append(f"left out: {self.rest:.2%} of the whole difference, in {', '.join(self.rest_names[:3])}")
        return [*lines, f"wrote adapter {self.checkpoint.digest[:12]}: {self.checkpoint.path}"]


def extract_adapter(
    model: Path, base: Path, out: Path, *, rank: int, drop_rest: bool = False, cache: Path | None = None
) -> Extracted:
    """Write the best rank-`rank` adapter over `base` for what `model` differs by. One matrix is in memory at a time.

    Args:
        model: a model or an adapter stack.
        base: a model with the same tensors.
        drop_rest: go on when tensors differ that no adapter can hold (embeddings, norms, biases).

    Raises:
        MergeError: models that do not belong together, that do not differ, or that differ where no adapter reaches.
    """
    tuned, below = describe(model, cache=cache), describe(base, cache=cache)
    if below.form != "model":
        raise MergeError(f"{base}: an adapter; the base of an extraction is a model.", remedy="Export it first.")
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(
            f"{out} exists and is not an empty folder.", remedy="Give a new folder; nothing is overwritten."
        )
    config = MergeConfig.model_validate(
        {"method": "task_arithmetic", "models": {"tuned": {"path": str(model)}}, "base": str(base), "output": "model"}
    )
    plan = plan_checkpoints(config, {"tuned": tuned}, below)
    if plan.donor.config.get("model_type") in TRANSPOSED_TYPES:
        raise MergeError(
            f"{base}: {plan.donor.config['model_type']} stores matrices transposed, which is not supported."
        )
    return _extract(plan, below, out, rank=rank, drop_rest=drop_rest)


def randomised_svd(matrix_OI: Array, rank: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """The largest `rank` singular triples, as (U, s, V^T) (Halko, Martinsson and Tropp 2011, arXiv:0909.4061).

    Ten directions more than asked for and two power steps; a small matrix is decomposed in full.
    """
    wanted = min(rank + OVERSAMPLING, *matrix_OI.shape)
    if wanted * 3 > min(matrix_OI.shape):
        u, sizes, v = np.linalg.svd(matrix_OI, full_matrices=False)
        return u[:, :rank], sizes[:rank], v[:rank]
    rng = np.random.Generator(np.random.Philox(seed))
    basis, _ = np.linalg.qr(matrix_OI @ rng.standard_normal((matrix_OI.shape[1], wanted)))
    for _ in range(POWER_STEPS):
        other, _ = np.linalg.qr(matrix_OI.T @ basis)
        basis, _ = np.linalg.qr(matrix_OI @ other)
    u, sizes, v = np.linalg.svd(basis.T @ matrix_OI, full_matrices=False)
    return (basis @ u)[:, :rank], sizes[:rank], v[:rank]


def _extract(plan: MergePlan, base: Checkpoint, out: Path, *, rank: int, drop_rest: bool) -> Extracted:
    import torch

    from evertune.model.adapter import Factor, write_adapter

    factors, by_tensor, held, whole, rest = {}, {}, 0.0, 0.0, {}
    files = Files()
    try:
        for tensor in plan.tensors:
            if tensor.settings is None:
                continue
            delta = _difference(plan, tensor, files)
            size = float(np.square(delta).sum())
            if size == 0.0:
                continue
            if delta.ndim != 2 or not _IN_LAYER.search(tensor.name):
                rest[tensor.name] = size
                continue
            u, sizes, v = randomised_svd(delta, rank)
            roots = np.sqrt(sizes)
            module = tensor.name.removesuffix(".weight")
            a, b = np.ascontiguousarray(roots[:, None] * v, np.float32), np.ascontiguousarray(u * roots, np.float32)
            factors[module] = Factor(torch.from_numpy(a), torch.from_numpy(b), 1.0)
            by_tensor[tensor.name] = float(np.square(sizes).sum()) / size
            held, whole = held + float(np.square(sizes).sum()), whole + size
    finally:
        files.close()
    left = sum(rest.values())
    names = tuple(sorted(rest, key=lambda one: -rest[one]))
    if not factors:
        raise MergeError("the two models do not differ in any matrix of a layer.", remedy="Check the two folders.")
    if left > NEGLIGIBLE * (whole + left) and not drop_rest:
        raise MergeError(
            f"{left / (whole + left):.2%} of the squared difference lies in tensors that no adapter holds: "
            f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}.",
            remedy="Give --drop-rest to leave it out, or keep the whole model.",
        )
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_adapter(factors, temporary, base)
        describe(temporary)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    share = left / (whole + left)
    return Extracted(describe(out), rank, min(1.0, held / whole), share, names, by_tensor)


def _difference(plan: MergePlan, tensor: TensorPlan, files: Files) -> Array:
    """The tuned model's tensor minus the base's, in float64."""
    inputs = open_inputs(plan, tensor, files)
    reader = Reader(files)
    delta = np.empty(math.prod(tensor.shape))
    for chunk in reader.chunks(inputs, 0, tensor.elements):
        values = chunk.values()
        part = delta[chunk.begin : chunk.begin + chunk.count]
        np.subtract(values.experts[0], values.start, out=part, dtype=np.float64)
    return delta.reshape(tensor.shape)
