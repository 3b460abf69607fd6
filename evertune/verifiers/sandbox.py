"""Programs that nobody has read, run where they can do no harm: one process each, no network, no files but the standard
library, no process of their own, limits of time and memory. Linux on x86-64 or aarch64 with Landlock (kernel 5.13).

What the kernel must refuse is refused by the kernel: resource limits, Landlock for files, seccomp for system calls. At
first use a few programs show that honest ones run and hostile ones are held; where they are not, nothing is run at all.
Not covered: errors of the kernel, and what can be learnt from timing. Nor is what stat tells: whether a path exists
that the program can name, and its size and dates, never what is in it.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evertune.errors import ProbeError

LAUNCHER = Path(__file__).with_name("launcher.py")
CPU_SECONDS, WALL_SECONDS = 5, 10.0
MEMORY_BYTES = 1 << 29
LARGEST_REPLY = 1 << 20


@dataclass(frozen=True)
class Ran:
    """What a program left: the values of the expressions that were reached, and why it stopped early, or None."""

    values: tuple[Any, ...]
    error: str | None


def run_program(code: str, expressions: Sequence[str], *, wall_seconds: float = WALL_SECONDS) -> Ran:
    """Run a program and evaluate expressions in what it has defined; plain values come back, never objects.

    A program can lie about the values, for it shares a process with what reports them; it cannot know what values are
    hoped for. Whatever it does is its own failure: a crash, silence, too much time or memory end in `error`.

    Raises:
        ProbeError: this machine cannot confine programs.
    """
    require_confinement()
    return _run(code, expressions, wall_seconds)


@cache
def require_confinement() -> None:
    """Show once that honest programs run here and hostile ones are held.

    Raises:
        ProbeError: naming what was not held, or why nothing runs.
    """
    control = _run(
        "import math, json, re, collections\ndef f(x):\n    return [x, math.sqrt(16.0)]", ["f(3)"], WALL_SECONDS
    )
    if control.values != ([3, 4.0],):
        raise _unconfined(f"an honest program did not run: {control.error}")
    with tempfile.TemporaryDirectory() as name:
        secret = Path(name) / "secret"
        secret.write_text("secret")
        for what, attempt in _canaries(secret).items():
            ran = _run(attempt, ["done"], WALL_SECONDS)
            if ran.values or (Path(name) / "written").exists():
                raise _unconfined(f"a program could {what}")


def _canaries(secret: Path) -> dict[str, str]:
    """Programs that define `done` only if they could do what they must not."""
    folder = secret.parent
    return {
        "read a file": f"done = open({str(secret)!r}).read()",
        "write a file": f"done = open({str(folder / 'written')!r}, 'w').write('x')",
        "open a connection": "import socket\nsocket.socket()\ndone = 1",
        "start a process": "import os\nif os.fork() == 0:\n    os._exit(0)\ndone = 1",
        "run a command": "import os\nos.execv('/bin/true', ['true'])",
        "signal a process": f"import os\nos.kill({os.getpid()}, 0)\ndone = 1",
        "have a process signalled": f"import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, {os.getpid()})\ndone = 1",
    }


def _unconfined(why: str) -> ProbeError:
    return ProbeError(
        f"programs cannot be confined on this machine: {why}.",
        remedy="The verifier 'python' needs Linux on x86-64 or aarch64 with Landlock (kernel 5.13 or later, enabled); "
        "without it, no program is run.",
    )


def _run(code: str, expressions: Sequence[str], wall_seconds: float) -> Ran:
    order = {
        "roots": _library_roots(),
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
        "code": code,
        "expressions": list(expressions),
    }
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCHER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(json.dumps(order).encode())
        reply = _reply(child.stdout.fileno(), time.monotonic() + wall_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    if reply is None:
        return Ran((), f"it took longer than {wall_seconds:g} s")
    return _read(reply, child.returncode)


def _reply(descriptor: int, deadline: float) -> bytes | None:
    """What the child says until it ends, a little more than the largest reply at most; None when time is up."""
    said = b""
    while len(said) <= LARGEST_REPLY:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            break
        said += piece
    return said


def _read(reply: bytes, code: int) -> Ran:
    if not reply:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Ran((), f"it ended with {how} and said nothing")
    if len(reply) > LARGEST_REPLY:
        return Ran((), f"it said more than {LARGEST_REPLY} bytes")
    try:
        found = json.loads(reply)
        return Ran(tuple(_decoded(one) for one in found["values"]), found["error"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return Ran((), f"its reply cannot be read: {type(error).__name__}")


def _decoded(value: Mapping[str, Any]) -> Any:
    """A value as the launcher encodes it; only plain data can come out, whatever was written."""
    ((kind, inner),) = value.items()
    if kind == "plain" and (inner is None or isinstance(inner, bool | str)):
        return inner
    if kind == "int":
        return int(inner, 16)
    if kind == "float":
        return float.fromhex(inner)
    if kind == "complex":
        return complex(*(float.fromhex(one) for one in inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {_decoded(key): _decoded(one) for key, one in inner}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](_decoded(one) for one in inner)


@cache
def _library_roots() -> list[str]:
    """Where the interpreter's own files lie: all that a program may read."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["platstdlib"], f"{sys.base_prefix}/lib", "/usr/lib", "/lib", "/lib64", "/usr/lib64"]
    return sorted({str(Path(one).resolve()) for one in found if Path(one).is_dir()})
