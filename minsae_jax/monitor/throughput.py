"""Speed of training, without the time of other work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Tokens per second, and the share of time spent waiting for the stream."""

    def __init__(self, tokens: int):
        self._tokens = tokens
        self._started = time.perf_counter()
        self._waited = 0.0

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
        self._started += time.perf_counter() - started

    def since_last(self, tokens: int) -> dict[str, float]:
        """Return the speed since the last call; tokens: trained on so far."""
        now = time.perf_counter()
        seconds = now - self._started
        speed = {
            "tokens_per_second": (tokens - self._tokens) / seconds,
            "waiting": self._waited / seconds,
        }
        self._tokens = tokens
        self._started = now
        self._waited = 0.0
        return speed
