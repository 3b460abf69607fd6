"""The verifier `function`: a function of the user's own, called in a child process with a time limit.

It is trusted code, unlike the programs of the verifier `python`: the child keeps it from ending or stalling the run,
not from doing what the user may do.
"""

import ast
import atexit
import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from evertune.errors import ProbeError
from evertune.hashing import digest_file
from evertune.verifiers.outcome import Outcome

CALLER = Path(__file__).with_name("caller.py")
IMPORT_SECONDS = 120.0


def own_function(argument: Mapping[str, Any], output: str, answer: Any) -> Outcome:
    """What `function(output, answer)` returns: a number from 0 to 1, or a truth value. Valid: always.

    A function that raises, returns anything else, ends its process or takes too long has failed.
    """
    child = _child(argument["folder"], argument["call"])
    try:
        reply = child.ask(json.dumps([output, answer]), argument["seconds"])
    except _Failed as failed:
        return Outcome(0.0, False, error=str(failed))
    score = reply.get("value", -1.0)
    if "error" not in reply and not 0.0 <= score <= 1.0:
        reply = {"error": f"it returned {score!r}, expected a number from 0 to 1"}
    return Outcome(0.0, False, error=reply["error"]) if "error" in reply else Outcome(score, True)


def any_answer(argument: Any, answer: Any, *, place: str) -> None:
    """Nothing is known of what answers a function takes. That it is there is seen where it is located."""


def with_digest(argument: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The argument with the digest of the function's file: what a score depends on.

    The module is looked for in the folder first, then among what is installed; nothing is imported.

    Raises:
        ProbeError: there is no such module, or no such function at its top level.
    """
    return {**argument, "digest": digest_file(_file_of(argument["call"], folder))}


def _file_of(call: str, folder: Path) -> Path:
    module, _, name = call.partition(":")
    parts = Path(*module.split("."))
    candidates = [folder / parts.with_suffix(".py"), folder / parts / "__init__.py"]
    file = next((one for one in candidates if one.is_file()), None) or _installed(module)
    if file is None:
        raise ProbeError(
            f"the verifier 'function' names the module '{module}', which is neither in {folder} nor installed.",
            remedy="Put the file beside the recipe, or correct 'call'.",
        )
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ProbeError(f"{file} is no Python that can be read: {error}.") from error
    if name not in _top_level(tree):
        raise ProbeError(
            f"the verifier 'function' names '{name}', which {file} does not define at its top level.",
            remedy="Correct 'call': it is 'module:function'.",
        )
    return file


def _installed(module: str) -> Path | None:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(found.origin) if found and found.origin and found.origin.endswith(".py") else None


def _top_level(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for one in tree.body:
        if isinstance(one, ast.FunctionDef | ast.ClassDef):
            names.add(one.name)
        elif isinstance(one, ast.Assign):
            names |= {each.id for each in one.targets if isinstance(each, ast.Name)}
        elif isinstance(one, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name.partition(".")[0] for each in one.names}
    return names


class _Failed(Exception):
    """The child said nothing in time, or has ended."""


class _Child:
    """The process that calls one function. It is started at the first question, and again after it was ended."""

    def __init__(self, folder: str, call: str) -> None:
        self._arguments = [folder, *call.split(":")]
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""

    def ask(self, question: str, seconds: float) -> dict[str, Any]:
        """One question, one reply.

        Raises:
            _Failed: it took longer than `seconds`, or the process ended.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(question.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._reply(seconds)

    def end(self) -> None:
        """End the process and what it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process, self._said = None, b""

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CALLER), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        reply = self._reply(IMPORT_SECONDS)
        if reply != {"value": True}:
            self.end()
            raise _Failed(f"it cannot be imported: {reply.get('error', 'it is no function')}")

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._said:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.end()
                raise _Failed(f"it took longer than {seconds:g} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._ended()
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ended(self) -> _Failed:
        assert self._process is not None
        code = self._process.wait()
        self.end()
        return _Failed(
            f"its process ended with {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with code {code}"
        )


@lru_cache(maxsize=64)
def _child(folder: str, call: str) -> _Child:
    child = _Child(folder, call)
    atexit.register(child.end)
    return child
