"""Atomic writes and folder replacement, also of processes that are killed."""

import gc
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minsae_jax.checksums import read_npz, write_npz
from minsae_jax.errors import UserError
from minsae_jax.files import (
    atomic_write,
    foreign_entries,
    regular_file,
    replaced_folder,
    sha256_of,
)
from minsae_jax.locks import lock_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_only_on_success(tmp_path):
    path = tmp_path / "x.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()

    def fail_half_way():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["x.txt"]


def test_shared_atomic_write_has_a_name_of_its_process(tmp_path):
    with atomic_write(tmp_path / "x.txt", shared=True) as temporary:
        assert str(os.getpid()) in temporary.name
        temporary.write_text("x")
    assert names(tmp_path) == ["x.txt"]


def test_folder_is_made_and_replaced(tmp_path):
    folder = tmp_path / "parent" / "folder"
    for content in ("first", "second"):
        with replaced_folder(folder) as temporary:
            assert names(temporary) == []
            (temporary / content).write_text(content)
        assert names(folder) == [content]
    assert names(folder.parent) == ["folder"]


def test_folder_stays_on_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()

    def fail_half_way():
        with replaced_folder(folder) as temporary:
            (temporary / "after").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert names(folder) == ["before"]
    assert names(tmp_path) == ["folder"]


@pytest.fixture
def no_more_files():
    """Open files stay usable, but no further one can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_folder_that_cannot_be_locked_leaves_nothing(tmp_path, no_more_files):
    folder = tmp_path / "folder"
    with pytest.raises(OSError, match="Too many open files"), replaced_folder(folder):
        pass
    assert not folder.with_name(".folder.tmp").exists()


REPLACE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from minsae_jax.files import replaced_folder

renames_left = int(sys.argv[2])
rename = Path.rename

def dying(self, target):
    global renames_left
    if renames_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    renames_left -= 1
    return rename(self, target)

Path.rename = dying
with replaced_folder(Path(sys.argv[1])) as temporary:
    (temporary / "after").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_folder_of_killed_process_is_restored(tmp_path, renames):
    """Killed before the first rename or between the two, at most the new content is lost."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()
    command = [sys.executable, "-c", REPLACE_AND_DIE, str(folder), str(renames)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert folder.exists() == (renames == 0)
    with replaced_folder(folder) as temporary:
        assert names(folder) == ["before"]
        assert names(temporary) == []
        (temporary / "after").touch()
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["after"]


def test_foreign_entries_match_no_pattern(tmp_path):
    for name in ("b0001.npy", "manifest.json", "thesis.tex", "notes.md"):
        (tmp_path / name).touch()
    assert foreign_entries(tmp_path, ("b*.npy", "manifest.json")) == ["notes.md", "thesis.tex"]
    assert foreign_entries(tmp_path, ("*",)) == []
    assert foreign_entries(tmp_path / "nowhere", ()) == []


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_folder_that_another_process_replaces_is_refused(tmp_path):
    folder = tmp_path / "folder"
    with replaced_folder(folder) as temporary:
        (temporary / "first").touch()
        written = pytest.raises(UserError, match="folder is being written by another process")
        with written, replaced_folder(folder):
            pass
        assert names(temporary) == ["first"]
    assert names(folder) == ["first"]


def test_folder_that_another_process_reads_or_made_stays(tmp_path):
    folder = tmp_path / "folder"

    def replace_while_it_appears():
        with replaced_folder(folder) as temporary:
            (temporary / "new").touch()
            folder.mkdir()
            (folder / "of another command").touch()

    with pytest.raises(UserError, match="meanwhile"):
        replace_while_it_appears()
    read = pytest.raises(UserError, match="is being read by another process")
    with lock_folder(folder, shared=True), read, replaced_folder(folder):
        pass
    assert names(folder) == ["of another command"]
    assert names(tmp_path) == ["folder"]


def test_only_regular_files_are_read(tmp_path):
    """Opening a named pipe waits for ever; a device may never end."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind(str(tmp_path / "socket"))
    for name in ("file", "link"):
        assert regular_file(tmp_path / name) == tmp_path / name
    for name in ("pipe", "device", "socket"):
        with pytest.raises(OSError, match=f"not a regular file.*{name}"):
            regular_file(tmp_path / name)
    with pytest.raises(OSError, match=r"symbolic links.*loop"):
        regular_file(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        regular_file(tmp_path / "nothing")


@pytest.fixture
def busy_collector():
    """Let Python's garbage collector run often, and other threads during it, as JAX's does."""
    threshold = gc.get_threshold()
    interval = sys.getswitchinterval()

    def work(*_):
        sum(range(50))

    gc.callbacks.append(work)
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    yield
    gc.callbacks.remove(work)
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


def test_npz_files_are_read_in_several_threads(tmp_path, busy_collector):
    """Python 3.11 cannot parse headers in two at once: 6 % of such reads failed."""
    path = tmp_path / "x.npz"
    write_npz(path, {"a": np.arange(3), "b": np.ones((2, 3))})
    with ThreadPoolExecutor(8) as pool:
        for arrays in pool.map(read_npz, [path] * 300):
            assert arrays["a"].tolist() == [0, 1, 2]
