"""Ray as the place where parts of a data set are worked on: the one door to that library.

Ray Data runs a function over the parts, on the cores of this machine or on a cluster that `RAY_ADDRESS` names, and
starts a part again whose machine is lost. Every machine needs this package and sees the files under the same paths.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from evertune import errors
from evertune.errors import DataError, EvertuneError

P = TypeVar("P")
R = TypeVar("R")


class Piece(NamedTuple):
    """A piece of what work on a part gave, with the number of the part."""

    part: int
    value: Any


class Engine(Protocol):
    """Something that works on many parts at a time."""

    def map(self, work: Callable[[P], Iterable[R]], parts: Sequence[P]) -> Iterator[Piece]:
        """What the work on each part yields, piece by piece: in the order of the parts, and of the pieces in each.

        Work is a function of its part alone, since a part may be begun again.

        Raises:
            EvertuneError: as the work raises it.
        """


class RayEngine:
    """Works with Ray Data.

    Args:
        workers: processes, where Ray is not running yet and no `RAY_ADDRESS` is set; else the cluster decides.

    Raises:
        DataError: Ray is not installed, or cannot be started.
    """

    def __init__(self, workers: int) -> None:
        # Ray tells its makers what is used unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise DataError("Ray Data is not installed.", remedy="pip install 'evertune[scale]'") from error
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            here = {} if address else {"num_cpus": workers, "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
            except Exception as error:  # the library raises what its processes and the network raise
                raise DataError(
                    f"Ray cannot be started: {error}.", remedy="Check RAY_ADDRESS and the cluster."
                ) from error

    def map(self, work: Callable[[P], Iterable[R]], parts: Sequence[P]) -> Iterator[Piece]:
        import ray
        from ray import cloudpickle

        if not parts:
            return
        _quieten()
        given = [{"part": i, "value": cloudpickle.dumps(one)} for i, one in enumerate(parts)]
        shared = ray.put(work)

        def perform(batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
            number = int(batch["part"][0])
            try:
                for one in ray.get(shared)(cloudpickle.loads(batch["value"][0])):
                    yield _row(number, "", cloudpickle.dumps(one))
            except EvertuneError as error:
                facts = {"message": error.message, "remedy": error.remedy}
                yield _row(number, type(error).__name__, cloudpickle.dumps(facts))

        done = ray.data.from_items(given, override_num_blocks=len(given)).map_batches(perform, batch_size=1)
        for row in done.iter_rows():
            value = cloudpickle.loads(row["value"])
            if row["error"]:
                raise getattr(errors, row["error"])(value["message"], remedy=value["remedy"])
            yield Piece(int(row["part"]), value)


def _row(part: int, error: str, value: bytes) -> dict[str, list[Any]]:
    return {"part": [part], "error": [error], "value": [value]}


def _quieten() -> None:
    """Ray Data in the order of its input, and without lines about itself: its own warnings and errors stay."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data.dataset"):
        logging.getLogger(name).setLevel(logging.ERROR)
