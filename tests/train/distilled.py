"""A small distillation in tests: the order to learn from some checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from evertune.hashing import digest_json
from evertune.model.checkpoint import Checkpoint
from evertune.train.distill_spec import DistillSpec, TeacherSpec
from tests.train.stage import make_spec

OWN: dict[str, Any] = {
    "loss": "forward_kl",
    "beta": 0.5,
    "temperature": 1.0,
    "weight": 0.5,
    "words": 16,
    "compressed": None,
    "on_policy": None,
    "answers": None,
    "route": "sources",
}


def make_distill_spec(
    folder: Path, model: Path, teachers: list[Checkpoint], routes: dict[str, list[int]] | None = None, **changes: Any
) -> DistillSpec:
    """An 8-step LoRA stage with replay that learns from the first teacher, or by `routes`. Weights are 1, 2, 3, ..."""
    own = {name: changes.pop(name, value) for name, value in OWN.items()}
    training = make_spec(folder, model, label="round/1-distill", **changes)
    spec = DistillSpec(
        **vars(training),
        teachers=[TeacherSpec(f"teacher {i}", one, 1.0 + i) for i, one in enumerate(teachers)],
        routes=routes or {training.new[0].source: [0]},
        **own,
    )
    return replace(spec, key=digest_json(spec.to_json()))
