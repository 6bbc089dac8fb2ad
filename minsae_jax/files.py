"""Atomic writes and folder replacement: no half-written file ever looks complete.

Files also survive a power cut: their content is flushed to the disk before a file or folder gets
its name, and the name after that.
"""

import errno
import hashlib
import os
import shutil
import socket
import stat
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from threading import Lock

from minsae_jax.errors import UserError
from minsae_jax.locks import lock_folder

FLUSH_THREADS = 8
# To be held while NumPy reads the header of an array. It does so with Python's parser, which Python
# 3.11 cannot run in two threads at once: it raises SystemError now and then.
HEADER_LOCK = Lock()


@contextmanager
def atomic_write(path: Path, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success and removed on error.

    shared: several processes may write this file at once, also of several machines, so the
    temporary name is unique.
    durable: the file survives a power cut once the block has ended. Without it the caller flushes,
    which is quicker for many files.
    """
    suffix = ".tmp"
    if shared:
        suffix = f".tmp{os.getpid()}-{socket.gethostname()}"
    temporary = path.with_name(path.name + suffix)
    try:
        with named_errors(path):
            yield temporary
        if durable:
            # Before the renaming: a power cut must not leave the new name without its content.
            flush([temporary])
        # Atomic within one file system, so the temporary file is in the same folder.
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush([path.parent])


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `folder` on success.

    On an error `folder` stays as it was. A process killed between the two renames leaves
    `.NAME.old`, which the next call restores. The new folder survives a power cut. Raises UserError
    if another process writes the folder, or reads it under a lock.
    """
    # A folder cannot be renamed over one with files, so the old one is moved away first.
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    make_folder(folder.parent)
    temporary.mkdir(exist_ok=True)
    with _locked_or_removed(temporary, named=folder):
        try:
            if old.exists() and not folder.exists():
                old.rename(folder)
            if old.exists():
                shutil.rmtree(old)
            empty_folder(temporary)
            is_new = not folder.exists()
            if not is_new:
                # Refused before the work rather than after it.
                with lock_folder(folder):
                    pass
            with named_errors(folder):
                yield temporary
            flush_tree(temporary)
            if folder.exists():
                if is_new:
                    raise UserError(f"{folder} has been written by another process meanwhile")
                with lock_folder(folder):
                    folder.rename(old)
            temporary.rename(folder)
        except BaseException:
            remove_folder(temporary)
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        flush([folder.parent])
    # The new folder is complete; the next call removes any leftover of the old one.
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked_or_removed(folder: Path, named: Path) -> Iterator[None]:
    """Lock an empty folder, or remove it if an error of the system prevents that."""
    with ExitStack() as stack:
        try:
            with named_errors(named):
                stack.enter_context(lock_folder(folder, named=named))
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            raise
        yield


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Add the path to errors of the system that have none, such as that of a full disk."""
    try:
        yield
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = str(path)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder after an error, if possible.

    Threads of Orbax may still write to it, and make it again: it must be gone for a second.
    """
    checks_without = 0
    for _ in range(200):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            checks_without = 0
        checks_without += 1
        if checks_without == 20:
            return
        time.sleep(0.05)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, which survive a power cut."""
    if folder.exists() and not folder.is_dir():
        # The system would say that it exists.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    flush([path.parent for path in missing])


def flush(paths: Collection[Path]) -> None:
    """Write files to the disk that are in memory only; of a folder, the list of its entries.

    A power cut loses unflushed content. Raises OSError if the disk fails.
    """
    if len(paths) <= 1:
        for path in paths:
            _flush(path)
        return
    # Together, since a file system writes its journal once for all that wait: 14 times as fast.
    with ThreadPoolExecutor(min(len(paths), FLUSH_THREADS)) as pool:
        for _ in pool.map(_flush, paths):
            pass


def flush_tree(folder: Path) -> None:
    """Flush a folder with everything in it."""
    flush([folder, *(path for path in folder.rglob("*") if not path.is_symlink())])


def _flush(path: Path) -> None:
    # Windows flushes files only, and only those that are open for writing.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    except OSError as e:
        # Some network file systems cannot flush folders.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def regular_file(path: str | Path) -> Path:
    """Return the path of a file that is about to be read.

    Raises OSError if there is none, or if it is a named pipe, a socket or a device: reading from
    those can wait forever or never end. Opening a folder fails by itself.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return Path(path)


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
    with regular_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
