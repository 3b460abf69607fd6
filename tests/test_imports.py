"""Imports point one way, and the light commands stay light: both are read from the code, not trusted."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "evertune"

# Each room may import the rooms named here, and no other. Those of `OPEN_TO_ALL` import none themselves.
OPEN_TO_ALL = {"errors", "hashing", "failpoint", "methods", "durations"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "hashing": set(),
    "failpoint": set(),
    "methods": set(),
    "durations": set(),
    "method_pages": set(),
    "preload": set(),
    "demo": set(),
    "recipe": set(),
    "workspace": set(),
    "agents": set(),
    "verifiers": {"agents"},
    "ledger": {"workspace"},
    "model": {"workspace"},
    "data": {"agents", "model", "workspace"},
    "measure": set(),
    "train": {"agents", "data", "model", "workspace", "measure"},
    "federated": {"model", "train", "workspace"},
    "flower": {"federated", "model", "recipe", "train", "workspace"},
    # Comes in by entry points: nothing here is imported by any other room.
    "academic": {"recipe", "data", "measure", "model", "train"},
    "probe": {"agents", "data", "model", "workspace", "verifiers", "measure"},
    "merge": {"model", "recipe"},
    "merge_search": {"merge", "model", "probe", "recipe"},
    "gate": {"measure", "probe"},
    "erosion": {"gate", "measure"},
    "rescue": {"gate", "probe", "recipe"},
    "consolidation": {"gate", "probe", "rescue"},
    "ratchet": {"gate", "probe"},
    "report": {"ledger", "measure", "workspace"},
    "advice": {"display", "lineage", "recipe", "run", "workspace"},
    "comparison_table": {"comparison"},
    "comparison": {"check", "display", "ledger", "lineage", "measure", "recipe", "run", "workspace"},
    "safety": set(),
    "watching": {"display", "lineage", "report", "workspace"},
    "retraining": {
        "data",
        "display",
        "ledger",
        "lineage",
        "measure",
        "model",
        "plan",
        "probe",
        "process",
        "recipe",
        "report",
        "run",
        "scoring",
    },
    "audit": {
        "display",
        "ledger",
        "lineage",
        "measure",
        "model",
        "plan",
        "probe",
        "process",
        "recipe",
        "scoring",
        "suites",
    },
    "blame": {
        "data",
        "display",
        "gate",
        "influence",
        "ledger",
        "lineage",
        "model",
        "plan",
        "probe",
        "process",
        "recipe",
        "run",
        "scoring",
        "workspace",
    },
    "provenance": {"data", "ledger", "lineage", "workspace"},
    "lineage": {"ledger", "model", "workspace"},
    "stages": {"federated", "plan", "probe", "recipe", "data", "merge", "model", "train", "verifiers", "workspace"},
    "influence": {"data", "measure", "merge", "model", "probe"},
    "worker": {"stages", "influence", "merge", "probe", "model", "workspace", "early", "gate"},
    "process": {"worker"},
    "plan": {"recipe", "data", "model", "probe", "train", "gate", "workspace"},
    "check": {
        "measure",
        "merge",
        "recipe",
        "data",
        "model",
        "train",
        "probe",
        "gate",
        "ledger",
        "workspace",
        "verifiers",
    },
    "display": {"consolidation", "gate", "probe", "workspace"},
    "listing": {"lineage", "ledger", "model", "workspace", "recipe"},
    "scoring": {"process", "display", "model", "probe", "workspace"},
    "run": {
        "plan",
        "stages",
        "scoring",
        "process",
        "display",
        "erosion",
        "consolidation",
        "rescue",
        "ratchet",
        "gate",
        "ledger",
        "lineage",
        "model",
        "probe",
        "recipe",
        "report",
        "workspace",
    },
    "hooks": {"suites", "gate", "model", "probe"},
    "judgement": {"gate", "probe"},
    "early": {"gate", "probe"},
    "renderings": set(),
    "suites": {"recipe", "data", "model", "probe", "gate"},
    "judging": {
        "suites",
        "judgement",
        "scoring",
        "process",
        "display",
        "gate",
        "model",
        "probe",
        "recipe",
        "workspace",
    },
}
# Whole-package doors: they may import anything below them.
TOP = {"cli", "commands", "__main__", "__init__"}

LIGHT = (
    "recipe",
    "retraining",
    "gate",
    "ledger",
    "report",
    "cli",
    "audit",
    "blame",
    "check",
    "lineage",
    "plan",
    "run",
    "display",
    "workspace",
    "stages",
)
HEAVY = ("torch", "transformers", "accelerate", "peft")


def _room(path: Path, package: Path = PACKAGE) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def _imports(path: Path) -> set[str]:
    """Rooms of evertune that a file imports anywhere, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "evertune":
                names = [f"evertune.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("evertune.")}
    return rooms


def turned_arrows(package: Path = PACKAGE) -> list[str]:
    """Every import that points the wrong way, as `file: room -> room`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = _room(path, package)
        if room in TOP:
            continue
        allowed = MAY_IMPORT.get(room, set()) | OPEN_TO_ALL | {room}
        found += [f"{path.relative_to(package)}: {room} -> {other}" for other in sorted(_imports(path) - allowed)]
    return found


def test_imports_point_one_way() -> None:
    assert turned_arrows() == []


def test_every_room_is_in_the_table() -> None:
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - TOP
    assert rooms == set(MAY_IMPORT)


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {room for room, uses in MAY_IMPORT.items() if room not in done and uses <= done}
        assert free, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= free


def test_an_import_that_turns_round_is_named(tmp_path: Path) -> None:
    # The check itself is seen to go red: probe importing train is the classic mistake.
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "score.py").write_text("def f():\n    from evertune.train import losses\n")
    assert turned_arrows(tmp_path) == ["probe/score.py: probe -> train"]


def test_light_rooms_import_no_torch() -> None:
    modules = ", ".join(f"evertune.{room}" for room in LIGHT)
    code = f"import sys, {modules}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_import_what_they_need_and_no_more() -> None:
    """What keeps `--help`, `log` and `report` below a second: no time is measured, only what is loaded."""
    unneeded = {
        "cli": ("numpy", "pydantic", "jinja2", "scipy", "pyarrow", "rich"),
        "lineage": ("jinja2", "scipy", "pyarrow"),
        "report": ("pydantic", "scipy", "pyarrow"),
        "check": ("scipy", "rich"),
    }
    for room, names in unneeded.items():
        code = f"import sys, evertune.{room}; print([name for name in {names!r} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", room


def test_a_check_loads_no_more_than_it_imports() -> None:
    recipe = PACKAGE.parent / "recipes" / "debug.yaml"
    names = ("torch", "scipy", "pyarrow", "rich", "numpy.ma")
    code = (
        f"import sys; sys.argv = ['evertune', 'check', {str(recipe)!r}]\n"
        "from evertune.cli import main\n"
        "try: main()\n"
        f"except SystemExit as end: print(end.code, [name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout


def test_nothing_but_the_door_leads_to_academic_methods() -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if _room(path) != "academic" and "academic" in _imports(path)
    }
    assert importers == set()
    code = "import sys, evertune.run, evertune.worker, evertune.train.stage, evertune.check; "
    code += "print([name for name in sys.modules if 'academic' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_library_of_the_annex_has_one_door() -> None:
    doors = {"flwr": {"flower/apps.py", "flower/secure.py"}, "dp_accounting": {"federated/privacy.py"}}
    for library, expected in doors.items():
        importers = {
            str(path.relative_to(PACKAGE))
            for path in PACKAGE.rglob("*.py")
            if re.search(rf"^ *(from|import) {library}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        }
        assert importers == expected
    for room in ("academic", "flower"):
        leads = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if room in _imports(path)}
        assert {one for one in leads if not one.startswith((f"{room}/", "commands/"))} == set()


def test_only_the_door_opens_models() -> None:
    # A classifier is no language model: it is read by the verifier that asks it, on the same terms.
    doors = {"model/open.py", "model/gguf.py", "verifiers/classifier.py"}
    callers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert callers <= doors
