"""Every objective on two processes: the same losses and weights as on one, up to the order of sums."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evertune.stages import KINDS
from tests.train.stage import make_spec, open_workspace, published_weights
from tests.train.test_dpo import make_dpo
from tests.train.test_rl import make_rl

# Short answers whose first letter decides: some of a group's answers do, some do not.
REWARD = {"asked": {"regex": "(?s)[ -~].*"}}
# Without dropout, whose masks are each process's own.
TUNE = {"lora": {"rank": 4, "targets": "all-linear"}}
ORDERS: dict[str, Any] = {
    "sft": lambda folder, model: make_spec(
        folder, model, anchor={"on": "both"}, micro_batch_rows=1, steps=4, tune=TUNE
    ),
    "dpo": lambda folder, model: make_dpo(folder, model, anchor={"on": "both"}, micro_batch_rows=1, steps=4, tune=TUNE),
    "rl": lambda folder, model: make_rl(
        folder, model, verifiers=REWARD, micro_batch_rows=3, steps=4, iterations=2, tune=TUNE
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ORDERS)
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    spec = ORDERS[kind](tmp_path, tiny_model)
    alone, launched = open_workspace(tmp_path / "alone"), open_workspace(tmp_path / "launched")
    facts = KINDS[kind].perform(spec.to_json(), alone)["checkpoint"]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"kind": kind, "workspace": str(launched.root), "spec": spec.to_json()}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613"]
    subprocess.run([*command, "-m", "evertune.worker", str(job)], check=True, timeout=300, cwd=Path.cwd())
    answer = json.loads(job.with_suffix(".result.json").read_text())["result"]["checkpoint"]
    assert answer["final"].keys() == facts["final"].keys()
    for name, value in facts["final"].items():
        assert answer["final"][name] == pytest.approx(value, abs=1e-4), name
    one, other = published_weights(alone, spec), published_weights(launched, spec)
    for name in one:
        assert torch.allclose(one[name], other[name], atol=5e-5), name
