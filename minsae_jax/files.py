"""Writing files so that nothing half-written ever looks complete, and no two processes write the same folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minsae_jax.config import UserError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it at the end, removed after an error."""
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A folder that this process alone writes to, until the end or its death. Raises UserError where another does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another process: wait for it, or name another folder") from None
    finally:
        os.close(descriptor)
