"""Batches of work in separate processes, on every core; results in order, and never more than a few batches in memory."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from loky import ProcessPoolExecutor, cpu_count

Item = TypeVar("Item")
Result = TypeVar("Result")
BATCH = 512
# Batches done in this process before any other is started: short data is finished before one would be ready.
AT_HOME = 4


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last holds what is left."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def in_processes(work: Callable[[list[Item]], Result], items: Iterable[Item], batch: int = BATCH) -> Iterator[Result]:
    """`work` on every batch of `items`, which are read in this process and no faster than they are processed.

    work: a module-level function whose result can be pickled. An error in it is raised here.
    """
    groups, cores = batches(items, batch), cpu_count()
    yield from map(work, groups if cores == 1 else islice(groups, AT_HOME))
    # Ctrl-C reaches all processes, but only the parent answers it. Without a parent they end after `timeout` seconds.
    pool = ProcessPoolExecutor(cores, timeout=60, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        waiting = deque()
        for group in groups:
            waiting.append(pool.submit(work, group))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(kill_workers=True)
