"""Resume points: everything a stage needs to go on from a step, bit for bit. Safetensors and JSON lines, no pickle.

    work/<key>/step-000050/   weights.safetensors  moments.safetensors  [average.safetensors]  metrics.jsonl
                              MANIFEST.json

The stream and the dropout masks are functions of the step, so no sampler and no generator needs saving.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from evertune.errors import IntegrityError
from evertune.train.sink import Metrics, from_lines, to_lines
from evertune.workspace import Workspace, verify_folder

KEEP = 2
METRICS = "metrics.jsonl"

State = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ResumePoint:
    """`step` optimizer steps are done; `state` is what `Masters.state` returned; `history` the metrics so far."""

    step: int
    state: dict[str, dict[str, Tensor]]
    history: list[Metrics]


class ResumePoints:
    """The resume points of one stage, in the folder `work/<key>`. The newest two are kept."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        self.folder = workspace.work / key
        self._workspace = workspace

    def save(self, step: int, state: State, history: Sequence[Metrics]) -> None:
        """Publish a resume point in one rename, then drop those before the last two."""

        def write(folder: Path) -> None:
            for name, tensors in state.items():
                plain = {key: one.detach().cpu().contiguous() for key, one in tensors.items()}
                save_file(plain, folder / f"{name}.safetensors")
            (folder / METRICS).write_bytes(to_lines(history))

        self.folder.mkdir(parents=True, exist_ok=True)
        self._workspace.publish_folder(self._place(step), record={"step": step}, write=write)
        for old in self._places()[KEEP:]:
            shutil.rmtree(old)

    def newest(self) -> ResumePoint | None:
        """The newest resume point whose every byte is as it was written, or None."""
        for place in self._places():
            if _is_intact(place):
                return _read(place)
        return None

    def drop_after(self, step: int) -> None:
        """Delete resume points later than `step`: they did not verify, and their places are needed again."""
        for place in self._places():
            if _step_of(place) > step:
                shutil.rmtree(place)

    def clear(self) -> None:
        """Delete all resume points; the metrics beside them stay."""
        for place in self._places():
            shutil.rmtree(place)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _places(self) -> list[Path]:
        """Newest first, by step: clocks do not count."""
        return sorted(self.folder.glob("step-*"), key=_step_of, reverse=True)


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _is_intact(place: Path) -> bool:
    try:
        return not verify_folder(place)
    except IntegrityError:
        return False


def _read(place: Path) -> ResumePoint:
    state = {file.stem: load_file(file) for file in sorted(place.glob("*.safetensors"))}
    return ResumePoint(_step_of(place), state, from_lines((place / METRICS).read_bytes()))
