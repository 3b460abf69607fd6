"""Supervised fine-tuning: cross-entropy on completion tokens, with replay and a KL anchor."""

from typing import Any

from evertune.model.codec import Codec
from evertune.train.adapt import Ask, adaptive
from evertune.train.material import Material, load_material
from evertune.train.objective import CrossEntropy, Objective
from evertune.train.spec import SftSpec
from evertune.train.stage import Lesson, Setting, run_training
from evertune.workspace import Workspace


def run_sft(spec: SftSpec, workspace: Workspace, *, ask: Ask | None = None) -> dict[str, Any]:
    """Train one supervised stage and publish it; see `run_training`."""
    return run_training(spec, workspace, _Supervised(spec), ask=ask)


class _Supervised(Lesson):
    def __init__(self, spec: SftSpec) -> None:
        self._spec = spec

    def load(self, codec: Codec, *, world_size: int) -> Material:
        return adaptive(load_material(self._spec, codec, world_size=world_size), self._spec)

    def objective(self, setting: Setting) -> Objective:
        return CrossEntropy()

    def methods(self) -> dict[str, bool]:
        return {"sft": True}
