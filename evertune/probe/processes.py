"""Parts of a suite, each scored by a process of its own.

A token more of forty answers is a thousand small operations. Two threads that share them mostly wait for each other;
two processes of one thread each do not. Children are forked, so they share the model's memory; what they find comes
back through pipes, and only the parent writes.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from evertune.errors import ProbeError
from evertune.model.forward import CACHE_BYTES
from evertune.model.open import OpenModel

A = TypeVar("A")
T = TypeVar("T")
MOST_THREADS = 8


def is_divided(opened: OpenModel) -> bool:
    """Whether parts are scored by processes of one thread each, rather than by this one with all its threads.

    Decided by machine, settings and model alone: the last bits of a score follow the number of threads, and must not
    follow which other probes are asked. Forked threads of OpenMP are not there any more, so a child has one; with more
    threads than `MOST_THREADS` a suite has too few parts for them, and a large model's products keep them busy.
    """
    threads = torch.get_num_threads()
    may_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if opened.device.type != "cpu" or not may_fork or not 2 <= threads <= MOST_THREADS:
        return False
    weights = sum(one.nbytes for one in opened.model.parameters())
    return threads * (2 * weights + CACHE_BYTES) <= _memory_bytes()


def in_processes(work: Callable[[A], T], given: Sequence[A], processes: int) -> Iterator[T]:
    """`work(one)` of each one given, begun in their order, as they are done.

    Args:
        given: is sent through pipes, as results are; `work` itself and what it refers to are forked.

    Raises:
        ProbeError: a child died.
        Exception: what `work` raised, with the child's traceback as a note; children still at work are ended.
    """
    context = multiprocessing.get_context("fork")
    life, our_life = context.Pipe(duplex=False)
    children: dict[Connection, Any] = {}
    left, at_work = iter(given), 0
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            inherited = [ours, our_life, *children]
            child = context.Process(target=_serve, args=(work, theirs, life, inherited), daemon=True)
            child.start()
            theirs.close()
            children[ours] = child
        for pipe, one in zip(children, itertools.islice(left, processes), strict=False):
            pipe.send(one)
            at_work += 1
        while at_work:
            for ready in wait(list(children)):
                assert isinstance(ready, Connection)
                try:
                    result, error = ready.recv()
                except EOFError:
                    raise _died(children[ready]) from None
                at_work -= 1
                if error is not None:
                    raise error
                for following in itertools.islice(left, 1):
                    ready.send(following)
                    at_work += 1
                yield result
    finally:
        for pipe, child in children.items():
            pipe.close()
            child.kill()
            child.join()
        our_life.close()
        life.close()


def _serve(work: Callable[[Any], Any], pipe: Connection, life: Connection, inherited: list[Connection]) -> None:
    # Ctrl-C in a terminal reaches every process; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for one in inherited:
        one.close()
    threading.Thread(target=_die_with_parent, args=(life,), daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            one = pipe.recv()
        except EOFError:  # all is done
            return
        try:
            answer: tuple[Any, Exception | None] = work(one), None
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = None, error
        pipe.send(answer)


def _die_with_parent(life: Connection) -> None:
    try:
        life.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


def _died(child: Any) -> ProbeError:
    child.join()
    how = f"signal {signal.Signals(-child.exitcode).name}" if child.exitcode < 0 else f"exit code {child.exitcode}"
    return ProbeError(
        f"a process that scored items died with {how}.",
        remedy="Out of memory is the usual cause: 'numerics: {threads: 1}' scores in one process.",
    )


def _memory_bytes() -> int:
    """The machine's memory, whatever is in use."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
