"""Did the models begin from the same weights? Averages of unrelated models are noise, so that is asked first."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from evertune.errors import MergeError
from evertune.merge import kernels
from evertune.merge.plan import MergePlan, TensorPlan
from evertune.merge.reader import Reader, open_inputs
from evertune.merge.sources import Files

# Fine-tunes of one start have cosines above 0.99; models trained apart are near 0, or 0.2 where norms weigh in.
SAME_START_COSINE = 0.7
SAMPLED_TENSORS = 8


@dataclass(frozen=True)
class Likeness:
    """Cosine between the weights of two models over sampled matrices."""

    first: str
    second: str
    cosine: float


def likeness(plan: MergePlan) -> list[Likeness]:
    """The cosine of each pair of models, the base included, over at most eight matrices, evenly chosen."""
    matrices = [one for one in plan.tensors if one.settings is not None and len(one.shape) >= 2 and one.elements]
    matrices = matrices or [one for one in plan.tensors if one.settings is not None and one.elements]
    chosen = matrices[:: max(1, len(matrices) // SAMPLED_TENSORS)][:SAMPLED_TENSORS]
    names = [one.name for one in plan.sources]
    gram = np.zeros((len(names), len(names)))
    files = Files()
    reader = Reader(files)
    try:
        for tensor in chosen:
            every = _with_all_experts(plan, tensor)
            inputs = open_inputs(plan, every, files)
            for chunk in reader.sample(inputs):
                kernels.gram(chunk.models_MN, False, chunk.like, gram)
    finally:
        files.close()
    return [
        Likeness(names[a], names[b], float(gram[a, b] / max(math.sqrt(gram[a, a] * gram[b, b]), 1e-300)))
        for a, b in itertools.combinations(range(len(names)), 2)
    ]


def check_starts(plan: MergePlan) -> None:
    """Raise MergeError when two models have as good as unrelated weights. Adapters over one base share it."""
    bases = {one.name: one.checkpoint.base.digest for one in plan.sources}
    if len(set(bases.values())) == 1:
        return
    for one in likeness(plan):
        if one.cosine < SAME_START_COSINE and bases[one.first] != bases[one.second]:
            raise MergeError(
                f"'{one.first}' and '{one.second}' do not have the same start: the cosine between their weights is "
                f"{one.cosine:.2f}, fine-tunes of one model have 0.99.",
                remedy="Distil one into the other instead, or set different_starts: allow.",
            )


def _with_all_experts(plan: MergePlan, tensor: TensorPlan) -> TensorPlan:
    count = len(plan.sources) - (1 if plan.base else 0)
    return replace(tensor, experts=tuple(range(count)))
