"""A child that calls one function of a user's for each line it is given. Run by path: nothing else is imported.

`caller.py FOLDER MODULE NAME`, then for each line `[output, answer]` one line `{"value"}` or `{"error"}` back. The
first line it says is of the import. What the function prints goes to standard error.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


def main(folder: str, module: str, name: str) -> None:
    """Import the function, then serve until standard input ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[0] = folder  # else this file's neighbours would be found first
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def say(**reply: Any) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    try:
        function = getattr(importlib.import_module(module), name)
    except BaseException as error:
        say(error=f"{type(error).__name__}: {error}")
        return
    say(value=callable(function))
    for line in questions:
        try:
            found = function(*json.loads(line))
            with contextlib.suppress(AttributeError):
                found = found.item()  # numbers of NumPy and torch
            if not isinstance(found, bool | int | float):
                raise TypeError(f"it returned {found!r}, expected a number from 0 to 1 or a truth value")
            say(value=float(found))
        except Exception as error:
            say(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
