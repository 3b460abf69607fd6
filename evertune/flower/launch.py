"""Flower's processes on this machine: without telemetry or update checks, on loopback unless asked otherwise, with a
home of their own, and without installing anything.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evertune.errors import TrainingError
from evertune.flower.files import ClientFile, ServerFile, federated_spec
from evertune.workspace import Workspace

# Read when Flower is imported; without them it posts events, asks for updates, and reads a shared configuration.
QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}
MODULE = "evertune_federation"
APP = f"""\
[project]
name = "evertune-federation"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "evertune"

[tool.flwr.app.components]
serverapp = "{MODULE}:server"
clientapp = "{MODULE}:client"

[tool.flwr.app.config]
server = ""
"""
STOP_SECONDS = 20.0
PROGRESS = "progress.txt"
"""In the federation's home: what the server's app has to say, line by line."""

SERVER = """\
# A federation, as its server sees it. `evertune federated server FILE` waits for the clients and makes one update.
base: {base}
clients: [berlin, paris]
out: federation            # workspace of the result
exchanges: 2
aggregate: flora
rank: 16
steps: 20                  # of a client in each exchange
norm_bound: 20
too_large: clip
"""
CLIENT = """\
# One client, as it sees itself. Its rows stay on its machine. `evertune federated client FILE --server HOST:PORT`
name: {name}
base: {base}               # the same model as the server's
data:
  - {{path: rows.jsonl, format: messages}}
"""


def write_examples(folder: Path, base: str) -> list[Path]:
    """A server's file and two clients', to be edited.

    Raises:
        TrainingError: one of them is there already.
    """
    texts = {"server.yaml": SERVER.format(base=base)}
    texts |= {f"{name}/client.yaml": CLIENT.format(name=name, base=base) for name in ("berlin", "paris")}
    present = [one for one in texts if (folder / one).exists()]
    if present:
        raise TrainingError(f"{folder / present[0]} exists.", remedy="Choose another folder.")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def serve(path: Path, *, host: str, port: int, certificates: Sequence[Path] | None, say: Callable[[str], None]) -> Path:
    """Run a federation to its end; returns the checkpoint that it made.

    Args:
        certificates: of the authority, of the server, and its key; None only on loopback.

    Raises:
        RecipeError: the server's file.
        TrainingError: Flower is missing or failed, and then what its processes said is in the named log; or the port is
            taken.
    """
    own = ServerFile.read(path)
    base = own.checkpoint()
    spec = federated_spec(own, base)
    workspace = Workspace.open(own.workspace(), create=True)
    has_run = workspace.manifest(spec.key) is not None
    if not has_run:
        require_free(host, port)
        home = workspace.work / "flower"
        _write_home(home, host, port, certificates)
        transport = ["--insecure"] if certificates is None else _certificates(certificates)
        link = [_program("flower-superlink"), *transport, "--host", host, "--port", str(port)]
        link += ["--disable-runtime-dependency-installation"]
        with _running(link, home, "superlink.log"):
            say(f"waiting for {', '.join(own.clients)} at {host}:{port}")
            run = [_program("flwr"), "run", str(home / "app"), "here", "--stream"]
            run += ["--run-config", f"server={json.dumps(str(path.absolute()))}"]
            seconds = own.wait_seconds * (own.exchanges + 1)
            _submit(run, home, lambda: workspace.manifest(spec.key) is not None, seconds, say)
    manifest = workspace.manifest(spec.key)
    if manifest is None:
        raise TrainingError(f"the federation has made no update; see the logs in {workspace.work / 'flower'}.")
    if has_run:
        for i, one in enumerate(manifest.record["checkpoint"]["exchanges"]):
            for line in exchange_lines(i + 1, one):
                say(line)
    return workspace.path(spec.key)


def require_free(host: str, port: int) -> None:
    """Raise TrainingError where another program listens: Flower would go on and talk to that one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise TrainingError(
                f"--port: {host}:{port} cannot be used: {error.strerror}.",
                remedy="Give another port, or stop what is there.",
            ) from None


def exchange_lines(number: int, exchange: Mapping[str, Any]) -> Iterator[str]:
    """Who was used in an exchange, and who was not and why."""
    used = ", ".join(f"{name} {weight:.2f}" for name, weight in exchange["weights"].items())
    error = exchange["error"]
    exact = "a secure sum" if error is None else f"distance from the mean of the products {error:.2g}"
    yield f"exchange {number}: used {used}; {exact}"
    for name, reason in {**exchange["refused"], **exchange["clipped"]}.items():
        yield f"  {name}: {reason}"
    for name, behind in exchange["late"].items():
        yield f"  {name}: came {behind} exchange{'s' * (behind > 1)} late"


def join(path: Path, *, server: str, authority: Path | None, port: int, seconds: float | None = None) -> int:
    """Take part as a client until stopped, or for so long; returns Flower's exit code.

    Raises:
        RecipeError: the client's file.
        TrainingError: Flower is missing, or the port is taken.
    """
    own = ClientFile.read(path)
    own.checkpoint()
    require_free("127.0.0.1", port)
    transport = ["--insecure"] if authority is None else ["--root-certificates", str(authority)]
    node = [_program("flower-supernode"), *transport, "--superlink", server, "--port", str(port)]
    node += ["--node-config", f"client={json.dumps(str(path.absolute()))}"]
    home = path.absolute().parent / ".flower"
    home.mkdir(exist_ok=True)
    with _running(node, home, "supernode.log") as process, contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=seconds)
    return 0


def _submit(
    command: Sequence[str], home: Path, is_done: Callable[[], bool], seconds: float, say: Callable[[str], None]
) -> None:
    """Start the run, again while the link is not up yet, and wait for its result or its end; says how far it is."""
    until, said = time.monotonic() + seconds, 0

    def say_new() -> None:
        nonlocal said
        progress = home / PROGRESS
        text = progress.read_text(encoding="utf-8") if progress.is_file() else ""
        for line in text[said : text.rfind("\n") + 1].splitlines():
            say(line)
        said = max(said, text.rfind("\n") + 1)

    for _ in range(30):
        with _running(command, home, "run.log") as process:
            while process.poll() is None and time.monotonic() < until:
                say_new()
                time.sleep(0.5)
        say_new()
        if is_done() or process.returncode == 0 or "Connection" not in (home / "run.log").read_text(errors="replace"):
            return
        time.sleep(2.0)


def _write_home(home: Path, host: str, port: int, certificates: Sequence[Path] | None) -> None:
    app = home / "app"
    shutil.rmtree(app, ignore_errors=True)
    (home / PROGRESS).unlink(missing_ok=True)
    app.mkdir(parents=True)
    (app / "pyproject.toml").write_text(APP, encoding="utf-8")
    # Flower looks for the names' assignments before it imports anything.
    stub = "from evertune.flower import apps\n\nclient = apps.client\nserver = apps.server\n"
    (app / f"{MODULE}.py").write_text(stub, encoding="utf-8")
    secure = "insecure = true" if certificates is None else f"root-certificates = {json.dumps(str(certificates[0]))}"
    text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{host}:{port}"\n{secure}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")


def _certificates(paths: Sequence[Path]) -> list[str]:
    authority, certificate, key = map(str, paths)
    return ["--ssl-ca-certfile", authority, "--ssl-certfile", certificate, "--ssl-keyfile", key]


def _program(name: str) -> str:
    """A program of the environment that this process runs in.

    Raises:
        TrainingError: it is not there.
    """
    beside = Path(sys.executable).parent / name
    if not beside.exists():
        raise TrainingError(
            f"{name} is not installed in {beside.parent}.",
            remedy='pip install "evertune[federated]", best in an environment of its own (docs/federated.md).',
        )
    return str(beside)


@contextlib.contextmanager
def _running(command: Sequence[str], home: Path, log: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process group that ends with the block; what it says goes to a log in its home."""
    # Asked to end, this process ends Flower's first: they would go on without it.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": _path()}
    with (home / log).open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_SECONDS)


def _path() -> str:
    """Flower starts its own programs by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
