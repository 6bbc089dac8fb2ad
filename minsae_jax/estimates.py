"""A measure with its interval, as it is passed on and written to JSON."""

from typing import NamedTuple


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A measure, and its interval; None where nothing varies. NaN if it is not defined."""

    value: float
    interval: Interval | None = None
