"""Resume points: everything a stage needs to go on from a step, bit for bit. Safetensors and JSON lines, no pickle.

    work/<key>/step-000050/   weights.safetensors  moments.safetensors  [average.safetensors]  metrics.jsonl
                              MANIFEST.json

Where the model lies in shards, each group of tensors is a folder of what each process holds (`shards.py`). A stage goes
on from either kind on any number of processes.

The stream and the dropout masks are functions of the step, so no sampler and no generator needs saving.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from evertune.errors import IntegrityError
from evertune.train.shards import as_shards, read_shards, write_shards
from evertune.train.sink import Metrics, from_lines, to_lines
from evertune.workspace import Workspace, verify_folder

KEEP = 2
METRICS = "metrics.jsonl"

State = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ResumePoint:
    """`step` optimizer steps are done; `history` are the metrics so far."""

    step: int
    place: Path
    history: list[Metrics]

    def state(self, *, like: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What `Trainer.state` returned, bit for bit, the tensors laid out over processes as `like` is.

        Args:
            like: the trained weights, by name. All processes call this.
        """
        groups = {file.stem: load_file(file) for file in sorted(self.place.glob("*.safetensors"))}
        if any(isinstance(one, DTensor) for one in like.values()):
            groups = {name: as_shards(one, like=like) for name, one in groups.items()}
        folders = sorted(one for one in self.place.iterdir() if one.is_dir())
        return groups | {folder.name: read_shards(folder, like=like) for folder in folders}


class ResumePoints:
    """The resume points of one stage, in the folder `work/<key>`. The newest two are kept."""

    def __init__(self, workspace: Workspace, key: str) -> None:
        self.folder = workspace.work / key
        self._workspace = workspace

    def save(self, step: int, state: State, history: Sequence[Metrics], *, is_sharded: bool = False) -> None:
        """Publish a resume point in one rename, then drop those before the last two.

        Args:
            is_sharded: each process holds its part of the tensors; all call this, else the main one alone.
        """
        if is_sharded and dist.get_rank() != 0:
            folder = _told(None)
            for name, tensors in state.items():
                write_shards(tensors, folder / name)
            return

        def write(folder: Path) -> None:
            if is_sharded:
                _told(folder)
            for name, tensors in state.items():
                if is_sharded:
                    write_shards(tensors, folder / name)
                    continue
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
    return ResumePoint(_step_of(place), place, from_lines((place / METRICS).read_bytes()))


def _told(folder: Path | None) -> Path:
    """The folder that the main process tells the others."""
    found = [folder]
    dist.broadcast_object_list(found)
    assert found[0] is not None, "the main process tells the folder"
    return found[0]
