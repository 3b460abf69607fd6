"""Where metrics go: a JSON-lines file always, trackers through their own libraries when asked."""

import importlib.metadata
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evertune.errors import RecipeError
from evertune.hashing import canonical_json

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = dict[str, Any]

# The distributions that provide each tracker; any one of them will do.
TRACKERS = {
    "trackio": ("trackio",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb",),
}
# What depends on the machine and the hour, not on the training.
VOLATILE = ("seconds", "tokens_per_second")


def require_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker whose package is not installed."""
    for name in names:
        if not any(_is_installed(package) for package in TRACKERS[name]):
            raise RecipeError(
                f"track: '{name}' is asked for, but its package is not installed.",
                remedy="Run `pip install 'evertune[track]'`, or leave it out; metrics.jsonl is always written.",
            )


def start_trackers(accelerator: "Accelerator", label: str, settings: Mapping[str, Any], *, folder: Path) -> None:
    """Begin a run named `label` with every tracker the accelerator was made with.

    Files go to `folder`, unless the tracker's own environment variable names another place. Only plain settings are
    shown: trackers differ in what else they accept.
    """
    if not accelerator.log_with:
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    os.environ.setdefault("MLFLOW_TRACKING_URI", (folder / "mlflow").absolute().as_uri())
    plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    places = {"wandb": {"dir": str(folder)}}
    accelerator.init_trackers(label.replace("/", "-"), config=plain, init_kwargs=places)


class Sink:
    """Receives one record a step. Only the main process of several writes.

    Args:
        path: the JSON-lines file; replaced by `history` at the start, so that a resumed run shows each step once.
        history: records of the steps before.
        accelerator: forwards to the trackers it was made with.
    """

    def __init__(self, path: Path, *, history: Sequence[Metrics] = (), accelerator: "Accelerator") -> None:
        self.history = list(history)
        self._path = path
        self._accelerator = accelerator
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            replacement = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            replacement.write_bytes(to_lines(self.history))
            replacement.replace(path)

    def log(self, metrics: Metrics) -> None:
        """Append a record; `step` is its number."""
        self.history.append(metrics)
        if self._accelerator.is_main_process:
            with self._path.open("ab") as file:
                file.write(to_lines([metrics]))
        self._accelerator.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])


def to_lines(history: Sequence[Metrics]) -> bytes:
    return b"".join(canonical_json(one) + b"\n" for one in history)


def from_lines(data: bytes) -> list[Metrics]:
    return [json.loads(line) for line in data.splitlines()]


def without_volatile(history: Sequence[Metrics]) -> list[Metrics]:
    """The records as they are published: equal for equal runs."""
    return [{name: value for name, value in one.items() if name not in VOLATILE} for one in history]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
