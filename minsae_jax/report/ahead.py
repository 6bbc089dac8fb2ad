"""Work for the device, started ahead of the host, which uses the results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from minsae_jax.parallel.mesh import on_cpu

MAX_AHEAD = 4  # pieces of work; their results are in memory

Work = TypeVar("Work")
Started = TypeVar("Started")


def start_ahead(pieces: Iterable[Work], start: Callable[[Work], Started]) -> Iterator[Started]:
    """Yield start(piece) of each piece of work, in order; later ones are started while one is used.

    XLA for CPU computes most programs on one core, but independent ones at the same time, so that
    as many are started as there are cores. An accelerator is busy with one.
    """
    ahead = min(os.cpu_count() or 1, MAX_AHEAD) if on_cpu() else 1
    started: deque[Started] = deque()
    for piece in pieces:
        started.append(start(piece))
        if len(started) > ahead:
            yield started.popleft()
    while started:
        yield started.popleft()
