"""Speed of training, without the time of other work."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# Shorter log intervals are averaged. Those that the devices finished while the host waited for
# something else end at nearly the same time for the host.
MIN_SECONDS = 0.5


class Mark(NamedTuple):
    """Totals at the end of a log interval."""

    seconds: float  # without pauses
    waited: float
    tokens: int


class Throughput:
    """Tokens per second, and the share of time spent waiting for the stream."""

    def __init__(self, tokens: int):
        self._paused = 0.0
        self._waited = 0.0
        # The first is the start of what `recent` averages.
        self._marks = deque([Mark(time.perf_counter(), 0.0, tokens)])

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in this block, which is not training."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def recent(self, tokens: int) -> dict[str, float]:
        """Return the speed since the last call that is MIN_SECONDS ago, or since the start.

        tokens: trained on so far.
        """
        now = Mark(time.perf_counter() - self._paused, self._waited, tokens)
        while len(self._marks) > 1 and now.seconds - self._marks[1].seconds >= MIN_SECONDS:
            self._marks.popleft()
        first = self._marks[0]
        self._marks.append(now)
        seconds = now.seconds - first.seconds
        return {
            "tokens_per_second": (now.tokens - first.tokens) / seconds,
            "waiting": (now.waited - first.waited) / seconds,
        }
