"""Flags that the processes of a cluster exchange while they train."""

import time

import jax

from minsae_jax.parallel.processes import any_process

# Least time between two exchanges, about.
SECONDS = 0.5


class Agreement:
    """Exchanges flags about twice a second, at the ends of log intervals.

    An exchange waits for all calls on the devices, so that one after each of many short intervals
    would leave the devices without work. A single process has nothing to wait for.
    """

    def __init__(self) -> None:
        self._exchanged_at = time.monotonic()
        self._intervals = 0  # since the last exchange
        self._intervals_between = 1  # exchanges; the same on all processes

    def is_due(self, ends_interval: bool) -> bool:
        """Return whether to call `exchange` now; the answer is the same on all processes."""
        if jax.process_count() == 1:
            return True
        self._intervals += ends_interval
        return ends_interval and self._intervals >= self._intervals_between

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any process has set it."""
        if jax.process_count() == 1:
            return flags
        now = time.monotonic()
        seconds = now - self._exchanged_at
        times = (seconds < SECONDS, seconds > 2 * SECONDS)
        *flags_of_any, is_early, is_late = any_process(*flags, *times)
        if is_late:
            self._intervals_between = 1
        elif is_early:
            self._intervals_between *= 2
        self._exchanged_at = now
        self._intervals = 0
        return tuple(flags_of_any)
