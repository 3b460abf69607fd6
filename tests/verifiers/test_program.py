"""The verifier `python`: honest programs graded as they deserve, hostile ones held, forged ones wrong."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from evertune.errors import ProbeError
from evertune.verifiers import check, sandbox, validate
from evertune.verifiers.program import program_of
from evertune.verifiers.sandbox import run_program
from tests.verifiers.hostile import FORGED, HOSTILE, WASTEFUL

NOBODY = 65534


def _score(program: str, *tests: str, setup: str = "") -> float:
    found = check({"python": {}}, output=program, answer={"tests": list(tests), "setup": setup})
    assert found.error is None
    return found.score


HONEST: dict[str, tuple[str, str]] = {
    "numbers": ("def f(x):\n    return x * x", "assert f(3) == 9"),
    "floats": ("def f(x):\n    return x / 2", "assert f(3) == 1.5"),
    "equal across types": ("def f(x):\n    return x", "assert f(3) == 3.0"),
    "texts": ("def f(x):\n    return 'é' * x", "assert f(2) == 'éé'"),
    "tuples in lists": ("def f(x):\n    return [(1, x), None]", "assert f(3) == [(1, 3), None]"),
    "sets": ("def f(x):\n    return {1, x}", "assert f(3) == {3, 1}"),
    "dictionaries": ("def f(x):\n    return {'a': {x: 1.5}}", "assert f(3) == {'a': {3: 1.5}}"),
    "large numbers": ("def f(x):\n    return x ** 20000", "assert f(3) == 3 ** 20000"),
    "computed right sides": ("def f(x):\n    return set([x])", "assert f(3) == set([3])"),
    "not an equation": ("def f(x):\n    return x > 2", "assert f(3)"),
    "nearly": ("import math\ndef f(x):\n    return math.sqrt(x)", "assert abs(f(2) - 1.4142) < 1e-3"),
    "recursion": ("def f(x):\n    return 1 if x == 0 else 2 * f(x - 1)", "assert f(500) == 2 ** 500"),
    "libraries": (
        "import re, json, heapq, itertools\ndef f(x):\n    return re.sub('a', 'b', x)",
        "assert f('aa') == 'bb'",
    ),
    "threads": (
        "import threading\ndef f(x):\n    out = []\n    t = threading.Thread(target=out.append, args=(x,))\n"
        "    t.start(); t.join()\n    return out",
        "assert f(3) == [3]",
    ),
    "printing": ("def f(x):\n    print('hello')\n    return x", "assert f(3) == 3"),
    "standard input": ("import sys\ndef f(x):\n    return sys.stdin.read()", "assert f(3) == ''"),
    "hashing": ("import hashlib\ndef f(x):\n    return hashlib.sha256(x).hexdigest()[:4]", "assert f(b'') == 'e3b0'"),
}


@pytest.mark.parametrize("what", HONEST)
def test_an_honest_program_is_graded_right_and_its_opposite_wrong(what: str) -> None:
    program, test = HONEST[what]
    assert _score(program, test) == 1.0
    assert _score(program, f"assert not ({test.removeprefix('assert ')})") == 0.0


def test_every_test_must_hold_and_setup_runs_before_them() -> None:
    program = "def f(x):\n    return x + 1"
    assert _score(program, "assert f(1) == 2", "assert f(2) == 3") == 1.0
    assert _score(program, "assert f(1) == 2", "assert f(2) == 4") == 0.0
    assert _score(program, "assert f(one) == two", setup="one, two = 1, 2") == 1.0


@pytest.mark.parametrize(
    ("output", "valid"),
    [("", False), ("def f(:", False), ("I cannot help with that.", False), ("x = 1", True), ("raise ValueError", True)],
)
def test_an_answer_without_a_program_that_python_reads_has_not_the_form(output: str, valid: bool) -> None:
    found = check({"python": {}}, output=output, answer={"tests": ["assert f(1) == 2"]})
    assert (found.score, found.valid, found.error) == (0.0, valid, None)


def test_the_program_is_the_last_fenced_block_or_everything() -> None:
    assert program_of("Sure.\n```python\na = 1\n```\nBetter:\n```py\na = 2\n```\nDone.") == "a = 2"
    assert program_of("```\na = 3") == "a = 3"
    assert program_of("a = 4") == "a = 4"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    return tmp_path


def _attempt(name: str, canary: Path) -> str:
    return "did = []\n" + HOSTILE[name].format(canary=canary, pid=os.getpid())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_held(name: str, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "a token")
    ran = run_program(f"{_guarded(_attempt(name, canary))}", ["did"])
    assert ran.values in ((), ([],)), ran
    assert sorted(one.name for one in canary.iterdir()) == ["secret"]
    assert (canary / "secret").read_text() == "secret"
    assert not Path("/tmp/evertune-hostile").exists()


def _guarded(program: str) -> str:
    """The program with whatever it raises caught, so that what it had managed before is seen."""
    inner = "\n".join(f"    {line}" for line in program.splitlines()[1:])
    return f"did = []\ntry:\n{inner}\nexcept BaseException:\n    pass"


# What any program may do when nothing holds it, also without root.
UNHELD = (
    "read a file outside", "read the passwords", "read its own token", "list a folder", "write a file",
    "delete a file", "rename a file", "make a folder", "change a mode", "fork", "start a process", "run a shell",
    "open a TCP connection", "send a datagram", "open a unix socket", "kill a neighbour",
    "have a neighbour signalled", "choose the signal", "make a file in memory",
    "make a symbolic link",
)  # fmt: skip


@pytest.mark.parametrize("name", UNHELD)
def test_without_the_sandbox_the_same_programs_do_their_harm(
    name: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would only show that they do not run."""
    monkeypatch.setenv("SECRET_TOKEN", "a token")
    program = f"{_guarded(_attempt(name, canary))}\nimport json, sys\nsys.stdout.write(json.dumps(len(did)))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=canary, timeout=30
    )
    assert json.loads(done.stdout) == 1, done


def test_reading_a_programs_reply_ends_no_process() -> None:
    """Who may choose the owner and the signal of the pipe it answers on can have our reading kill the owner."""
    program = (
        "import fcntl\n"
        "def f(x):\n"
        "    for n in range(1, 32):\n"
        "        for command, value in ((8, {pid}), (10, 9), (4, 0o20001)):\n"
        "            try: fcntl.fcntl(n, command, value)\n"
        "            except OSError: pass\n"
        "    return x"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        ran = run_program(program.format(pid=victim.pid), ["f(3)"])
        assert ran.values == (3,)
        victim.communicate(b"\n", timeout=30)
    assert victim.returncode == 0


@pytest.mark.parametrize("name", WASTEFUL)
def test_a_wasteful_program_gets_a_verdict_in_time(name: str) -> None:
    began = time.monotonic()
    ran = run_program(WASTEFUL[name], ["1"], wall_seconds=3.0)
    if name not in ("start many threads",):
        assert ran.error is not None
    assert time.monotonic() - began < 60


def test_memory_and_time_of_the_processor_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run_program("x = bytearray(700 << 20)", ["1"])
    assert ran.error is not None
    assert "MemoryError" in ran.error
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    ran = run_program("while True: pass", ["1"], wall_seconds=60.0)
    assert ran.error == "it ended with SIGKILL and said nothing"


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_program_is_wrong(name: str) -> None:
    assert _score(FORGED[name], "assert f(3) == 9") == 0.0


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sandbox._run

    def unheld(code: str, expressions: Any, wall_seconds: float) -> sandbox.Ran:
        # As if the kernel let a program open a socket.
        return sandbox.Ran((1,), None) if "socket" in code else real(code, expressions, wall_seconds)

    monkeypatch.setattr(sandbox, "_run", unheld)
    sandbox.require_confinement.cache_clear()
    try:
        with pytest.raises(ProbeError, match="a program could open a connection"):
            run_program("x = 1", ["x"])
        with pytest.raises(ProbeError, match="cannot be confined"):
            validate({"python": {}}, {"tests": ["assert x == 1"]}, place="rows.jsonl:1")
    finally:
        sandbox.require_confinement.cache_clear()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("assert f(1) == 2", "expected an object with 'tests'"),
        ({"tests": []}, "expected an object with 'tests'"),
        ({"tests": ["f(1) == 2"]}, "expected one assert statement"),
        ({"tests": ["assert f(1 == 2"]}, "expected one assert statement"),
        ({"tests": ["assert f(1) == 2; assert f(2) == 3"]}, "expected one assert statement"),
        ({"tests": ["assert f(1) == 2"], "setup": "import ("}, "expected one assert statement"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_with_their_place(answer: Any, words: str) -> None:
    with pytest.raises(ProbeError) as caught:
        validate({"python": {}}, answer, place="rows.jsonl:7")
    assert "rows.jsonl:7" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/usr/bin/python3").exists(),
    reason="becoming another user takes root, and a Python that everyone may read",
)
def test_it_holds_for_an_unprivileged_user_too() -> None:
    """The same programs from a process of user `nobody`, who gets a copy of the launcher that it can read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        launcher = Path(name) / "launcher.py"
        launcher.write_bytes(sandbox.LAUNCHER.read_bytes())
        launcher.chmod(0o644)
        code = (
            "import os, sys\n"
            "from pathlib import Path\n"
            "from evertune.verifiers import sandbox\n"
            "from tests.verifiers.hostile import HOSTILE\n"
            f"sandbox.LAUNCHER = Path({str(launcher)!r})\n"
            "sys.executable = '/usr/bin/python3'\n"
            "sandbox._library_roots = lambda: ['/usr/lib', '/lib', '/lib64']\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "held = [sandbox.run_program('did = []\\n' + one.format(canary='/etc', pid=os.getppid()), ['did']).values\n"
            "        in ((), ([],)) for one in HOSTILE.values()]\n"
            "honest = sandbox.run_program('def f(x): return x * x', ['f(3)']).values == (9,)\n"
            "sys.stdout.write(f'{os.getuid()} {sum(held)} {len(held)} {honest}')\n"
        )
        root = Path(__file__).parent.parent.parent
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{NOBODY} {len(HOSTILE)} {len(HOSTILE)} True", done.stderr[-500:]
