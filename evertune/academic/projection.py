"""Gradient rules: the step is turned until it no longer opposes what earlier tasks need.

A-GEM (Chaudhry et al. 2018, arXiv:1812.00420), GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840), OGD (Farajtabar et
al. 2019, arXiv:1910.07104) and GPM (Saha et al. 2021, arXiv:2103.09762).

Departure, for all: the papers step by plain gradient descent, so what they say of the gradient holds for the step. Here
AdamW follows, whose step is a rescaled mean of past gradients: a projected gradient never opposes the memory, the step
it becomes may. Weight decay is not projected either.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from evertune.academic.importance import Tensors
from evertune.data.encode import EncodedRow
from evertune.measure.products import inner_product
from evertune.train.batch import collate
from evertune.train.plugins import Bench, Parts

Gradient = Mapping[str, Tensor]


def dot(one: Gradient, other: Gradient) -> float:
    """Inner product over all weights, summed in float64; a weight that one lacks counts 0."""
    return sum(float(inner_product(one[name], other[name])) for name in one if name in other)


def add_(gradient: dict[str, Tensor], scale: float, other: Gradient) -> None:
    """gradient += scale * other, in place."""
    for name, one in other.items():
        if name in gradient:
            gradient[name].add_(one, alpha=scale)
        else:
            gradient[name] = scale * one


def gem_multipliers(gram_KK: NDArray[np.float64], along_K: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """v of GEM's dual: min 1/2 v'Gv + p'v over v >= 0, then plus the margin.

    Args:
        gram_KK: inner products of the memories' gradients.
        along_K: inner products of each with the new gradient.

    Returns:
        (K,) multipliers; the projected gradient is g + sum v_k g_k.

    The paper adds the margin to the solution; the authors' code asks v >= margin instead, which is the same only where
    no constraint binds another.
    """
    values, vectors = np.linalg.eigh((gram_KK + gram_KK.T) / 2)
    kept = values > values[-1] * 1e-12
    if not kept.any():
        return np.zeros(len(along_K))
    # G = R'R and p lies in its range, so the dual is the least squares |R v + R^-T p| over v >= 0.
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    target = -(vectors[:, kept].T @ along_K) / np.sqrt(values[kept])
    found, _ = nnls(root, target)
    return np.asarray(found + margin, dtype=np.float64)


def picks(count: int, size: int, *parts: object) -> list[int]:
    """`count` different indexes below `size` (all where there are fewer), a function of the parts alone."""
    seed = int.from_bytes(sha256(repr(parts).encode()).digest()[:7], "big")
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist()


class Stateless:
    """A rule that learns nothing while it works: it is made anew from the start and the rows."""

    def see(self, weights: Mapping[str, Tensor]) -> None:
        pass

    def state(self) -> Tensors:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass

    def carried(self) -> Tensors:
        return {}


class Agem(Stateless):
    """If g opposes the mean gradient r of some remembered rows of all tasks: g - (g.r / r.r) r."""

    name = "agem"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._rows = [row for rows in bench.memory.values() for row in rows]

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        if not self._rows:
            return {}
        chosen = picks(self._bench.options["rows"], len(self._rows), "agem", self._bench.seed, step)
        memory = self._bench.gradient([self._rows[i] for i in chosen])
        along, square = dot(gradients, memory), dot(memory, memory)
        if along < 0.0 < square:
            add_(gradients, -along / square, memory)
        return {"agem_opposed": float(along < 0.0)}


class Gem(Stateless):
    """The nearest gradient that opposes the gradient of no task's memory (a quadratic program in the tasks)."""

    name = "gem"

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        options, seed = self._bench.options, self._bench.seed
        memories = [
            self._bench.gradient([rows[i] for i in picks(options["rows"], len(rows), "gem", seed, step, source)])
            for source, rows in self._bench.memory.items()
        ]
        along = np.array([dot(gradients, one) for one in memories])
        if not memories:
            return {}
        if (along < 0.0).any():
            gram = np.array([[dot(one, other) for other in memories] for one in memories])
            for multiplier, memory in zip(gem_multipliers(gram, along, options["margin"]), memories, strict=True):
                add_(gradients, float(multiplier), memory)
        return {"gem_opposed": float((along < 0.0).sum())}


class Ogd(Stateless):
    """g - sum_k (g.v_k) v_k: no component along the orthonormal gradients of remembered rows.

    Departure: the paper keeps gradients of the logits (its variant GTL, of the true label's); these are of each row's
    log-likelihood, measured at the start of the stage on kept rows.
    """

    name = "ogd"

    def __init__(self, basis: Sequence[Gradient]) -> None:
        self._basis = basis

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        before = dot(gradients, gradients)
        for direction in self._basis:
            add_(gradients, -dot(gradients, direction), direction)
        return {"ogd_kept": dot(gradients, gradients) / before} if self._basis and before > 0 else {}


class Gpm(Stateless):
    """Each layer's gradient without its part on the subspace of earlier tasks' inputs: G - G M M'.

    bases: by weight name (outputs, inputs), M with orthonormal columns (inputs, k). Weights that are no linear layer's
    (norms, the embeddings and with tied ones the head) are left as they are: they are not protected.
    """

    name = "gpm"

    def __init__(self, bases: Mapping[str, Tensor]) -> None:
        self._bases = bases

    def change(self, gradients: dict[str, Tensor], step: int) -> dict[str, float]:
        for name, basis_IK in self._bases.items():
            if name in gradients:
                gradients[name] -= (gradients[name] @ basis_IK) @ basis_IK.T
        return {}


def orthonormal(gradients: Sequence[Gradient], least: float = 1e-5) -> list[dict[str, Tensor]]:
    """Gram-Schmidt, twice over, on gradients as long vectors; directions that are almost spanned are left out."""
    basis: list[dict[str, Tensor]] = []
    for gradient in gradients:
        rest = {name: one.clone() for name, one in gradient.items()}
        size = dot(rest, rest) ** 0.5
        for _ in range(2):
            for direction in basis:
                add_(rest, -dot(rest, direction), direction)
        left = dot(rest, rest) ** 0.5
        if size > 0.0 and left > least * size:
            basis.append({name: one / left for name, one in rest.items()})
    return basis


def input_basis(covariance_II: Tensor, energy: float) -> Tensor:
    """The fewest leading directions of a layer's inputs that hold this share of their squared norm.

    Args:
        covariance_II: sum of x x' over inputs x, float64.

    Returns:
        (inputs, k) with orthonormal columns, float32.
    """
    values, vectors = torch.linalg.eigh(covariance_II)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    k = int((shares < energy).sum()) + 1
    return vectors[:, :k].float()


def make_agem(bench: Bench) -> Parts:
    return Parts(rules=[Agem(bench)])


def make_gem(bench: Bench) -> Parts:
    return Parts(rules=[Gem(bench)])


def make_ogd(bench: Bench) -> Parts:
    rows = [row for each in bench.memory.values() for row in each]
    return Parts(rules=[Ogd(orthonormal([bench.gradient([row]) for row in rows]))])


def make_gpm(bench: Bench) -> Parts:
    """Bases from the inputs that each linear layer sees on the remembered rows, all tasks together."""
    rows = [row for each in bench.memory.values() for row in each]
    if not rows:
        return Parts(rules=[Gpm({})])
    found = input_covariances(bench, rows)
    energy = bench.options["energy"]
    bases = {f"{name}.weight": input_basis(one, energy).to(bench.policy.device) for name, one in found.items()}
    return Parts(rules=[Gpm(bases)])


@torch.no_grad()
def input_covariances(bench: Bench, rows: Sequence[EncodedRow]) -> Tensors:
    """Sum of x x' over the tokens of the rows, for the inputs x of each trained linear layer of the decoder, by module
    name, in float64: of all weights or of those that the trained adapter changes."""
    policy = bench.policy
    found: Tensors = {}
    handles = []
    layers = {
        name: one
        for name, one in policy.model.named_modules()
        if (isinstance(one, nn.Linear) and f"{name}.weight" in bench.trained) or f"{name}.lora_A" in bench.trained
    }

    def remember(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        covariance_II = x_TI.T @ x_TI
        found[name] = found[name] + covariance_II if name in found else covariance_II

    policy.model.eval()
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(remember, name)))
    try:
        for row in rows:
            policy.hidden(collate([row], pad_id=policy.pad_id, device=policy.device).ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found
