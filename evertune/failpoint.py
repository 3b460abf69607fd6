"""Named places where a test can make the process die or the disk fail.

Every publish and every ledger write passes failpoints before and after its effect. With the environment variable
`EVERTUNE_FAILPOINT=name[:n][:action]` the n-th passage (1 by default) of that name kills the process (`kill`, the
default), or raises `OSError` (`enospc`, `eio`). Without the variable a passage costs one dictionary look-up.
"""

import errno
import os
import signal
from collections import Counter

# Every name in the code, in the order a run meets them; a test walks this list, and `reach` refuses any other name.
FAILPOINTS = (
    "publish.begin",
    "publish.file_synced",
    "publish.manifest_synced",
    "publish.renamed",
    "publish.end",
    "ledger.begin",
    "ledger.inserted",
    "ledger.committed",
    "resume.begin",
    "resume.file_synced",
    "resume.manifest_synced",
    "resume.renamed",
    "resume.end",
    "current.begin",
    "current.end",
)
# The same for a merge, which may run without a workspace.
MERGE_FAILPOINTS = ("merge.segment", "merge.finished")

_passages: Counter[str] = Counter()


def reach(name: str) -> None:
    """Pass the failpoint `name`; dies or raises only when `EVERTUNE_FAILPOINT` names it."""
    if name not in FAILPOINTS and name not in MERGE_FAILPOINTS:
        raise AssertionError(f"failpoint {name!r} is in no list of failpoints")
    wanted = os.environ.get("EVERTUNE_FAILPOINT")
    if not wanted:
        return
    target, *options = wanted.split(":")
    if target != name:
        return
    count = next((int(option) for option in options if option.isdigit()), 1)
    action = next((option for option in options if not option.isdigit()), "kill")
    _passages[name] += 1
    if _passages[name] != count:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    code = {"enospc": errno.ENOSPC, "eio": errno.EIO}[action]
    raise OSError(code, os.strerror(code), f"failpoint {name}")
