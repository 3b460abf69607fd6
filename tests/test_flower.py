"""Federated rounds through Flower: files, what a client takes from a server, and a real run on loopback (slow)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from evertune.errors import RecipeError, TrainingError
from evertune.federated.spec import client_order
from evertune.flower.files import ClientFile, ServerFile, client_spec, federated_spec
from evertune.flower.launch import require_free, write_examples
from tests.command import evertune

if TYPE_CHECKING:
    from evertune.model.adapter import Factors

SERVER = "base: tiny-random\nclients: [berlin, paris]\nsteps: 2\nrank: 4\nbatch_rows: 4\ndtype: float32\n"


def _write(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    turns = [{"role": "user", "content": f"{name} 1"}, {"role": "assistant", "content": f"yes {name}"}]
    (place / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    (place / "client.yaml").write_text(f"name: {name}\nbase: tiny-random\ndata:\n  - path: rows.jsonl\n")
    return place / "client.yaml"


def test_the_example_files_are_files_that_can_be_read(tmp_path: Path) -> None:
    paths = write_examples(tmp_path, "tiny-random")
    assert ServerFile.read(paths[0]).clients == ["berlin", "paris"]
    assert [ClientFile.read(one).name for one in paths[1:]] == ["berlin", "paris"]
    with pytest.raises(TrainingError, match="exists"):
        write_examples(tmp_path, "tiny-random")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("too_large: clip", "'too_large' is what is done above norm_bound, and there is none"),
        ("trim: 0.1", "'trim' is read by aggregate: trimmed_mean"),
        ("exchangez: 3", r"server.yaml:7: unknown key 'exchangez'\. Did you mean 'exchanges'\?"),
        ("noise: {multiplier: 1.0}", "needs aggregate: ffa, norm_bound, and weigh: equal"),
        ("exchanges: 0", "exchanges"),
        ("folder: /tmp", "unknown key 'folder'"),
        ("late: 0.5\naggregate: ffa", "'late' needs a rule that is a weighted mean of products"),
        ("late: -1", "late"),
        ("secure: 1.0", "'secure' needs aggregate: ffa and weigh: equal"),
        ("secure: 1.0\naggregate: ffa", "'secure' needs three clients or more"),
    ],
)
def test_a_wrong_file_is_one_clear_error(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(f"{SERVER}{line}\n")
    with pytest.raises(RecipeError, match=told):
        ServerFile.read(tmp_path / "server.yaml")


def test_a_client_takes_settings_and_neither_paths_nor_code(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(SERVER)
    own, served = ClientFile.read(_write(tmp_path, "berlin")), ServerFile.read(tmp_path / "server.yaml")
    base = own.checkpoint()
    settings = federated_spec(served, base).settings()
    assert not [name for name, one in settings.items() if isinstance(one, str) and "/" in one]
    order = client_order(client_spec(settings, own, base), "berlin", 1, base)
    assert [one.path for one in order.new] == [str(tmp_path / "berlin" / "rows.jsonl")]
    assert (order.steps, order.tune["lora"]["rank"], order.plugins) == (2, 4, [])
    for odd in ({"plugins": [{"make": "os:system"}]}, {"start": "/etc"}):
        with pytest.raises(ValueError, match="other settings than this version knows"):
            client_spec({**settings, **odd}, own, base)


def test_without_certificates_it_stays_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(SERVER)
    told = evertune("federated", "server", tmp_path / "server.yaml", "--host", "0.0.0.0", code=3)
    assert "unencrypted" in told
    told = evertune("federated", "client", _write(tmp_path, "paris"), "--server", "10.0.0.7:9092", code=3)
    assert "unencrypted" in told


def test_a_port_that_is_taken_is_an_error_and_not_another_federation() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TrainingError, match=f"--port: 127.0.0.1:{port} cannot be used: Address already in use"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)


def test_flower_missing_is_said_in_words(tmp_path: Path) -> None:
    if (Path(sys.executable).parent / "flower-superlink").exists():
        pytest.skip("Flower is installed here")
    (tmp_path / "server.yaml").write_text(SERVER)
    told = evertune("federated", "server", tmp_path / "server.yaml", code=5)
    assert "flower-superlink is not installed" in told
    assert "evertune[federated]" in told


def python_with_flower() -> str:
    """That of the tests, or EVERTUNE_FLOWER, where it has `evertune[federated]`; without one the test is skipped."""
    python = os.environ.get("EVERTUNE_FLOWER", sys.executable)
    if not (Path(python).parent / "flower-superlink").exists():
        pytest.skip("needs evertune[federated]")
    return python


def federate(
    folder: Path, clients: list[Path], port: int, *, hear: Callable[[str, list[int]], None] = lambda line, nodes: None
) -> Path:
    """Run a federation by its files: a SuperLink and a SuperNode for each client on loopback; returns the update.

    Args:
        hear: called with each line of the server, as it comes, and the process ids of the clients' commands.
    """
    python = python_with_flower()

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [python, "-m", "evertune", "federated", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    link = f"127.0.0.1:{port}"
    server = start("server", folder / "server.yaml", "--port", port)
    nodes = [start("client", one, "--server", link, "--port", port + 2 + i) for i, one in enumerate(clients)]
    lines = []
    try:
        assert server.stdout is not None
        for line in server.stdout:
            lines.append(line)
            hear(line, [one.pid for one in nodes])
        server.wait(timeout=60)
    finally:
        for one in (server, *nodes):
            one.terminate()
            one.wait(timeout=60)
    printed = "".join(lines)
    assert server.returncode == 0, printed
    (folder / "printed.txt").write_text(printed)
    return Path(next(line for line in lines if line.startswith("update: ")).removeprefix("update: ").strip())


def made_here(folder: Path, clients: list[Path]) -> "Factors":
    """The same rounds in this process, client by client, every update seen."""
    from evertune.federated.client import Answer, train_here
    from evertune.federated.server import run_federated
    from evertune.model.adapter import read_factors
    from evertune.train.spec import SftSpec
    from tests.train.stage import open_workspace

    served = ServerFile.read(folder / "server.yaml")
    base = served.checkpoint()
    spec, own = federated_spec(served, base), {one.parent.name: ClientFile.read(one) for one in clients}
    counts = dict.fromkeys(own, 0)

    def here(order: SftSpec, place: Path) -> Answer:
        name = place.name
        counts[name] += 1
        return train_here(
            client_order(client_spec(spec.settings(), own[name], base), name, counts[name] - 1, order.start), place
        )

    workspace = open_workspace(folder / "here")
    run_federated(replace(spec, secure=None), workspace, transport=here)
    return read_factors(workspace.path(spec.key))


def farthest(found: "Factors", expected: "Factors") -> float:
    """The largest distance of a module's update from what it should be, relative to that."""
    return max(float((found[name].delta() - one.delta()).norm() / one.delta().norm()) for name, one in expected.items())


@pytest.mark.slow
def test_flowers_protocol_shows_the_mean_alone_and_does_without_a_third() -> None:
    script = Path(__file__).parent / "secure_sum.py"
    done = subprocess.run(
        [python_with_flower(), "-m", "tests.secure_sum"], cwd=script.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Entries are rounded to a 2^21st part of the range.
    for name, clients in (("all", [11, 12, 13]), ("one out", [11, 13])):
        assert found[name]["clients"] == clients
        assert found[name]["error"] < 2**-20
    assert found["seen"] < 0.15, "800 numbers that have nothing to do with the update"
    assert "too few of 3 clients stayed" in found["two out"]
    assert "a message of type 'train.default'" in found["other type"]


@pytest.mark.slow
def test_two_clients_on_loopback_make_the_update_that_one_machine_makes(tmp_path: Path) -> None:
    from evertune.model.adapter import read_factors

    (tmp_path / "server.yaml").write_text(f"{SERVER}exchanges: 2\nwait_seconds: 600\nlate: 0.5\n")
    clients = [_write(tmp_path, name) for name in ("berlin", "paris")]
    made = federate(tmp_path, clients, 19192)
    assert "exchange 2: used berlin 0.50, paris 0.50" in (tmp_path / "printed.txt").read_text()
    assert farthest(read_factors(made), made_here(tmp_path, clients)) <= 1e-4


def _tell_apps(command: int, number: signal.Signals) -> None:
    """Signal what a client's SuperNode has started; the SuperNode itself goes on telling that it is there."""
    (node,) = map(int, Path(f"/proc/{command}/task/{command}/children").read_text().split())
    for one in (int(place.name) for place in Path("/proc").iterdir() if place.name.isdigit()):
        with contextlib.suppress(ProcessLookupError):
            if one != node and os.getpgid(one) == node:
                os.kill(one, number)


@pytest.mark.slow
def test_a_client_that_comes_too_late_counts_in_the_next_exchange(tmp_path: Path) -> None:
    own = "exchanges: 2\nwait_seconds: 600\nexchange_seconds: 60\nlate: 0.5\n"
    (tmp_path / "server.yaml").write_text(f"{SERVER}{own}")
    clients = [_write(tmp_path, name) for name in ("berlin", "paris")]

    def hold_paris(line: str, nodes: list[int]) -> None:
        if line.startswith("all are here"):
            _tell_apps(nodes[1], signal.SIGSTOP)
        elif line.startswith("exchange 1"):
            _tell_apps(nodes[1], signal.SIGCONT)

    federate(tmp_path, clients, 19222, hear=hold_paris)
    printed = (tmp_path / "printed.txt").read_text()
    assert "exchange 1: used berlin 1.00" in printed
    assert "  paris: did not return" in printed
    assert "  paris, exchange 1: came 1 exchange late" in printed


@pytest.mark.slow
def test_three_clients_add_up_in_secret_what_they_would_add_up_in_the_open(tmp_path: Path) -> None:
    from evertune.model.adapter import read_factors

    server = SERVER.replace("[berlin, paris]", "[berlin, paris, turin]")
    own = "exchanges: 1\naggregate: ffa\nsecure: 1.0\nlr: 0.01\nwait_seconds: 600\n"
    (tmp_path / "server.yaml").write_text(f"{server}{own}")
    clients = [_write(tmp_path, name) for name in ("berlin", "paris", "turin")]
    for one in clients:
        one.write_text(f"{one.read_text()}secure: true\n")
    made = federate(tmp_path, clients, 19202)
    printed = (tmp_path / "printed.txt").read_text()
    assert "exchange 1: used berlin 0.33, paris 0.33, turin 0.33; a secure sum" in printed
    # The sum's own rounding: a 2^21st part of its range of 1 for each entry.
    assert farthest(read_factors(made), made_here(tmp_path, clients)) <= 1e-3


@pytest.mark.slow
def test_a_client_that_insists_on_secure_sums_sends_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(f"{SERVER}exchanges: 1\nwait_seconds: 600\n")
    clients = [_write(tmp_path, name) for name in ("berlin", "paris")]
    clients[0].write_text(f"{clients[0].read_text()}secure: true\n")
    federate(tmp_path, clients, 19212)
    printed = (tmp_path / "printed.txt").read_text()
    assert "exchange 1: used paris 1.00" in printed
    assert "berlin: did not return: this client sends updates into secure sums only." in printed
