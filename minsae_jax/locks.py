"""Locks on folders, so that commands do not write files that another one writes or reads.

The kernel locks the folder itself (`flock`), which leaves no file and ends with the process. Where
that fails, as on Windows, or where other machines cannot see the lock, as on NFS or Lustre, a lock
file next to the folder names the host and the process.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from minsae_jax.errors import UserError, system_reason

if TYPE_CHECKING:
    import filelock

READER_SECONDS = 0.5  # to wait for another reader
# File systems on which a lock of a folder does not reach other machines: their drivers in Linux
# have no function for it, so that the kernel locks its own copy. Some FUSE are local, but few. The
# folders of a host in its virtual machine (9p, virtiofs) are not listed: one kernel has them all,
# and a lock file of a killed container would remain, since the next one has another host name.
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "lustre", "afs", "fuse")


@contextmanager
def lock_folder(folder: Path, shared: bool = False, named: Path | None = None) -> Iterator[None]:
    """Lock `folder` until the block ends or the process does.

    shared: for reading; several processes can read at once, but not while one writes. Lock files
    cannot be shared, so that a reader only checks there that nobody writes when it starts.
    named: the folder in messages. Raises UserError if another process has the lock.
    """
    named = named or folder
    try:
        # Windows does not have this module.
        import fcntl  # noqa: F401
    except ImportError:
        with _lock_file(folder, shared, named):
            yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _lock_by_kernel(folder, descriptor, shared, named):
            yield
        else:
            with _lock_file(folder, shared, named):
                yield
    finally:
        # Also releases the lock.
        os.close(descriptor)


def _lock_by_kernel(folder: Path, descriptor: int, shared: bool, named: Path) -> bool:
    """Lock an open folder. Return False where there are no locks, or none that others see.

    Raises UserError if another process has the lock, or has replaced the folder.
    """
    import fcntl

    if _is_remote(descriptor):
        return False
    is_read = False
    try:
        is_locked = _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if not is_locked:
            is_read = _flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return False
    if not is_locked or not _is_same(folder, descriptor):
        raise _in_use(named, is_read)
    return True


def _flock(descriptor: int, operation: int) -> bool:
    """Lock a folder, and return whether it is locked. Raises OSError if there are no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_same(folder: Path, descriptor: int) -> bool:
    """Return whether a folder is still the open one; another process can have replaced it."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_remote(descriptor: int) -> bool:
    """Return whether an open folder is on another machine; only Linux is asked."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        # A line has the number of the device in its third field, and the file system after " - ".
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, file_system = line.partition(" - ")
            if mount.split()[2] == number:
                # FUSE is named with its program, as in fuse.sshfs.
                return file_system.split()[0].partition(".")[0] in REMOTE
    return False


@contextmanager
def _lock_file(folder: Path, shared: bool, named: Path) -> Iterator[None]:
    """Lock by a file next to the folder; a reader only checks that no other process has one.

    It contains host and process; that of a dead process on this host is taken over.
    """
    import filelock

    if not folder.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(folder))
    # A folder and a link to it must have the same lock file.
    folder = folder.resolve()
    path = folder.with_name(f".{folder.name.lstrip('.')}.lock")
    lock = filelock.MarkerSoftFileLock(path)
    if shared and not path.exists():
        yield
        return
    try:
        # One that is left by a dead process is taken over, perhaps by several readers at once.
        lock.acquire(timeout=READER_SECONDS if shared else 0)
    except filelock.Timeout:  # a subclass of OSError
        raise _held(lock, path, named) from None
    except (OSError, NotImplementedError) as e:
        if not shared:
            warnings.warn(
                f"{named} cannot be locked ({system_reason(e)}); run no other command that writes "
                "there",
                stacklevel=3,
            )
    if shared:
        lock.release()
    try:
        yield
    finally:
        lock.release()


def _held(lock: "filelock.BaseFileLock", path: Path, named: Path) -> UserError:
    """Return the error for a lock file of another process."""
    owner = getattr(lock, "owner", None)
    if owner is None:
        return _in_use(named)
    # The library appends the namespace of a container to the host's name.
    host = owner.hostname.partition("?")[0]
    return UserError(
        f"{named} is being written by process {owner.pid} on {host}; wait for it, or if it has "
        f"ended, remove {path}"
    )


def _in_use(folder: Path, is_read: bool = False) -> UserError:
    use = "read" if is_read else "written"
    return UserError(
        f"{folder} is being {use} by another process; wait for it or choose another folder"
    )
