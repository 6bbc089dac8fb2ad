"""Where the tests' temporary folders are: in memory, if there is enough."""

import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
ENOUGH = 4 << 30  # bytes; all tests together take 1.6 GB at their peak


def use_memory() -> None:
    """Put temporary files in memory, here and in commands that tests start.

    Tests wait for a disk at 50,000 calls of fsync, which take no time there. An environment that
    names a folder (TMPDIR) is left as it is.
    """
    if "TMPDIR" not in os.environ and _has_room():
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None  # Python looks once


def _has_room() -> bool:
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return False
    # Some containers do not let files there be executed, as the library of the fault injection is.
    if os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        return False
    return min(shutil.disk_usage(MEMORY).free, _available()) >= ENOUGH


def _available() -> int:
    """Return the bytes of memory that programs could take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kilobytes << 10
