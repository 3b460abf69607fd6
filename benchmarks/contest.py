"""Programs that take turns: each runs in a process of its own and performs one step when it is told to.

So that a machine's mood falls on all alike, the steps of all contestants are interleaved. Processor time is counted
over all threads of a process; memory is the highest resident set since the contestant was ready.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evertune.process import ENVIRONMENT


class Turns:
    """A contestant's side: `begin` when it is ready, then `wait`, a step, `tell`, again and again; `wait` is False at
    the end. On a GPU its work is waited for, and its memory is what counts."""

    def __init__(self, device: str = "cpu") -> None:
        self._is_gpu = device == "cuda"

    def begin(self) -> None:
        if self._is_gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._memory = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
            self._memory = memory_mib("VmRSS")
        self._say({"ready": True})

    def wait(self) -> bool:
        line = sys.stdin.readline().strip()
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()
        return line == "go"

    def tell(self, **facts: Any) -> None:
        if self._is_gpu:
            import torch

            torch.cuda.synchronize()
            highest = torch.cuda.max_memory_allocated() / 2**20
        else:
            highest = memory_mib("VmHWM")
        wall, cpu = time.monotonic() - self._wall, _cpu_seconds() - self._cpu
        peak = highest - self._memory
        self._say({"cpu": cpu, "wall": wall, "peak_mib": peak, "ready_mib": self._memory, **facts})

    @staticmethod
    def _say(facts: dict[str, Any]) -> None:
        print("@" + json.dumps(facts), flush=True)


@dataclass
class Contestant:
    """The other side of a contestant's process, and what it has told."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    told: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, command: Sequence[str], *, threads: int, log: Path) -> "Contestant":
        environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        return cls(name, process, log)

    def wait_ready(self) -> None:
        """Until it says that it is: many can get ready at a time."""
        try:
            self._hear()
        except RuntimeError as error:
            raise RuntimeError(f"{error}; see {self.log}") from None

    def go(self) -> dict[str, Any]:
        """Let it perform one step; returns what it tells of it."""
        self._write("go")
        self.told.append(self._hear())
        return self.told[-1]

    def stop(self) -> None:
        self._write("stop")
        self.process.wait(120)

    def total(self, name: str) -> float:
        return float(sum(one[name] for one in self.told))

    def _write(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                found: dict[str, Any] = json.loads(line[1:])
                return found
        raise RuntimeError(f"contestant '{self.name}' ended with {self.process.wait()}")


def interleave(
    contestants: Sequence[Contestant], *, steps: int, each: Callable[[int], None] = lambda step: None
) -> None:
    """Let all contestants perform `steps` steps in turn."""
    for step in range(steps):
        for one in contestants:
            one.go()
        each(step)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median [lowest, highest]`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine() -> dict[str, Any]:
    """Date, processor, cores and load, and the GPU where there is one, for the head of a table."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} cores of {model}",
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def unit_of(device: str) -> str:
    """The time that tells: of the processor, or, where a GPU works, of the clock."""
    return "wall" if device == "cuda" else "CPU"


def memory_mib(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
