"""Atomic writes, folder replacement and locks: no half-written file ever looks complete."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from minsae_jax.errors import UserError


@contextmanager
def atomic_write(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and removed on error.

    shared: several processes may write this file at once, so the temporary name is unique.
    """
    suffix = f".tmp{os.getpid()}" if shared else ".tmp"
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        # Atomic within one file system, so the temporary file is in the same folder.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `folder` on success.

    On an error `folder` stays as it was. A process killed between the two renames leaves
    `.NAME.old`, which the next call restores.
    """
    # A folder cannot be renamed over one with files, so the old one is moved away first.
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (temporary, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        # The new folder is complete; the next call removes any leftover of the old one.
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def foreign_entries(folder: Path, owned: Collection[str]) -> list[str]:
    """Return the sorted names in `folder` that match none of the `owned` patterns.

    There are none in a folder that does not exist.
    """
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in owned)]


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock `folder` exclusively until the block ends or the process does.

    Raises UserError if another process has the lock. On file systems without locks the block runs
    without one. The lock leaves no file in the folder: POSIX locks the folder itself, while Windows
    needs a lock file, which is in the parent folder.
    """
    try:
        # Windows does not have this module.
        import fcntl
    except ImportError:
        with _lock_file_in_parent(folder):
            yield
        return
    # The kernel releases the lock when the descriptor is closed, also that of a killed process.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock folders.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _locked(folder) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _lock_file_in_parent(folder: Path) -> Iterator[None]:
    import filelock

    if not folder.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(folder))
    # A folder and a link to it must have the same lock file.
    folder = folder.resolve()
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    with suppress(OSError, NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # a subclass of OSError
            raise _locked(folder) from None
    try:
        yield
    finally:
        lock.release()


def _locked(folder: Path) -> UserError:
    return UserError(
        f"{folder} is being written by another process; wait for it or choose another folder"
    )
