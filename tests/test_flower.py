"""Federated rounds through Flower: files, what a client takes from a server, and a real run on loopback (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evertune.errors import RecipeError, TrainingError
from evertune.federated.spec import client_order
from evertune.flower.files import ClientFile, ServerFile, client_spec, federated_spec
from evertune.flower.launch import write_examples
from tests.command import evertune

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
        ("stepz: 3", r"server.yaml:7, stepz: unknown key 'stepz'|unknown key 'stepz'"),
        ("noise: {multiplier: 1.0}", "needs aggregate: ffa, norm_bound, and weigh: equal"),
        ("exchanges: 0", "exchanges"),
        ("folder: /tmp", "unknown key 'folder'"),
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


def test_flower_missing_is_said_in_words(tmp_path: Path) -> None:
    if (Path(sys.executable).parent / "flower-superlink").exists():
        pytest.skip("Flower is installed here")
    (tmp_path / "server.yaml").write_text(SERVER)
    told = evertune("federated", "server", tmp_path / "server.yaml", code=5)
    assert "flower-superlink is not installed" in told
    assert "evertune[federated]" in told


@pytest.mark.slow
def test_two_clients_on_loopback_make_the_update_that_one_machine_makes(tmp_path: Path) -> None:
    """Needs `evertune[federated]`, in the environment of the tests or as EVERTUNE_FLOWER, a python that has it."""
    python = os.environ.get("EVERTUNE_FLOWER", sys.executable)
    if not (Path(python).parent / "flower-superlink").exists():
        pytest.skip("needs evertune[federated]")
    (tmp_path / "server.yaml").write_text(f"{SERVER}exchanges: 2\nwait_seconds: 600\n")
    clients = [_write(tmp_path, name) for name in ("berlin", "paris")]

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [python, "-m", "evertune", "federated", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    server = start("server", tmp_path / "server.yaml", "--port", 19192)
    nodes = [start("client", one, "--server", "127.0.0.1:19192", "--port", 19194 + i) for i, one in enumerate(clients)]
    try:
        printed = server.communicate(timeout=1800)[0]
    finally:
        for one in (server, *nodes):
            one.terminate()
            one.wait(timeout=60)
    assert server.returncode == 0, printed
    assert "exchange 2: used berlin 0.50, paris 0.50" in printed
    made = Path(next(line for line in printed.splitlines() if line.startswith("update: ")).removeprefix("update: "))
    # The same rounds in this process, client by client.
    from evertune.federated.client import Answer, train_here
    from evertune.federated.server import run_federated
    from evertune.model.adapter import read_factors
    from evertune.train.spec import SftSpec
    from tests.train.stage import open_workspace

    served = ServerFile.read(tmp_path / "server.yaml")
    base = served.checkpoint()
    spec, own = federated_spec(served, base), {one.parent.name: ClientFile.read(one) for one in clients}
    counts = dict.fromkeys(own, 0)

    def here(order: SftSpec, folder: Path) -> Answer:
        name = folder.name
        counts[name] += 1
        return train_here(
            client_order(client_spec(spec.settings(), own[name], base), name, counts[name] - 1, order.start), folder
        )

    workspace = open_workspace(tmp_path / "here")
    run_federated(spec, workspace, transport=here)
    for name, factor in read_factors(workspace.path(spec.key)).items():
        other = read_factors(made)[name]
        expected = factor.b_OR @ factor.a_RI * factor.scale
        found = other.b_OR @ other.a_RI * other.scale
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
