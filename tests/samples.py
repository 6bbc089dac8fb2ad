"""Sizes of random samples: small by default, and full with `FULL_SAMPLES=1 make test-all`."""

import os


def sample(few: int, full: int) -> int:
    """Return how many random cases a test tries."""
    return full if os.environ.get("FULL_SAMPLES") else few
