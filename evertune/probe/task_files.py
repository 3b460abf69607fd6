"""What an lm-eval task is made of, read without lm-eval: a recipe is checked and keyed before anything loads."""

import glob
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evertune.errors import ProbeError
from evertune.hashing import digest_file


def require_lm_eval(name: str) -> None:
    """Raise unless lm-eval is installed.

    Raises:
        ProbeError: naming the probe and the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ProbeError(
            f"probe '{name}' is a task of lm-eval, and lm-eval is not installed.",
            remedy='Install it: pip install "evertune[eval]".',
        )


def task_identity(name: str, task: str) -> dict[str, Any]:
    """What the items of a task depend on: lm-eval's version, and for a YAML the bytes of all files it names.

    Python files beside the YAML count, for its `!function` tags; data of a registered task or on a hub does not: it is
    compared when two checkpoints are.

    Raises:
        ProbeError: the YAML or a file that it names is missing or malformed.
    """
    identity: dict[str, Any] = {"lm_eval": importlib.metadata.version("lm_eval")}
    if not task.endswith((".yaml", ".yml")):
        return {**identity, "task": task}
    place = Path(task)
    config, files = _read_task(name, place, ())
    code = sorted(place.parent.glob("*.py"))
    data = [file for _, pattern in data_patterns(config, place.parent) for file in _matches(name, place, pattern)]
    return {**identity, "files": [[one.name, digest_file(one)] for one in (*files, *code, *data)]}


def data_patterns(config: Mapping[str, Any], folder: Path) -> list[tuple[str, Path]]:
    """Split and path of each data file a task names, relative names taken from the task's folder."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    by_split = named if isinstance(named, Mapping) else {"train": named}
    return [
        (str(split), folder / one)
        for split, value in by_split.items()
        for one in (value if isinstance(value, list) else [value])
        if "://" not in one
    ]


class _Loader(yaml.SafeLoader):
    """Plain values; a `!function` or any other tag stands for nothing here."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _read_task(name: str, place: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """A task's keys merged over those of what it includes, and all YAML files that were read."""
    if place in above:
        raise ProbeError(f"probe '{name}': {place} includes itself.", remedy="Remove the 'include'.")
    try:
        config = yaml.load(place.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProbeError(
            f"probe '{name}': the task file {place} cannot be read: {' '.join(str(error).split())}.",
            remedy="Paths are relative to the recipe.",
        ) from error
    if not isinstance(config, dict):
        raise ProbeError(f"probe '{name}': {place} holds no mapping, expected an lm-eval task.")
    included = config.pop("include", None) or []
    merged, files = {}, [place]
    for one in included if isinstance(included, list) else [included]:
        below, read = _read_task(name, place.parent / one, (*above, place))
        merged.update(below)
        files += read
    return {**merged, **config}, files


def _matches(name: str, place: Path, pattern: Path) -> list[Path]:
    found = [Path(one) for one in sorted(glob.glob(str(pattern), recursive=True))]  # noqa: PTH207
    if not found:
        raise ProbeError(
            f"probe '{name}': {place} names the data file {pattern}, and there is none.",
            remedy="Data files are relative to the task file.",
        )
    return found
