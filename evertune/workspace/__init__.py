"""The folder of a run: immutable objects, published atomically, each with a manifest of sizes and digests.

    tmp/<uuid>/            what is being written; swept at the next start
    objects/<key>/         published: MANIFEST.json beside the files it names
    work/<key>/step-*/     resume points of unfinished stages
    cache/                 what can be made again
    quarantine/            objects that did not match their manifest; nothing is deleted
    ledger.sqlite, current.json, lock
    launch.log             what a launcher and its processes have said in the last stage

Publishing: files, each fsynced; the manifest last; the folders fsynced; one rename; the parent fsynced. So an object is
there at once and whole, or not at all. `manifest.py` says what an object is, `disk.py` how bytes get to disk and who
may write, `store.py` puts the two together.
"""

from evertune.workspace.disk import write_atomically
from evertune.workspace.manifest import FileEntry, Manifest, Problem, read_manifest, verify_folder
from evertune.workspace.store import Recovery, Workspace

__all__ = [
    "FileEntry",
    "Manifest",
    "Problem",
    "Recovery",
    "Workspace",
    "read_manifest",
    "verify_folder",
    "write_atomically",
]
