"""What clients send back to the server: updates one by one, in time or late, or a sum that nobody can take apart."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evertune.federated.client import Answer
from evertune.train.spec import SftSpec


@dataclass(frozen=True)
class Late:
    """An answer that came after its exchange had closed.

    Attributes:
        exchange: the one it was asked for in, from 0.
    """

    client: str
    exchange: int
    answer: Answer


@dataclass(frozen=True)
class Returns:
    """Answers of the clients that were asked, by name, and those to earlier exchanges that have come since."""

    answers: Mapping[str, Answer]
    late: Sequence[Late] = ()


@dataclass(frozen=True)
class Sum:
    """The mean of updates that were added up without the server seeing one of them.

    Attributes:
        folder: an adapter, the mean of its clients'.
        clients: those whose updates are in it.
        losses: theirs, which are told openly.
        missing: why the others' are not.
    """

    folder: Path
    clients: Sequence[str]
    losses: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


Orders = Mapping[str, SftSpec]
Ask = Callable[[int, Orders, Path], Returns]
"""All clients of an exchange at once: its number from 0, their orders by name, and a folder for what they send."""
AskSum = Callable[[int, Orders, Path], Sum]
"""The same where only the mean of all updates comes back."""


def staleness_discount(exchanges_late: int, power: float) -> float:
    """What the weight of a late update is multiplied by: (1 + exchanges late)^-power, 1 in time.

    The polynomial discount of FedAsync (Xie et al. 2019, arXiv:1903.03934), with exchanges in place of single updates.
    """
    return float((1 + exchanges_late) ** -power)


class Post:
    """Orders under way, and their answers whenever they come: an exchange closes, its orders stay open.

    Args:
        send: gives an exchange's orders to their clients; one key each, in their order.
        collect: what has come under these keys since it was last asked.
        read: the answer in what has come to an order; a folder for what was sent.
        seconds: after which an exchange closes.
        pause: seconds between two looks.
    """

    def __init__(
        self,
        *,
        send: Callable[[int, Orders], Sequence[str]],
        collect: Callable[[Sequence[str]], Mapping[str, Any]],
        read: Callable[[Any, SftSpec, Path], Answer],
        seconds: float,
        pause: float = 1.0,
    ) -> None:
        self._send, self._collect, self._read = send, collect, read
        self._seconds, self._pause = seconds, pause
        self._under_way: dict[str, tuple[str, int, SftSpec]] = {}

    def ask(self, exchange: int, orders: Orders, folder: Path) -> Returns:
        """Send orders, and wait until all have answered or the exchange closes; earlier ones may answer meanwhile."""
        for key, (name, order) in zip(self._send(exchange, orders), orders.items(), strict=True):
            self._under_way[key] = (name, exchange, order)
        answers: dict[str, Answer] = {}
        late: list[Late] = []
        until = time.monotonic() + self._seconds
        while True:
            for key, reply in self._collect(list(self._under_way)).items():
                name, asked_in, order = self._under_way.pop(key)
                if asked_in == exchange:
                    answers[name] = self._read(reply, order, folder / name)
                else:
                    late.append(Late(name, asked_in, self._read(reply, order, folder / f"{name}-{asked_in + 1}")))
            if len(answers) == len(orders) or time.monotonic() > until:
                break
            time.sleep(self._pause)
        missing = {"error": f"no answer came within {self._seconds:g} s"}
        return Returns({name: answers.get(name, missing) for name in orders}, late)
