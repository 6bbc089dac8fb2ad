"""Writing files so that nothing half-written ever looks complete, and no two processes write the same folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minsae_jax.config import UserError


@contextmanager
def written_aside(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it at the end, removed after an error. In a folder that is not locked
    (`shared`) the name is this process's own."""
    aside = path.with_name(f"{path.name}.tmp{os.getpid() if shared else ''}")
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
        with contextlib.suppress(OSError):  # some file systems lock no folders
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{folder} is being written by another process: wait for it, or name another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)
