"""Are honest programs graded right? `python -m benchmarks.sandbox --data DATA [--rows 300]`

MBPP's reference solutions, each against its own task's tests, which it passes, and against the next task's, which it
does not. Asked of the verifier `python` as whoever runs this and, where that is root, as user 65534 with the system's
Python, which everyone may read. Prints the first that are graded otherwise. What hostile programs may do is tested in
tests/verifiers/.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evertune.verifiers import check, sandbox

NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mbpp")
    parser.add_argument("--rows", type=int, default=300)
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, {platform.release()}")
    files = [given.data / "mbpp" / f"{split}.jsonl" for split in ("train", "test", "validation")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    grade(rows[: given.rows])
    if os.getuid() == 0 and Path(SYSTEM_PYTHON).exists():
        grade_as_nobody(rows[: given.rows])


def grade_as_nobody(rows: Sequence[dict[str, Any]]) -> None:
    """Grade in a child that has become an unprivileged user, who gets a copy of the launcher that it can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        launcher = Path(shutil.copy(sandbox.LAUNCHER, name))
        launcher.chmod(0o644)
        child = os.fork()
        if child:
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                raise SystemExit(f"user {NOBODY}: it failed")
            return
        code = 1
        try:
            sandbox.LAUNCHER, sys.executable = launcher, SYSTEM_PYTHON
            sandbox._library_roots = lambda: ["/usr/lib", "/lib", "/lib64"]  # type: ignore[assignment]
            sandbox.require_confinement.cache_clear()
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            grade(rows)
            code = 0
        finally:
            os._exit(code)


def grade(rows: Sequence[dict[str, Any]]) -> None:
    began, right = time.monotonic(), {"own": 0, "other": 0}
    odd = []
    for number, row in enumerate(rows):
        other = rows[(number + 1) % len(rows)]
        for name, task, expected in (("own", row, 1.0), ("other", other, 0.0)):
            found = check({"python": {}}, output=f"```python\n{row['solution']}\n```", answer=task["answer"])
            if found.error is None and found.score == expected:
                right[name] += 1
            else:
                odd.append(f"{row['id']} against {task['id']}: {found.score}, {found.error}")
    seconds = time.monotonic() - began
    n = len(rows)
    print(
        f"user {os.getuid()}: {right['own']} of {n} solutions pass their own tests, {right['other']} of {n} fail "
        f"another task's; {1000 * seconds / (2 * n):.0f} ms a program"
    )
    for one in odd[:SHOWN]:
        print(f"  {one}", flush=True)


if __name__ == "__main__":
    main()
